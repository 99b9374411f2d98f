"""`hf-sparse bench` and `hf-sparse doctor`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForSequenceClassification,
)

from hf_sparse import BackendError, CheckpointError, RecipeError, SparsityConfig, compact, sparsify
from hf_sparse.analysis.bench_inputs import Examples, inputs_of, make_inputs
from hf_sparse.analysis.benchmark import Comparison, Timing
from hf_sparse.analysis.benchmark import compare as compare_outputs
from hf_sparse.analysis.dense_engines import ENGINES
from hf_sparse.analysis.environment import diagnose
from hf_sparse.cli.main import main
from hf_sparse.hf.auto import most_tokens
from hf_sparse.kernels import KERNELS
from hf_sparse.kernels.int8_ops import why_not_int8
from hf_sparse.profiling.speed_record import SPEED, Speed, read_speed
from hf_sparse.runtime import RuntimeReport
from hf_sparse.runtime.packed_weight import Packed
from hf_sparse.utils.markdown import plain
from tests.helpers.speeds import speed_file
from tests.helpers.structures import batch, build
from tests.helpers.tiny import save_t5, save_tokenizer

ALIKE = ("machine", "threads", "dtype", "batch", "length")
"""What the settings of two measurements have in common here, but for the examples."""


@pytest.fixture(autouse=True)
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other engine be there: exporting for one takes long. Tests put in their own."""
    for name in list(ENGINES):
        monkeypatch.delitem(ENGINES, name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("bert")
    sparsify(model, SparsityConfig(sparsity=0.8))
    model.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def test_bench_says_what_was_measured_where(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    arguments = ["--backend", "csr", "--threads", "1", "--batch", "2", "--length", "8", "--rounds", "3", "--layers"]
    assert main(["bench", str(saved), *arguments, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    for said in ("batch: 2", "length: 8", "threads: 1", "float32", "outputs differ by", "MB", "intermediate.dense"):
        assert said in text
    found = json.loads(out.read_text())
    assert found["difference"] < 1e-5
    assert found["runtime"]["bytes"] < found["dense"]["bytes"]
    assert found["dense"]["seconds"] == sorted(found["dense"]["seconds"])
    assert found["report"]["backend"] == "csr"


def test_what_bench_saves_is_what_card_report_and_compare_read(saved: Path, tmp_path: Path, capsys: Any) -> None:
    dense = tmp_path / "dense"
    build("bert").save_pretrained(dense)
    for folder, accuracy in ((dense, 0.9), (saved, 0.8)):
        recipe = {"model": {"name": "m"}, "data": {"text": "t"}, "training": {}, "seed": 0, "sparsity": None}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        (folder / "eval_results.json").write_text(json.dumps({"eval_accuracy": accuracy}))
    arguments = ["--against", str(dense), "--threads", "1", "--batch", "2", "--length", "8", "--rounds", "3", "--save"]
    assert main(["bench", str(saved), *arguments, "--backend", "dense", "--json", str(tmp_path / "out.json")]) == 0
    assert (saved / SPEED).read_bytes() == (tmp_path / "out.json").read_bytes()
    assert str(tmp_path) not in (saved / SPEED).read_text()
    speed = read_speed(saved / SPEED)
    assert (speed.threads, speed.batch, speed.length, speed.dtype) == (1, 2, 8, "float32")

    assert main(["card", str(saved), "--against", str(dense)]) == 0
    card = (saved / "README.md").read_text()
    for name, value in speed.rows:
        assert f"| {name} | {plain(value)} |" in card
    assert "| accuracy | 0.9000 | 0.8000 |" in card

    for bench in ([], ["--bench", str(tmp_path / "out.json")]):
        assert main(["report", str(saved), "--html", str(tmp_path / "r.html"), *bench]) == 0
        assert all(str(escape(value)) in (tmp_path / "r.html").read_text() for _, value in speed.rows)

    capsys.readouterr()
    assert main(["compare", str(dense), str(saved)]) == 0
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"| {1e3 * speed.dense[1]:.2f} | - |")
    assert second.endswith(f"| {1e3 * speed.sparse[1]:.2f} | - |")
    (saved / SPEED).unlink()
    assert main(["compare", str(dense), str(saved), "--bench", str(tmp_path / "out.json")]) == 0
    assert second in capsys.readouterr().out


@pytest.fixture
def examples(saved: Path, tmp_path: Path) -> Path:
    """Write examples of 1 to 6 words beside a model with its tokenizer."""
    save_tokenizer(saved)
    words = ["the film is great and warm", "a plot", "acting", "it was a bad bad film", "great"]
    rows = [{"text": text, "other": "film"} for text in words]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bench_times_texts_with_their_lengths(saved: Path, examples: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    arguments = ["bench", str(saved), "--backend", "csr", "--rounds", "2", "--data", str(examples), "--batch", "2"]
    assert main([*arguments, "--json", str(out), "--save"]) == 0
    printed = capsys.readouterr().out
    assert "examples: 5 of texts.jsonl, 3 to 8 tokens, median 4" in printed
    assert "examples a second: dense" in printed
    speed = read_speed(saved / SPEED)
    assert (speed.batch, speed.length, speed.examples) == (2, 8, "5 of texts.jsonl, 3 to 8 tokens, median 4")
    assert ("examples", speed.examples) in speed.rows
    assert main([*arguments, "--length", "4", "--samples", "3", "--text", "text", "--text", "other"]) == 0
    assert "3 of texts.jsonl, 4 to 4 tokens" in capsys.readouterr().out

    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / SPEED).write_text(
        json.dumps(speed_file(model="fixed", **{key: json.loads(out.read_text())["setting"][key] for key in ALIKE}))
    )
    assert main(["compare", str(saved), str(tmp_path / "fixed")]) == 2
    assert "timings must have one setting" in capsys.readouterr().err


def test_batches_of_texts_are_of_like_lengths_and_padded(saved: Path, examples: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    made = inputs_of(model, 2, None, Examples(str(examples)), str(saved))
    assert [tuple(batch["input_ids"].shape) for batch in made.batches] == [(2, 8), (2, 4), (1, 3)]
    assert [batch["attention_mask"].sum(1).tolist() for batch in made.batches] == [[8, 8], [4, 3], [3]]
    assert made.count == 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data", "FILE", "--samples", "0"], "`samples` must be at least 1, got 0"),
        (["--data", "FILE", "--text", "words"], "has no column 'words'"),
        (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--text", "words"], "--text names a column of --data, which is not given"),
        (["--data", "FILE", "--length", "99"], "cut at 99 tokens, but the model takes at most 16"),
    ],
)
def test_texts_that_cannot_be_timed_are_refused(
    saved: Path, examples: Path, arguments: list[str], reason: str, capsys: Any
) -> None:
    given = [str(examples) if each == "FILE" else each for each in arguments]
    assert main(["bench", str(saved), "--backend", "csr", *given]) == 2
    assert reason in capsys.readouterr().err


def test_compacted_model_is_timed_though_no_layer_is_sparse(saved: Path, tmp_path: Path, capsys: Any) -> None:
    model = build("bert")
    sparsify(model, SparsityConfig(pattern="neuron", sparsity=0.5))
    compact(model)
    model.save_pretrained(tmp_path / "small")
    arguments = ["--against", str(saved), "--length", "8", "--rounds", "2", "--save"]
    assert main(["bench", str(tmp_path / "small"), *arguments]) == 0
    speed = read_speed(tmp_path / "small" / SPEED)
    assert speed.sparse_bytes < speed.dense_bytes
    assert "layers sparse: 0 of 0" in capsys.readouterr().out
    build("bert").save_pretrained(tmp_path / "dense")
    assert main(["bench", str(tmp_path / "dense"), "--length", "8"]) == 2
    assert "nothing is sparse" in capsys.readouterr().err


def test_timings_of_other_machines_are_not_compared(tmp_path: Path, capsys: Any) -> None:
    for name, threads in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / SPEED).write_text(json.dumps(speed_file(model=name, threads=threads)))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "timings must have one setting to be compared" in capsys.readouterr().err


def test_save_needs_a_folder(capsys: Any) -> None:
    assert main(["bench", "user/model", "--save"]) == 2
    assert "--save needs a local folder, got 'user/model'; use --json OUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"setting": {"threads": 0}}, "`threads` >= 1, got 0"),
        ({"setting": {"machine": 3}}, "must have a text `machine`"),
        ({"dense": {"seconds": [3, 2, 1]}}, "`dense.seconds` of the measured speed must be quartiles, got [3, 2, 1]"),
        ({"runtime": {"bytes": None}}, "`runtime.bytes` >= 1, got None"),
        ({"speedup": [1.0]}, "`speedup` of the measured speed must be quartiles"),
        ({"speedup": [1.0, 1.0, float("nan")]}, "`speedup` of"),
    ],
)
def test_speed_without_its_circumstances_is_refused(change: dict[str, Any], reason: str) -> None:
    whole = speed_file()
    Speed.from_dict(whole)
    for key, value in change.items():
        whole[key] = {**whole[key], **value} if isinstance(value, dict) else value
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        Speed.from_dict(whole)
    with pytest.raises(CheckpointError, match="mapping `setting`"):
        Speed.from_dict([])


