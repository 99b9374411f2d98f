"""What other programs wrote and no model expresses: refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse import CheckpointError, RecipeError, import_checkpoint
from tests.hf.conversion.origins import FIXTURES, change_config, change_state, copied


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"0": [8, 4, 12]}, "names head 12 of layer 0, which has 12"),
        ({"9": [1]}, "must name layers from 0 to 2, got layer 9"),
        ({"0": [-1]}, "must be a list of numbers of heads"),
        ({"0": "84"}, "must be a list of numbers of heads"),
        ({"x": [1]}, "numbers of layers as keys"),
        ([8, 4, 7], "must be a mapping from layers to heads"),
        ({"0": [8, 4], "1": list(range(12))}, "10 of 12 heads of .* are left, and there are 9 in the files"),
        ({"0": [True]}, "must be a list of numbers of heads"),
    ],
)
def test_pruned_heads_that_cannot_be_are_refused(stated: Any, reason: str, tmp_path: Path) -> None:
    folder = copied("pruned-heads-bert", tmp_path / "in")
    change_config(folder, pruned_heads=stated)
    with pytest.raises(CheckpointError, match=reason):
        import_checkpoint(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_nonorm_models_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = copied("nn-pruning", tmp_path / "in")
    change_config(folder, layer_norm_type="no_norm")
    with pytest.raises(CheckpointError, match=r"NoNorm.*Import the variant without '-opt-'"):
        import_checkpoint(folder, tmp_path / "out")


def test_hidden_dimensions_that_are_gone_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"15 hidden dimensions, and config.json says 16.* residual stream"):
        import_checkpoint(FIXTURES / "cofi-hidden", tmp_path / "out")


def test_sub_block_that_is_gone_with_its_norm_is_refused(tmp_path: Path) -> None:
    folder = copied("cofi", tmp_path / "in")
    gone = "bert.encoder.layer.3.output.dense", "bert.encoder.layer.3.intermediate.dense"
    change_state(folder, lambda state: {k: t for k, t in state.items() if not k.startswith(gone)})
    with pytest.raises(CheckpointError, match=r"layer\.3\.intermediate' is not in the files at all.*layer norm"):
        import_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ({"hidden_z": torch.tensor([0.0] + [1.0] * 15)}, r"1 of 16 are 0.*layer norms"),
        ({"hidden_z": torch.full((16,), 0.9)}, "scales dimensions of the residual stream"),
        ({"mlp_z": torch.tensor([1.0] * 11 + [0.0])}, "layer 11 of `mlp_z` in zs.pt is 0"),
        ({"head_layer_z": torch.tensor([0.0] + [1.0] * 11)}, "layer 0 of `head_layer_z` in zs.pt is 0"),
        ({"head_z": torch.ones(12, 3)}, "must have 12 x 4 elements, got 36"),
        ({"other_z": torch.ones(1)}, "unknown mask 'other_z'"),
        ([1], "must hold a state dict"),
    ],
)
def test_masks_of_cofi_that_no_model_expresses_are_refused(masks: Any, reason: str, tmp_path: Path) -> None:
    folder = copied("cofi-masks", tmp_path / "in")
    torch.save(masks, folder / "zs.pt")
    with pytest.raises(CheckpointError, match=reason):
        import_checkpoint(folder, tmp_path / "out")


def test_pickled_module_of_cofi_is_refused(tmp_path: Path) -> None:
    folder = copied("cofi-masks", tmp_path / "in")
    (folder / "zs.pt").rename(folder / "l0_module.pt")
    with pytest.raises(CheckpointError, match="a pickled module, which is not read"):
        import_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("bert.encoder.layer.0.output.dense.mask_scores", "movement-pruning checkpoint from the middle of training"),
        ("bert.encoder.layer.0.output.dense.weight_fake_quant.scale", "quantization-aware"),
        ("bert.encoder.layer.0.output.dense.qweight", "quantized integers"),
        ("base_model.model.bert.encoder.layer.0.lora_A.weight", "merge them first"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_refused(key: str, reason: str, tmp_path: Path) -> None:
    folder = copied("tied-2-4", tmp_path / "in")
    change_state(folder, lambda state: {**state, key: torch.ones(2)})
    with pytest.raises(CheckpointError, match=reason):
        import_checkpoint(folder, tmp_path / "out")


def test_config_of_many_layers_is_refused_before_a_model_is_built(tmp_path: Path) -> None:
    folder = copied("pruned-heads-bert", tmp_path / "in")
    change_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="asks for 1000000000 layers"):
        import_checkpoint(folder, tmp_path / "out")


def test_folder_without_a_model_and_link_out_of_it_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file, and no pytorch_model\.bin"):
        import_checkpoint(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "pytorch_model.bin").symlink_to(FIXTURES / "torch-prune" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a link to"):
        import_checkpoint(tmp_path / "in", tmp_path / "out")


def test_compact_needs_a_config(tmp_path: Path) -> None:
    folder = copied("tied-2-4", tmp_path / "in")
    (folder / "config.json").unlink()
    for source in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(RecipeError, match=r"needs the config\.json"):
            import_checkpoint(source, tmp_path / "out", compact=True)
