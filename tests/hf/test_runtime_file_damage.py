"""Files in runtime form that are damaged, hostile, or for another processor, and models that cannot be saved."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hf_sparse import BackendError, CheckpointError, RecipeError, SparseConfig, load_runtime, save_runtime, to_runtime
from hf_sparse.formats.aligned_file import write_aligned
from hf_sparse.formats.codecs import encode
from hf_sparse.formats.manifest import Manifest
from hf_sparse.formats.model_folder import SINGLE as FILE
from hf_sparse.formats.safetensors_io import MANIFEST_KEY, read_header
from hf_sparse.kernels import KERNELS
from hf_sparse.runtime import saved_form
from tests.helpers.kernels import all_present, pretend
from tests.helpers.runtime_models import sparse


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    all_present(monkeypatch)


def edited(folder: Path, change: Any) -> None:
    """Write the file again with another description, and the tensors that it has."""
    path = folder / FILE
    manifest = Manifest.from_json(read_header(path).metadata[MANIFEST_KEY])
    extra = json.loads(json.dumps(manifest.extra))
    change(extra["runtime"])
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in manifest.tensors}
    write_aligned(tensors, path, {MANIFEST_KEY: replace(manifest, extra=extra).to_json()})


def saved_bert(folder: Path, backend: str = "cpu") -> Path:
    model = sparse("bert")
    to_runtime(model, backend)
    save_runtime(model, folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(version=2), "version 2"),
        (lambda run: run.update(layouts={"cpu": 7}), "version 7 of the layout of the kernel 'cpu'"),
        (lambda run: run.update(model="BertModel"), "loaded as a BertForSequenceClassification"),
        (lambda run: run.update(surplus=1), "has the keys"),
        (lambda run: run["units"].append(run["units"][0]), "packs each layer once"),
        (lambda run: run["units"][0].update(kernel="none"), "`layouts` of a runtime form must have"),
        (lambda run: run["units"][0].update(rows=[3] * len(run["units"][0]["rows"])), "blocks of 3 rows"),
        (lambda run: run["units"][0].update(layers=["bert.pooler.dense", "bert.no.such"]), "the model is to have"),
        (lambda run: run.update(lm_head="bert.no.such"), "which is no layer in a BertForSequenceClassification"),
        (lambda run: run["units"][0].update(form="qkv", rows=[1], exact_rows=[0]), "compute"),
        (lambda run: run.update(isa="../../etc"), "must be names"),
        (lambda run: run.update(shared={"a" * 900: "b"}), "must be a mapping from names"),
    ],
)
def test_hostile_and_foreign_descriptions_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    edited(saved_bert(tmp_path), change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_runtime(tmp_path)


def test_wrong_indexes_are_refused_though_their_checksum_is_right(tmp_path: Path) -> None:
    for number, backend in enumerate(("cpu", "csr", "bitmask")):
        folder = saved_bert(tmp_path / str(number), backend)
        path = folder / FILE
        manifest = Manifest.from_json(read_header(path).metadata[MANIFEST_KEY])
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in manifest.tensors}
        key = next(key for key in tensors if key.endswith("packed_pointers"))
        tensors[key].view(-1)[-1] = 2**30
        entries = {name: encode(tensor, "dense")[0] for name, tensor in tensors.items()}
        write_aligned(tensors, path, {MANIFEST_KEY: replace(manifest, tensors=entries).to_json()})
        with pytest.raises(CheckpointError, match="is corrupted"):
            load_runtime(folder)


@pytest.mark.parametrize("backend", ["bitmask", "bitmask-int8", "bitmask-int4"])
def test_bits_that_do_not_fit_the_row_pointers_are_refused(backend: str, tmp_path: Path) -> None:
    path = saved_bert(tmp_path, backend) / FILE
    manifest = Manifest.from_json(read_header(path).metadata[MANIFEST_KEY])
    with safe_open(path, "pt") as file:
        stored = {key: file.get_tensor(key).clone() for key in manifest.tensors}

    def written(key: str, part: Tensor) -> None:
        tensors = stored | {key: part}
        entries = {name: encode(tensor, "dense")[0] for name, tensor in tensors.items()}
        write_aligned(tensors, path, {MANIFEST_KEY: replace(manifest, tensors=entries).to_json()})

    key = next(key for key in stored if key.endswith("packed_pointers"))
    pointers = stored[key].clone()
    row = int((pointers.diff() > 0).nonzero()[1])  # the kernels take any that do not run backwards
    pointers[row] += 1
    written(key, pointers)
    with pytest.raises(CheckpointError, match="do not say how many bits"):
        load_runtime(tmp_path)
    key = next(key for key in stored if key.endswith("packed_bits"))
    bits = stored[key].clone()
    row = int((bits[:, 0] != 0).nonzero()[0])
    last = int(bits[row, 0]).bit_length() - 1
    bits[row, 0] ^= (1 << last) | (1 << 62)  # as many as before, one behind the columns
    written(key, bits)
    with pytest.raises(CheckpointError, match="bits are set behind the last of"):
        load_runtime(tmp_path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = saved_bert(tmp_path) / FILE
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_runtime(tmp_path)
    path.write_bytes(content[:-64])
    with pytest.raises(CheckpointError):
        load_runtime(tmp_path)


def test_another_processor_is_refused_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved_bert(tmp_path)
    monkeypatch.setattr(saved_form, "isa_here", lambda: "another")
    load_runtime(tmp_path)
    assert "may be slower" in caplog.text
    kernel = KERNELS["cpu"]
    object.__setattr__(kernel, "layout", replace(kernel.layout, by_isa=True))
    try:
        with pytest.raises(CheckpointError, match="its layout is another: load the checkpoint"):
            load_runtime(tmp_path)
    finally:
        object.__setattr__(kernel, "layout", replace(kernel.layout, by_isa=False))
    pretend(monkeypatch, cpu="it lacks something")
    with pytest.raises(CheckpointError, match="cannot run here: it lacks something"):
        load_runtime(tmp_path)


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path: Path) -> None:
    model = sparse("bert")
    with pytest.raises(BackendError, match="of which nothing is packed"):
        save_runtime(model, tmp_path)
    with pytest.raises(RecipeError, match="got a Sequential"):
        save_runtime(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(CheckpointError, match="name a folder that"):
        load_runtime(tmp_path)
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="holds a checkpoint, and no runtime form"):
        load_runtime(tmp_path / "packed")
    to_runtime(model, "cpu")
    with pytest.raises(RecipeError, match="would replace the checkpoint"):
        save_runtime(model, tmp_path / "packed")
    layer = model.bert.encoder.layer[0]
    kept, layer.output = layer.output, nn.Identity()
    with pytest.raises(BackendError, match="replaced"):
        save_runtime(model, tmp_path)
    layer.output = kept
    save_runtime(model, tmp_path)
    from transformers import BertForSequenceClassification, BertModel

    with pytest.raises(CheckpointError, match="was loaded as a BertModel"):
        BertModel.from_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="in runtime form already"):
        BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=SparseConfig(backend="cpu"))
    with pytest.raises(CheckpointError, match="and no dtype"):
        BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="save_runtime wrote"):
        load_runtime(tmp_path)


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_bert(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    model = sparse("bert", sparsity=0.5)
    to_runtime(model, "cpu")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_sparse.hf.runtime_file.write_aligned", full)
    with pytest.raises(Exception, match="No space left"):
        save_runtime(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".sav")] == []
