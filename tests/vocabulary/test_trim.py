"""Trimming a model and its tokenizer together: what stays is exact, what goes is counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
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
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse import RecipeError, sparsify, trim_vocabulary
from tests.helpers.tokenizers import CORPUS, KINDS, byte_bpe, tokens_of, unigram, word_piece

NAMED = ("\u0120dog", "\u0120the", "\u0120over")
DOMAIN = ["the quick fox and the lazy dog", "a dog walked over the brown hills"]


def ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the ids of the roles."""
    return {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id}  # fmt: skip


def bert(tokenizer: PreTrainedTokenizerFast, tied: bool = True) -> Any:
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                        intermediate_size=32, tie_word_embeddings=tied, **ids(tokenizer))  # fmt: skip
    return BertForMaskedLM(config)


def untied_bert(tokenizer: PreTrainedTokenizerFast) -> Any:
    return bert(tokenizer, tied=False)


def roberta(tokenizer: PreTrainedTokenizerFast) -> Any:
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                           intermediate_size=32, max_position_embeddings=80, **ids(tokenizer))  # fmt: skip
    return RobertaForMaskedLM(config)


def llama(tokenizer: PreTrainedTokenizerFast, rows: int = 0) -> Any:
    config = LlamaConfig(vocab_size=rows or len(tokenizer), hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                         intermediate_size=32, tie_word_embeddings=False, **ids(tokenizer))  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(tokenizer: PreTrainedTokenizerFast) -> Any:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=2, **ids(tokenizer))
    return GPT2LMHeadModel(config)


def bart(tokenizer: PreTrainedTokenizerFast) -> Any:
    sizes: dict[str, Any] = {f"{side}_{part}": value for side in ("encoder", "decoder")
             for part, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    config = BartConfig(vocab_size=len(tokenizer), d_model=16, decoder_start_token_id=tokenizer.sep_token_id,
                        forced_eos_token_id=tokenizer.sep_token_id, **sizes, **ids(tokenizer))  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def t5(tokenizer: PreTrainedTokenizerFast) -> Any:
    options: dict[str, Any] = {"decoder_start_token_id": tokenizer.pad_token_id, **ids(tokenizer)}
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), **sizes, **options)
    return T5ForConditionalGeneration(config)


MODELS = {make.__name__: make for make in (bert, untied_bert, roberta, llama, gpt2, bart, t5)}


def outputs(model: Any, encoded: Any) -> Any:
    """Return the outputs of a model, in evaluation mode."""
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = encoded["input_ids"]
    with torch.no_grad():
        return model.eval()(**inputs, output_hidden_states=True)


def hidden(result: Any) -> tuple[torch.Tensor, ...]:
    """Return all hidden states."""
    found = [
        getattr(result, name, None) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    ]
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


def test_ids_of_configs_and_of_generation_follow() -> None:
    tokenizer = byte_bpe()
    model = t5(tokenizer)
    vocab = tokenizer.get_vocab()
    dog, fox, never = (vocab[token] for token in NAMED)
    generation: Any = model.generation_config
    generation.update(
        suppress_tokens=[dog, never], bad_words_ids=[[never], [dog, fox]], forced_eos_token_id=[fox],
        sequence_bias=[[[dog, never], -2.0]], eos_token_id=[vocab["[SEP]"], dog],
    )  # fmt: skip
    model.config.forced_bos_token_id = never
    trim_vocabulary(model, tokenizer, ["the fox"])
    new = tokenizer.get_vocab()
    dog, fox, never = (new[token] for token in NAMED)  # what configs name stays
    assert (generation.suppress_tokens, generation.bad_words_ids) == ([dog, never], [[never], [dog, fox]])
    assert (generation.sequence_bias, generation.forced_eos_token_id) == ([[[dog, never], -2.0]], [fox])
    assert generation.eos_token_id == [new["[SEP]"], dog]
    assert model.config.forced_bos_token_id == never
    assert (model.config.decoder_start_token_id, model.config.vocab_size) == (new["[PAD]"], len(tokenizer))
    assert model.shared.padding_idx in (None, new["[PAD]"])


