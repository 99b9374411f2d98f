"""The small model that these tests push and pull."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import SparsityConfig
from tests.helpers.tiny import save_bert

REPO = "user/small"


INPUT = torch.tensor([[2, 5, 7, 8, 3]])


def pruned(folder):
    model = AutoModelForSequenceClassification.from_pretrained(save_bert(folder / "dense", head=True))
    hf_sparse.sparsify(model, SparsityConfig(sparsity=0.9))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=INPUT).logits


def pulled(repo=REPO, **options):
    return AutoModelForSequenceClassification.from_pretrained(repo, **options)


def assert_same(folder, repo=REPO, **options):
    assert torch.equal(logits(pulled(repo, **options)), logits(pulled(folder)))
