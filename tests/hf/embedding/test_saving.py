"""Packed models of sentence-transformers: saved with their modules, loaded bit for bit, encoded in every way."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse
from hf_sparse.formats.inspection import inspect
from hf_sparse.hf.hub.push import contents
from hf_sparse.runtime import is_runtime
from tests.helpers.sentence import TEXTS, cross_encoder, package, sentence_transformer

HALF: dict[str, Any] = {"sparsity": 0.75, "pattern": {"name": "block", "rows": 4, "cols": 1}}
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))


def sparse_encoder(folder: Path) -> Any:
    """Return a SparseEncoder: a masked language model and its SPLADE pooling."""
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    from transformers import BertForMaskedLM

    from tests.helpers import tiny

    torch.manual_seed(0)
    BertForMaskedLM(tiny.config(initializer_range=0.3)).save_pretrained(folder / "mlm")
    tiny.save_tokenizer(folder / "mlm")
    body = MLMTransformer(str(folder / "mlm"))
    return package().SparseEncoder(modules=[body, SpladePooling("max")], device="cpu")


def dense_layers(folder: Path) -> Any:
    return sentence_transformer(folder, "cls", dense=True)


KINDS = {"mean": sentence_transformer, "dense": dense_layers, "cross": cross_encoder, "splade": sparse_encoder}


def outputs(model: Any) -> Any:
    if hasattr(model, "predict"):
        return model.predict(PAIRS, show_progress_bar=False)
    found = model.encode(TEXTS, show_progress_bar=False)
    return found.to_dense().numpy() if isinstance(found, torch.Tensor) else found


def pruned(kind: str, folder: Path) -> Any:
    package()
    model = KINDS[kind](folder)
    hf_sparse.sparsify(model, hf_sparse.SparsityConfig(**HALF))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_packed_with_all_modules_and_loads_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = pruned(kind, tmp_path)
    before = outputs(model)
    out = tmp_path / "out"
    model.save_pretrained(str(out))
    assert inspect(out).packed
    assert {part["path"] for part in json.loads((out / "modules.json").read_text())} >= {""}
    loaded = type(model)(str(out), device="cpu")
    assert (outputs(loaded) == before).all()
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", KINDS)
def test_runtime_form_gives_the_outputs_of_dense_with_zeros(kind: str, tmp_path: Path) -> None:
    pruned(kind, tmp_path).save_pretrained(str(tmp_path / "out"))
    model = type(pruned(kind, tmp_path))(str(tmp_path / "out"), device="cpu")
    before = outputs(model)
    hf_sparse.to_runtime(model, "csr")
    assert is_runtime(model)
    np.testing.assert_allclose(outputs(model), before, atol=1e-6 * max(1.0, float(np.abs(before).max())))
    hf_sparse.to_dense_runtime(model)
    assert (outputs(model) == before).all()


def test_any_module_that_contains_a_transformer_goes_into_runtime_form(tmp_path: Path) -> None:
    class Ranker(torch.nn.Module):
        def __init__(self, body: Any) -> None:
            super().__init__()
            self.towers = torch.nn.ModuleDict({"both": body})
            self.score = torch.nn.Linear(32, 1)

        def forward(self, **batch: Any) -> torch.Tensor:
            return self.score(self.towers["both"](**batch).last_hidden_state[:, 0])

    ranker = Ranker(pruned("mean", tmp_path)[0].model).eval()
    batch = {"input_ids": torch.randint(5, 15, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        before = ranker(**batch)
        hf_sparse.to_runtime(ranker, "csr")
        torch.testing.assert_close(ranker(**batch), before, atol=1e-6, rtol=1e-5)


def runtime(folder: Path) -> tuple[Any, Any]:
    model = pruned("mean", folder)
    before = outputs(model)
    hf_sparse.to_runtime(model, "csr")
    return model, before


def test_runtime_form_is_pickled_for_the_workers_of_a_server(tmp_path: Path) -> None:
    model, before = runtime(tmp_path)
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301  our own
    assert is_runtime(copy)
    np.testing.assert_allclose(outputs(copy), before, atol=1e-6)


def test_threads_encode_at_the_same_time(tmp_path: Path) -> None:
    model, before = runtime(tmp_path)
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: outputs(model)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    for each in found.values():
        np.testing.assert_allclose(each, before, atol=1e-6)


@pytest.mark.slow
def test_processes_encode_a_model_in_runtime_form(tmp_path: Path) -> None:
    model, before = runtime(tmp_path)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(TEXTS, pool=pool, chunk_size=5)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, before, atol=1e-6)


def test_card_keeps_its_own_sections_and_gets_one_about_sparsity(tmp_path: Path) -> None:
    model = pruned("mean", tmp_path)
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the section
        model.save_pretrained(str(out))
        card = (out / "README.md").read_text(encoding="utf-8")
        assert card.count("## Sparsity") == 1
    for expected in ("## Model Details", "## Usage", "hf_sparse.to_runtime(model)", "sentence-transformers", "75.00%"):
        assert expected in card, expected
    assert "- hf_sparse" in card.split("---")[1]
    again = type(model)(str(out), device="cpu")
    again.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8").count("## Sparsity") == 1


def test_card_of_a_dense_model_says_nothing(tmp_path: Path) -> None:
    pruned("mean", tmp_path).save_pretrained(str(tmp_path / "sparse"))  # our function is in place from here on
    sentence_transformer(tmp_path).save_pretrained(str(tmp_path / "dense"))
    assert "Sparsity" not in (tmp_path / "dense" / "README.md").read_text(encoding="utf-8")


def test_a_push_takes_the_files_of_the_modules_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned("dense", tmp_path).save_pretrained(str(out))
    (out / "training_args.bin").write_bytes(b"pickle")
    (out / "1_Pooling" / "pickle.bin").write_bytes(b"pickle")
    (out / "eval").mkdir()
    (out / "eval" / "config.json").write_text("{}")
    names = set(contents(out))
    assert {
        "modules.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
    } <= names
    assert {"model.safetensors", "2_Dense/model.safetensors", "README.md"} <= names
    assert not {name for name in names if name.endswith(".bin") or name.startswith("eval")}


def test_a_module_folder_that_leads_out_is_not_pushed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned("mean", tmp_path).save_pretrained(str(out))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    (out / "9_Secret").symlink_to(tmp_path / "secret")
    with pytest.raises(hf_sparse.CheckpointError, match="outside of its folder"):
        contents(out)
