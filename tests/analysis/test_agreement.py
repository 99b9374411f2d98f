"""Agreement of masks: by hand, against chance, over compaction, and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from hf_sparse import RecipeError, SparsityConfig, compact, sparsify, summarize
from hf_sparse.analysis.agreement import agreement, expected_jaccard
from hf_sparse.cli.main import main
from tests.helpers import convolutional, decoders
from tests.helpers.pages import check_page
from tests.helpers.tiny import config, save_bert


def saved(path: Path, seed: int = 0, compacted: bool = False, **group: Any) -> str:
    torch.manual_seed(0)
    model = BertModel(config())
    if "scorer" not in group:
        group["scorer"] = {"name": "random", "seed": seed}
    sparsify(model, SparsityConfig(**group))
    if compacted:
        compact(model)
    model.save_pretrained(path)
    return str(path)


def test_by_hand(tmp_path: Path) -> None:
    """Of six inputs, three and two are kept, one of them by both: 1 of 4."""
    model = BertModel(config())
    layer = "encoder.layer.0.attention.self.query"
    for name, kept in (("one", (0, 1, 2)), ("two", (2, 3))):
        weight = model.get_parameter(f"{layer}.weight")
        with torch.no_grad():
            weight.fill_(0)
            weight[:, list(kept)] = 1
        model.save_pretrained(tmp_path / name)
    found = agreement([tmp_path / "one", tmp_path / "two"])
    (only,) = found.weights
    assert (only.name, only.densities) == (f"{layer}.weight", (3 / 32, 2 / 32))
    assert only.jaccard == pytest.approx(1 / 4)
    assert only.chance == pytest.approx(6 / 1024 / (5 / 32 - 6 / 1024))
    assert found.runs == ("one", "two")


def test_random_masks_agree_by_chance_and_equal_ones_fully(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(seed), seed, sparsity=0.5) for seed in range(3)]
    for weight in agreement(folders).weights:
        assert weight.chance == pytest.approx(expected_jaccard(0.5, 0.5))
        assert abs(weight.beyond_chance) < 0.1
    for weight in agreement([folders[0], folders[0]]).weights:
        assert weight.jaccard == weight.beyond_chance == 1
    assert agreement([folders[0], folders[0]]).runs == (folders[0], folders[0])


def test_heads_that_all_keep_also_after_compaction(tmp_path: Path) -> None:
    group: dict[str, Any] = {"pattern": "head+neuron", "sparsity": 0.5}
    masked = [saved(tmp_path / f"m{seed}", seed, **group) for seed in range(2)]
    small = [saved(tmp_path / f"c{seed}", seed, compacted=True, **group) for seed in range(2)]
    expected, found = agreement(masked), agreement(small)
    mixed = agreement([masked[0], small[1]])
    assert expected.groups == found.groups == mixed.groups
    first = next(group for group in expected.groups if group.kind == "heads")
    assert (first.kind, first.total, first.kept, first.chance) == ("heads", 4, (2, 2), 1.0)
    assert mixed.left_out
    assert "different shapes" in str(mixed)


def test_convolutions_stacked_experts_and_embeddings_are_compared_too(tmp_path: Path) -> None:
    for name, make, targets in (
        ("resnet", convolutional.build, "*layer.0.convolution"),
        ("mixtral", decoders.build, ["*.experts", "*embed_tokens"]),
    ):
        for seed in range(2):
            group = {"targets": targets, "sparsity": 0.5, "scorer": {"name": "random", "seed": seed}}
            model = sparsify(make(name), group)
            model.save_pretrained(tmp_path / name / str(seed))
        found = agreement([tmp_path / name / str(seed) for seed in range(2)]).weights
        assert {weight.name for weight in found} == {weight.name for weight in summarize(model).weights}
        assert all(abs(weight.beyond_chance) < 0.3 for weight in found)


def test_command_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [saved(tmp_path / f"run{seed}", seed, pattern="head", sparsity=0.5) for seed in range(2)]
    assert main(["agree", *folders, "--html", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert "runs: run0, run1" in text
    assert "by chance" in text
    check_page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert main(["agree", *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["run0", "run1"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    dense = str(save_bert(tmp_path / "dense"))
    with pytest.raises(RecipeError, match="two or more folders, got 1"):
        agreement([dense])
    with pytest.raises(RecipeError, match="no sparse weight"):
        agreement([dense, saved(tmp_path / "sparse", sparsity=0.5)])