@pytest.mark.parametrize("beams", [1, 3])
def test_t5_with_a_unigram_tokenizer_decodes_the_same(beams: int) -> None:
    """Trained until every decoded token is one of the domain: the logits of removed tokens must not have won before."""
    tokenizer = unigram(size=120)
    torch.manual_seed(1)
    model = t5(tokenizer)
    inputs = tokenizer(DOMAIN, return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(80):
        optimizer.zero_grad()
        model.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    whole_model, whole = copy.deepcopy(model), copy.deepcopy(tokenizer)
    trim_vocabulary(model, tokenizer, DOMAIN)
    assert len(tokenizer) < len(whole)
    decoded = []
    for side, words in ((whole_model, whole), (model, tokenizer)):
        encoded = words(DOMAIN, return_tensors="pt", padding=True)
        made = side.generate(**encoded, max_new_tokens=12, num_beams=beams, do_sample=False)
        decoded.append([words.convert_ids_to_tokens(row) for row in made])
    assert decoded[0] == decoded[1]
    assert any(set(row) - {"[PAD]"} for row in decoded[0])


def test_byt5_is_refused_with_the_reason() -> None:
    tokenizer = byte_bpe()
    with pytest.raises(RecipeError, match=r"a token for each of the 256 bytes.*nothing to trim"):
        trim_vocabulary(t5(tokenizer), ByT5Tokenizer(), DOMAIN)


def test_rows_without_a_token_go_and_a_multiple_is_filled_with_frequent_tokens() -> None:
    tokenizer = byte_bpe()
    model = llama(tokenizer, rows=len(tokenizer) + 37)
    whole = copy.deepcopy(tokenizer)
    report = trim_vocabulary(model, tokenizer, [DOMAIN[0], *CORPUS], min_count=3, pad_to_multiple_of=32)
    assert report.rows == len(whole) + 37
    assert model.config.vocab_size == model.lm_head.out_features == len(tokenizer) == report.rows_after
    assert len(tokenizer) % 32 == 0
    for sequence in CORPUS:
        before, after = tokens_of(whole, sequence), tokens_of(tokenizer, sequence)
        if set(before) <= set(tokenizer.get_vocab()):
            assert before == after


def test_token_without_a_row_keeps_none() -> None:
    """As Gemma's <image_soft_token>: an added token behind the last row of a text model."""
    tokenizer = byte_bpe()
    model = llama(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    trim_vocabulary(model, tokenizer, DOMAIN)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.vocab_size == len(tokenizer) - 1


def test_roberta_keeps_its_padding_where_positions_are_counted_from() -> None:
    tokenizer = byte_bpe()
    tokenizer.pad_token = "[MASK]"  # noqa: S105
    model = roberta(tokenizer)
    assert model.config.pad_token_id == model.roberta.embeddings.padding_idx == 4
    trim_vocabulary(model, tokenizer, DOMAIN)
    assert model.config.pad_token_id == tokenizer.pad_token_id == model.roberta.embeddings.padding_idx == 4


def test_chat_template_and_what_it_writes_stay() -> None:
    tokenizer = word_piece()
    tokenizer.chat_template = "{% for m in messages %}quick {{ m.role }} caf\u00e9 {{ m.content }}{% endfor %}"
    template = tokenizer.chat_template
    whole = copy.deepcopy(tokenizer)
    trim_vocabulary(bert(tokenizer), tokenizer, ["lazy"])
    assert tokenizer.chat_template == template
    chat = [{"role": "user", "content": "lazy"}]
    sides: list[Any] = [side.apply_chat_template(chat, tokenize=False) for side in (whole, tokenizer)]
    assert tokens_of(whole, sides[0]) == tokens_of(tokenizer, sides[1])


def test_optimizer_and_ties_keep_the_same_parameter() -> None:
    tokenizer = word_piece()
    model = bert(tokenizer)
    weight, frozen = model.get_input_embeddings().weight, model.get_output_embeddings().bias
    frozen.requires_grad_(False)
    trim_vocabulary(model, tokenizer, DOMAIN)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is weight
    assert model.get_output_embeddings().bias is frozen
    assert weight.shape[0] == len(tokenizer) == frozen.numel()
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert weight.grad is not None
    assert not frozen.requires_grad


def test_trimming_twice_and_pruning_afterwards() -> None:
    tokenizer = word_piece()
    model = bert(tokenizer)
    first = trim_vocabulary(model, tokenizer, CORPUS)
    second = trim_vocabulary(model, tokenizer, DOMAIN)
    assert first.tokens_after == second.tokens > second.tokens_after == model.config.vocab_size
    assert trim_vocabulary(model, tokenizer, DOMAIN).parameters_saved == 0
    sparsify(model, {"sparsity": 0.5})
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape[-1] == second.tokens_after
