"""The public names of hf_sparse are this list; whoever changes it changes the interface, and tells the changelog."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from importlib import metadata

import pytest

import hf_sparse

PUBLIC = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DistillationCallback",
    "DistillationConfig",
    "Edits",
    "GroupConfig",
    "HfSparseConfig",
    "HubError",
    "LayerReport",
    "PatternError",
    "Pruner",
    "RecipeError",
    "RuntimeReport",
    "SparseConfig",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityError",
    "SparsitySummary",
    "Summary",
    "VocabularyReport",
    "compact",
    "drop_experts",
    "drop_layers",
    "expert_saliency",
    "fill",
    "head_importance",
    "import_checkpoint",
    "keep_zeros",
    "last_checkpoint",
    "layer_importance",
    "load_lora",
    "load_runtime",
    "merge_experts",
    "merged_update",
    "prepare_for_inference",
    "prune_experts",
    "prune_layers",
    "restore_dense",
    "save_lora",
    "save_runtime",
    "sparsify",
    "sparsify_checkpoint",
    "summarize",
    "to_dense_runtime",
    "to_runtime",
    "trim_vocabulary",
    "unfreeze_zeros",
]


ALIASES = {
    "HfSparseConfig": "SparseConfig",
    "ConfigError": "RecipeError",
    "SparsitySummary": "Summary",
    "unfreeze_zeros": "fill",
    "prepare_for_inference": "to_runtime",
    "restore_dense": "to_dense_runtime",
}
METHODS = {
    "verify_sparsity": "finish",
    "finalize": "bake",
    "calibrate": "measure",
    "param_groups": "parameter_groups",
    "score_param_groups": "score_groups",
    "accumulate_gradients": "observe",
}


@pytest.mark.parametrize(("alias", "name"), METHODS.items())
def test_method_of_the_pruner_has_another_name(alias: str, name: str) -> None:
    assert getattr(hf_sparse.Pruner, alias) is getattr(hf_sparse.Pruner, name)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_alias_is_the_class_under_another_name(alias: str, name: str) -> None:
    assert getattr(hf_sparse, alias) is getattr(hf_sparse, name)


def test_public_names_are_the_checked_in_list() -> None:
    assert sorted(hf_sparse.__all__) == PUBLIC


def test_package_has_no_other_public_names() -> None:
    names = {name for name, value in vars(hf_sparse).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in names if not name.startswith("_")} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_of_its_own(name: str) -> None:
    text = vars(hf_sparse)[name].__doc__ or ""
    assert len(text.split()) >= 3
    assert not text.startswith(f"{name}("), "that is the signature which dataclasses make up"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.endswith("Error")])
def test_error_derives_from_the_one_base(name: str) -> None:
    assert issubclass(vars(hf_sparse)[name], hf_sparse.SparsityError)


def test_errors_of_every_module_derive_from_the_one_base() -> None:
    own = [cls for _, cls in inspect.getmembers(sys.modules["hf_sparse.errors"], inspect.isclass)]
    assert own
    assert all(issubclass(cls, hf_sparse.SparsityError) for cls in own)


def test_version_is_the_installed_one() -> None:
    try:
        installed = metadata.version("hf_sparse")
    except metadata.PackageNotFoundError:
        pytest.skip("hf_sparse is not installed here, only on the path")
    assert hf_sparse.__version__ == installed


def test_import_registers_the_quantizer_and_leaves_the_entry_points_out() -> None:
    """Everybody who loads a packed model pays for `import hf_sparse`, and only some train with a recipe."""
    code = """
import sys
import hf_sparse
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print("hf_sparse" in AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_sparse" in AUTO_QUANTIZER_MAPPING)
print([name for name in ("cli", "recipe", "analysis", "reporting") if f"hf_sparse.{name}" in sys.modules])
print([name for name in ("evaluate", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["True True", "[]", "[]"]
