"""The kernels for 64-bit ARM, compiled here and run in an emulator where there are both."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "tools" / "check_neon.sh"


@pytest.mark.slow
def test_neon_computes_what_it_should_in_an_emulator():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=1100, check=False)  # noqa: S607
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: at most" in done.stdout
    assert "neon: int8 bit by bit" in done.stdout
    assert "neon: no int8 kernels" in done.stdout
    assert done.stdout.count("all right") == 5
