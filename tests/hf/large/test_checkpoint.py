"""A checkpoint pruned block by block is what the whole model pruned in memory is, also after it was killed."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_sparse import CheckpointError, RecipeError, SparsityConfig, sparsify, sparsify_checkpoint
from hf_sparse.formats.inspection import inspect
from hf_sparse.formats.sharding import opened
from hf_sparse.hf.large import checkpoint
from hf_sparse.hf.large.lazy_model import source_files
from tests.helpers import oneshot
from tests.helpers.killed import sparsify_killed

BATCHES = oneshot.token_batches()
GROUPS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"scorer": "sparsegpt", "sparsity": 0.5},
    "wanda 2:4": {"scorer": "wanda", "pattern": "2:4"},
    "magnitude": {"scorer": "magnitude", "sparsity": 0.5, "reconstruction": "cg"},
    "owl": {"scorer": "wanda", "sparsity": 0.6, "selection": "owl"},
}


def shards(folder: Path, model: Any) -> Path:
    """Write a model in several files."""
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return shards(tmp_path / "source", oneshot.llama().float())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("spill", [False, True], ids=["memory", "spilled"])
@pytest.mark.parametrize("group", list(GROUPS))
def test_checkpoint_is_pruned_as_the_model_in_memory_is(source: Path, tmp_path: Path, group: str, spill: bool) -> None:
    expected: Any = AutoModelForCausalLM.from_pretrained(source)
    sparsify(expected, SparsityConfig(**GROUPS[group]), BATCHES)
    manifest = sparsify_checkpoint(source, tmp_path / "out", GROUPS[group], BATCHES, spill=spill, max_shard_size="30KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    assert len(manifest.targets) == 21
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    assert loaded.config.quantization_config.intent == SparsityConfig(**GROUPS[group])
    sparse = [tensor for tensor in inspect(tmp_path / "out").tensors if tensor.nonzeros < 0.7 * tensor.parameters]
    assert len(sparse) == 21


BLIND: dict[str, dict[str, Any]] = {
    "elements": {"sparsity": 0.5},
    "random 2:4": {"scorer": "random", "pattern": "2:4"},
    "blocks of each row": {"sparsity": 0.5, "pattern": {"name": "block", "rows": 2, "cols": 4}, "selection": "per_row"},
}


@pytest.mark.parametrize("group", list(BLIND))
def test_scorers_of_weights_need_no_batches_and_run_no_block(
    source: Path, tmp_path: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: Any = AutoModelForCausalLM.from_pretrained(source)
    sparsify(expected, SparsityConfig(**BLIND[group]))
    monkeypatch.setattr(type(expected), "forward", None)
    manifest = sparsify_checkpoint(source, tmp_path / "out", BLIND[group])
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    assert len(manifest.targets) == 21


def test_interrupted_run_without_batches_goes_on_to_the_same_bits(source: Path, tmp_path: Path) -> None:
    def interrupt_second(update: Any) -> None:
        if ".1." in update.name:
            raise StopRunError

    with pytest.raises(StopRunError):
        sparsify_checkpoint(source, tmp_path / "out", BLIND["elements"], on_layer=interrupt_second)
    updates: list[str] = []
    sparsify_checkpoint(source, tmp_path / "out", BLIND["elements"], on_layer=lambda each: updates.append(each.name))
    assert len(updates) == 14
    sparsify_checkpoint(source, tmp_path / "whole", BLIND["elements"])
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_batches_are_asked_for_where_they_are_needed_and_named_where_not(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for group, wants in (("sparsegpt", "sparsegpt"), ("magnitude", "a selection or reconstruction")):
        with pytest.raises(RecipeError, match=rf"{wants} looks at the inputs of layers, .* and there are none"):
            sparsify_checkpoint(source, tmp_path / "out", GROUPS[group])
    with pytest.raises(RecipeError, match="`batches` is empty"):
        sparsify_checkpoint(source, tmp_path / "out", GROUPS["sparsegpt"], [])
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        sparsify_checkpoint(source, tmp_path / "out", BLIND["elements"], BATCHES)
    assert [record.message.split(":")[0] for record in caplog.records] == ["`batches` are not used"]


@pytest.mark.parametrize("build", [oneshot.gemma, oneshot.gpt2, oneshot.bert], ids=["gemma", "gpt2", "bert"])
def test_other_families(tmp_path: Path, build: Callable[[], Any]) -> None:
    model = build().float()
    model.save_pretrained(tmp_path / "source")
    sparsify(model, SparsityConfig(scorer="sparsegpt", sparsity=0.5), BATCHES)
    sparsify_checkpoint(tmp_path / "source", tmp_path / "out", {"scorer": "sparsegpt", "sparsity": 0.5}, BATCHES)
    loaded = type(model).from_pretrained(tmp_path / "out")
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes: Any = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in
                  (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = BartConfig(vocab_size=60, d_model=32, max_position_embeddings=32, **sizes)
    return BartForConditionalGeneration(config).eval()


def taught() -> list[dict[str, Tensor]]:
    """Batches of an encoder-decoder, padded on both sides."""
    found = []
    for batch in BATCHES:
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, -4:] = 0
        labels = ids[:, :7].clone()
        labels[1, -2:] = -100
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("spill", [False, True], ids=["memory", "spilled"])
@pytest.mark.parametrize("build", [oneshot.t5, bart], ids=["t5", "bart"])
def test_encoder_and_decoder_are_pruned_as_in_memory(tmp_path: Path, build: Callable[[], Any], spill: bool) -> None:
    model = build().float()
    model.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    group = GROUPS["owl" if spill else "sparsegpt"]
    sparsify(model, SparsityConfig(**group), taught())
    sparsify_checkpoint(tmp_path / "source", tmp_path / "out", group, taught(), spill=spill)
    loaded = type(model).from_pretrained(tmp_path / "out")
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("spill", [False, True], ids=["memory", "spilled"])
@pytest.mark.parametrize("layers", [5, 8, 17, 25])
def test_interrupted_encoder_decoder_goes_on_to_the_same_bits(tmp_path: Path, layers: int, spill: bool) -> None:
    source, group, out = tmp_path / "source", GROUPS["sparsegpt"], tmp_path / "out"
    bart().float().save_pretrained(source, max_shard_size="30KB")  # 2 blocks of 6 layers, then 2 of 10
    left = [layers]

    def stop(update: Any) -> None:
        left[0] -= 1
        if not left[0]:
            interrupt()

    with pytest.raises(StopRunError):
        sparsify_checkpoint(source, out, group, taught(), spill=spill, on_layer=stop)
    updates: list[str] = []
    sparsify_checkpoint(source, out, group, taught(), spill=spill, on_layer=lambda update: updates.append(update.name))
    finished = sum(size for size, end in ((6, 6), (6, 12), (10, 22)) if end < layers)
    assert len(updates) == 32 - finished
    sparsify_checkpoint(source, tmp_path / "whole", group, taught())
    assert files(out) == files(tmp_path / "whole")


def test_half_of_an_encoder_decoder(tmp_path: Path) -> None:
    for part in ("encoder", "decoder"):
        model = oneshot.t5().float()
        model.save_pretrained(tmp_path / f"source-{part}")
        group = {**GROUPS["wanda 2:4"], "targets": f"{part}.*"}
        sparsify(model, SparsityConfig(**group), taught())
        sparsify_checkpoint(tmp_path / f"source-{part}", tmp_path / part, group, taught())
        loaded = type(model).from_pretrained(tmp_path / part)
        for key, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], weight), key


def test_experts_are_kept_as_they_are_stored(tmp_path: Path) -> None:
    """They are merged in memory, and only the layers beside them are pruned."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    sparsify(model, SparsityConfig(scorer="wanda", sparsity=0.5, targets="*self_attn*"), BATCHES)
    group = {"scorer": "wanda", "sparsity": 0.5, "targets": "*self_attn*"}
    sparsify_checkpoint(tmp_path / "source", tmp_path / "out", group, BATCHES)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "out")
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], weight, rtol=0, atol=0)


