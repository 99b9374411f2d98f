"""Measured times are kept in a file where that is possible, and work is never lost where it is not."""

from __future__ import annotations

import errno
import io
import json
import logging
import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparse import to_runtime
from hf_sparse.profiling import machine, measurement_cache
from hf_sparse.profiling.latency_table import LatencyTable, Shape
from hf_sparse.profiling.measurement_cache import MeasurementCache
from hf_sparse.runtime import SpeedTable
from hf_sparse.runtime.autotune import Measurement, Trial
from tests.helpers.runtime_models import Fixed

SHAPE = Shape("attention", 8, 2, 4, 3, 4, 1)


def quiet(path: Path, seconds: float) -> LatencyTable:
    """Return a table in which a group takes this long, on a machine without other programs."""
    return LatencyTable(path, lambda _, levels: {groups: [seconds * groups] for groups in levels}, idle)


def idle() -> Any:
    return SimpleNamespace(stop=lambda: 0.0)


def unexpected() -> list[float]:
    raise AssertionError("measured, though it is known")


def test_times_are_measured_once_and_read_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "times.json"
    assert MeasurementCache(path).get("a", lambda: [1.0, 2.0]) == [1.0, 2.0]
    assert MeasurementCache(path).get("b", lambda: [3.0]) == [3.0]
    assert MeasurementCache(path).get("a", unexpected) == [1.0, 2.0]
    assert json.loads(path.read_text()) == {"a": [1.0, 2.0], "b": [3.0]}
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")], "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    ["", '{"a": [1, 2', "[]", "[" * 100_000, '{"a": ["x"]}', '{"a": [NaN, 1]}', '{"a": [Infinity]}', '{"a": [-1.0]}',
     '{"a": [true]}', '{"a": 1}', '{"a": [1e9]}', "\ufeff{}", "null"],
)  # fmt: skip
def test_damaged_file_is_measured_again_and_replaced(content: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(content, encoding="utf-8")
    assert MeasurementCache(path).get("a", lambda: [1.0]) == [1.0]
    assert json.loads(path.read_text())["a"] == [1.0]


def test_times_that_are_not_valid_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text('{"a": [0.0, 1.0]}')
    assert MeasurementCache(path).get("a", lambda: [2.0, 1.0], all) == [2.0, 1.0]


def below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "times.json"


def is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "times.json").mkdir()
    return tmp_path / "times.json"


def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    return tmp_path / "sub" / "times.json"


def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    return tmp_path / "times.json"


def full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    return tmp_path / "times.json"


def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from filelock import FileLock

    monkeypatch.setattr(measurement_cache, "LOCK_SECONDS", 0.05)
    lock = FileLock(tmp_path / "times.json.lock", is_singleton=False)
    lock.acquire()
    monkeypatch.setattr(measurement_cache, "_test_lock", lock, raising=False)  # kept until the end of the test
    return tmp_path / "times.json"


TROUBLES = [below_a_file, is_a_folder, read_only, full_disk, full_at_the_end, locked]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_without_its_file_the_cache_works_and_warns_once(
    trouble: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = MeasurementCache(trouble(tmp_path, monkeypatch))
    with caplog.at_level(logging.WARNING, logger="hf_sparse"):
        assert cache.get("a", lambda: [1.0]) == [1.0]
        assert cache.get("b", lambda: [2.0]) == [2.0]
    assert cache.get("a", unexpected) == [1.0]
    assert [record.getMessage().count("HF_SPARSE_CACHE") for record in caplog.records] == [1]
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_auto_and_latency_budgets_go_on_without_their_file(
    trouble: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(64, 32)
    layer.weight.data[:, 8:] = 0.0
    path = trouble(tmp_path, monkeypatch)
    report = to_runtime(nn.Sequential(layer).eval(), table=SpeedTable(path, Fixed()), tokens=[3])
    assert report.layers[0].gains == {3: 2.0}
    assert quiet(path, 2.0).times(SHAPE).tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("times", [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
def test_cached_time_of_zero_is_measured_again(times: list[float], tmp_path: Path) -> None:
    path, trial = tmp_path / "runtime.json", Trial("sparse_linear", ((2, 2),), 50, (1,), 3)
    table = SpeedTable(path, Fixed())
    table.measure(trial, lambda: None, lambda: None)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: times}))
    assert SpeedTable(path, Fixed()).measure(trial, lambda: None, lambda: None) == Measurement(1.0, 0.5, 2.0)


@pytest.mark.parametrize("times", [[0.0, 0.0, 4.0, 0.0, 0.0], [0.0, 2.0, 4.0], [0.0, 1.0], []])
def test_cached_latency_of_zero_is_measured_again(times: list[float], tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    quiet(path, 2.0).times(SHAPE)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: times}))
    assert quiet(path, 3.0).times(SHAPE).tolist() == [0.0, 3.0, 6.0]