@pytest.mark.skipif(why_not_int8() is not None, reason=f"no int8 products here: {why_not_int8()}")
@pytest.mark.parametrize("backend", ["cpu-int8", "bitmask-int8"])
def test_bench_takes_int8_and_says_how_far_off_it_is(saved: Path, tmp_path: Path, capsys: Any, backend: str) -> None:
    out = tmp_path / "out.json"
    arguments = ["--backend", backend, "--threads", "1", "--length", "8", "--rounds", "2", "--layers"]
    assert main(["bench", str(saved), *arguments, "--json", str(out)]) == 0
    assert "not exact" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert 1e-5 < found["difference"] < 0.1
    assert all(layer["error"] > 0 for layer in found["report"]["layers"] if layer["reason"] is None)


@pytest.mark.parametrize(
    ("arguments", "reason"), [(["--batch", "0"], "`batch` must be at least 1"), (["--length", "99"], "32 positions")]
)
def test_bench_says_what_is_wrong(saved: Path, capsys: Any, arguments: list[str], reason: str) -> None:
    assert main(["bench", str(saved), *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_bench_against_a_model_that_takes_other_inputs_is_refused(saved: Path, tmp_path: Path, capsys: Any) -> None:
    save_t5(tmp_path / "t5")
    command = ["bench", str(saved), "--length", "8", "--rounds", "1", "--backend", "csr", "--against"]
    assert main([*command, str(tmp_path / "t5")]) == 2
    assert "cannot be compared with a T5ForConditionalGeneration" in capsys.readouterr().err
    build("bert", vocab_size=5).save_pretrained(tmp_path / "fewer")
    assert main([*command, str(tmp_path / "fewer")]) == 2
    assert "with 5: both get the same inputs" in capsys.readouterr().err
    build("bert", num_labels=7).save_pretrained(tmp_path / "labels")
    assert main([*command, str(tmp_path / "labels")]) == 2
    assert "outputs must be of one shape" in capsys.readouterr().err


def test_inputs_are_no_longer_than_roberta_takes_and_have_one_end_for_a_classifier() -> None:
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    roberta = RobertaModel(RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=12, pad_token_id=1))
    assert most_tokens(roberta) == 10  # the first two positions are those of the padding and before it
    with pytest.raises(RecipeError, match="the 10 positions of the model"):
        make_inputs(roberta, 1, 11)
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, eos_token_id=1)
    inputs = make_inputs(T5ForSequenceClassification(config), 4, 50)
    assert inputs["input_ids"].eq(1).sum(1).tolist() == [1] * 4