def test_weights_keep_the_type_of_the_checkpoint(tmp_path: Path) -> None:
    shards(tmp_path / "source", oneshot.llama(hidden_size=64).bfloat16())
    sparsify_checkpoint(tmp_path / "source", tmp_path / "out", {"scorer": "sparsegpt", "sparsity": 0.5}, BATCHES)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.bfloat16}
    assert float((loaded.model.layers[1].mlp.up_proj.weight == 0).float().mean()) == 0.5


def test_one_tensor_in_float64_does_not_make_the_others_so(tmp_path: Path) -> None:
    model = oneshot.llama(hidden_size=64).bfloat16()
    model.model.norm.double()
    devices = {"": torch.device("cpu")}
    with opened(source_files(shards(tmp_path / "mixed", model))) as stored:
        assert checkpoint._compute_dtype(stored, devices) == torch.float32
    with opened(source_files(shards(tmp_path / "double", model.double()))) as stored:
        assert checkpoint._compute_dtype(stored, devices) == torch.float64


@pytest.mark.parametrize("group", ["magnitude alone", "sparsegpt"])
def test_weights_in_float64_are_pruned_in_float64(tmp_path: Path, group: str) -> None:
    model = oneshot.llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)  # what float32 does not hold
    shards(tmp_path / "source", model)
    config, batches = {"magnitude alone": ({"sparsity": 0.5}, None), "sparsegpt": (GROUPS["sparsegpt"], BATCHES)}[group]
    sparsify_checkpoint(tmp_path / "source", tmp_path / "out", config, batches)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    sparsify(model, SparsityConfig(**config), batches)
    for key, weight in model.state_dict().items():
        found = loaded.state_dict()[key]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize(
    ("layers", "spill"),
    [
        pytest.param(3, False, marks=pytest.mark.slow),
        (11, False),
        (11, True),
        pytest.param(20, True, marks=pytest.mark.slow),
    ],
)
def test_killed_run_goes_on_to_the_same_bits(source: Path, tmp_path: Path, layers: int, spill: bool) -> None:
    group, out = GROUPS["owl"] if layers == 20 else GROUPS["sparsegpt"], tmp_path / "out"
    sparsify_killed(source, out, group, oneshot.token_batches, layers, spill)
    assert not list(out.glob("*.safetensors"))
    assert len(list((out / ".pruning" / "blocks").iterdir())) == (layers - 1) // 7  # at most one block is lost
    updates: list[str] = []
    sparsify_checkpoint(source, out, group, BATCHES, spill=spill, on_layer=lambda update: updates.append(update.name))
    assert len(updates) == 21 - (layers - 1) // 7 * 7
    sparsify_checkpoint(source, tmp_path / "whole", group, BATCHES)
    assert files(out) == files(tmp_path / "whole")


