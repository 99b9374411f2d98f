"""hf/patches.py is the one place that replaces anything of transformers, accelerate, huggingface_hub and PEFT."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from accelerate import Accelerator
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.quantizers import HfQuantizer

from hf_sparse.hf import patches

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_sparse"
PATCHES = PACKAGE / "hf" / "patches.py"
FILES = sorted(PACKAGE.rglob("*.py"))
LIBRARIES = {"transformers", "accelerate", "huggingface_hub", "peft", "datasets", "tokenizers", "evaluate"}
METHODS = {
    name
    for owner in (Trainer, PreTrainedModel, HfQuantizer, Accelerator, HfApi)
    for name in dir(owner)
    if callable(getattr(owner, name)) and not name.startswith("__")
}
PEFT_METHODS = {"merge", "unmerge", "merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"}


def imported(tree: ast.AST) -> set[str]:
    """Return the local names that a file imports from the libraries."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in LIBRARIES}
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] in LIBRARIES:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def root_of(node: ast.AST) -> str | None:
    """Return the first name of an expression like `a.b.c`."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def replacements(source: str) -> Iterator[str]:
    """Yield line and text of each assignment to, or deletion of, something of the libraries in a file.

    That is an attribute of what was imported from them, or of a name that such a thing was assigned to; a method of
    theirs on any object; and entries of `vars(...)` or `__dict__` under such a name, or one that is not known.
    """
    tree = ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):  # `module: Any = transformers.trainer`
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and root_of(node.value) in names:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    methods = METHODS | PEFT_METHODS

    def of_library(owner: ast.AST, name: object) -> bool:
        mine = isinstance(owner, ast.Name) and owner.id == "self"
        return root_of(owner) in names or (name in methods and not mine)

    for node in ast.walk(tree):
        wrong = False
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            wrong = of_library(node.value, node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "setattr",
            "delattr",
            "__setattr__",
        ):
            wrong = of_library(node.args[0], getattr(node.args[1], "value", None))
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            space = ast.unparse(node.value)
            if space.startswith("vars(") or space.endswith(".__dict__"):
                wrong = not isinstance(node.slice, ast.Constant) or node.slice.value in methods
        if wrong:
            yield f"{node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import Trainer\nTrainer.train = f",
        "import transformers.trainer as module\nmodule.save_fsdp_model = f",
        "import transformers\nm: Any = transformers.trainer\nm.x, m.y = f, g",
        "from transformers.quantizers import auto\nsetattr(auto, NAME, ())",
        "from transformers import Trainer as T\ndel T.train",
        "trainer.save_model = f",
        "vars(model)['save_pretrained'] = f",
        "parent.__dict__[verb] = f",
        "object.__setattr__(layer, 'merge', f)",
    ],
)
def test_scan_finds_a_replacement(code: str) -> None:
    assert list(replacements(code))


def test_scan_leaves_other_assignments_alone() -> None:
    code = """
from torch import nn
self.train = f
layer.weight = w
vars(x)["traced"] = {}
object.__setattr__(self, "train", v)
"""
    assert not list(replacements(code))


ALLOWED = {
    # State of ours on a module, under a key of ours.
    "modeling/model_state.py": {"vars(owner)[self.name]"},
    # What accelerate calls for a layer that a device_map places: the forward method of its class.
    "runtime/packed_linear.py": {"vars(layer)[name]"},
    # Methods of torch, not of these libraries, on a module in runtime form.
    "runtime/guards.py": {"vars(module)['_apply']", "vars(module)['_load_from_state_dict']", "vars(module)[name]"},
}


@pytest.mark.parametrize("path", [path for path in FILES if path != PATCHES], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_other_file_replaces_anything_of_the_libraries(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    found = [line for line in replacements(path.read_text(encoding="utf-8")) if line.partition(": ")[2] not in allowed]
    assert not found, f"move it to hf/patches.py, with a row in PATCHES: {found}"


def calls() -> Iterator[tuple[str, str, str]]:
    """Yield function, owner and name of each use of patches.py; a name that is not constant is that of each verb."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("patches.") and path != PATCHES:
                how = ast.unparse(node.func).removeprefix("patches.")
                if how == "on_registration":
                    yield how, "nn.Module", "register_module"
                elif isinstance(node.args[1], ast.Constant):
                    yield how, ast.unparse(node.args[0]), str(node.args[1].value)
                else:
                    assert path.name == "peft.py"
                    yield from ((how, "parent", verb) for verb in PEFT_METHODS - {"unmerge_adapter", "unload"})


