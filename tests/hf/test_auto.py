"""The class that a saved model is loaded with: that of its head, also where a user registered it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PretrainedConfig,
)

from hf_sparse import RecipeError, SparsityConfig, import_checkpoint, sparsify
from hf_sparse.hf.auto import check_length, load_tokenizer, load_whole, model_class
from tests.helpers import structures, tiny
from tests.helpers.convolutional import TinyVGGConfig, TinyVGGForImageClassification, outputs


class RegisteredConfig(PretrainedConfig):
    model_type = "hf-sparse-registered-vgg"

    def __init__(self, **rest: Any) -> None:
        self.widths, self.norm = (6, 8, 10), True
        super().__init__(**rest)


class RegisteredVGG(TinyVGGForImageClassification):
    config_class: Any = RegisteredConfig


AutoConfig.register(RegisteredConfig.model_type, RegisteredConfig)
AutoModelForImageClassification.register(RegisteredConfig, RegisteredVGG)


def test_registered_class_is_loaded_and_compacted_while_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: Any = RegisteredConfig()
    model = RegisteredVGG(config).eval()
    sparsify(model, SparsityConfig(pattern="filter", sparsity=0.5))
    model.save_pretrained(tmp_path / "dense", format="dense")
    loaded = load_whole(str(tmp_path / "dense")).eval()
    assert type(loaded) is RegisteredVGG
    assert torch.equal(outputs(loaded), outputs(model))
    done = import_checkpoint(tmp_path / "dense", tmp_path / "small", compact=True)
    assert "vgg.features.0: 3 of 6 filters" in str(done)
    small = load_whole(str(tmp_path / "small")).eval()
    torch.testing.assert_close(outputs(small), outputs(model), atol=1e-5, rtol=1e-5)


def test_unregistered_class_is_refused(tmp_path: Path) -> None:
    model = TinyVGGForImageClassification(TinyVGGConfig())
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match="cannot load model"):
        load_whole(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["torch", "__name__", "BertConfig", "AutoModel", "RegisteredVGG", "os"])
def test_names_that_are_no_model_of_the_config_are_not_taken(name: str) -> None:
    found = model_class([name], BertConfig())
    assert found.__name__ == "AutoModel"
    assert model_class([name, "BertForMaskedLM"], BertConfig()) is BertForMaskedLM
    assert model_class(["BertModel"], BertConfig()) is BertModel


def test_length_that_leaves_nothing_of_an_example_is_refused(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(RecipeError, match="examples are cut at 2 tokens, of which the tokenizer adds 2"):
        check_length(2, structures.build("bert"), tokenizer)
    check_length(3, structures.build("bert"), tokenizer)


@pytest.mark.parametrize("name", ["./nosuch", "some/deep/folder", "/nosuch/model", "~/nosuch"])
def test_folder_that_is_missing_is_looked_for_here_and_not_on_the_hub(name: str) -> None:
    where = Path(name).absolute()
    for load in (load_whole, load_tokenizer):
        with pytest.raises(RecipeError, match=re.escape(f"there is no folder {where}, and a name on the Hub is NAME")):
            load(name)


def test_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="is a file, and no folder"):
        load_whole(str(tmp_path / "model.safetensors"))


def test_name_that_may_be_one_of_the_hub_tells_both_places() -> None:
    with pytest.raises(RecipeError, match=re.escape(f"there is no folder {Path('nosuch').absolute()}, and it is not")):
        load_whole("nosuch")
