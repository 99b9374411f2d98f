"""The build of the C++ kernels where a compiler lacks something."""

from __future__ import annotations

import logging
import shutil
import stat
from pathlib import Path

import pytest
import torch

from hf_sparse.kernels import build, library, library_status, pack
from hf_sparse.kernels import fp32_ops as ops


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("missing", ["-c", "-shared"])
def test_without_openmp_the_kernels_work_on_one_thread_and_say_so(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"""#!/bin/sh
case " $* " in *" -fopenmp "*) case " $* " in *" {missing} "*) echo "no OpenMP here" >&2; exit 1;; esac;; esac
exec g++ "$@"
""")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    made = library.Library(str(build.build(tmp_path / "_cpu.so", extra=("-O0",))))
    assert not made.parallel
    monkeypatch.setattr(library, "_load", lambda: (made, ""))
    assert "on one thread: they were built without OpenMP" in library_status().message
    monkeypatch.setattr(ops, "library", lambda: made)
    x, weight = torch.randn(33, 20), torch.randn(9, 20)
    torch.testing.assert_close(ops.linear(x, pack(weight)), x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not library_status().available, reason="the kernels are not built")
def test_instruction_sets_by_their_variable(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """INFERENCE.md has their names."""
    text = (Path(library.__file__).parents[1] / "runtime" / "INFERENCE.md").read_text(encoding="utf-8")
    (documented,) = [line for line in text.replace("\n  ", " ").splitlines() if library.ISA_VARIABLE in line]
    made = library.Library(str(library.TARGET))
    names = {*build.X86_KERNELS, *made.isas, "neon", "portable", "none"}
    assert [name for name in names if f"`{name}`" not in documented] == []
    load = library._load.__wrapped__
    for name in made.isas:
        monkeypatch.setenv(library.ISA_VARIABLE, name)
        found, _ = load()
        assert found is not None
        assert found.isa == name
    with caplog.at_level(logging.WARNING):
        for name in ("none", "avx5"):
            monkeypatch.setenv(library.ISA_VARIABLE, name)
            assert load()[0] is None
    (message,) = [record.getMessage() for record in caplog.records]
    expected = f"HF_SPARSE_ISA must be one of {', '.join(made.isas)} on this processor, or 'none' for plain torch"
    assert message.startswith(f"{expected}; got 'avx5'")
