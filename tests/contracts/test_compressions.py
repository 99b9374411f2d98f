"""What every compression promises: it trains, is saved and loaded exactly, resumes, and refuses what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_sparse import (
    CheckpointError,
    Pruner,
    RecipeError,
    SparsityCallback,
    SparsityConfig,
    import_checkpoint,
    sparsify,
    sparsify_checkpoint,
)
from hf_sparse.config.sparsity import COMPRESSIONS, SCORERS
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.forms import FORMS
from hf_sparse.pruning.compressions.saved_forms import forms_of
from tests.helpers.tiny import config as bert_config
from tests.helpers.tiny import save_bert

OPTIONS: dict[str, dict[str, Any]] = {"low_rank": {"rank": 2}}
GROUPS = [
    *({"compress": {"name": name, **OPTIONS.get(name, {})}} for name in COMPRESSIONS),
    *(
        {"compress": {"name": name, **OPTIONS.get(name, {})}, "sparsity": 0.75}
        for name in COMPRESSIONS
        if COMPRESSIONS[name].goes_beside
    ),
]
groups = pytest.mark.parametrize("group", GROUPS, ids=lambda group: "-".join([group["compress"]["name"], *group]))


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(bert_config(num_labels=2)).eval()


def batches(seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(5, 17, (4, 12), generator=generator)} for _ in range(3)]


def compressed(group: dict[str, Any]) -> Any:
    needs = COMPRESSIONS.build(group["compress"]).needs_inputs
    return sparsify(bert(), group, batches() if needs else None)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(**batches(2)[0]).logits
    return out


@groups
def test_saved_and_loaded_exactly(group: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(group)
    forms = forms_of(model)
    assert len(forms.layers) == 12  # six linear layers in each of two blocks
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert forms_of(loaded) == forms
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "two")
    names = [path.name for path in (tmp_path / "one").glob("model*")]
    assert [(tmp_path / "one" / n).read_bytes() for n in names] == [(tmp_path / "two" / n).read_bytes() for n in names]
    base = loaded.base_model.from_pretrained(tmp_path / "one")  # without the head, and without its prefix
    assert len(forms_of(base).layers) == 12


@groups
def test_trains_resumes_and_stays_of_its_form(group: dict[str, Any], tmp_path: Path) -> None:
    rows: Any = [{"input_ids": batch["input_ids"][0], "labels": torch.tensor(1)} for batch in batches()] * 4

    def trainer(model: Any, folder: Path, steps: int, sparsity: Any) -> Trainer:
        args = TrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none",
            disable_tqdm=True, per_device_train_batch_size=4, dataloader_pin_memory=False,
        )  # fmt: skip
        callbacks: Any = [] if sparsity is None else [SparsityCallback(sparsity)]
        return Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)

    needs = COMPRESSIONS.build(group["compress"]).needs_inputs
    make = (lambda: compressed(group)) if needs else bert
    model = make()
    before = copy.deepcopy(model.state_dict())
    whole = trainer(model, tmp_path / "run", 4, None if needs else group)
    whole.train()
    assert len(forms_of(model).layers) == 12
    changed = [name for name, value in model.state_dict().items() if name in before and not before[name].equal(value)]
    assert needs is False or any("low_rank" in name or ".up" in name for name in changed)
    again = make()
    resumed = trainer(again, tmp_path / "run", 4, None if needs else group)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(again), logits(model))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(model))


@groups
def test_a_second_time_leaves_the_layers(group: dict[str, Any]) -> None:
    if "sparsity" in group:
        pytest.skip("pruned again, which has tests of its own")
    model = compressed(group)
    forms, before = forms_of(model), logits(model)
    pruner = Pruner(model, group).attach()
    assert forms_of(model) == forms
    assert torch.equal(logits(model), before)
    assert pruner.logs() == {"sparsity": 0.0}
    pruner.step(1.0)
    pruner.finish()
    pruner.bake()


@groups
def test_files_of_other_forms_are_refused(group: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(group)
    model.save_pretrained(tmp_path)
    assert inspect(tmp_path).packed
    plain = bert()
    sparsify(plain, {"sparsity": 0.5})
    with pytest.raises((CheckpointError, RuntimeError)):
        plain.load_state_dict(model.state_dict())


@groups
def test_what_dense_files_cannot_hold_is_refused(group: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(group)
    with pytest.raises(RecipeError, match="cannot be saved dense: 12 layers"):
        model.save_pretrained(tmp_path / "dense", format="dense")
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(RecipeError, match="which no dense checkpoint can hold"):
        import_checkpoint(tmp_path / "packed", tmp_path / "dense", format="dense")
    import_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")), logits(model))
    with pytest.raises(RecipeError, match="sparsify_checkpoint cannot"):
        sparsify_checkpoint(save_bert(tmp_path / "bert"), tmp_path / "out", group, batches())


def test_every_form_has_a_reader_and_names_are_those_of_files() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8))
    assert all(form.read(module) is None for form in FORMS.values() for module in model.modules())
    assert {COMPRESSIONS[name].form for name in COMPRESSIONS} <= set(FORMS)


@pytest.mark.parametrize("name", list(COMPRESSIONS))
def test_unpruned_layers_have_no_schedule(name: str) -> None:
    for key, value in (("scorer", "random"), ("pattern", "row"), ("schedule", "constant"), ("selection", "global")):
        with pytest.raises(RecipeError, match=f"`{key}` has no meaning"):
            SparsityConfig.from_dict({"compress": {"name": name}, key: value})
    assert "magnitude" in SCORERS


@pytest.mark.parametrize("name", [name for name in COMPRESSIONS if not COMPRESSIONS[name].goes_beside])
def test_what_takes_the_place_of_a_weight_goes_with_no_sparsity(name: str) -> None:
    with pytest.raises(RecipeError, match="takes the place of the weight"):
        Pruner(bert(), {"compress": name, "sparsity": 0.5})


def test_a_layer_is_in_one_group() -> None:
    with pytest.raises(RecipeError, match="is in group"):
        Pruner(bert(), {"groups": [{"sparsity": 0.5}, {"compress": "hashed"}]})
