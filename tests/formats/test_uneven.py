"""Checkpoints of compacted models: exact in a new process, again and again, and refused where they cannot be right."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5EncoderModel,
    Trainer,
)

from hf_sparse import CheckpointError, RecipeError, SparsityConfig, compact, sparsify, summarize
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.architectures import find_sub_blocks
from hf_sparse.pruning.compaction import edits_of
from tests.helpers import structures
from tests.helpers.training import Rows, arguments, bert, sparse_trainer
from tests.hf.quantization.packed_bert import change_header
from tests.pruning.test_compaction import GENERATIONS, generate

ROOT = Path(__file__).parents[2]
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
SCRIPT = """
import sys, torch, hf_sparse
import tests.formats.test_uneven as t
from tests.helpers import structures
family, folder = sys.argv[1:]
torch.set_num_threads(1)
model = t.auto(family).from_pretrained(folder)
inputs = structures.batch(family)
found = {"logits": model(**inputs).logits.detach(), "loss": model(**inputs).loss.detach()}
if family != "bert":
    found |= {name: t.generate(model, inputs, **how) for name, how in t.GENERATIONS.items()}
torch.save(found, folder + "/found.pt")
"""


def auto(family: str) -> Any:
    return AutoModelForSeq2SeqLM if "t5" in family else AutoModelForSequenceClassification


def in_a_new_process(family: str, folder: Path) -> dict[str, torch.Tensor]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, family, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, torch.Tensor] = torch.load(folder / "found.pt", weights_only=True)
    return found


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert edits_of(first) == edits_of(second)


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", structures.MAIN)
def test_two_rounds_of_prune_compact_save_and_load_are_the_masked_model(family: str, tmp_path: Path) -> None:
    model = structures.build(family)
    inputs = structures.batch(family)
    for round_, sparsity in enumerate((0.25, 0.4)):
        groups: list[Any] = [
            {"pattern": name, "sparsity": sparsity, "selection": "global"} for name in ("head", "neuron")
        ]
        sparsify(model, SparsityConfig(groups=groups))
        structures.remove_others(model, structures.choose(model, seed=round_) if round_ == 0 else {})
        masked = copy.deepcopy(model)
        before = sum(parameter.numel() for parameter in model.parameters())
        compact(model)
        assert sum(parameter.numel() for parameter in model.parameters()) < before
        folder = tmp_path / str(round_)
        model.save_pretrained(folder)
        loaded, info = auto(family).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        same_state(loaded, model)
        model = loaded
        torch.testing.assert_close(model(**inputs).logits, masked(**inputs).logits, **CLOSE)
    found = in_a_new_process(family, folder)
    expected = masked(**inputs)
    torch.testing.assert_close(found["logits"], expected.logits.detach(), **CLOSE)
    torch.testing.assert_close(found["loss"], expected.loss.detach(), **CLOSE)
    for name, how in GENERATIONS.items() if family != "bert" else ():
        assert torch.equal(found[name], generate(masked, inputs, **how)), name


@pytest.mark.parametrize("family", structures.FAMILIES)
def test_loaded_model_is_bit_identical(family: str, tmp_path: Path) -> None:
    model = structures.build(family)
    structures.remove_others(model, structures.choose(model))
    compact(model)  # never pruned by a config: no tensor is packed, the zeros were there
    model.save_pretrained(tmp_path)
    assert {tensor.codec for tensor in inspect(tmp_path).tensors} == {"dense"}
    loaded = auto(family).from_pretrained(tmp_path)
    same_state(loaded, model)
    assert torch.equal(loaded(**structures.batch(family)).logits, model(**structures.batch(family)).logits)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="3KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    same_state(auto(family).from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5"])
def test_model_without_heads_or_neurons_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = structures.build(family)
    names = [block.name for block in find_sub_blocks(model, "a test")]
    structures.remove_others(model, {name: [] for name in names[::2]})
    compact(model)
    model.save_pretrained(tmp_path)
    loaded = auto(family).from_pretrained(tmp_path)
    same_state(loaded, model)
    assert torch.equal(loaded(**structures.batch(family)).logits, model(**structures.batch(family)).logits)
    assert not any(p.requires_grad for p in loaded.parameters() if not p.numel())
    loaded(**structures.batch(family)).loss.backward()
    torch.optim.AdamW(loaded.parameters()).step()


def test_what_is_left_can_be_sparse_too(tmp_path: Path) -> None:
    model = structures.build("bert", hidden_size=64, intermediate_size=128)
    sparsify(model, SparsityConfig(pattern="neuron", sparsity=0.5))
    compact(model)
    sparsify(model, SparsityConfig(sparsity=0.75))
    model.save_pretrained(tmp_path)
    assert "dense" not in {tensor.codec for tensor in inspect(tmp_path).weights}
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    same_state(loaded, model)
    assert summarize(loaded).sparsity == pytest.approx(0.75, abs=1e-3)
    assert loaded.bert.encoder.layer[0].intermediate.dense.weight.shape == (64, 64)


def test_base_model_and_model_with_a_head_load_from_each_other(tmp_path: Path) -> None:
    model = structures.build("bert")
    structures.remove_others(model, structures.choose(model))
    compact(model)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base.encoder.layer[1].output.dense.weight, model.bert.encoder.layer[1].output.dense.weight)
    base.save_pretrained(tmp_path / "base")
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.bert.encoder.layer[1].output.dense.weight, base.encoder.layer[1].output.dense.weight)
    assert next(iter(loaded.hf_sparse_edits.heads)).startswith("bert.encoder.")


def test_encoder_alone_loads_from_the_whole_of_t5(tmp_path: Path) -> None:
    model = structures.build("t5")
    structures.remove_others(model, structures.choose(model))
    compact(model)
    model.save_pretrained(tmp_path)
    encoder: Any = T5EncoderModel.from_pretrained(tmp_path)
    inputs = structures.batch("t5")
    del inputs["labels"]
    expected = model.encoder(**inputs).last_hidden_state
    assert torch.equal(encoder(**inputs).last_hidden_state, expected)
    assert all(name.startswith("encoder.") for _, name, _ in encoder.hf_sparse_edits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model = structures.build("t5-gated")
    structures.remove_others(model, structures.choose(model))
    compact(model)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert torch.isfinite(loaded(**structures.batch("t5-gated")).logits).all()


def test_device_map_is_made_of_the_sizes_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import accelerate

    model = structures.build("t5")
    structures.remove_others(model, structures.choose(model))
    dense = sum(parameter.numel() * 4 for parameter in model.parameters())
    compact(model)
    small = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert small < 0.7 * dense
    model.save_pretrained(tmp_path)
    sizes: list[int] = []
    original = accelerate.compute_module_sizes

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        sizes.append(found[0][""])
        return found

    monkeypatch.setattr(accelerate, "compute_module_sizes", watched)
    room = {"cpu": int(0.6 * small), "disk": 10**9}
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=room, offload_folder=str(tmp_path / "offload")
    )
    assert sizes
    assert max(sizes) == small
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(loaded(**structures.batch("t5")).logits, model(**structures.batch("t5")).logits)


# -- training ----------------------------------------------------------------------------------------------------------

HEADS_AND_NEURONS = SparsityConfig(
    groups=[
        {
            "pattern": pattern,
            "scorer": "movement",
            "sparsity": 0.5,
            "schedule": {"name": "cubic", "begin": 0.1, "end": 0.6},
        }
        for pattern in ("head", "neuron")
    ]
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=Rows(16).ids).logits


def test_trainer_prunes_heads_and_neurons_and_the_compacted_model_is_what_it_trained(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, HEADS_AND_NEURONS)
    trainer.train()
    model, before = trainer.model, logits(trainer.model)
    edits = compact(model)
    assert [len(cut.kept) for cut in edits.heads.values()] == [2, 2]
    assert [len(cut.kept) for cut in edits.neurons.values()] == [32, 32]
    torch.testing.assert_close(logits(model), before, **CLOSE)
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(model))
    Trainer(loaded, arguments(tmp_path / "on", max_steps=3), train_dataset=Rows()).train()
    assert not torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert len(config["intent"]["groups"]) == 2


def test_training_checkpoint_loads_masked_and_the_run_goes_on_from_it_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6, "max_steps": 18}
    trainer = sparse_trainer(tmp_path / "whole", HEADS_AND_NEURONS, **options)
    trainer.train()
    half = tmp_path / "whole" / "checkpoint-6"
    loaded, info = AutoModelForSequenceClassification.from_pretrained(half, output_loading_info=True)
    assert not any(info.values())
    resumed = sparse_trainer(tmp_path / "resumed", HEADS_AND_NEURONS, **options)
    resumed._load_from_checkpoint(str(half))
    assert torch.equal(logits(resumed.model), logits(loaded))
    assert 0.2 < summarize(loaded).sparsity < 0.5  # rows too, not only columns
    again = sparse_trainer(tmp_path / "again", HEADS_AND_NEURONS, **options)
    again.train(resume_from_checkpoint=str(half))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_pruning_a_compacted_model_resumes_exactly_too(tmp_path: Path) -> None:
    model = sparsify(bert(), SparsityConfig(pattern="head", sparsity=0.5))
    compact(model)
    model.save_pretrained(tmp_path / "small")
    config = SparsityConfig(
        pattern="neuron", scorer="taylor", sparsity=0.5, schedule={"name": "cubic", "begin": 0.1, "end": 0.6}
    )
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20}

    def load(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder)

    trainer = sparse_trainer(tmp_path / "whole", config, load(tmp_path / "small"), **options)
    trainer.train()
    half = tmp_path / "whole" / "checkpoint-10"
    assert load(half).hf_sparse_edits == model.hf_sparse_edits
    again = sparse_trainer(tmp_path / "again", config, load(tmp_path / "small"), **options)
    again.train(resume_from_checkpoint=str(half))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    model = structures.build("bert")
    structures.remove_others(
        model, {"bert.encoder.layer.0.attention": [1, 2], "bert.encoder.layer.1.intermediate": [3]}
    )
    compact(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_edits_are_in_the_header_and_in_the_config(small: Path) -> None:
    expected = {
        "heads": {"bert.encoder.layer.0.attention": {"of": 4, "kept": "06"}},
        "neurons": {"bert.encoder.layer.1.intermediate": {"of": 12, "kept": "0800"}},
        "checksum": "crc32:7b7e8a3d",
    }
    with safe_open(small / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hf_sparse"])["extra"]["edits"] == expected
    config = json.loads((small / "config.json").read_text())
    assert config["quantization_config"]["manifest"]["extra"]["edits"] == expected


ATTENTION, INTERMEDIATE = "bert.encoder.layer.0.attention", "bert.encoder.layer.1.intermediate"


def change_edits(folder: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite the edits of a checkpoint as one would who knows the format, with their checksum."""

    def rewrite(manifest: dict[str, Any]) -> None:
        edits = manifest["extra"]["edits"]
        del edits["checksum"]
        change(edits)
        cuts = [(kind, *cut) for kind in ("heads", "neurons") for cut in edits.get(kind, {}).items()]
        lines = sorted(f"{kind} {name} {cut['of']} {cut['kept']}\n" for kind, name, cut in cuts)
        if lines:
            edits["checksum"] = f"crc32:{zlib.crc32(''.join(lines).encode()):08x}"

    change_header(folder, rewrite)


