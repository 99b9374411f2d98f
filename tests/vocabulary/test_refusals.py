"""What cannot be trimmed is refused with the reason, and left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

import hf_sparse
from hf_sparse import RecipeError, trim_vocabulary
from tests.helpers.tokenizers import word_piece

DOMAIN = ["the quick fox"]


def make(cls: Any = BertModel, **options: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    """Return a tiny model and its tokenizer."""
    tokenizer = word_piece()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return cls(BertConfig(**{**sizes, "intermediate_size": 16, **options})), tokenizer


def refused(message: str, model: Any, tokenizer: Any, *arguments: Any, **options: Any) -> None:
    """Check that trimming is refused, and changes nothing."""
    sizes = {name: value.shape for name, value in model.state_dict().items()}
    vocab = tokenizer.get_vocab()
    with pytest.raises(RecipeError, match=message):
        trim_vocabulary(model, tokenizer, *(arguments or (DOMAIN,)), **options)
    assert {name: value.shape for name, value in model.state_dict().items()} == sizes
    assert tokenizer.get_vocab() == vocab


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 1.5}, r"`coverage` must be in \(0, 1\], got 1.5"),
        ({"coverage": 0}, r"`coverage` must be in \(0, 1\], got 0"),
        ({"min_count": 0}, "`min_count` must be a positive integer, got 0"),
        ({"coverage": 0.9, "min_count": 2}, "give one of them"),
        ({"keep": "fox"}, "`keep` must be a list, got 'fox'"),
        ({"keep": ["foxx"]}, "`keep` must list tokens of the vocabulary, got 'foxx'; did you mean 'fox'?"),
        ({"keep": [10**6]}, "`keep` must list tokens or ids below"),
        ({"scripts": ["Klingon"]}, "Unicode scripts, such as Latin, Cyrillic or Han, got 'Klingon'"),
        ({"scripts": ["Latin}|."]}, "Unicode scripts"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be a positive integer"),
        (
            {"pad_to_multiple_of": 10**9},
            "`pad_to_multiple_of` must be at most .*, the rows of the embeddings, got 1000000000",
        ),
        ({"keep_characters": "no"}, "`keep_characters` must be true or false"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    refused(message, *make(), **options)


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ([], {}, "nothing to choose tokens by"),
        ([""], {"coverage": 0.9}, "need a corpus that has tokens"),
        ("one string", {}, "`texts` must be a list of strings, got one string"),
        (["a", 5], {}, "`texts` must be strings, got 5 at position 1"),
        (None, {}, "`texts` must be a list of strings, or another iterable of them, got None"),
        ([b"a"], {}, "`texts` must be strings"),
    ],
)
def test_corpus_that_is_none(corpus: Any, options: dict[str, Any], message: str) -> None:
    refused(message, *make(), corpus, **options)


def test_what_is_no_model() -> None:
    with pytest.raises(RecipeError, match=r"`model` must be a torch.nn.Module, got 'bert-base-uncased'"):
        trim_vocabulary("bert-base-uncased", word_piece(), DOMAIN)  # type: ignore[arg-type]


def test_held_out_that_is_one_string() -> None:
    refused("`held_out` must be a list of strings", *make(), held_out="one string")


def test_unknown_kind_of_tokenizer() -> None:
    model, _ = make()
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))  # noqa: S106
    refused("a WordLevel tokenizer cannot be trimmed", model, PreTrainedTokenizerFast(tokenizer_object=backend))


def test_model_without_tokens() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    refused("no table of embeddings for tokens", ViTModel(ViTConfig(**sizes)), word_piece())


def test_model_with_masks_or_in_runtime_form() -> None:
    model, tokenizer = make()
    nn.utils.parametrizations.weight_norm(model.embeddings.word_embeddings)
    with pytest.raises(RecipeError, match="has a mask or another parametrisation"):
        trim_vocabulary(model, tokenizer, DOMAIN)
    model, tokenizer = make()
    hf_sparse.sparsify(model, {"sparsity": 0.9})
    hf_sparse.to_runtime(model, "csr")
    with pytest.raises(hf_sparse.BackendError, match="to_dense_runtime"):
        trim_vocabulary(model, tokenizer, DOMAIN)


def test_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, tokenizer = make()
    refused("not in memory", model, tokenizer)


def test_tables_that_no_getter_returns() -> None:
    model, tokenizer = make()
    model.hash_embedding = nn.Embedding(100, 8)
    refused("indexed by hashes or n-grams", model, tokenizer)
    model, tokenizer = make()
    model.second = nn.Embedding(len(tokenizer), 8)
    refused("'second' has .* rows, one for each token", model, tokenizer)
    model, tokenizer = make(BertForMaskedLM)
    model.set_output_embeddings(nn.Linear(8, 7))
    refused(r"output layer .* not a linear layer with an output for each", model, tokenizer)


def test_config_of_another_size() -> None:
    model, tokenizer = make()
    model.config.vocab_size += 1
    refused("no config of the model states", model, tokenizer)


def test_embeddings_in_another_form() -> None:
    model, tokenizer = make()
    hf_sparse.sparsify(model, {"targets": "*word_embeddings", "compress": {"name": "hashed", "ratio": 0.5}})
    refused("'embeddings.word_embeddings' has the form 'hashed'", model, tokenizer)


@pytest.mark.parametrize("further", [1500, -1500])
def test_tokenizer_of_another_model(further: int) -> None:
    tokenizer = word_piece()
    if further < 0:
        tokenizer.add_tokens([f"<{number}>" for number in range(-further)])
    model, _ = make(vocab_size=len(tokenizer) + further)
    refused("so it is not that of the model", model, tokenizer)