class StopRunError(Exception):
    """Stands for Ctrl-C."""


def interrupt(*_: object) -> None:
    raise StopRunError


def test_another_run_in_the_same_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopRunError):
        sparsify_checkpoint(source, tmp_path / "out", GROUPS["sparsegpt"], BATCHES, on_layer=interrupt)
    with pytest.raises(CheckpointError, match="holds the finished blocks of an interrupted run with another config"):
        sparsify_checkpoint(source, tmp_path / "out", GROUPS["owl"], BATCHES)
    with pytest.raises(CheckpointError, match="another batches"):
        sparsify_checkpoint(source, tmp_path / "out", GROUPS["sparsegpt"], BATCHES[:2])


def test_requests_that_cannot_be_met_one_block_at_a_time_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(kind: type[Exception], match: str, folder: Path = source, **group: Any) -> None:
        with pytest.raises(kind, match=match):
            sparsify_checkpoint(folder, out, {"sparsity": 0.5, **group}, BATCHES)
        assert not out.exists()

    refused(RecipeError, "compares weights of different blocks", selection="global")
    refused(RecipeError, "needs the whole model", scorer="taylor")
    refused(RecipeError, "not in one list of blocks", scorer="wanda", targets="*")
    sparsify_checkpoint(source, tmp_path / "packed", GROUPS["sparsegpt"], BATCHES)
    refused(CheckpointError, "is packed: write it dense first", tmp_path / "packed", scorer="wanda")
    with pytest.raises(RecipeError, match="is the source itself"):
        sparsify_checkpoint(source, source, GROUPS["sparsegpt"], BATCHES)
    sorted(source.glob("*.safetensors"))[1].unlink()
    refused(CheckpointError, "is missing|not complete|no such file", scorer="wanda")


def test_a_finished_model_in_the_output_is_not_written_over(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sparsify_checkpoint(source, out, GROUPS["magnitude"], BATCHES)
    before = files(out)
    with pytest.raises(
        RecipeError, match=r"output .*out holds a model already \(model.*safetensors\).* another folder"
    ):
        sparsify_checkpoint(source, out, GROUPS["wanda 2:4"], BATCHES)
    assert files(out) == before