def test_each_use_has_a_row_and_each_row_a_use() -> None:
    rows = {(patch.how, patch.what.rpartition(".")[2]) for patch in patches.PATCHES}
    used = {(how, name) for how, _, name in calls() if how != "take"}
    assert used == rows


def test_rows_are_complete_and_different() -> None:
    assert len({(patch.what, patch.how) for patch in patches.PATCHES}) == len(patches.PATCHES)
    for patch in patches.PATCHES:
        assert patch.how in ("wrap", "put", "append", "on_registration")
        assert callable(getattr(patches, patch.how))
        assert all(patch), patch
        assert patch.upstream == "none filed" or patch.upstream.startswith("https://github.com/")


def test_what_has_no_row_is_refused_and_stays() -> None:
    original = Trainer.evaluate
    with pytest.raises(KeyError, match=r"no row for evaluate of .*Trainer"):
        patches.wrap(Trainer, "evaluate", lambda original, *args: None)
    with pytest.raises(KeyError, match="no row for train"):
        patches.wrap(PreTrainedModel, "train", lambda original, *args: None)
    model = nn.Linear(1, 1)
    with pytest.raises(KeyError, match="no row for extra_repr"):
        patches.put(model, "extra_repr", lambda: "")
    with pytest.raises(KeyError, match="no row for __all__"):
        patches.append(transformers.trainer, "__all__", 1)
    assert Trainer.evaluate is original
    assert "extra_repr" not in vars(model)


def test_wrapped_once_and_static_stays_static(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        def method(self, x: int) -> int:
            return x

        @staticmethod
        def static(x: int) -> int:
            return x

    rows = tuple(patches.Patch(f"Owner.{name}", "wrap", "why", "none filed", "when") for name in ("method", "static"))
    monkeypatch.setattr(patches, "PATCHES", rows)
    Owner.__qualname__ = "Owner"
    for _ in range(2):
        patches.wrap(Owner, "method", lambda original, self, x: original(self, x) + 1)
        patches.wrap(Owner, "static", lambda original, x: original(x) + 1)
    assert (Owner().method(1), Owner().static(1), Owner.static(1)) == (2, 2, 2)
    assert Owner.method.__name__ == "method"


def test_put_and_take() -> None:
    model = nn.Linear(1, 1)
    patches.put(model, "save_pretrained", len)
    assert vars(model)["save_pretrained"] is len
    patches.take(model, "save_pretrained")
    patches.take(model, "save_pretrained")
    assert "save_pretrained" not in vars(model)


COMPARE = """
import inspect, sys
import transformers, transformers.trainer, transformers.modeling_utils, transformers.quantizers, accelerate
import transformers.integrations.accelerate, huggingface_hub.hf_api, torch

def members():
    found = {}
    for module in [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] in LIBRARIES and m is not None]:
        for name, value in list(vars(module).items()):
            found[module.__name__, name] = value
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found.update({(value.__qualname__, key): entry for key, entry in vars(value).items()})
    return found

before = members()
import hf_sparse
after = members()
for (owner, name), value in sorted(before.items(), key=lambda item: item[0]):
    if after.get((owner, name)) is not value and not name.startswith("__"):
        print(owner + "." + name)
"""


def test_import_changes_what_the_table_lists_and_nothing_else() -> None:
    code = f"LIBRARIES = {sorted(LIBRARIES)!r}\n{COMPARE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    # sentence-transformers is not imported for us: its class is wrapped when a model of it is saved.
    later = {"BaseModel._create_model_card"}
    expected = {patch.what for patch in patches.PATCHES if patch.how in ("wrap", "append")} - later
    assert set(done.stdout.split()) == expected
