"""The script of the mixture of experts: what is trained is kept, and methods are compared at equal stored bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts.reference import experts


def test_methods_leave_the_bytes_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("Half of the experts, or half of each. " * 40)
    monkeypatch.setattr(experts, "LENGTH", 16)
    text, found = str(tmp_path / "text.txt"), tmp_path / "found.json"
    words = ["--train", text, "--test", text, "--output", str(found), "--models", str(tmp_path / "models")]
    words += ["--seeds", "0", "1", "--steps", "2", "--windows", "2", "--samples", "2", "--budgets", "0.5"]
    methods = ["magnitude", "random", "whole experts, REAP", "whole experts, random", "2:4, magnitude"]
    monkeypatch.setattr(sys, "argv", ["experts.py", *words, "--methods", *methods])
    experts.main()
    first = json.loads(found.read_text())
    rows = {row["method"]: row for row in first["rows"]}
    assert list(rows) == ["dense", *methods]
    assert rows["dense"]["share"] == 1.0
    for name in methods:
        assert rows[name]["share"] == pytest.approx(0.53 if "2:4" in name else 0.5, abs=0.01)
        assert len(rows[name]["bits"]) == 2
        assert rows[name]["bits"] != rows["dense"]["bits"]

    def refused(*_: object) -> None:
        raise AssertionError("the folder has this model")

    monkeypatch.setattr(experts, "train", refused)
    experts.main()
    assert json.loads(found.read_text()) == first