def add(path: Path, name: str) -> None:
    for number in range(20):
        MeasurementCache(path).add({f"{name} {number}": [1.0]})


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    processes = [multiprocessing.Process(target=add, args=(path, str(number))) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(MeasurementCache(path).read()) == 60


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "times.json"
    MeasurementCache(path).add({"a": [1.0]})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        MeasurementCache(path).add({"b": [1.0]})
    assert json.loads(path.read_text()) == {"a": [1.0]}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_folder_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path))
    assert MeasurementCache(name="a.json").path == tmp_path / "a.json"
    assert SpeedTable().cache.path == tmp_path / "runtime.json"
    assert LatencyTable().cache.path == tmp_path / "latency.json"
    monkeypatch.delenv("HF_SPARSE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert machine.cache_folder() == tmp_path / "home" / ".cache" / "hf_sparse"


def test_user_without_a_home_has_a_folder_below_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HF_SPARSE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert machine.cache_folder().parent == tmp_path
    table = SpeedTable(clock=Fixed())
    table.measure(Trial("csr", ((2, 2),), 50, (1,), 3), lambda: None, lambda: None)
    assert table.cache.path.is_file()


def test_machine_names_processor_threads_and_torch() -> None:
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in machine.machine()


def noisy(levels: Any) -> dict[int, list[float]]:
    return {groups: [1.0 * groups, 2.0 * groups, 9.0 * groups] for groups in levels}


def test_busy_machine_is_measured_again_until_it_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = iter([noisy, lambda levels: {groups: [3.0 * groups] for groups in levels}])
    table = LatencyTable(tmp_path / "latency.json", lambda _, levels: next(calls)(levels), idle)
    assert table.times(SHAPE).tolist() == [0.0, 3.0, 6.0]
    assert not caplog.records
    assert list(table.cache.read().values()) == [[0.0, 3.0, 6.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("rounds", "others", "message"),
    [
        (noisy, 0.0, "rounds differ by 267%, and other programs take 0.0 of the CPUs"),
        (
            lambda levels: {groups: [groups] for groups in levels},
            1.0,
            "rounds differ by 0%, and other programs take 1.0",
        ),
    ],
)
def test_times_of_a_busy_machine_are_not_kept_and_named(
    rounds: Any, others: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(os, "cpu_count", torch.get_num_threads)
    path, measured = tmp_path / "latency.json", list[int]()

    def clock(_: Shape, levels: Any) -> Any:
        measured.append(1)
        return rounds(levels)

    table = LatencyTable(path, clock, lambda: SimpleNamespace(stop=lambda: others))  # type: ignore[arg-type,return-value]
    first = table.times(SHAPE)
    assert torch.equal(table.times(SHAPE), first), "one process has one answer"
    assert len(measured) == 3
    assert [message in record.getMessage() for record in caplog.records] == [True]
    assert not path.exists()
    assert quiet(path, 2.0).times(SHAPE).tolist() == [0.0, 2.0, 4.0]


def test_cpus_of_other_programs_are_counted_without_those_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    # Two seconds, in which this process used one and all programs together four.
    clocks = SimpleNamespace(perf_counter=iter([0.0, 2.0]).__next__, process_time=iter([0.0, 1.0]).__next__)
    monkeypatch.setattr(machine, "time", clocks)
    lines = iter(["cpu 0 0 0 50 0 0 0 0 0 0", f"cpu {2 * ticks} 0 {ticks} 90 7 0 0 {ticks} 0 0"])
    monkeypatch.setattr(machine, "open", lambda *_, **__: io.StringIO(next(lines)), raising=False)
    assert machine.CpusOfOthers().stop() == pytest.approx(1.5)
