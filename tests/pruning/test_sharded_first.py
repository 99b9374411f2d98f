"""Masks on a model that fully_shard has divided already, in a group of one process: what masks put on first do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from hf_sparse import Pruner, RecipeError, SparsityConfig, summarize
from hf_sparse.pruning import sharded_first
from hf_sparse.pruning.masked_weight import MaskedWeight
from hf_sparse.pruning.shards import whole
from tests.helpers.ranks import one_process
from tests.helpers.sharded import GRADIENT_SCORERS, SCORERS, batch, build, shard, trained

METHODS = [*SCORERS, *GRADIENT_SCORERS]


@pytest.mark.parametrize("scorer", METHODS)
def test_masks_are_those_of_masks_put_on_first(scorer: str) -> None:
    _, expected = trained("bert", scorer, {}, "alone")
    with one_process():
        for how in ("fsdp", "fsdp first"):
            pruner, masks = trained("bert", scorer, {}, how)
            assert masks == expected, how
            assert all(isinstance(parameter, DTensor) for parameter in pruner.model.parameters())


def test_model_that_has_run_and_whose_root_is_still_gathered() -> None:
    with one_process():
        model = shard(build("llama"))
        before = model(**batch(0, 0, 1)).logits
        pruner = Pruner(model, SparsityConfig(sparsity=0.5, scorer="movement", schedule="constant")).attach()
        assert torch.equal(model(**batch(0, 0, 1)).logits, before)
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
        pruner.step(0.0)
        model(**batch(0, 0, 1)).loss.backward()
        optimizer.step()
        pruner.step(1.0)
        options = StateDictOptions(full_state_dict=True)
        state = {name: t.clone() for name, t in get_model_state_dict(model, options=options).items()}  # type: ignore[union-attr]
        assert any(key.endswith("_scores") and tensor.any() for key, tensor in state.items())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        set_model_state_dict(model, dict(state), options=options)
        again: dict[str, Any] = get_model_state_dict(model, options=options)
        assert all(torch.equal(whole(again[name]), whole(tensor)) for name, tensor in state.items())
        pruner.bake()
        assert summarize(model).sparsity == pytest.approx(0.5, abs=1e-3)
        plain = build("llama")
        plain.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
        assert torch.equal(plain(**batch(0, 0, 1)).logits, model(**batch(0, 0, 1)).logits)


def test_tied_embeddings_keep_one_mask() -> None:
    config = SparsityConfig(targets="*word_embeddings", sparsity=0.5, schedule="constant")
    expected = Pruner(build("bert"), config).attach()
    expected.step(0.0)
    with one_process():
        model = shard(build("bert"))
        pruner = Pruner(model, config).attach()
        pruner.step(0.0)
        assert torch.equal(model(**batch(0, 0, 1)).logits, expected.model(**batch(0, 0, 1)).logits)
        model(**batch(0, 0, 1)).loss.backward()
        gradient = whole(pruner.units[0].members[0].hidden.grad)  # type: ignore[arg-type]
        kept = whole(pruner.units[0].masked.mask)
        assert gradient[kept].any()
        assert not gradient[~kept].any()


def test_unknown_layout_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_first, "_is_there", lambda noted: False)
    with one_process():
        model = shard(build("bert"))
        names = set(model.state_dict())
        with pytest.raises(RecipeError, match=r"is sharded already.*Put masks on first"):
            Pruner(model, SparsityConfig(sparsity=0.5)).attach()
        assert set(model.state_dict()) == names


def test_measuring_a_sharded_model_is_refused() -> None:
    with one_process():
        pruner = Pruner(shard(build("bert")), SparsityConfig(sparsity=0.5, scorer="taylor")).attach()
        with pytest.raises(RecipeError, match=r"is sharded \(fully_shard\).*Call Pruner.measure before fully_shard"):
            pruner.measure([batch(0, 0, 1)])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scorer", ["magnitude", "movement", "taylor"])
def test_no_masked_weight_is_kept_between_passes(
    scorer: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    original = MaskedWeight.forward

    def forward(masked: MaskedWeight, weight: torch.Tensor) -> torch.Tensor:
        shown = original(masked, weight)
        if masked.made is not None:
            made.append(shown.untyped_storage())
        return shown

    def gradients(model: Any, pruner: Pruner) -> dict[str, torch.Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        pruner.step(0.0)
        monkeypatch.setattr(MaskedWeight, "forward", forward)
        made.clear()
        loss = model(**batch(0, 0, 1)).loss
        kept = sum(memory.nbytes() for memory in made)
        loss.backward()
        monkeypatch.undo()
        if isinstance(pruner.units[0].masked.mask, DTensor):
            assert len(made) >= len(pruner.units)
            assert (kept == 0) == (not checkpointing)  # which recomputes whole blocks, and decides what is kept
            assert checkpointing or sum(memory.nbytes() for memory in made) == 0
        return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}

    config = SparsityConfig(sparsity=0.5, scorer=scorer, schedule="constant")
    model = build("llama")
    expected = gradients(model, Pruner(model, config).attach())
    with one_process():
        model = build("llama")
        pruner = Pruner(model, config).attach()
        found = gradients(shard(model), pruner)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
