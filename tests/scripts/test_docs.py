"""The docstrings build into pages without a warning."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,  # starts interpreters that import everything
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="pdoc is not installed (extra dev)"),
]


def build(folder: Path, *modules: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path}
    command = ["bash", "scripts/tools/make_docs.sh", str(folder), *modules]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_public_names_build_without_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path, "hf_sparse")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "hf_sparse.html").read_text(encoding="utf-8")
    for name in hf_sparse.__all__:
        assert f'id="{name}"' in page
    assert (tmp_path / "index.html").is_file()


def test_a_warning_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "badly_typed.py").write_text(
        "from __future__ import annotations\ndef f(a: Nowhere) -> int:\n    '''Do.'''\n    return 1\n"
    )
    done = build(tmp_path / "out", "badly_typed", path=str(tmp_path))
    assert done.returncode == 1
    assert "Nowhere" in done.stderr
    assert "without a warning" in done.stderr
