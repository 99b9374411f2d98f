"""Compacted models that a config can express are saved dense and load anywhere; which families read what is a table."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer

from hf_sparse import RecipeError, SparsityConfig, compact, import_checkpoint, sparsify
from tests.helpers.tiny_families import ATTEMPTS, families, model_class, tiny_config
from tests.helpers.training import bert

MODELS = Path(transformers.__file__).parent / "models"
FORMAT = Path(__file__).parents[2] / "hf_sparse" / "formats" / "FORMAT.md"
NEEDED = {"diffusion_gemma": {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 32}}
"""What a config needs besides its defaults."""
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")


class UnevenConfig(BertConfig):
    model_type = "hf_sparse_uneven_test"


class UnevenModel(PreTrainedModel):
    """An encoder whose layers read `per_layer_config`, as a few families do."""

    config_class = UnevenConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.ModuleList(BertLayer(config.per_layer_config[i]) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            out = layer(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


def uneven() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
    }
    return UnevenModel(UnevenConfig(**sizes)).eval()


def remove_neurons(model: nn.Module, counts: list[int]) -> None:
    layers: Any = [module for module in model.modules() if isinstance(module, BertLayer)]
    with torch.no_grad():
        for layer, count in zip(layers, counts, strict=True):
            layer.output.dense.weight[:, :count] = 0
    compact(model)


def test_uneven_layers_go_into_the_config_where_the_family_reads_it(tmp_path: Path) -> None:
    model = uneven()
    remove_neurons(model, [20, 5])
    model.save_pretrained(tmp_path, format="dense")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["per_layer_config"] == {"0": {"intermediate_size": 12}, "1": {"intermediate_size": 27}}
    assert "quantization_config" not in config
    again = UnevenModel.from_pretrained(tmp_path).eval()
    assert not hasattr(again, "hf_quantizer")
    hidden = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(again(hidden), model(hidden))


def test_even_layers_need_no_more_than_the_sizes_of_the_config(tmp_path: Path) -> None:
    model = bert().eval()
    remove_neurons(model, [24, 24])
    model.save_pretrained(tmp_path, format="dense")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] == 40
    assert "per_layer_config" not in config
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 10, (2, 6))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_model_is_as_it_was_after_saving_dense(tmp_path: Path) -> None:
    model = bert().eval()
    remove_neurons(model, [24, 24])
    before = copy.deepcopy(model.config.to_dict())
    model.save_pretrained(tmp_path / "dense", format="dense")
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path / "packed")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")


def test_even_layers_are_converted_to_dense_from_packed_files(tmp_path: Path) -> None:
    model = bert().eval()
    remove_neurons(model, [24, 24])
    model.save_pretrained(tmp_path / "packed")
    import_checkpoint(tmp_path / "packed", tmp_path / "dense", "dense")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert again.bert.encoder.layer[1].output.dense.in_features == 40
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("pattern", ["head", "neuron"])
def test_what_no_config_expresses_is_refused_as_before(pattern: str, tmp_path: Path) -> None:
    model = sparsify(bert(), SparsityConfig(pattern=pattern, sparsity=0.5, selection="global"))
    compact(model)
    with pytest.raises(RecipeError, match=r"config\.json cannot express"):
        model.save_pretrained(tmp_path, format="dense")
    assert not list(tmp_path.iterdir())


# -- which families read it --------------------------------------------------------------------------------------------


def readers() -> list[str]:
    """Return the families whose modeling code looks at `per_layer_config`."""
    files = MODELS.glob("*/modeling_*.py")
    return sorted({path.parent.name for path in files if "per_layer_config[" in path.read_text(encoding="utf-8")})


def documented() -> dict[str, set[str]]:
    """Return the table of FORMAT.md: the sizes that each family reads per layer."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", FORMAT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {family: set(re.findall(r"`(\w+)`", sizes)) for family, sizes in rows if (MODELS / family).is_dir()}


def test_table_lists_the_families_that_read_it() -> None:
    assert sorted(documented()) == readers()


SLOW = {"diffusion_gemma"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(documented())]
)
def test_table_lists_the_sizes_that_change_a_layer(family: str) -> None:
    kinds = [kind for kind in families() if _module(kind) == family]
    assert kinds
    found: set[str] = set()
    for kind in kinds:
        found |= read_per_layer(kind)
    assert found == documented()[family]


def _module(kind: str) -> str:
    try:
        return model_class(kind).__module__.split(".")[2]
    except (ImportError, AttributeError):
        return ""


def read_per_layer(kind: str) -> set[str]:
    """Build a tiny model with another size in its first layer, and return the sizes that changed weights of it."""
    config: Any = None
    base: dict[str, Any] = {}
    for attempt in ATTEMPTS:
        try:
            config = tiny_config(kind, attempt)
            for name, value in NEEDED.get(kind, {}).items():
                setattr(config.get_text_config(), name, value)
            base = shapes(kind, config)
            break
        except Exception:  # noqa: BLE001, S112  some attempts fit no model of the family
            continue
    assert base, kind
    found = set()
    for size in SIZES:
        changed = copy.deepcopy(config)
        text = changed.get_text_config()
        stated = text._getattr_without_heterogeneous_validation(size, None)
        if stated is None:
            continue
        overrides = copy.deepcopy(text._heterogeneity_spec.per_layer_overrides) if text.is_heterogeneous else {}
        overrides.setdefault(0, {})[size] = 2 * stated
        try:
            text.per_layer_config = overrides
            if shapes(kind, changed) != base:
                found.add(size)
        except Exception:  # noqa: BLE001, S112  transformers refuses a size that the family reads from the whole config
            continue
    return found


def shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(kind)._from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
