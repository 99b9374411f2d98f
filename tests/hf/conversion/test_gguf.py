"""GGUF: what transformers dequantizes is what is written, and can be pruned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_plain
from transformers import AutoModelForCausalLM

from hf_sparse import CheckpointError, SparsityConfig, import_checkpoint, sparsify

pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
FIXTURE = Path(__file__).parents[2] / "fixtures" / "import" / "qwen2-gguf"
FILE = FIXTURE / "model-q8_0.gguf"


def logits(model: Any) -> torch.Tensor:
    inputs = load_plain(FIXTURE / "expected.safetensors")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
    return found


def test_logits_are_those_of_the_dequantized_weights(tmp_path: Path) -> None:
    done = import_checkpoint(FILE, tmp_path / "out")
    assert done.kind == "dense (GGUF)"
    assert done.source_bytes == FILE.stat().st_size
    expected = load_plain(FIXTURE / "expected.safetensors")["logits"]
    assert expected.std() > 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_model_that_exists_as_gguf_only_is_pruned_and_packed(tmp_path: Path) -> None:
    import_checkpoint(FILE, tmp_path / "dense", "dense")
    model = sparsify(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), SparsityConfig(sparsity=0.9))
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again), logits(model))


def test_truncated_file_is_refused_and_the_old_output_stays(tmp_path: Path) -> None:
    import_checkpoint(FILE, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "cut.gguf").write_bytes(FILE.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*cut\.gguf"):
        import_checkpoint(tmp_path / "cut.gguf", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_file_is_told_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    shutil.copyfile(FILE, tmp_path / "model.bin")
    assert import_checkpoint(tmp_path / "model.bin", tmp_path / "out").kind == "dense (GGUF)"
