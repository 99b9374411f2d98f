"""Old dotted paths give the modules that they gave, under their new names."""

from __future__ import annotations

import importlib
import sys

import pytest

from hf_sparse._moved import MOVED, new_path


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_path_is_the_new_module_with_a_warning(old: str) -> None:
    name = f"hf_sparse.{old}"
    new = importlib.import_module(f"hf_sparse.{MOVED[old]}")
    spec = new.__spec__
    sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match=f"{name} has moved to hf_sparse.{MOVED[old]}"):
        assert importlib.import_module(name) is new
    assert new.__spec__ is spec


def test_module_below_a_moved_package_is_not_imported_twice() -> None:
    bitmask = importlib.import_module("hf_sparse.formats.codecs.bitmask")
    with pytest.warns(FutureWarning):
        assert importlib.import_module("hf_sparse.codecs.bitmask") is bitmask


@pytest.mark.parametrize("name", ["hf_sparse.nothing", "hf_sparse", "torch", "hf_sparse.pruning.pruner"])
def test_other_names_are_left_alone(name: str) -> None:
    assert new_path(name) is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_documented_names_are_found_at_their_old_paths() -> None:
    documented = {
        "adapters": "merged_update",
        "learning": "DistillationCallback",
        "importance": "head_importance",
        "metrics": "accuracy",
        "runtime": "SpeedTable",
        "kernels": "pack",
    }
    for module, name in documented.items():
        assert hasattr(importlib.import_module(f"hf_sparse.{module}"), name), (module, name)
