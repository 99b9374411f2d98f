from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, BertModel

from hf_sparse.cli.main import main
from tests.helpers.tiny import save_bert

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path / "dense", head=True)


def errors_of(capsys, *arguments):
    """Return what a command that has to fail writes to stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_prune_saves_a_packed_model_of_the_class_it_found_with_its_tokenizer(bert, tmp_path, capsys):
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(tmp_path / "sparse")]) == 0
    assert "50.00%" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert isinstance(model, BertForSequenceClassification)
    dense = AutoModelForSequenceClassification.from_pretrained(bert)
    weight, before = model.get_parameter(f"bert.{QUERY}"), dense.get_parameter(f"bert.{QUERY}")
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert torch.equal(weight, torch.where(weight != 0, before, 0.0))
    assert torch.equal(model.classifier.weight, dense.classifier.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").tokenize("the film") == ["the", "film"]


def test_prune_takes_pattern_targets_and_exclude(bert, tmp_path, capsys):
    arguments = ["--pattern", "2:4", "--targets", "*.query", "--targets", "*.key", "--exclude", "*.layer.1.*"]
    assert main(["prune", str(bert), "--output", str(tmp_path / "sparse"), *arguments]) == 0
    assert main(["inspect", str(tmp_path / "sparse"), "--json"]) == 0
    text = capsys.readouterr().out
    listed = json.loads(text[text.index("\n{") :])
    targeted = {tensor["name"]: tensor["sparsity"] for tensor in listed["tensors"] if tensor["targeted"]}
    assert targeted == {f"bert.{QUERY}": 0.5, f"bert.{QUERY.replace('query', 'key')}": 0.5}


def test_prune_takes_a_pattern_with_options(bert, tmp_path, capsys):
    arguments = ["--sparsity", "0.5", "--pattern", "{name: block, rows: 8, cols: 8}"]
    assert main(["prune", str(bert), "--output", str(tmp_path / "sparse"), *arguments]) == 0
    weight = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse").get_parameter(f"bert.{QUERY}")
    blocks = weight.unfold(0, 8, 8).unfold(1, 8, 8).ne(0).sum((-1, -2))
    assert sorted(blocks.flatten().tolist()) == [0] * 8 + [64] * 8


def test_prune_takes_a_model_without_head_and_without_tokenizer(tmp_path, capsys):
    save_bert(tmp_path / "base")
    for path in (tmp_path / "base").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    assert main(["prune", str(tmp_path / "base"), "--sparsity", "0.9", "--output", str(tmp_path / "sparse")]) == 0
    assert isinstance(BertModel.from_pretrained(tmp_path / "sparse"), BertModel)
    assert sorted(path.name for path in (tmp_path / "sparse").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sparsity", "1.0"], "`sparsity` must be in [0, 1), got 1.0"),
        (["--sparsity=-0.1"], "`sparsity` must be in [0, 1), got -0.1"),
        ([], "`sparsity` is missing"),
        (["--sparsity", "0.5", "--scorer", "magnitud"], "unknown scorer 'magnitud'; did you mean 'magnitude'"),
        (["--sparsity", "0.5", "--scorer", "movement"], "'movement' learns from training"),
        (["--sparsity", "0.5", "--targets", "*.quarry"], "`targets` '*.quarry' matches no layer"),
        (["--sparsity", "0.5", "--pattern", "{name: block, rows: 5, cols: 5}"], "PatternError"),
    ],
)
def test_prune_says_what_is_wrong_and_writes_nothing(bert, tmp_path, capsys, arguments, reason):
    assert reason in errors_of(capsys, "prune", bert, "--output", tmp_path / "sparse", *arguments)
    assert not (tmp_path / "sparse").exists()


def test_prune_does_not_overwrite_the_dense_model(bert, capsys):
    before = (bert / "model.safetensors").read_bytes()
    assert "folder of the model, which would be overwritten" in errors_of(
        capsys, "prune", bert, "--sparsity", "0.5", "--output", bert
    )
    assert (bert / "model.safetensors").read_bytes() == before


def test_prune_says_that_a_model_cannot_be_loaded(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = ("prune", tmp_path / "empty", "--sparsity", "0.5", "--output", tmp_path / "sparse")
    assert "cannot load model" in errors_of(capsys, *arguments)


def test_prune_finds_a_damaged_packed_model(bert, tmp_path, capsys):
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(tmp_path / "sparse")]) == 0
    path = tmp_path / "sparse" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    arguments = ("prune", tmp_path / "sparse", "--sparsity", "0.6", "--output", tmp_path / "again")
    assert "CheckpointError" in errors_of(capsys, *arguments)


def test_prune_loads_no_class_but_a_model(bert, tmp_path, capsys):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "architectures": ["logging", "TrainingArguments"]}))
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(tmp_path / "sparse")]) == 0
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_inspect_counts_the_zeros_of_a_plain_file(tmp_path, capsys):
    weight = torch.tensor([[0.0, -0.0, 1.0, 2.0], [0.0, 3.0, 4.0, 5.0]])
    save_file({"a.weight": weight, "a.bias": torch.zeros(3)}, tmp_path / "plain.safetensors")
    assert main(["inspect", str(tmp_path / "plain.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "No manifest" in text
    assert "37.50%" in text


def test_inspect_prints_json_with_totals(tmp_path, capsys):
    weight = torch.tensor([[0.0, -0.0, 1.0, 2.0], [0.0, 3.0, 4.0, 5.0]])
    save_file({"a.weight": weight, "a.bias": torch.zeros(3)}, tmp_path / "plain.safetensors")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["packed"] is False
    assert listed["files"] == {"plain.safetensors": (tmp_path / "plain.safetensors").stat().st_size}
    assert listed["weights"] == {
        "parameters": 8,
        "nonzeros": 5,
        "stored_bytes": 32,
        "dense_bytes": 32,
        "sparsity": 0.375,
    }
    assert [(tensor["name"], tensor["shape"], tensor["nonzeros"]) for tensor in listed["tensors"]] == [
        ("a.bias", [3], 0),
        ("a.weight", [2, 4], 5),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("nowhere", None, "there is no file or folder"),
        ("a.safetensors", b"\x00" * 4, "cannot read"),
        ("a.safetensors", b"\xff" * 100, "cannot read"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_file(tmp_path, capsys, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert reason in errors_of(capsys, "inspect", tmp_path / name)


def test_inspect_says_that_a_folder_is_empty(tmp_path, capsys):
    assert "holds no .safetensors file" in errors_of(capsys, "inspect", tmp_path)


def test_inspect_finds_a_damaged_packed_file(bert, tmp_path, capsys):
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(tmp_path)]) == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "cannot read" in errors_of(capsys, "inspect", path)


def test_train_says_which_key_of_the_recipe_is_unknown(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("{model: bert, data: {name: glue}, metrik: f1}")
    assert "no key 'metrik'; did you mean 'metric'" in errors_of(capsys, "train", tmp_path / "r.yaml")


def test_train_says_which_override_is_unknown(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("{model: bert, data: {name: glue}}")
    arguments = ("train", tmp_path / "r.yaml", "--set", "training.learning_rat=1")
    assert "did you mean 'learning_rate'" in errors_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--targets", "*.query", "*.key"], "and may be repeated: --targets '*.query' --targets '*.key'"),
        (["--targets=*.query", "*.key"], "and may be repeated: --targets '*.query' --targets '*.key'"),
        (["--targets", "a", "b", "c"], "and may be repeated: --targets 'a' --targets 'b' --targets 'c'"),
        (["--targets", "a", "b", "--exclude", "b"], "and may be repeated: --targets 'a' --targets 'b'"),
        (["--sparsity", "0.5", "0.6"], "--sparsity takes one value, got '0.5' and '0.6'"),
        (["--targets", "*.query,*.key"], "it takes one glob, and may be repeated, got '*.query,*.key'"),
        (["--exclude", "*.query *.key"], "write the option once for each of ['*.query', '*.key']"),
        (["--pattern", "{name: block, rows: 4"], "as in '{name: block, rows: 32, cols: 32}', got '{name: block, rows"),
    ],
)
def test_several_values_of_an_option_that_takes_one(capsys, arguments, reason):
    with pytest.raises(SystemExit) as exit_:
        main(["prune", "model", "--output", "out", *arguments])
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err


def test_an_unknown_option_is_no_second_value(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "model", "--output", "out", "--targets", "a", "-x"])
    assert "takes one value" not in capsys.readouterr().err


def test_column_without_data_is_an_error(capsys):
    assert "--label names a column of the examples" in errors_of(
        capsys, "prune", "model", "--output", "out", "--sparsity", "0.5", "--label", "l"
    )


def test_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["prone"])
    assert exit_.value.code == 2


def test_module_runs_as_a_program():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "hf_sparse", "inspect", "nowhere"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    # The last line: bitsandbytes, which transformers imports where peft is installed, may have had something to say.
    assert done.stderr.splitlines()[-1] == "hf-sparse: CheckpointError: there is no file or folder nowhere"


def test_records_of_a_model_that_was_there_before_are_not_those_of_the_pruned_one(bert, tmp_path):
    out = tmp_path / "out"
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(out)]) == 0
    (out / "eval_results.json").write_text('{"eval_accuracy": 0.99}')
    (out / "trainer_state.json").write_text('{"log_history": []}')
    (out / "recipe.yaml").write_text("model: {name: org/other}\n")
    assert main(["card", str(out)]) == 0
    assert "org/other" in (out / "README.md").read_text()
    assert main(["prune", str(bert), "--sparsity", "0.8", "--output", str(out)]) == 0
    assert (out / "recipe.yaml.old").read_text() == "model: {name: org/other}\n"
    assert not {path.name for path in out.iterdir()} & {
        "eval_results.json", "trainer_state.json", "recipe.yaml", "README.md",
    }  # fmt: skip
    (out / "README.md").write_text("By hand")
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(out)]) == 0
    assert (out / "README.md").read_text() == "By hand"


def test_folder_that_cannot_be_made_is_no_traceback(bert, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["prune", str(bert), "--sparsity", "0.5", "--output", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_help_of_every_verb_imports_nothing_that_only_some_verbs_need():
    code = """
import contextlib, sys
from hf_sparse.cli.main import main
from hf_sparse.cli.verb import VERBS
for arguments in (["--help"], *([name, "--help"] for name in VERBS)):
    with contextlib.suppress(SystemExit):
        main(arguments)
heavy = ("evaluate", "matplotlib", "onnx", "hf_sparse.recipe.train", "hf_sparse.analysis", "hf_sparse.hf.export")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
