"""Imports go down only: every module of hf_sparse lies on a floor and imports from its own or a lower one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_sparse"
FLOORS = {
    0: "config distillation_config edits errors manifest registry",
    1: "allocation budget codecs kth latency losses markdown patterns radix schedules scorers selection speed",
    2: "ablation architectures attaching compaction distillation examples importance masking measuring "
    "permutation plan pruner ranks report targets units warmup zeros",
    3: "compressed_tensors files kernels runtime shards",
    4: "adapters callback checkpoint convert export export_inputs export_targets filling fsdp hub inspection "
    "learning loading loss_terms model_card oneshot optimizer packing quantizer requantize saving "
    "sparse_config teacher teacher_cache",
    5: "__main__ bench cli cli_data cli_share compare data doctor drawing heads labelled metrics page pareto placing "
    "prune recipe recipe_sections recipe_text report_page results run sensitivity stages stress teach "
    "text_metrics",
    6: "__init__",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
HUGGING_FACE = {"transformers", "accelerate", "huggingface_hub", "datasets", "evaluate", "tokenizers"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of all that a file imports, also inside functions and `if TYPE_CHECKING`."""
    package = ("hf_sparse", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], node.module] if node.level else [node.module]
            yield from ((node.lineno, ".".join(filter(None, [*base, alias.name]))) for alias in node.names)


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def refusal(floor: int, name: str) -> str | None:
    """Say why a module on this floor may not import this name, or return None."""
    top, *rest = name.split(".")
    if top == "hf_sparse":
        module = rest[0] if rest and rest[0] in FLOOR else "__init__"  # a name that is no module comes from the top
        return f"{module} is on floor {FLOOR[module]}" if FLOOR[module] > floor else None
    if floor == 0 and top != "yaml" and top not in sys.stdlib_module_names:
        return "floor 0 is the standard library only"
    return "Hugging Face is for floor 4 and above" if floor < 4 and top in HUGGING_FACE else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_its_own_or_a_lower_floor(path: Path) -> None:
    module = module_of(path)
    assert module in FLOOR, f"{module} is on no floor: file it in FLOORS of {Path(__file__).name}"
    found = [(line, name, refusal(FLOOR[module], name)) for line, name in imports(path)]
    wrong = [
        f"{path.name}:{line}: {module} (floor {FLOOR[module]}) imports {name}: {why}"
        for line, name, why in found
        if why
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("floor", "name"),
    [(0, "torch"), (1, "hf_sparse.pruner.Pruner"), (3, "transformers.Trainer"), (4, "hf_sparse.cli"), (5, "hf_sparse")],
)
def test_floor_refuses_what_lies_above_it(floor: int, name: str) -> None:
    assert refusal(floor, name) is not None
