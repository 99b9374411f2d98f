"""The worked examples of CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


class Example(NamedTuple):
    """One part to add: where its file would lie, its source, its test, and the contract that runs over it."""

    path: str
    source: str
    test: str
    contract: str

    @property
    def module(self) -> str:
        """Name of the module that the file would be."""
        return self.path.removesuffix(".py").replace("/", ".")


def example(title: str) -> Example:
    """Read a section of CONTRIBUTING.md."""
    section = re.split(r"^##+ ", TEXT.split(f"### {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", section, flags=re.DOTALL)
    assert [path.split("/")[0] for path, _ in blocks] == ["hf_sparse", "tests"]
    contract = re.search(r"tests/contracts/\w+\.py", section)
    assert contract is not None
    return Example(blocks[0][0], blocks[0][1], blocks[1][1], contract.group())
