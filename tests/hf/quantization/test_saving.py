"""What save_pretrained writes: packed, whole, the same bytes for the same model, dense on request."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

from hf_sparse import RecipeError, SparsityConfig, sparsify, summarize
from hf_sparse.formats.safetensors_io import check_files
from tests.helpers.tiny import config
from tests.helpers.training import RAMP, Rows, bert, sparse_trainer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = sparsify(bert(), SparsityConfig(sparsity=0.9))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_packed_file_holds_values_under_the_original_key(saved: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    tensors = load_file(saved / "model.safetensors")
    assert tensors[name].shape == (102,)  # floor((1 - 0.9) * 1,024)
    assert tensors["bert.embeddings.word_embeddings.weight"].ndim == 2
    manifest = json.loads((saved / "config.json").read_text())["quantization_config"]["manifest"]
    assert manifest["tensors"][name]["shape"] == [32, 32]
    assert name in manifest["targets"]


def test_packed_file_is_smaller_by_what_was_removed(saved: Path, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "dense")
    removed = 0.9 * 2 * (4 * 32 * 32 + 2 * 32 * 64) * 4
    header = 30_000  # the manifest; a few bytes a weight in a model of real size
    assert len(weights(saved)) < len(weights(tmp_path / "dense")) - removed + 2 * 8192 / 8 + header


def test_equal_models_are_equal_files(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(saved)
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path / "again"))
    assert config == again


def test_dense_format_is_read_by_anyone(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "dense", format="dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(plain) == set(bert().state_dict())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(plain[name], tensor)
    loaded.save_pretrained(tmp_path / "packed")  # and the model itself still packs
    assert weights(tmp_path / "packed") == weights(saved)


def test_smallest_format_codes_the_values_too_and_loads_the_same(tmp_path: Path) -> None:
    # Wide enough for a code of the values to pay, and in half precision, where it pays most.
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    model = sparsify(BertModel(config(**sizes)).half(), SparsityConfig(sparsity=0.8))
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "smallest", format="smallest")
    packed, smallest = (check_files(tmp_path / name / "model.safetensors") for name in ("packed", "smallest"))
    assert {smallest.tensors[key].codec for key in smallest.targets} == {"planes"}
    assert "planes" not in {entry.codec for entry in packed.tensors.values()}
    assert smallest.targets == packed.targets
    assert len(weights(tmp_path / "smallest")) < len(weights(tmp_path / "packed"))
    loaded = AutoModel.from_pretrained(tmp_path / "smallest")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    loaded.save_pretrained(tmp_path / "again")  # nobody asked for the smallest now
    assert weights(tmp_path / "again") == weights(tmp_path / "packed")


def test_smallest_format_leaves_a_model_in_training_as_it_is(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.9, scorer="movement", schedule=RAMP))
    trainer.create_optimizer()
    trainer.callback_handler.callbacks[0].pruner.step(1.0)
    for name in ("packed", "smallest"):
        trainer.model.save_pretrained(tmp_path / name, format=name)
    assert any(name.endswith("_hidden") for name in load_file(tmp_path / "smallest" / "model.safetensors"))
    assert weights(tmp_path / "smallest") == weights(tmp_path / "packed")


def test_unknown_format_is_an_error_and_writes_nothing(saved: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    before = weights(saved)
    with pytest.raises(RecipeError, match="`format` must be one of 'packed', 'smallest', 'dense', got 'zip'"):
        loaded.save_pretrained(saved, format="zip")
    assert weights(saved) == before


def test_dequantize_makes_a_plain_model(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    sparsity = summarize(loaded).sparsity
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert summarize(plain).sparsity == sparsity


def test_shards_load_and_a_single_file_replaces_them(saved: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    expected = loaded(input_ids=Rows(4).ids).logits
    loaded.save_pretrained(saved, max_shard_size="8KB")
    assert not (saved / "model.safetensors").exists()  # from_pretrained would prefer it, with its old content
    assert len(list(saved.glob("model-0000*.safetensors"))) > 1
    again = AutoModelForSequenceClassification.from_pretrained(saved)
    assert torch.equal(again(input_ids=Rows(4).ids).logits, expected)
    again.save_pretrained(saved)
    assert [path.name for path in saved.glob("model*")] == ["model.safetensors"]


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
    model = sparsify(T5ForConditionalGeneration(config), SparsityConfig(sparsity=0.5)).eval()
    model.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.shared.weight
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids, decoder_input_ids=ids).logits, model(ids, decoder_input_ids=ids).logits)


def test_checkpoint_of_training_holds_its_state_once(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, save_strategy="steps", save_steps=10)
    trainer.train()
    tensors = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    entries = 32 * 64
    assert tensors[f"{name}_scores"].shape == (32, 64)
    # Kept values and removed values are apart, so together they are as many as the weight has.
    assert tensors[name].numel() + tensors[f"{name}_hidden"].numel() == entries
    assert tensors[f"{name}_kept"].shape == (entries // 8,)
    masked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-10")
    weight = dict(masked.named_parameters())[name]
    assert int((weight != 0).sum()) == tensors[name].numel()
    assert not any("scores" in key for key in masked.state_dict())


def test_checkpoint_saved_dense_in_training_is_the_masked_model(tmp_path: Path) -> None:
    trainer = sparse_trainer(tmp_path, SparsityConfig(sparsity=0.9, scorer="movement", schedule=RAMP))
    trainer.create_optimizer()
    callback = trainer.callback_handler.callbacks[0]
    callback.pruner.step(1.0)
    trainer.model.save_pretrained(tmp_path / "dense", format="dense")
    plain = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(plain) == set(bert().state_dict())
    assert int((plain["bert.encoder.layer.0.attention.self.query.weight"] != 0).sum()) == 102


SAVE_FOREVER = """
    import sys, torch
    from hf_sparse import SparsityConfig, sparsify
    from tests.helpers.training import bert
    model = sparsify(bert(), SparsityConfig(sparsity=0.5))
    print("ready", flush=True)
    while True:
        with torch.no_grad():
            model.classifier.bias.add_(1)
        model.save_pretrained(sys.argv[1])
        print("saved", flush=True)
