"""The package as pip builds it: with a compiler and without, from the tree and from its own source distribution."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_sparse.kernels import build, library

ROOT = Path(__file__).parents[2]
SOURCES = {path.name for path in (ROOT / "hf_sparse" / "kernels" / "csrc").iterdir()}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]

pytest.importorskip("setuptools", "77", reason="needs the build backend of pyproject.toml")


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a command away from this tree; what it says."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_SPARSE"))}
    done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def backend(hook: str, tree: Path, out: Path, **variables: str) -> Path:
    """Call what pip and build call, and return the file that was made."""
    out.mkdir(exist_ok=True)
    run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"], tree, **variables
    )
    return max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def has_compiler() -> bool:
    try:
        build.find_compiler()
    except build.BuildError:
        return False
    return True


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of what git keeps, as far as the package is made of it."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "hf_sparse", copy / "hf_sparse", ignore=shutil.ignore_patterns("__pycache__", "_cpu.*"))
    return copy


def installed(what: Path, tmp_path: Path, **variables: str) -> Path:
    """Install with pip into a folder of its own, which it returns."""
    target = tmp_path / "installed"
    run([*PIP, "install", *OFFLINE, "--target", str(target), str(what)], tmp_path, **variables)
    return target


def doctor(target: Path, tmp_path: Path) -> str:
    code = "import hf_sparse, sys; print(hf_sparse.__file__); from hf_sparse.cli.main import main; main(['doctor'])"
    said = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(target), HF_HUB_OFFLINE="1")
    assert str(target) in said, f"another hf_sparse was looked at:\n{said}"
    return said


def test_library_is_looked_for_where_it_is_built() -> None:
    assert (library.TARGET, library.LOG) == (build.TARGET, build.LOG)


def test_building_in_place_warns_of_nothing(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv = ['build']; runpy.run_module('hf_sparse.kernels.build', run_name='__main__')"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", f"import hf_sparse.kernels; {code}"]
    environment = os.environ | {"CXX": str(tmp_path / "none"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "no C++ compiler" in done.stderr, "stopped before it builds, so that the tree stays as it is"
    assert "RuntimeWarning" not in done.stderr


def test_source_distribution_holds_the_sources_and_no_machine_code(tree: Path, tmp_path: Path) -> None:
    (tree / "hf_sparse" / "kernels" / "_cpu.so").write_bytes(b"built before")
    with tarfile.open(backend("build_sdist", tree, tmp_path / "made")) as archive:
        names = {Path(name) for name in archive.getnames()}
    assert {path.name for path in names if path.parent.name == "csrc"} == SOURCES
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= {path.name for path in names}
    assert not [path for path in names if path.suffix == ".so"]
    assert {"FORMAT.md", "py.typed"} <= {path.name for path in names}


def test_installs_without_a_compiler_and_says_so(tree: Path, tmp_path: Path) -> None:
    target = installed(tree, tmp_path, CXX="no-such-compiler")
    assert not list(target.rglob("*.so"))
    said = doctor(target, tmp_path)
    (line,) = [line for line in said.splitlines() if line[4:].startswith("C++ kernels")]
    assert line.startswith("no ")
    assert "no C++ compiler: looked for no-such-compiler" in line
    assert "python -m hf_sparse.kernels.build" in line
    assert "yes kernel 'cpu' (plain torch, slow)" in said


def test_wheel_without_a_compiler_is_for_any_machine(tree: Path, tmp_path: Path) -> None:
    wheel = backend("build_wheel", tree, tmp_path / "made", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_after_one_with_a_compiler_keeps_no_old_library(tree: Path, tmp_path: Path) -> None:
    old = tree / "build" / "lib" / "hf_sparse" / "kernels" / "_cpu.so"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of another version")
    wheel = backend("build_wheel", tree, tmp_path / "made", CXX="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_wheel_from_the_source_distribution_computes_with_its_kernels(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(backend("build_sdist", tree, tmp_path / "made")) as archive:
        archive.extractall(tmp_path / "sources", filter="data")
    (unpacked,) = (tmp_path / "sources").iterdir()
    wheel = backend("build_wheel", unpacked, tmp_path / "made")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "hf_sparse/kernels/_cpu.so" in names
    assert not [name for name in names if name.endswith("_cpu.log")]
    target = installed(wheel, tmp_path)
    said = doctor(target, tmp_path)
    assert "yes C++ kernels" in said
    assert str(target / "hf_sparse" / "kernels" / "_cpu.so") in said
    kernels = [line for line in said.splitlines() if line[4:].startswith("kernel '")]
    assert kernels
    assert all("verified" in line or "cannot run here" in line for line in kernels)
