"""What a file says of the forms of layers is untrusted: exactly what FORMAT.md describes, or an error."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest

from hf_sparse import CheckpointError
from hf_sparse.formats.layer_forms import LayerForms


def signed(layers: Any) -> dict[str, Any]:
    """Return forms with the checksum of FORMAT.md."""
    text = json.dumps(layers, sort_keys=True, separators=(",", ":"))
    return {"layers": layers, "checksum": f"crc32:{zlib.crc32(text.encode('ascii')):08x}"}


GOOD = {"a.b": {"form": "hashed", "rows": 4, "columns": 2, "buckets": 3, "seed": 2**63 - 1}}


def test_round_trip_and_checksum_of_the_specification() -> None:
    forms = LayerForms.from_dict(signed(GOOD))
    assert forms.to_dict() == signed(GOOD)
    assert LayerForms().to_dict() == {}


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"a b": GOOD["a.b"]},
        {"": GOOD["a.b"]},
        {"a": []},
        {"a": {"rows": 1}},
        {"a": {"form": "../x"}},
        {"a": {"form": "hashed", "rows": 1.0}},
        {"a": {"form": "hashed", "rows": True}},
        {"a": {"form": "hashed", "rows": -1}},
        {"a": {"form": "hashed", "rows": 2**50}},
        {"a": {"form": "hashed", "seed": 2**63}},
        {"a": {"form": "hashed", **{f"k{chr(97 + n)}": 1 for n in range(9)}}},
    ],
)
def test_other_content_is_refused(layers: Any) -> None:
    with pytest.raises(CheckpointError):
        LayerForms.from_dict(signed(layers))


def test_a_changed_seed_is_found_out() -> None:
    data = signed(GOOD)
    data["layers"] = {"a.b": {**GOOD["a.b"], "seed": 1}}
    with pytest.raises(CheckpointError, match="checksum"):
        LayerForms.from_dict(data)
    wrong: list[Any] = [None, [], {}, {"layers": GOOD}, {**signed(GOOD), "more": 1}]
    for broken in wrong:
        with pytest.raises(CheckpointError, match="forms must be a mapping"):
            LayerForms.from_dict(broken)
