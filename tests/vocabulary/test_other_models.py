"""Models with further tables and nested configs, and tokenizers that come from a SentencePiece file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from hf_sparse import RecipeError, trim_vocabulary
from tests.helpers.tokenizers import CORPUS, byte_bpe, suffix_bpe

DOMAIN = list(CORPUS[:2])
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def hidden_states(model: Any, tokenizer: Any, text: str, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of a sequence."""
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        states: tuple[torch.Tensor, ...] = model(**ids, **inputs, output_hidden_states=True).hidden_states
    return states


@pytest.mark.parametrize("further", [0, 8], ids=["same height", "a table for fewer tokens"])
def test_table_for_each_layer_of_gemma_3n_is_trimmed_too(further: int) -> None:
    torch.manual_seed(0)
    tokenizer = byte_bpe()
    config = Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 2}, vocab_size=len(tokenizer) + further, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(tokenizer), num_key_value_heads=1, head_dim=8, laurel_rank=4, altup_num_inputs=2,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0],
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model: Any = Gemma3nForCausalLM(config).eval()
    whole, names = copy.deepcopy(model), copy.deepcopy(tokenizer)
    report = trim_vocabulary(model, tokenizer, DOMAIN)
    assert report.rows_after == len(tokenizer) < report.rows
    assert model.model.embed_tokens_per_layer.weight.shape[0] == model.config.vocab_size_per_layer_input
    assert model.config.vocab_size == model.config.vocab_size_per_layer_input == len(tokenizer)
    for text in DOMAIN:
        assert all(map(torch.equal, hidden_states(model, tokenizer, text), hidden_states(whole, names, text)))


def test_text_model_in_a_model_of_text_and_images_is_trimmed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 2}, image_size=8, patch_size=4)
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    text_config = LlamaConfig(**SIZES, vocab_size=len(tokenizer))
    config = LlavaConfig(vision_config=vision, text_config=text_config, image_token_index=image)
    model: Any = LlavaForConditionalGeneration(config).eval()
    whole, names = copy.deepcopy(model), copy.deepcopy(tokenizer)
    trim_vocabulary(model, tokenizer, DOMAIN)
    assert model.config.text_config.vocab_size == len(tokenizer) < len(names)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") != image
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    text, pixels = "<image>" * 4 + DOMAIN[0], torch.randn(1, 3, 8, 8)
    before = hidden_states(whole, names, text, pixel_values=pixels)
    assert all(map(torch.equal, before, hidden_states(loaded, tokenizer, text, pixel_values=pixels)))


def test_clip_finds_the_end_of_a_text_by_its_new_id() -> None:
    torch.manual_seed(0)
    tokenizer = suffix_bpe()
    text = {**SIZES, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.sep_token_id, "bos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 8, "patch_size": 4})
    model = CLIPModel(config).eval()
    ids = tokenizer(DOMAIN[0], return_tensors="pt")
    with torch.no_grad():
        before = model.get_text_features(**ids)
        trim_vocabulary(model, tokenizer, DOMAIN)
        after = model.get_text_features(**tokenizer(DOMAIN[0], return_tensors="pt"))
    assert torch.equal(before.pooler_output, after.pooler_output)
    assert model.text_model.eos_token_id == tokenizer.sep_token_id


@pytest.mark.parametrize(
    ("cls", "kind"), [(T5Tokenizer, "unigram"), (XLMRobertaTokenizer, "unigram"), (LlamaTokenizer, "bpe")]
)
def test_tokenizer_of_a_sentencepiece_file(cls: Any, kind: str, tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 5), encoding="utf-8")
    trainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=100, model_type=kind,
        hard_vocab_limit=False, pad_id=3, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "whole").mkdir()
    (tmp_path / "spiece.model").rename(tmp_path / "whole" / cls.vocab_files_names["vocab_file"])
    tokenizer = cls.from_pretrained(tmp_path / "whole")
    assert len(tokenizer) > 50
    names = copy.deepcopy(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer)))
    report = trim_vocabulary(model, tokenizer, DOMAIN[:1])
    assert report.rows_after == len(tokenizer) < len(names)
    tokenizer.save_pretrained(tmp_path / "trimmed")
    assert not list((tmp_path / "trimmed").glob("*.model"))  # it would be read as that of this vocabulary
    again = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert again.get_vocab() == tokenizer.get_vocab()
    tokens = names.convert_ids_to_tokens(names(DOMAIN[0])["input_ids"])
    assert again.convert_ids_to_tokens(again(DOMAIN[0])["input_ids"]) == tokens


class Written(PreTrainedTokenizer):
    """A tokenizer in Python, as those that only have a SentencePiece model."""

    def __init__(self, **options: Any) -> None:
        self.names = ["<unk>", "a", "b"]
        super().__init__(unk_token="<unk>", **options)  # noqa: S106

    @property
    def vocab_size(self) -> int:
        return len(self.names)

    def get_vocab(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]


def test_tokenizer_without_the_library_is_refused() -> None:
    model = BertModel(BertConfig(**SIZES, vocab_size=3))
    with pytest.raises(RecipeError, match=r"Written is not backed by the tokenizers library.*Load a fast tokenizer"):
        trim_vocabulary(model, Written(), ["ab"])
