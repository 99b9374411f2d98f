"""Trimming a model and its tokenizer together: what stays is exact, what goes is counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse import RecipeError, trim_vocabulary
from tests.helpers.tokenizers import CORPUS, KINDS, byte_bpe, tokens_of, unigram, word_piece

DOMAIN = ["the quick fox and the lazy dog", "a dog walked over the brown hills"]


def ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the ids of the roles."""
    return {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id}  # fmt: skip


def bert(tokenizer: PreTrainedTokenizerFast, tied: bool = True) -> PreTrainedModel:
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                        intermediate_size=32, tie_word_embeddings=tied, **ids(tokenizer))  # fmt: skip
    return BertForMaskedLM(config)


def untied_bert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return bert(tokenizer, tied=False)


def roberta(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                           intermediate_size=32, max_position_embeddings=80, **ids(tokenizer))  # fmt: skip
    return RobertaForMaskedLM(config)


def llama(tokenizer: PreTrainedTokenizerFast, rows: int = 0) -> PreTrainedModel:
    config = LlamaConfig(vocab_size=rows or len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                         intermediate_size=32, tie_word_embeddings=False, **ids(tokenizer))  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=2, **ids(tokenizer))
    return GPT2LMHeadModel(config)


def bart(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {f"{side}_{part}": value for side in ("encoder", "decoder")
             for part, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    config = BartConfig(vocab_size=len(tokenizer), d_model=16, decoder_start_token_id=tokenizer.sep_token_id,
                        forced_eos_token_id=tokenizer.sep_token_id, **sizes, **ids(tokenizer))  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def t5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                      decoder_start_token_id=tokenizer.pad_token_id, **ids(tokenizer))  # fmt: skip
    return T5ForConditionalGeneration(config)


MODELS = {make.__name__: make for make in (bert, untied_bert, roberta, llama, gpt2, bart, t5)}


def outputs(model: PreTrainedModel, encoded: Any) -> Any:
    """Return the outputs of a model, in evaluation mode."""
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = encoded["input_ids"]
    with torch.no_grad():
        return model.eval()(**inputs, output_hidden_states=True)


def hidden(result: Any) -> tuple[torch.Tensor, ...]:
    """Return all hidden states."""
    found = [getattr(result, name, None) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")]
    return tuple(state for states in found if states is not None for state in states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_hidden_states_and_kept_logits_are_the_same_bits(make: Any, kind: str) -> None:
    tokenizer = KINDS[kind]()
    model = make(tokenizer)
    whole_model, whole = copy.deepcopy(model), copy.deepcopy(tokenizer)
    report = trim_vocabulary(model, tokenizer, DOMAIN)
    assert report.tokens_after == len(tokenizer) == model.config.vocab_size < report.tokens == len(whole)
    before, after = (side(DOMAIN, return_tensors="pt", padding=True) for side in (whole, tokenizer))
    assert [whole.convert_ids_to_tokens(row) for row in before["input_ids"]] == [
        tokenizer.convert_ids_to_tokens(row) for row in after["input_ids"]
    ]
    expected, found = outputs(whole_model, before), outputs(model, after)
    assert all(map(torch.equal, hidden(expected), hidden(found)))
    kept = [whole.get_vocab()[token] for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    torch.testing.assert_close(found.logits, expected.logits[..., kept], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_saved_model_and_tokenizer_are_those_of_plain_transformers(make: Any, tmp_path: Path) -> None:
    tokenizer = word_piece()
    model = make(tokenizer)
    trim_vocabulary(model, tokenizer, DOMAIN)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    encoded = again([*DOMAIN, *CORPUS], return_tensors="pt", padding=True)
    assert encoded["input_ids"].equal(tokenizer([*DOMAIN, *CORPUS], return_tensors="pt", padding=True)["input_ids"])
    assert outputs(loaded, encoded).logits.equal(outputs(model, encoded).logits)
    tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
