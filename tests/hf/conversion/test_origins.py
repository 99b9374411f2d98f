"""Checkpoints that other programs wrote compute after conversion what those programs computed.

The folders were written by `scripts/tools/make_import_fixtures.py`, which names the versions, with their logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from transformers import GPT2Config, GPT2LMHeadModel

import hf_sparse.hf.conversion.download
from hf_sparse import CheckpointError, Edits, HubError, import_checkpoint
from hf_sparse import compact as hf_sparse_compact
from hf_sparse.cli.main import main
from hf_sparse.formats.structure import EDITS_KEY
from hf_sparse.hf.auto import load_whole
from hf_sparse.hf.conversion.checkpoint import open_checkpoint
from hf_sparse.hf.conversion.source import source_of
from tests.hf.conversion.origins import FIXTURES, change_config, change_state, copied

ORIGINS = {
    "pruned-heads-bert": "transformers < 5 with pruned heads (bin)",
    "pruned-heads-distilbert": "transformers < 5 with pruned heads",
    "pruned-heads-roberta": "transformers < 5 with pruned heads (bin)",
    "nn-pruning": "transformers < 5 with pruned heads (bin)",
    "tied-2-4": "dense (bin)",
    "torch-prune": "torch.nn.utils.prune (bin)",
    "cofi": "CoFi (bin)",
    "cofi-masks": "CoFi with masks (bin)",
    "neural-compressor-4x1": "dense (bin)",
}


def logits(folder: Path, fixture: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a converted model, and those of the program that wrote it."""
    expected = load_plain(FIXTURES / fixture / "expected.safetensors")
    model = load_whole(str(folder)).eval()
    with torch.no_grad():
        found = model(input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    return found, expected["logits"]


def check(folder: Path, fixture: str) -> None:
    found, expected = logits(folder, fixture)
    assert expected.std() > 0.05  # a model whose outputs do not depend on its layers would prove nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# -- what the original programs wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "compact"),
    [*((fixture, False) for fixture in ORIGINS), ("nn-pruning", True), ("cofi-masks", True), ("tied-2-4", True)],
)
def test_logits_are_those_of_the_original_program(fixture: str, compact: bool, tmp_path: Path) -> None:
    done = import_checkpoint(FIXTURES / fixture, tmp_path / "out", compact=compact)
    assert done.kind == ORIGINS[fixture]
    check(tmp_path / "out", fixture)


@pytest.mark.parametrize("fixture", ["pruned-heads-bert", "pruned-heads-distilbert", "tied-2-4"])
def test_converted_model_saves_and_loads_again(fixture: str, tmp_path: Path) -> None:
    import_checkpoint(FIXTURES / fixture, tmp_path / "out")
    load_whole(str(tmp_path / "out")).save_pretrained(tmp_path / "again")
    check(tmp_path / "again", fixture)


def edits_of_file(done: Any) -> Edits:
    return Edits.from_dict(done.manifest.extra.get(EDITS_KEY) or {})


def test_heads_that_were_pruned_are_the_edits(tmp_path: Path) -> None:
    stated = json.loads((FIXTURES / "pruned-heads-bert" / "config.json").read_text())["pruned_heads"]
    assert stated["0"] == [8, 4, 7]  # not sorted, as transformers wrote it
    done = import_checkpoint(FIXTURES / "pruned-heads-bert", tmp_path / "out")
    left = {name: cut.kept for _, name, cut in edits_of_file(done)}
    assert left == {
        "bert.encoder.layer.0.attention": (0, 1, 2, 3, 5, 6, 9, 10, 11),
        "bert.encoder.layer.1.attention": (),
    }
    assert "pruned_heads" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "bert.encoder.layer.1.attention: 0 of 12 heads" in str(done)


def test_heads_of_nn_pruning_are_gone_and_its_neurons_are_counted_then_removed(tmp_path: Path) -> None:
    done = import_checkpoint(FIXTURES / "nn-pruning", tmp_path / "out")
    edits = edits_of_file(done)
    assert edits.heads
    assert not edits.neurons
    small = import_checkpoint(FIXTURES / "nn-pruning", tmp_path / "small", compact=True)
    assert len(edits_of_file(small).neurons) == 12
    assert small.output_bytes < done.source_bytes


