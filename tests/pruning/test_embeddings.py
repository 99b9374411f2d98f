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
from hf_sparse.modeling.ownership import count_owners
from hf_sparse.pruning.masked_weight import hidden


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


def trained(model: Any, pruner: Pruner, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train a model on one sequence."""
    ids = torch.arange(40)[None]
    for step in steps:
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step((step + 1) / 4)


@pytest.mark.parametrize("scorer", ["magnitude", "movement"])
@pytest.mark.parametrize("name", MODELS)
def test_training_prunes_embeddings_and_what_is_tied_to_them(name: str, scorer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied, holders, size = weight is head, count_owners(model)[id(weight)], weight.numel()
    pruner = Pruner(model, {"targets": TARGETS.get(name, "*embed*"), "sparsity": 0.5, "scorer": scorer}).attach()
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    trained(model, pruner, optimizer, range(2))
    shown, of_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert bool((shown == 0).any())
    assert torch.equal(shown, of_head) == tied
    assert summarize(model).parameters == size

    state = model.state_dict()
    of_tied = [key for key, value in state.items() if value.shape == weight.shape and torch.equal(value, shown)]
    assert len({state[key].data_ptr() for key in of_tied}) == 1
    assert len(of_tied) == holders
    other = MODELS[name]()
    again = Pruner(other, {"targets": TARGETS.get(name, "*embed*"), "sparsity": 0.5, "scorer": scorer}).attach()
    assert not any(other.load_state_dict(state))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    model.save_pretrained(tmp_path / "training")
    del again

    trained(model, pruner, optimizer, range(2, 4))
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, labels=ids).logits
    pruner.bake()
    assert model.get_input_embeddings().weight is weight
    assert model.get_output_embeddings().weight is head
    assert count_owners(model)[id(weight)] == holders
    assert size // 2 <= int((weight == 0).sum()) <= size // 2 + 16  # the row of the padding is zero anyway
    assert torch.equal(weight, before[0])
    assert torch.equal(head, before[1])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, labels=ids).logits, logits)
    model.save_pretrained(tmp_path / "baked")
    loaded = type(model).from_pretrained(tmp_path / "baked").eval()
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids, labels=ids).logits, logits)
    stored = [entry for entry in inspect(tmp_path / "baked").tensors if entry.parameters == size]
    assert len(stored) == (1 if tied else 2)
    trained_on = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zeros = weight == 0
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained_on.step()
    assert torch.equal(weight == 0, zeros)


def test_gradient_of_a_tied_weight_is_that_of_both_uses_under_the_mask() -> None:
    torch.manual_seed(0)
    model: Any = llama(True)
    plain: Any = llama(True)
    plain.load_state_dict(model.state_dict())
    pruner = Pruner(model, {"targets": "*embed*", "sparsity": 0.5, "schedule": "constant"}).attach()
    pruner.step(0.5)
    weight = plain.get_input_embeddings().weight
    mask = model.get_input_embeddings().weight.detach() != 0
    with torch.no_grad():
        weight.mul_(mask)
    ids = torch.arange(40)[None]
    losses = [side(input_ids=ids, labels=ids).loss for side in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gradient = hidden(model.get_input_embeddings()).grad
    assert gradient is not None
    assert torch.allclose(gradient, weight.grad * mask, atol=1e-7)
    pruner.detach()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not bool((model.get_input_embeddings().weight == 0).any())


def test_a_weight_that_is_tied_to_another_name_is_refused() -> None:
    model = bert()
    model.cls.own = torch.nn.Module()
    model.cls.own.register_parameter("table", model.get_input_embeddings().weight)
    with pytest.raises(RecipeError, match=r"tied to 'cls\.own\.table', and only a `weight`"):
        Pruner(model, {"targets": "*word_embeddings", "sparsity": 0.5}).attach()


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
