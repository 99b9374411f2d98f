"""Point the real client at a Hub on loopback, and let no test wait for its patience."""

from __future__ import annotations

import time
import types

import pytest
import yaml
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http
from huggingface_hub.utils._http import close_session
from transformers import AutoTokenizer
from transformers.utils import hub as transformers_hub

from tests.hf.hub.server import WRITER, LocalHub
from tests.hf.hub.small_model import pruned


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh Hub; the suite is offline otherwise, and the client has read its settings at import."""
    with LocalHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # the functions of the package are its methods
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # keeps the first endpoint that it has seen
        close_session()
        yield server
    close_session()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client wanted to wait between its tries."""
    asked: list[float] = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": asked.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return asked


@pytest.fixture
def saved(tmp_path):
    """A folder as a Trainer leaves it: the model, and much that must stay at home."""
    model = pruned(tmp_path)
    folder = tmp_path / "small"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", ".env"):
        (folder / name).write_bytes(b"not for others")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"not for others")
    recipe = {
        "model": {"name": "/home/somebody/models/bert"},
        "data": {"train": "/home/somebody/train.jsonl"},
        "training": {"output_dir": "/home/somebody/out", "max_steps": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder
