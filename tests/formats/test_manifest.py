"""The manifest: strict both ways, and bounded."""

import json
from typing import Any

import pytest

from hf_sparse.errors import CheckpointError
from hf_sparse.formats.manifest import FORMAT_VERSION, Manifest, TensorEntry

ENTRY = {"codec": "n:m", "shape": [2, 4], "dtype": "F16", "nonzeros": 3, "checksum": "crc32:00c0ffee"}
OPTIONS = {"n": 2, "m": 4}
DATA: dict[str, Any] = {
    "version": 1,
    "generator": "0.1.0",
    "targets": ["w"],
    "tensors": {"w": {**ENTRY, "options": OPTIONS}},
}


def with_entry(**changes):
    return {**DATA, "tensors": {"w": {**ENTRY, **changes}}}


def test_manifest_round_trips_through_json():
    manifest = Manifest.from_dict(DATA)
    assert manifest.tensors["w"] == TensorEntry("n:m", (2, 4), "F16", 3, "crc32:00c0ffee", OPTIONS)
    assert manifest.tensors["w"].nbytes == 16
    assert manifest.to_dict() == DATA
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_manifest_says_which_version_wrote_it():
    import hf_sparse

    assert Manifest({}).generator == hf_sparse.__version__


def test_manifest_keeps_what_it_does_not_know_under_extra():
    data = {**DATA, "extra": {"future": [1, {"a": None}]}}
    assert Manifest.from_dict(data).to_dict() == data


def test_manifest_asks_to_upgrade_when_the_version_is_newer():
    newer = {"version": FORMAT_VERSION + 1, "anything": "else"}
    with pytest.raises(CheckpointError, match=r"version 2 of the format.*upgrade it: pip install --upgrade hf-sparse"):
        Manifest.from_dict(newer)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], "the manifest must be a mapping"),
        ({**DATA, "version": 0}, "version of the format"),
        ({**DATA, "version": True}, "version of the format"),
        ({**DATA, "version": "1"}, "version of the format"),
        ({**DATA, "edits": {}}, "unknown key 'edits'"),
        ({key: value for key, value in DATA.items() if key != "generator"}, "lacks the key 'generator'"),
        ({**DATA, "generator": 1}, "generator must be"),
        ({**DATA, "generator": "x" * 101}, "generator must be"),
        ({**DATA, "extra": []}, "extra must be a mapping"),
        ({**DATA, "targets": "w"}, "targets must be a list"),
        ({**DATA, "targets": ["w", "w"]}, "targets must be a list of different keys"),
        ({**DATA, "targets": [[]]}, "targets must be a list of different keys"),
        ({**DATA, "targets": ["v"]}, "target 'v' is not among the tensors"),
        ({**DATA, "tensors": []}, "tensors must be a mapping"),
        ({**DATA, "tensors": {"w": []}}, "tensor 'w' in the manifest: a tensor entry must be a mapping"),
        (with_entry(path="/etc/passwd"), "unknown key 'path'"),
        (with_entry(codec="../codec"), "codec must be the name"),
        (with_entry(codec=1), "codec must be the name"),
        (with_entry(dtype="F4"), "dtype 'F4' is not one of"),
        (with_entry(dtype=["F16"]), "is not one of"),
        (with_entry(shape=[2.0, 4]), "shape must be a list of integers"),
        (with_entry(shape=[True, 4]), "shape must be a list of integers"),
        (with_entry(shape=[-1, 4]), "shape must be a list of integers"),
        (with_entry(shape=[2**63, 4]), "shape must be a list of integers"),
        (with_entry(shape="24"), "shape must be a list of integers"),
        (with_entry(shape=[1] * 33), "shape must be a list of integers"),
        (with_entry(shape=[2**45, 2]), "is larger than"),
        (with_entry(shape=[0, 2**46]), "is larger than"),
        (with_entry(nonzeros=9), "nonzeros must be an integer in \\[0, 8\\]"),
        (with_entry(nonzeros=-1), "nonzeros must be"),
        (with_entry(nonzeros=None), "nonzeros must be"),
        (with_entry(checksum="crc32:00C0FFEE"), "checksum must be"),
        (with_entry(checksum="crc32:00c0ffee\n"), "checksum must be"),
        (with_entry(checksum="md5:00c0ffee"), "checksum must be"),
        (with_entry(options=[]), "options must be a mapping"),
        (with_entry(options={"n": -1}), "option 'n' must be an integer"),
        (with_entry(options={"n": 1.5}), "option 'n' must be an integer"),
        (with_entry(options={"n": 2**63}), "option 'n' must be an integer"),
        (with_entry(options={"N M": 1}), "option 'N M'"),
        (with_entry(options={f"o{i}": 1 for i in range(9)}), "options must be a mapping"),
        ({**DATA, "tensors": {"\ud800": DATA["tensors"]["w"]}}, r"'\\ud800' is not text"),
        ({**DATA, "generator": "\udfff"}, r"'\\udfff' is not text"),
    ],
)
def test_manifest_refuses_what_it_would_not_have_written(data, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        Manifest.from_dict(data)
    with pytest.raises(CheckpointError, match=complaint):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"version": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"version": 1, "version": 1}', "the manifest names the key 'version' twice"),
        (json.dumps(DATA)[:-1] + ', "extra": {"a": NaN}}', "holds NaN"),
        (json.dumps(DATA)[:-1] + ', "extra": {"a": -Infinity}}', "holds -Infinity"),
        (json.dumps(DATA)[:-1] + ', "extra": {"a": 1e999}}', "holds the number '1e999', which is too large"),
        (
            json.dumps(DATA)[:-1] + ', "extra": {"a": [-1.5E+400]}}',
            "holds the number '-1.5E\\+400', which is too large",
        ),
    ],
)
def test_manifest_refuses_text_that_is_no_strict_json(text, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        Manifest.from_json(text)


def test_manifest_shows_only_the_start_of_a_hostile_value():
    with pytest.raises(CheckpointError) as error:
        Manifest.from_dict({**DATA, "generator": "x" * 10**6})
    assert len(str(error.value)) < 200


def nested(depth):
    value: object = 1.5
    for _ in range(depth):
        value = [value]
    return {"a": value}


@pytest.mark.parametrize("extra", [{"a": float("inf")}, {"a": [float("nan")]}, {"a": {1, 2}}, nested(100_000)])
def test_extra_that_json_cannot_hold_is_refused_before_it_is_written(extra):
    with pytest.raises(CheckpointError, match="extra of the manifest cannot be written as JSON"):
        Manifest({}, extra=extra).to_json()


@pytest.mark.parametrize(
    "text", ['{"a": 1e308}', '{"a": -1e-400}', '{"a": "\\ud800"}', '{"a": 123456789012345678901234}']
)
def test_extra_that_is_read_can_be_written_and_read_again(text):
    manifest = Manifest.from_json(json.dumps(DATA)[:-1] + f', "extra": {text}}}')
    assert Manifest.from_json(manifest.to_json()) == manifest