def test_report_names_patterns_codecs_and_negative_zeros(tmp_path: Path) -> None:
    text = str(import_checkpoint(FIXTURES / "tied-2-4", tmp_path / "out"))
    assert "attention.self.query.weight: 2 with pattern 2:4, zeros 50.0 %, packed as deflate" in text
    assert "were -0.0" in text


def test_tied_weight_is_stored_once_and_tied_after_loading(tmp_path: Path) -> None:
    done = import_checkpoint(FIXTURES / "tied-2-4", tmp_path / "out")
    assert done.manifest is not None
    shapes = [key for key, entry in done.manifest.tensors.items() if entry.shape == (40, 32)]
    assert shapes == ["bert.embeddings.word_embeddings.weight"]
    model: Any = load_whole(str(tmp_path / "out"))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_zero_heads_and_neurons_of_a_dense_checkpoint_are_counted(tmp_path: Path) -> None:
    model: Any = load_whole(str(import_into(FIXTURES / "torch-prune", tmp_path / "whole")))
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight[:, 6:18] = 0  # heads 1 and 2 of 4
        layer.output.dense.weight[:, :10] = 0
        layer.intermediate.dense.weight[10:15] = 0  # constants: their biases are not zero
    model.save_pretrained(tmp_path / "dense", format="dense")
    done = import_checkpoint(tmp_path / "dense", tmp_path / "out")
    edits = hf_sparse_compact(load_whole(str(tmp_path / "out")))
    removed = {kind: cut.before - cut.count for kind, _, cut in edits}
    assert removed["heads"] == 2
    assert removed["neurons"] >= 15
    assert done.dead == (2, 4, removed["neurons"], 32, 0, 0)
    assert f"2 of 4 heads, {removed['neurons']} of 32 neurons; --compact removes them" in str(done)


def import_into(source: Path, output: Path) -> Path:
    import_checkpoint(source, output)
    return output


# -- how checkpoints differ from the ideal -----------------------------------------------------------------------------


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pairs = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    for new, old in pairs:
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    return state


def parallel(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{key}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("fixture", "change"),
    [
        ("pruned-heads-bert", old_names),
        ("pruned-heads-bert", parallel),
        *(
            (fixture, lambda state: parallel(old_names(state)))
            for fixture in ("torch-prune", "nn-pruning", "cofi-masks")
        ),
    ],
)
def test_old_names_and_prefixes_are_read(fixture: str, change: Any, tmp_path: Path) -> None:
    folder = copied(fixture, tmp_path / "in")
    change_state(folder, change)
    import_checkpoint(folder, tmp_path / "out")
    check(tmp_path / "out", fixture)


def test_safetensors_of_the_same_model_are_read_too(tmp_path: Path) -> None:
    folder = copied("pruned-heads-bert", tmp_path / "in")
    save_plain(torch.load(folder / "pytorch_model.bin", weights_only=True), folder / "model.safetensors")
    assert import_checkpoint(folder, tmp_path / "out").kind == "transformers < 5 with pruned heads"
    check(tmp_path / "out", "pruned-heads-bert")


def test_single_bin_file_becomes_a_safetensors_file(tmp_path: Path) -> None:
    source = FIXTURES / "torch-prune" / "pytorch_model.bin"
    done = import_checkpoint(source, tmp_path / "out.safetensors", "dense")
    assert done.kind == "torch.nn.utils.prune (bin)"
    assert not [key for key in load_plain(tmp_path / "out.safetensors") if key.endswith(("_orig", "_mask"))]


def test_head_that_is_named_twice_is_one_head(tmp_path: Path) -> None:
    folder = copied("pruned-heads-bert", tmp_path / "in")
    change_config(folder, pruned_heads={"0": [8, 4, 7, 8], "1": list(range(12)), "2": []})
    import_checkpoint(folder, tmp_path / "out")
    check(tmp_path / "out", "pruned-heads-bert")


