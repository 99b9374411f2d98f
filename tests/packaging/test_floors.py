"""Folders are floors: a module imports from its own folder or from a lower floor, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_sparse"
FLOORS = [
    {"_version", "_moved", "errors"},
    {"registry", "utils"},
    {"config"},
    {"formats", "profiling", "modeling", "reporting"},
    {"pruning", "distillation", "kernels", "vocabulary"},
    {"runtime"},
    {"hf"},
    {"recipe"},
    {"analysis"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
HUGGING_FACE = {"transformers", "accelerate", "huggingface_hub", "datasets", "evaluate", "tokenizers", "peft"}
FIRST_WITH_TORCH, FIRST_WITH_HUGGING_FACE = FLOOR["formats"], FLOOR["hf"]
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the dotted name of a module below the package; that of the package itself is `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of all that a file imports, also inside functions and `if TYPE_CHECKING`."""
    package = ("hf_sparse", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            yield from ((node.lineno, ".".join(filter(None, [*base, alias.name]))) for alias in node.names)


def module_of(name: str) -> str | None:
    """Return the module of hf_sparse that an imported name lies in, or None."""
    top, *rest = name.split(".")
    if top != "hf_sparse":
        return None
    while rest and ".".join(rest) not in MODULES:
        rest.pop()
    return ".".join(rest) or "__init__"


def refusal(folder: str, name: str) -> str | None:
    """Say why a module of this folder may not import this name, or return None."""
    top = name.split(".")[0]
    module, floor = module_of(name), FLOOR[folder]
    if module is not None:
        other = module.split(".")[0]
        if other == folder:
            return None
        return f"{other} is on floor {FLOOR[other]}, {folder} on {floor}" if FLOOR[other] >= floor else None
    if floor < FIRST_WITH_TORCH and top not in sys.stdlib_module_names | {"yaml"}:
        return "floors below `formats` use the standard library only"
    if floor < FIRST_WITH_HUGGING_FACE and top in HUGGING_FACE:
        return "Hugging Face is for the floor `hf` and above"
    return None


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_folder_is_on_one_floor_and_every_name_exists() -> None:
    found = {name.split(".")[0] for name in MODULES}
    assert set(FLOOR) == found
    assert len(FLOOR) == sum(map(len, FLOORS))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_its_own_folder_or_a_lower_floor(path: Path) -> None:
    folder = name_of(path).split(".")[0]
    found = [(line, name, refusal(folder, name)) for line, name in imports(path)]
    wrong = [f"{path.name}:{line} imports {name}: {why}" for line, name, why in found if why]
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        own = name.removesuffix(".__init__")
        # A package that gathers the names of its modules stands above them: an import of the package by one of them
        # (`from . import sibling`) is an import of the sibling.
        graph[name] = {
            module
            for _, target in imports(path)
            if (module := module_of(target)) is not None and module != name and not own.startswith(f"{module}.")
        }
    assert circle(graph) == []


def test_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"a"}, "c": {"a"}})


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("registry", "torch"),
        ("formats", "hf_sparse.pruning.pruner.Pruner"),
        ("formats", "hf_sparse.modeling.layer_matching"),
        ("runtime", "transformers.Trainer"),
        ("hf", "hf_sparse.cli.main"),
        ("analysis", "hf_sparse"),
    ],
)
def test_floor_refuses_what_lies_above_or_beside_it(folder: str, name: str) -> None:
    assert refusal(folder, name) is not None


def test_root_has_at_most_eight_files() -> None:
    names = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(names) <= 8, names


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
    assert 60 <= statistics.median(length for name, length in lengths.items() if "__init__" not in name) <= 140
