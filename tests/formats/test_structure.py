"""What was cut out, as plain JSON that may come from a stranger."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import CheckpointError
from hf_sparse.formats.structure import MAX_GROUPS, Cut, Edits
from hf_sparse.pruning.compaction import apply_edits, edits_of
from tests.helpers.limits import limited
from tests.helpers.training import bert

GOOD: dict[str, Any] = {"heads": {"layer.0.attention": {"of": 12, "kept": "0900"}}, "checksum": "crc32:5a0ffe6b"}
GOOD_CUTS = {"layer.0.attention": Cut.of(12, (0, 3))}


def test_bitmask_counts_from_the_least_significant_bit_of_the_first_byte() -> None:
    assert Cut.of(12, (0, 3, 9)).to_dict() == {"of": 12, "kept": "0902"}
    assert Edits.from_dict(GOOD).heads == GOOD_CUTS
    assert Edits(GOOD_CUTS).to_dict() == GOOD
    assert Edits({}, {"x": Cut.of(8, ())}).to_dict()["neurons"] == {"x": {"of": 8, "kept": "00"}}


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_edits_survive_json(case: tuple[int, set[int]]) -> None:
    before, kept = case
    edits = Edits({"a.0": Cut.of(before, tuple(sorted(kept)))}, {"b": Cut.of(3, (1,))})
    assert Edits.from_dict(edits.to_dict()) == edits


def test_edits_without_any_are_false_and_empty() -> None:
    assert not Edits()
    assert Edits().to_dict() == {}
    assert Edits.from_dict({}) == Edits()


def test_second_cut_counts_what_the_first_has_left() -> None:
    assert Cut.of(6, (1, 3, 5)).then([0, 2]) == Cut.of(6, (1, 5))


def with_cut(**change: Any) -> dict[str, Any]:
    return {"heads": {"a": {"of": 12, "kept": "0900", **change}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "edits must be a mapping"),
        (None, "edits must be a mapping"),
        ({"layers": {}}, "no other keys than heads, neurons, experts, filters, checksum"),
        ({"heads": []}, "heads of the edits must be a mapping"),
        ({"heads": {"../x": {"of": 8, "kept": "00"}}}, "is not a name of a module"),
        ({"heads": {"a" * 501: {"of": 8, "kept": "00"}}}, "is not a name of a module"),
        ({"heads": {"": {"of": 8, "kept": "00"}}}, "is not a name of a module"),
        ({"heads": {"a": [0, 1]}}, "a mapping with the keys 'of' and 'kept'"),
        ({"heads": {"a": {"of": 8}}}, "a mapping with the keys 'of' and 'kept'"),
        (with_cut(more=1), "and nothing else"),
        (with_cut(of=0, kept=""), "'of' must be an integer in"),
        (with_cut(of=-8), "'of' must be an integer in"),
        (with_cut(of=True, kept="01"), "'of' must be an integer in"),
        (with_cut(of=12.0), "'of' must be an integer in"),
        (with_cut(of="12"), "'of' must be an integer in"),
        (with_cut(of=MAX_GROUPS + 1), "'of' must be an integer in"),
        (with_cut(of=2**62), "'of' must be an integer in"),
        (with_cut(kept="09"), "'kept' must be a bitmask of 12 flags"),
        (with_cut(kept="090000"), "'kept' must be a bitmask of 12 flags"),
        (with_cut(kept="09 0"), "'kept' must be a bitmask of 12 flags"),
        (with_cut(kept="090A"), "'kept' must be a bitmask of 12 flags"),
        (with_cut(kept=900), "'kept' must be a bitmask of 12 flags"),
        (with_cut(kept="0910"), "bits behind the end of its 12 flags"),
        (with_cut(), "the checksum of the edits"),
        ({"checksum": "crc32:00000000"}, "the checksum of the edits"),
        ({**GOOD, "checksum": 1}, "the checksum of the edits"),
        ({**GOOD, "checksum": None}, "the checksum of the edits"),
        ({**GOOD, "heads": {"layer.0.attention": {"of": 12, "kept": "0500"}}}, "the checksum of the edits"),
        ({**GOOD, "heads": {"layer.1.attention": {"of": 12, "kept": "0900"}}}, "the checksum of the edits"),
    ],
)
def test_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Edits.from_dict(data)


BOMB = {"neurons": {f"decoder.{n}": {"of": MAX_GROUPS, "kept": "ff" * (MAX_GROUPS // 8)} for n in range(6)}}


def apply_bomb(data: dict[str, Any], model: Any) -> int:
    apply_edits(model, Edits.from_dict(data), "bert")
    return len(edits_of(model).neurons)


def test_edits_of_sub_blocks_that_the_model_does_not_have_cost_no_more_than_their_bytes() -> None:
    lines = [f"neurons {name} {cut['of']} {cut['kept']}\n" for name, cut in BOMB["neurons"].items()]
    data = {**BOMB, "checksum": f"crc32:{zlib.crc32(''.join(sorted(lines)).encode()):08x}"}
    assert limited(apply_bomb, data, bert(), seconds=10, megabytes=300) == 0


def test_edits_of_another_size_are_refused_before_the_bitmask_is_looked_at() -> None:
    cut = {"encoder.layer.0": {"of": MAX_GROUPS, "kept": "ff" * (MAX_GROUPS // 8)}}
    line = f"neurons encoder.layer.0 {MAX_GROUPS} {cut['encoder.layer.0']['kept']}\n"
    data = {"neurons": cut, "checksum": f"crc32:{zlib.crc32(line.encode()):08x}"}
    with pytest.raises(CheckpointError, match=r"has lost neurons of|does not know"):
        limited(apply_bomb, data, bert(), seconds=10, megabytes=300)


def test_number_of_those_left_is_that_of_the_list() -> None:
    cut = Cut.of(13, (0, 3, 12))
    assert (cut.kept, cut.count) == ((0, 3, 12), 3)
    assert Cut.of(9).kept == tuple(range(9))
