"""A file in runtime form is no checkpoint, and a changed model is no runtime form: both are refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from hf_sparse import BackendError, CheckpointError, import_checkpoint, save_runtime, to_runtime
from hf_sparse.cli.main import main
from hf_sparse.formats.inspection import inspect
from tests.helpers.runtime_models import sparse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = sparse("bert")
    to_runtime(model, "cpu")
    save_runtime(model, tmp_path / "runtime")
    return tmp_path / "runtime"


@pytest.mark.parametrize("output", ["dense", "packed"])
def test_convert_wants_the_checkpoint(output: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"in runtime form, which .* name the checkpoint that it was made from"):
        import_checkpoint(folder, tmp_path / "out", format=output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["card", "report", "inspect"])
def test_no_figures_are_given_of_it(verb: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="in runtime form"):
        inspect(folder)
    assert main([verb, str(folder)]) == 2
    assert "in runtime form, which hf_sparse.save_runtime wrote for inference alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_projection_that_was_replaced_is_named(name: str, tmp_path: Path) -> None:
    model = sparse("bert")
    to_runtime(model, "cpu")
    attention = model.bert.encoder.layer[0].attention.self
    width = attention.query.in_features
    setattr(attention, name, nn.Linear(width, width))
    with pytest.raises(
        BackendError, match=r"layer\.0\.attention\.self\.(key|query)', or packed with it, were replaced"
    ):
        save_runtime(model, tmp_path)
