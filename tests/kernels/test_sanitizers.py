"""The C++ under AddressSanitizer and UBSan, driven through its C interface by small programs without Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hf_sparse.kernels.build import BuildError, build, find_compiler

DRIVERS = ("sanitized.cpp", "sanitized_int8.cpp", "exact_int8.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


@pytest.mark.slow
def test_no_sanitizer_complains(tmp_path):
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    try:
        compiler = find_compiler()
        subprocess.run([*compiler, *SANITIZERS, str(empty), "-o", str(tmp_path / "empty")], check=True)
    except (BuildError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a C++ compiler with sanitizers: {error}")
    library = build(tmp_path / "_cpu.so", SANITIZERS)  # sources that do not compile fail
    for driver in DRIVERS:
        program, source = tmp_path / "driver", str(Path(__file__).parent / driver)
        subprocess.run([*compiler, *SANITIZERS, "-std=c++17", source, str(library), "-o", str(program)], check=True)
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "all right" in done.stdout
