"""`device_map` of `sparsify_checkpoint`: what goes where; moves to devices that are not there are intercepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

from hf_sparse import RecipeError, sparsify_checkpoint
from hf_sparse.cli.main import main
from hf_sparse.hf.large import block_run, device_map
from hf_sparse.hf.large.device_map import DeviceMap, check_device_map, place
from hf_sparse.hf.large.lazy_model import LazyModel
from hf_sparse.pruning.calibrated import activations, recording
from tests.helpers import oneshot

BATCHES = oneshot.token_batches()
GROUP = {"scorer": "sparsegpt", "sparsity": 0.5}
CPU, OTHER = torch.device("cpu"), torch.device("cuda:1")
BLOCKS = [f"model.layers.{index}" for index in range(3)]
OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    oneshot.llama().float().save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("pruned") / "out"
    sparsify_checkpoint(source, out, GROUP, BATCHES)
    return AutoModelForCausalLM.from_pretrained(out)


def test_names_become_devices() -> None:
    assert check_device_map("cpu") == check_device_map(CPU) == {"": CPU}
    auto = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else CPU
    assert check_device_map("auto") == {"": auto}
    assert check_device_map({"model": "cpu", "lm_head": CPU}) == {"model": CPU, "lm_head": CPU}


def test_auto_takes_an_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert check_device_map("auto") == {"": torch.device("cuda")}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("disk", r"`device_map` is 'disk', where nothing is computed.*spill=True"),
        ({"model": "disk", "lm_head": "cpu"}, r"`device_map\['model'\]` is 'disk'"),
        ("balanced", r"`device_map` must be 'auto', a device as in 'cpu' or 'cuda:1', or a mapping, got 'balanced'"),
        ({"": "auto"}, r"`device_map\[''\]` must be a device as in 'cpu' or 'cuda:1', got 'auto'"),
        ("meta", "holds no values"),
        ("cuda:99", "`device_map` is 'cuda:99', and torch has no such device here"),
        (99, "99.*(no such accelerator|no such device)"),
        (True, "must be 'auto'"),
        (None, "must be 'auto'"),
        (["cpu"], "must be 'auto'"),
        ({}, "must map names of modules to devices"),
        ({0: "cpu"}, "must map names of modules to devices"),
        ({"model.layer": "cpu", "": "cpu"}, r"names 'model.layer', and LlamaForCausalLM has no such.*'model.layers"),
        ({"model": "cpu"}, r"must cover the model, and 'lm_head.weight' and 0 more weights have no device"),
        ({"model.layers.1": "cpu", "lm_head": "cpu"}, r"'model.embed_tokens.weight' and 19 more weights"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_written(
    source: Path, tmp_path: Path, given: Any, match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        sparsify_checkpoint(source, tmp_path / "out", GROUP, BATCHES, device_map=given)
    assert not (tmp_path / "out").exists()


def test_longest_name_counts_and_a_block_is_not_divided() -> None:
    model = oneshot.llama()
    devices = {"": CPU, "model.layers": OTHER, "model.layers.2": CPU, "lm_head": OTHER}
    places = place(model, BLOCKS, devices)
    assert places.rest == CPU
    assert list(places.blocks.values()) == [OTHER, OTHER, CPU]
    with pytest.raises(RecipeError, match=r"divides 'model.layers.1' between cpu and cuda:1"):
        place(model, BLOCKS, {"": CPU, "model.layers.1.mlp": OTHER})


def test_a_map_of_everything_gives_the_same_bits(source: Path, tmp_path: Path, expected: Any) -> None:
    given = dict.fromkeys([*BLOCKS, *OUTSIDE], "cpu")
    sparsify_checkpoint(source, tmp_path / "out", GROUP, BATCHES, device_map=given)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def test_blocks_are_on_their_devices_and_hidden_states_move(
    source: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is loaded where the map says, and is called with tensors that were moved there."""
    loaded_on: dict[str, torch.device] = {}
    called_on: dict[int, set[torch.device]] = {}
    where: dict[int, torch.device] = {}
    plain_load = LazyModel.load_block
    monkeypatch.setattr(device_map, "_there", lambda device, where: device)

    def load(self: Any, name: str, device: torch.device) -> Any:
        loaded_on[name] = device
        block = plain_load(self, name, CPU)
        where[id(block)] = device
        return block

    def moved(value: Any, device: torch.device | None) -> Any:
        def mark(part: Any) -> Any:
            if isinstance(part, Tensor) and device is not None:
                part = part.clone()
                part.placed = device
            return part

        return tree_map(mark, value)

    plain_run = recording.Call.run

    def run(self: Any, block: Any, hidden: Tensor) -> Tensor:
        tensors = tree_leaves((self.args, dict(self.kwargs), hidden))
        found = {getattr(value, "placed", CPU) for value in tensors if isinstance(value, Tensor)}
        called_on.setdefault(id(block), set()).update(found)
        assert found == {where[id(block)]}
        return plain_run(self, block, hidden)

    for module in (activations, recording, block_run):
        monkeypatch.setattr(module, "moved", moved)
    monkeypatch.setattr(LazyModel, "load_block", load)
    monkeypatch.setattr(recording.Call, "run", run)
    given: DeviceMap = {"": "cpu", BLOCKS[1]: OTHER, BLOCKS[0]: "cuda:0"}
    sparsify_checkpoint(source, tmp_path / "out", GROUP, BATCHES, device_map=given, dtype=torch.float32)
    assert loaded_on == {BLOCKS[0]: torch.device("cuda:0"), BLOCKS[1]: OTHER, BLOCKS[2]: CPU}
    assert len(called_on) == 3
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, weight in expected.state_dict().items():
        assert torch.equal(result.state_dict()[key], weight), key


