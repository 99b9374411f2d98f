"""Sparse embeddings: targeted by name only, exact in files, tied weights included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_sparse
from hf_sparse import Pruner, RecipeError, sparsify, summarize
from hf_sparse.formats.inspection import inspect
from hf_sparse.modeling.layer_matching import match_layers


def bert(tied: bool = True) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=40, intermediate_size=32, tie_word_embeddings=tied, **sizes))


def llama(tied: bool) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, intermediate_size=32, tie_word_embeddings=tied, **sizes))


def t5() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    sizes |= {"decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes))


MODELS: dict[str, Any] = {
    "tied BERT": bert, "untied BERT": lambda: bert(False), "tied Llama": lambda: llama(True),
    "untied Llama": lambda: llama(False), "T5": t5,
}  # fmt: skip
TARGETS = {"tied BERT": "*word_embeddings", "untied BERT": "*word_embeddings", "T5": "shared"}


def test_only_a_target_that_says_so_matches_embeddings() -> None:
    linear = set(match_layers(bert(), ["*"]))
    assert not any("embeddings" in name for name in linear)
    assert set(match_layers(bert(), ["*word_embed*"])) == {"bert.embeddings.word_embeddings"}
    tables = {"bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"}
    tables.add("bert.embeddings.token_type_embeddings")
    assert set(match_layers(bert(), ["*embed*"])) == tables
    assert set(match_layers(bert(), ["*embed*"], ["*position*"])) == tables - {"bert.embeddings.position_embeddings"}
    assert set(match_layers(t5(), ["shared"])) == {"shared"}
    assert not any("bias" in name for name in match_layers(t5(), ["*SelfAttention*"]))


@pytest.mark.parametrize("pattern", ["element", "row"])
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_exactly(name: str, pattern: str, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    weight = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied, before = head is weight, head.detach().clone()
    sparsify(model, {"targets": TARGETS.get(name, "*embed*"), "sparsity": 0.5, "pattern": pattern})
    assert model.get_input_embeddings().weight is weight
    assert (head is weight) == tied
    zeros = (weight == 0).all(1) if pattern == "row" else weight == 0
    assert int(zeros.sum()) == zeros.numel() // 2
    assert tied or torch.equal(head, before)
    assert summarize(model).parameters == weight.numel()
    model.save_pretrained(tmp_path)
    (stored,) = (tensor for tensor in inspect(tmp_path).tensors if tensor.targeted)
    assert (stored.parameters, stored.nonzeros) == (weight.numel(), int(torch.count_nonzero(weight)))
    assert stored.codec != "dense"
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, weight)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert summarize(loaded).sparsity == pytest.approx(0.5)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_fine_tuning_keeps_the_zeros(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    sparsify(model, {"targets": TARGETS.get(name, "*embed*"), "sparsity": 0.5})
    model.save_pretrained(tmp_path)
    for side in (model, type(model).from_pretrained(tmp_path)):
        weight = side.get_input_embeddings().weight
        zeros, before = weight == 0, weight.detach().clone()
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-2)
        ids = torch.arange(40)[None]
        for _ in range(3):
            optimizer.zero_grad()
            side.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert torch.equal(weight == 0, zeros)
        assert not torch.equal(weight, before)


def test_training_prunes_untied_embeddings_and_refuses_tied_ones() -> None:
    model = bert(tied=False)
    pruner = Pruner(model, {"targets": "*word_embeddings", "sparsity": 0.5}).attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(40)[None]
    for step in range(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        pruner.step((step + 1) / 4)
    pruner.bake()
    assert int((model.get_input_embeddings().weight == 0).sum()) == 40 * 16 // 2
    with pytest.raises(
        RecipeError, match=r"tied to 'cls\.predictions\.decoder\.weight', so it can be pruned in one shot"
    ):
        Pruner(bert(), {"targets": "*word_embeddings", "sparsity": 0.5}).attach()


def test_trimmed_then_pruned_then_trimmed(tmp_path: Path) -> None:
    from tests.helpers.tokenizers import CORPUS, word_piece

    tokenizer = word_piece()
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes))
    hf_sparse.trim_vocabulary(model, tokenizer, CORPUS[:3])
    sparsify(model, {"targets": ["*word_embeddings", "*.query"], "sparsity": 0.5})
    report = hf_sparse.trim_vocabulary(model, tokenizer, CORPUS[:1])
    assert report.parameters_saved > 0
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loaded.config.vocab_size == len(tokenizer)
