"""A file that several processes write together is the file that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_sparse.formats.codecs.base import DTYPE_NAMES, Part
from hf_sparse.formats.safetensors_io import settle_header, write_safetensors
from hf_sparse.formats.shared_file import begin_file, fill_file, plan_file


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    of_every_type = {
        f"{index % 3}.{name}": torch.randint(0, 2, (index + 1, 3)).to(dtype)
        for index, (dtype, name) in enumerate(DTYPE_NAMES.items())
        if not dtype.is_complex
    }
    return {
        **of_every_type,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ümlaut": torch.ones(5, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    found, metadata = tensors(), {"hf_sparse": '{"a": "ü"}', "another": "1"}
    write_safetensors({key: tensor.contiguous() for key, tensor in found.items()}, tmp_path / "expected", metadata)
    settle_header(tmp_path / "expected")
    plan = plan_file({key: Part(DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in found.items()}, metadata)
    begin_file(plan, tmp_path / "found")
    keys = list(found)
    for share in (keys[::2], keys[1::2]):  # as two processes would
        fill_file(plan, tmp_path / "found", {key: found[key] for key in share})
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    plan = plan_file({"a": Part("F32", (2,))}, {})
    begin_file(plan, tmp_path / "file")
    with pytest.raises(FileExistsError):
        begin_file(plan, tmp_path / "file")
