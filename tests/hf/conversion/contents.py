"""Weights and files of folders, to compare."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification


def state(folder, auto=AutoModelForSequenceClassification):
    return auto.from_pretrained(folder).state_dict()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