@pytest.mark.parametrize(("gain", "said"), [(1.01, "no speed-up"), (0.5, "no speed-up"), (2.0, "2.00x as fast")])
def test_no_speed_up_is_called_that(gain: float, said: str) -> None:
    timing = Timing((1.0, 1.0, 1.0), 1)
    report = RuntimeReport("auto", "", "", ())
    assert said in str(Comparison({}, 0.0, timing, timing, (gain, gain, gain), report))


def test_other_outputs_are_an_error_and_not_timed() -> None:
    first, second = build("bert"), build("bert", seed=1)
    with pytest.raises(BackendError, match="above the tolerance of 1e-03"):
        compare_outputs(first, second, batch("bert"))


def test_doctor_verifies_the_kernels_and_finds_wrong_ones(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "C++ kernels" in text
    tried = [line for line in text.splitlines() if line[4:].startswith("kernel '")]
    assert len(tried) == len(KERNELS.of_device("cpu"))
    assert not [line for line in tried if "verified" not in line and "cannot run here" not in line]
    assert why_not_int8() is not None or not [line for line in tried if "cannot run here" in line]
    monkeypatch.setattr(Packed, "multiply", lambda self, x, bias: torch.zeros(len(x), self.out_features))
    wrong = {finding.name: finding for finding in diagnose().findings}
    assert not wrong["kernel 'csr'"].works
    assert "WRONG" in wrong["kernel 'csr'"].says
    assert "WRONG" in wrong["kernel 'bitmask-int4'"].says
    assert why_not_int8() is not None or "WRONG" in wrong["kernel 'int8'"].says
