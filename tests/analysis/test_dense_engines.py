"""Other engines as the dense baseline: outputs compared first, threads given, and the fastest one named."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from hf_sparse import BackendError, CheckpointError, RecipeError, SparsityConfig, sparsify
from hf_sparse.analysis.dense_engines import ENGINES, INT8, DenseEngine, Job, engines_named, first_output
from hf_sparse.cli.main import main
from hf_sparse.profiling.speed_record import FP32, EngineSpeed, Speed, fastest, read_speed
from tests.helpers.speeds import speed_file
from tests.helpers.structures import build


def saved(folder: Path) -> Path:
    model = build("bert")
    sparsify(model, SparsityConfig(sparsity=0.8))
    model.save_pretrained(folder)
    return folder


def engine(
    precision: str = FP32, factor: float = 1.0, threads: list[int] | None = None, shape: Any = None
) -> DenseEngine:
    """Return an engine that runs the model in torch, and multiplies its outputs."""

    def build_it(job: Job) -> Any:
        if threads is not None:
            threads.append(job.threads)
        return lambda batch: first_output(job.model(**batch))[:shape] * factor

    return DenseEngine(precision, ("torch",), build_it)


def failing(job: Job) -> Any:
    raise ValueError("an operator is missing\nand more")


def test_fastest_engines_are_named_and_wrong_ones_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in list(ENGINES):
        monkeypatch.delitem(ENGINES, name)
    threads: list[int] = []
    monkeypatch.setitem(ENGINES, "right", engine(threads=threads))
    monkeypatch.setitem(ENGINES, "wrong", engine(factor=1.1))
    monkeypatch.setitem(ENGINES, "rounded", engine(INT8, 1.1))
    monkeypatch.setitem(ENGINES, "short", engine(shape=0))
    monkeypatch.setitem(ENGINES, "failing", DenseEngine(FP32, ("torch",), failing))
    monkeypatch.setitem(ENGINES, "absent", DenseEngine(FP32, ("no_such_package",), failing))
    folder = saved(tmp_path / "model")
    arguments = ["--backend", "csr", "--length", "8", "--rounds", "2", "--threads", "1", "--save"]
    assert main(["bench", str(folder), *arguments]) == 0
    text = capsys.readouterr().out
    assert threads == [1]
    assert "failing          left out: ValueError: an operator is missing" in text
    assert "wrong            left out: BackendError: the outputs of this engine differ" in text
    assert "short            left out: BackendError: the outputs of this engine have shape" in text
    assert f"fastest dense {FP32} engine: " in text
    assert f"fastest dense {INT8} engine: rounded; over it, " in text
    assert "absent" not in text
    speed = read_speed(folder / "speed.json")
    assert speed.engines is not None
    assert [(each.name, each.precision) for each in speed.engines] == [("right", FP32), ("rounded", INT8)]
    assert speed.engines[0].version == f"torch {importlib.metadata.version('torch')}"
    rows = dict(speed.rows)
    assert f"fastest dense {FP32} engine" in rows
    assert "rounded" in rows[f"fastest dense {INT8} engine"]
    assert f"gain over it, {INT8}" in rows


def timed(name: str, middle: float, precision: str = FP32) -> EngineSpeed:
    return EngineSpeed(name, f"{name} 1", precision, (middle, middle, middle), (2.0, 2.0, 2.0), 0.0)


def test_rows_compare_with_the_fastest() -> None:
    file = speed_file()  # dense takes 8 ms
    engines = [timed("slow", 0.009), timed("quick", 0.006), timed("small", 0.004, INT8)]
    assert fastest(engines, FP32) is engines[1]
    assert fastest([], FP32) is None
    file["engines"] = [vars(each) | {"seconds": list(each.seconds)} for each in engines]
    rows = dict(Speed.from_dict(json.loads(json.dumps(file))).rows)
    assert rows["fastest dense float32 engine"] == "quick 1 (quick), 6.00 ms [6.00, 6.00]"
    assert rows["gain over it, float32"] == "2.00x as fast [2.00, 2.00]"
    assert rows["fastest dense int8 engine"] == "small 1 (small), 4.00 ms [4.00, 4.00]"
    file["engines"] = file["engines"][:1]
    rows = dict(Speed.from_dict(json.loads(json.dumps(file))).rows)
    assert rows["fastest dense float32 engine"] == "torch, before slow 1 (slow)"
    assert "gain over it, float32" not in rows
    assert dict(Speed.from_dict({**file, "engines": []}).rows)["other dense engines"] == "none measured"
    assert "other dense engines" not in dict(Speed.from_dict(speed_file()).rows)


@pytest.mark.parametrize("engines", ["fast", [1], [{"name": "a"}], [{}] * 99])
def test_hostile_engines_in_a_file_are_refused(engines: Any) -> None:
    with pytest.raises(CheckpointError, match="engine"):
        Speed.from_dict({**speed_file(), "engines": engines})


def test_names_of_engines() -> None:
    assert engines_named("none") == []
    assert "torch-compile" in engines_named("installed")
    with pytest.raises(RecipeError, match="got 'tensorrt'"):
        engines_named("torch-compile,tensorrt")
    absent = [name for name, each in ENGINES.items() if each.missing]
    for name in absent:
        with pytest.raises(BackendError, match="not installed here"):
            engines_named(name)


@pytest.mark.slow
def test_engines_that_are_installed_run_a_model(tmp_path: Path, capsys: Any) -> None:
    names = engines_named("installed")
    assert main(["bench", str(saved(tmp_path / "model")), "--backend", "csr", "--length", "8", "--rounds", "2"]) == 0
    text = capsys.readouterr().out
    assert "left out" not in text
    assert all(name in text for name in names)
