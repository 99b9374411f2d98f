"""Every example of CONTRIBUTING.md works: one file, one registration, its hand-checked test, and the contract tests.

The example is imported from a temporary folder under the name that it would have in the package, in its own process.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.contributing import ROOT, TEXT, example

PARTS = ("A scorer", "A selection", "A codec", "A kernel", "An architecture", "An origin", "A command")
RUN = """
import importlib.util, sys
import pytest
import hf_sparse, hf_sparse.cli
name, path, hand_checked, contract, word = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, path)
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "ignore"]
status = pytest.main([*options, hand_checked])
status = status or pytest.main([*options, contract, "-k", word])
sys.exit(int(status))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("title", PARTS)
def test_example_keeps_the_contract(title: str, tmp_path: Path) -> None:
    part = example(title)
    path = part.path
    assert not (ROOT / path).exists(), "the example is not part of the package"
    file, hand_checked = tmp_path / Path(path).name, tmp_path / f"test_{Path(path).name}"
    file.write_text(part.source, encoding="utf-8")
    hand_checked.write_text(part.test, encoding="utf-8")
    word = Path(path).stem.partition("_")[2]  # example_rows: the tests whose names contain `rows` or `example`
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            part.module,
            str(file),
            str(hand_checked),
            str(ROOT / part.contract),
            f"example and {word}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = [int(count) for count in re.findall(r"(\d+) passed", done.stdout)]
    assert len(passed) == 2, done.stdout
    assert min(passed) >= 1


def test_every_path_of_the_layout_exists() -> None:
    layout = TEXT.split("## Layout", 1)[1].split("## Adding", 1)[0]
    for path in re.findall(r"`([\w/.]+/[\w.]*)`", layout):
        assert (ROOT / path).exists() or (ROOT / "hf_sparse" / path).exists(), path