def test_lost_list_of_heads_is_made_up_where_heads_are_alike(tmp_path: Path) -> None:
    folder = copied("pruned-heads-bert", tmp_path / "in")
    change_config(folder, pruned_heads=None)
    assert import_checkpoint(folder, tmp_path / "out").kind == "CoFi (bin)"
    check(tmp_path / "out", "pruned-heads-bert")


def test_masked_heads_and_neurons_of_cofi_are_removed_on_request(tmp_path: Path) -> None:
    done = import_checkpoint(FIXTURES / "cofi-masks", tmp_path / "out")
    assert done.dead is not None
    assert done.dead.heads > 5
    assert done.dead.neurons > 50
    small = import_checkpoint(FIXTURES / "cofi-masks", tmp_path / "small", compact=True)
    assert edits_of_file(small).heads


def test_blocks_of_neural_compressor_are_found(tmp_path: Path) -> None:
    done = import_checkpoint(FIXTURES / "neural-compressor-4x1", tmp_path / "out")
    assert {found.pattern for found in done.patterns} == {"block 4x1"}


def test_leftover_of_compressed_tensors_is_read_as_dense(tmp_path: Path) -> None:
    folder = copied("tied-2-4", tmp_path / "in")
    leftover = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense", "ignore": []}}
    change_config(folder, quantization_config=leftover)
    import_checkpoint(folder, tmp_path / "out")
    check(tmp_path / "out", "tied-2-4")


def test_fused_and_transposed_projections_of_gpt2_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=4, n_layer=2, n_positions=16)).eval()
    (tmp_path / "in").mkdir()
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "in")
    change_config(tmp_path / "in", pruned_heads={"1": [2, 0]})
    kept = [line for line in range(16) if line // 4 in (1, 3)]
    columns = [line + part * 16 for part in range(3) for line in kept]
    state, name = model.state_dict(), "transformer.h.1.attn"
    for suffix in ("weight", "bias"):
        state[f"{name}.c_attn.{suffix}"] = state[f"{name}.c_attn.{suffix}"][..., columns].contiguous()
    state[f"{name}.c_proj.weight"] = state[f"{name}.c_proj.weight"][kept].contiguous()
    torch.save(state, tmp_path / "in" / "pytorch_model.bin")
    import_checkpoint(tmp_path / "in", tmp_path / "out")
    ids = torch.randint(0, 40, (2, 6))
    with torch.no_grad():
        layer: Any = model.transformer.h[1].attn
        layer.c_proj.weight[[line for line in range(16) if line not in kept]] = 0
        found = load_whole(str(tmp_path / "out")).eval()(input_ids=ids).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_name_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        if name == "someone/nothing":
            raise OSError("404")
        return str(FIXTURES / "torch-prune")

    monkeypatch.setattr(hf_sparse.hf.conversion.download, "snapshot_download", download)
    import_checkpoint("someone/bert", tmp_path / "out", revision="v1")
    check(tmp_path / "out", "torch-prune")
    with pytest.raises(HubError, match="no such model on the Hub: 404"):
        import_checkpoint("someone/nothing", tmp_path / "out")
    assert asked == [("someone/bert", "v1"), ("someone/nothing", "main")]
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        import_checkpoint(tmp_path / "nothing", tmp_path / "out")


# -- the command, and the order of sources -----------------------------------------------------------------------------


def test_command_converts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FIXTURES / "nn-pruning"), str(tmp_path / "out"), "--compact"]) == 0
    out = capsys.readouterr().out
    assert "attention: 1 of 4 heads" in out
    assert "more lines like these" in out
    assert "Saved in" in out
    check(tmp_path / "out", "nn-pruning")


def test_compact_of_a_model_without_zero_heads_says_so(tmp_path: Path) -> None:
    done = import_checkpoint(FIXTURES / "tied-2-4", tmp_path / "out", compact=True)
    assert "no head, neuron or filter is zero" in str(done)
    check(tmp_path / "out", "tied-2-4")


def test_every_fixture_is_recognized_by_one_source() -> None:
    for fixture, kind in ORIGINS.items():
        with open_checkpoint(FIXTURES / fixture) as checkpoint:
            assert source_of(checkpoint).name == kind.removesuffix(" (bin)")
