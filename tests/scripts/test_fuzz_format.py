"""A bounded number of damaged files; scripts/tools/fuzz_format.py tries as many as one likes."""

import hf_sparse.formats.codecs
import hf_sparse.formats.safetensors_io
from scripts.tools.fuzz_format import fuzz


def counts(files, seed):
    found = fuzz(files, seed)
    ends = ("right", "refused", "violation")
    return {end: sum(times for (_, one), times in found.items() if one == end) for end in ends}


def test_damaged_files_are_refused_or_load_exactly():
    found = counts(1500, seed=1)
    assert found["violation"] == 0
    assert found["refused"] > 1000
    assert found["right"] >= 77  # the intact ones


def test_fuzzing_finds_wrong_tensors_when_checksums_are_not_verified(monkeypatch, capsys):
    monkeypatch.setattr(hf_sparse.formats.codecs, "verify", lambda *_: None)
    monkeypatch.setattr(hf_sparse.formats.safetensors_io, "verify", lambda *_: None)
    assert counts(500, seed=1)["violation"] > 0
    assert "other tensors than were saved" in capsys.readouterr().err


def test_fuzzing_finds_other_exceptions(monkeypatch, capsys):
    monkeypatch.setattr(hf_sparse.formats.codecs, "_check_parts", lambda *_: None)
    monkeypatch.setattr(hf_sparse.formats.safetensors_io, "_check_parts", lambda *_: None)
    assert counts(1500, seed=1)["violation"] > 0
    assert "Error" in capsys.readouterr().err