def test_command_line(tmp_path: Path) -> None:
    model, text = oneshot.save_llama(tmp_path / "model"), oneshot.write_text(tmp_path / "text.txt")
    arguments = ["prune", str(model), "--data", str(text), "--samples", "4", "--length", "32"]
    arguments += ["--scorer", "sparsegpt", "--pattern", "2:4"]
    assert main([*arguments, "--output", str(tmp_path / "memory")]) == 0
    for name, given in (("auto", "auto"), ("map", '{model: cpu, "": cpu}')):
        assert main([*arguments, "--output", str(tmp_path / name), "--device-map", given]) == 0
        memory, files = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("memory", name))
        for key, weight in memory.state_dict().items():
            assert torch.equal(files.state_dict()[key], weight), key
        assert (tmp_path / name / "tokenizer.json").is_file()


def test_command_line_needs_no_data_for_magnitude(tmp_path: Path) -> None:
    model = oneshot.save_llama(tmp_path / "model")
    arguments = ["prune", str(model), "--sparsity", "0.5", "--scorer", "magnitude"]
    assert main([*arguments, "--output", str(tmp_path / "memory")]) == 0
    assert main([*arguments, "--output", str(tmp_path / "files"), "--device-map", "cpu"]) == 0
    memory, files = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("memory", "files"))
    for key, weight in memory.state_dict().items():
        assert torch.equal(files.state_dict()[key], weight), key


def test_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = oneshot.save_llama(tmp_path / "model"), oneshot.write_text(tmp_path / "text.txt")
    arguments = ["prune", str(model), "--output", str(tmp_path / "out"), "--sparsity", "0.5", "--scorer", "wanda"]
    for more, reason in (
        (["--device-map", "cpu"], "give some (hf-sparse prune: --data)"),
        (["--device-map", "disk", "--data", str(text)], "where nothing is computed"),
        (["--device-map", "7", "--data", str(text)], "no such"),
        (["--device-map", "{model: cpu}", "--data", str(text), "--length", "16", "--samples", "2"], "must cover"),
    ):
        assert main([*arguments, *more]) == 2
        assert reason in capsys.readouterr().err
    plain = ["--device-map", "cpu", "--data", str(text)]
    for more, named in ((["--label", "l"], "--label"), (["--text", "t", "--label", "l"], "--text and --label")):
        assert main([*arguments, *plain, *more]) == 2
        assert f"{named} would name columns of a file of examples, and {text} is plain text" in capsys.readouterr().err
    for given, found in (
        ("{model: cpu", "not valid YAML: while parsing a flow mapping"),
        ("{model:cpu}", "key 'model:cpu' has no value (a colon is followed by a space)"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--device-map", given])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert "argument --device-map: it must be auto, a device as in cpu or cuda:1, or a mapping as in" in line
        assert f"got '{given}': {found}" in line
    assert not (tmp_path / "out").exists()