def test_heads_of_other_numbers_but_the_same_shapes_are_refused(small: Path) -> None:
    change_header(small, lambda manifest: manifest["extra"]["edits"]["heads"][ATTENTION].update(kept="05"))
    with pytest.raises(CheckpointError, match="the checksum of the edits"):
        AutoModelForSequenceClassification.from_pretrained(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["heads"][ATTENTION].update(of=8), r"which had 8, but with this config\.json it has 4"),
        (lambda e: e["heads"][ATTENTION].update(kept="ff"), "bits behind the end"),
        (lambda e: e["heads"][ATTENTION].update(of=2**40), "'of' must be an integer in"),
        (lambda e: e["heads"].update({"decoder.layer.0.attention": {"of": 4, "kept": "01"}}), None),
        (lambda e: e["heads"].update({"bert.encoder": {"of": 4, "kept": "01"}}), "does not know of any there"),
        (lambda e: e["heads"].update({INTERMEDIATE: {"of": 12, "kept": "0800"}}), "does not know of any there"),
        (lambda e: e["heads"].update({"encoder.layer.0.attention": {"of": 4, "kept": "06"}}), "which had 4"),
        (lambda e: e.update(layers={}), "no other keys"),
    ],
)
def test_edits_that_cannot_be_right_are_refused(small: Path, change: Callable[[Any], Any], message: str | None) -> None:
    change_edits(small, change)
    if message is None:  # a part that this model does not have
        AutoModelForSequenceClassification.from_pretrained(small)
        return
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(small)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.clear(),
        lambda e: e["heads"][ATTENTION].update(kept="07"),
        lambda e: e.pop("neurons"),
    ],
)
def test_edits_of_other_shapes_than_the_tensors_are_refused(small: Path, change: Callable[[Any], Any]) -> None:
    change_edits(small, change)
    with pytest.raises((CheckpointError, RuntimeError), match=r"shape|size mismatch|mismatched"):
        AutoModelForSequenceClassification.from_pretrained(small)


def test_compacted_model_cannot_be_saved_as_what_nobody_could_load(small: Path, tmp_path: Path) -> None:
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(small)
    with pytest.raises(RecipeError, match=r"a compacted model cannot be saved dense"):
        loaded.save_pretrained(tmp_path / "dense", format="dense")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(RecipeError, match=r"a compacted model cannot be made a model without marks"):
        loaded.dequantize()
    loaded.save_pretrained(tmp_path / "packed")
    same_state(AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed"), loaded)
