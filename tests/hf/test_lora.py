"""Low-rank parts and PEFT: the same outputs from an adapter on the sparse model, trained there, and back again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse import CheckpointError, SparsityError, sparsify
from hf_sparse.hf.lora import low_rank_parts
from tests.contracts.test_compressions import batches, bert, logits

GROUP = {"sparsity": 0.75, "compress": {"name": "low_rank", "rank": 2}}


@pytest.fixture
def both() -> Any:
    return sparsify(bert(), GROUP, batches())


def test_peft_loads_it_on_the_sparse_model_trains_it_and_it_comes_back(both: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    hf_sparse.save_lora(both, tmp_path / "adapter")
    sparse = sparsify(bert(), {"sparsity": 0.75})
    adapted = peft.PeftModel.from_pretrained(sparse, tmp_path / "adapter", is_trainable=True)
    torch.testing.assert_close(logits(adapted), logits(both))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batches(3)[0], labels=torch.tensor([0, 1, 1, 1])).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "trained")
    again = sparsify(bert(), {"sparsity": 0.75})
    hf_sparse.load_lora(again, tmp_path / "trained")
    torch.testing.assert_close(logits(again), logits(adapted))
    assert len(low_rank_parts(again)) == 12
    again.save_pretrained(tmp_path / "whole")
    loaded = type(again).from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded), logits(again))


def test_what_is_no_adapter_is_refused(both: Any, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="no low-rank parts"):
        hf_sparse.save_lora(bert(), tmp_path)
    with pytest.raises(CheckpointError, match="adapter_config"):
        hf_sparse.load_lora(both, tmp_path)
    hf_sparse.save_lora(both, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    for change, message in (
        ({"use_dora": True}, "use_dora"),
        ({"r": 0}, "not a LoRA adapter"),
        ({"r": "x"}, "not a LoRA"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            hf_sparse.load_lora(copy.deepcopy(both), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no linear layer of that name"):
        hf_sparse.load_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path)
