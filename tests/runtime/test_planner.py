"""The planner: what is timed, once, and what a choice says of its time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import to_runtime
from hf_sparse.kernels import LibraryStatus
from hf_sparse.runtime import planner
from hf_sparse.runtime.candidates import CandidateGroup, Candidates
from hf_sparse.runtime.survey import survey
from tests.helpers.kernels import pretend
from tests.helpers.runtime_models import sparse, table


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators count as the kernels: without the library they fall back to torch, and give the same."""
    import hf_sparse.runtime.convert as runtime

    monkeypatch.setattr(runtime, "library_status", lambda: LibraryStatus(True, None, "test", "as if they were there"))
    pretend(monkeypatch, cpu=None, dense_few=None, bitmask=None)


def test_each_candidate_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[Any] = Counter()
    real = planner.measure

    def counted(candidate: Any, speeds: Any, tokens: Sequence[int]) -> Any:
        seen[candidate.kernel, candidate.form, candidate.names, tuple(tokens)] += 1
        return real(candidate, speeds, tokens)

    monkeypatch.setattr(planner, "measure", counted)
    to_runtime(sparse("t5"), "auto", table=table(tmp_path, bitmask=0.4, sparse_ffn=2.0, sparse_qkv=2.0))
    assert {kernel for kernel, *_ in seen} == {"cpu", "bitmask"}
    assert {form for _, form, *_ in seen} == {"linear", "ffn", "qkv"}
    assert set(seen.values()) == {1}


def test_choice_states_the_time_of_its_layers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with torch.no_grad():
        next(model.parameters())[::2] = 0.0
    found = survey(model)
    layers = {name: decision.layer for name, decision in found.items()}
    single = Candidates(model, layers, "cpu").single("0")
    for seconds, expected, count in ((0.25, 0.25, 1), (3.0, 1.0, 0)):
        folder = tmp_path / str(seconds)
        folder.mkdir()
        choice = planner.choose(CandidateGroup(single, list), found, table(folder, sparse_linear=seconds), (1, 17))
        assert choice.seconds == {1: expected, 17: expected}, "packed where that is faster, else dense"
        assert len(choice.packed) == count
    assert planner.choose(CandidateGroup(single, list), found, None, (1, 17)).seconds == {}
