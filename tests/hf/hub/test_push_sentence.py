"""Models of sentence-transformers over loopback: they go up packed with their modules, and come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_sparse
from hf_sparse.cli.main import main
from hf_sparse.formats.inspection import inspect
from tests.helpers.sentence import TEXTS, package, sentence_transformer

REPO = "user/sentences"
MODULES = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"}


def pruned(folder: Path) -> Any:
    model = sentence_transformer(folder, "cls", dense=True)
    hf_sparse.sparsify(model[0].model, hf_sparse.SparsityConfig(sparsity=0.75))
    return model.eval()


def encoded(model: Any) -> Any:
    return model.encode(TEXTS, show_progress_bar=False)


def test_its_own_push_to_hub_sends_packed_weights_and_a_section_about_them(hub: Any, tmp_path: Path) -> None:
    model = pruned(tmp_path)
    expected = encoded(model)
    model.push_to_hub(REPO, private=True)
    files = hub.files(REPO)
    assert {"model.safetensors", "2_Dense/model.safetensors", *MODULES} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert "## Sparsity" in files["README.md"].decode()
    assert (encoded(package().SentenceTransformer(REPO, device="cpu")) == expected).all()
    (tmp_path / "pulled").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "pulled" / name).write_bytes(files[name])
    assert inspect(tmp_path / "pulled").packed


def test_the_command_pushes_a_folder_with_its_modules(hub: Any, tmp_path: Path) -> None:
    model, out = pruned(tmp_path), tmp_path / "out"
    model.save_pretrained(str(out))
    assert main(["push", str(out), REPO]) == 0
    assert hub.files(REPO).keys() >= MODULES
    assert (encoded(package().SentenceTransformer(REPO, device="cpu")) == encoded(model)).all()


def test_a_model_of_the_hub_is_pruned_with_its_modules(hub: Any, tmp_path: Path) -> None:
    dense = sentence_transformer(tmp_path, "cls", dense=True)
    dense.push_to_hub(REPO)
    out = tmp_path / "out"
    assert main(["prune", REPO, "--sparsity", "0.75", "--output", str(out)]) == 0
    assert all((out / name).is_file() for name in MODULES)
    hf_sparse.sparsify(dense[0].model, hf_sparse.SparsityConfig(sparsity=0.75))
    assert (encoded(package().SentenceTransformer(str(out), device="cpu")) == encoded(dense)).all()