"""


@pytest.mark.timeout(400)  # each process imports torch and transformers anew
def test_killed_save_leaves_a_whole_file(tmp_path: Path) -> None:
    """Kill a process with SIGKILL at six different moments of saving over and over: what is there always loads."""
    for moment in range(6):
        folder = tmp_path / str(moment)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(folder)],
            cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "saved":
                break
        # The next save has begun; wait a little longer each time, so that the kill falls into another part of it.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.002 + 0.005 * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert summarize(loaded).sparsity == pytest.approx(0.5, abs=1e-3)


def test_interrupted_write_leaves_the_old_file_and_no_litter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def half(tensors: object, filename: str, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", half)
    with torch.no_grad():
        loaded.classifier.bias.add_(1)
    with pytest.raises(OSError, match="no space left"):
        loaded.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


DIE_BETWEEN_RENAMES = """
    import os, pathlib, sys
    from transformers import BertForSequenceClassification
    import hf_sparse
    folder, other, moment = sys.argv[1:]
    model = BertForSequenceClassification.from_pretrained(other)
    replace, seen = pathlib.Path.replace, []
    def dies(self, target):
        if self.parent.name.startswith(".sav") and len(seen) == int(moment):
            os._exit(9)
        seen.append(self)
        return replace(self, target)
    pathlib.Path.replace = dies
    model.save_pretrained(folder, max_shard_size="8KB")
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("moment", [3])
def test_a_sharded_save_killed_between_renames_is_finished_by_the_reader(moment: int, tmp_path: Path) -> None:
    sparsify(bert(), SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "folder", max_shard_size="8KB")
    other = sparsify(bert(), SparsityConfig(sparsity=0.5))
    with torch.no_grad():
        other.classifier.bias.add_(1)
    other.save_pretrained(tmp_path / "other")
    code = textwrap.dedent(DIE_BETWEEN_RENAMES)
    command = [sys.executable, "-c", code, str(tmp_path / "folder"), str(tmp_path / "other"), str(moment)]
    assert subprocess.run(command, cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL).returncode == 9
    assert len(list((tmp_path / "folder").glob(".saved-*"))) == 1
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in other.state_dict().items())
    assert not list((tmp_path / "folder").glob(".sav*"))


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("shards_first", [False, True], ids=["one file, then shards", "shards, then one file"])
def test_a_save_killed_before_stale_files_are_removed_is_finished_by_the_reader(
    shards_first: bool, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old weights beside new ones of another number of files are never what is loaded."""
    sizes = ["8KB", "1GB"] if shards_first else ["1GB", "8KB"]
    model: Any = sparsify(bert(), SparsityConfig(sparsity=0.5))
    model.save_pretrained(tmp_path, format=form, max_shard_size=sizes[0])
    with torch.no_grad():
        model.classifier.bias.add_(1)
    real = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("model"):
            raise KeyboardInterrupt
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path, format=form, max_shard_size=sizes[1])
    assert {"model.safetensors", "model.safetensors.index.json"} <= {path.name for path in tmp_path.iterdir()}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert not list(tmp_path.glob(".sav*"))
    assert (tmp_path / "model.safetensors").exists() == shards_first


def test_the_next_save_removes_what_a_killed_one_has_left(saved: Path) -> None:
    left = saved / ".saving-abandoned"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half a file")
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert left.exists(), "a reader cannot know that nobody writes there"
    loaded.save_pretrained(saved)
    assert not list(saved.glob(".sav*"))


def test_a_tensor_that_is_only_called_like_training_state_is_saved(tmp_path: Path) -> None:
    model = bert()
    model.classifier.bias_scores = torch.nn.Parameter(torch.ones(2))
    sparsify(model, SparsityConfig(sparsity=0.9)).save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense", format="dense")
    for name in ("packed", "dense"):
        assert load_file(tmp_path / name / "model.safetensors")["classifier.bias_scores"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("suffix", ["_mask", "_gaps", "_scores"])
def test_a_tensor_under_the_name_of_a_part_is_refused_before_it_is_lost(suffix: str, saved: Path) -> None:
    before = weights(saved)
    model = sparsify(bert(), SparsityConfig(sparsity=0.5))
    layer = model.bert.encoder.layer[0].output.dense
    layer.register_buffer(f"weight{suffix}", torch.ones(3))
    with pytest.raises(RecipeError, match=f"a tensor 'bert.encoder.layer.0.output.dense.weight{suffix}' of its own"):
        model.save_pretrained(saved)
    assert weights(saved) == before
    model.save_pretrained(saved, format="dense")
    assert (
        load_file(saved / "model.safetensors")[f"bert.encoder.layer.0.output.dense.weight{suffix}"].tolist()
        == [1.0] * 3
    )
