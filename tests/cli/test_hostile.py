"""Hostile folders and recipes, through the commands: an error of ours, in bounded time and memory, and nothing lost."""

import json
import os

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import SparsityConfig
from tests.helpers.limits import command, limited
from tests.helpers.tiny import save_bert, write_sentences

BOMB = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = f"data: {'[' * 900}"


@pytest.fixture
def folder(tmp_path):
    """A run as `hf-sparse train` leaves it: a packed model, its recipe and its results."""
    model = AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path / "dense", head=True))
    hf_sparse.sparsify(model, SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "run")
    write_sentences(tmp_path / "data.jsonl")
    recipe = "model:\n  name: bert\ndata:\n  train: data.jsonl\nsparsity:\n  sparsity: 0.5\ntraining: {}\nseed: 0\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    (tmp_path / "run" / "eval_results.json").write_text('{"eval_accuracy": 0.5}')
    return tmp_path / "run"


def refused(*arguments, seconds=20, megabytes=1024, **limits):
    """Run a command that must fail in words, and return them."""
    status, _, errors = limited(command, *arguments, seconds=seconds, megabytes=megabytes, **limits)
    assert status == 2
    assert len(errors) < 3000
    return errors


@pytest.mark.parametrize("text", [BOMB, DEEP], ids=["bomb", "deep"])
@pytest.mark.parametrize("verb", ["card", "push", "heads", "compare"])
def test_recipe_next_to_a_model_cannot_hang_a_command(folder, verb, text):
    (folder / "recipe.yaml").write_text(text)
    more = {"push": ["user/x"], "heads": ["--data", folder.parent / "data.jsonl"]}.get(verb, [])
    assert "not valid YAML" in refused(verb, folder, *more)


@pytest.mark.parametrize("text", [BOMB, DEEP], ids=["bomb", "deep"])
@pytest.mark.parametrize("verb", ["train", "teach"])
def test_recipe_that_is_run_cannot_hang_a_command(tmp_path, verb, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert "not valid YAML" in refused(verb, tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text("model: bert\n")
    assert "not valid YAML" in refused(verb, tmp_path / "recipe.yaml", "--set", f"data={{{text.strip()}")


def test_spec_on_the_command_line_cannot_hang_a_command(folder):
    bomb = "{" + ", ".join(BOMB.strip().splitlines()) + "}"
    with pytest.raises(SystemExit) as ended:
        limited(command, "prune", folder, "--output", folder.parent / "out", "--sparsity", "0.5", "--scorer", bomb)
    assert ended.value.code == 2


@pytest.mark.parametrize("seed", [".inf", "-.inf", ".nan", "1e400", "x", "[1]", "null", "{a: 1}"])
def test_compare_refuses_a_seed_that_is_none(folder, seed):
    recipe = (folder / "recipe.yaml").read_text().replace("seed: 0", f"seed: {seed}")
    (folder / "recipe.yaml").write_text(recipe)
    assert str(folder) in refused("compare", folder)


@pytest.mark.parametrize("value", [5, "BertModel", {"a": 1}, [5], [[]], None, True])
def test_architectures_that_are_no_list_of_names_are_no_traceback(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": value}))
    status, _, errors = limited(
        command, "report", folder, "--html", folder.parent / "r.html", seconds=60, megabytes=2048
    )
    assert status in (0, 2)
    assert "Traceback" not in errors


def test_linked_recipe_is_not_in_the_card_and_linked_config_is_not_converted(folder, tmp_path):
    (tmp_path / "secret.yaml").write_text("model: {name: secret}\n")
    (folder / "recipe.yaml").unlink()
    (folder / "recipe.yaml").symlink_to(tmp_path / "secret.yaml")
    assert "outside of its folder" in refused("card", folder)
    assert not (folder / "README.md").exists()
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert "outside of its folder" in refused("convert", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "prune", "compact"])
def test_full_disk_is_an_error_in_words_and_leaves_the_old_model(folder, verb, tmp_path):
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    hf_sparse.sparsify(dense, SparsityConfig(pattern="head", sparsity=0.5)).save_pretrained(tmp_path / "heads")
    output = tmp_path / "out"
    more = ["--output", output, *(["--sparsity", "0.5"] if verb == "prune" else [])]
    arguments = [tmp_path / "heads", *([output] if verb == "convert" else more)]
    assert limited(command, verb, *arguments, seconds=60, megabytes=2048)[0] == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    errors = refused(verb, *arguments, seconds=60, megabytes=2048, file_bytes=4000)
    assert "cannot write" in errors
    assert "The old files are unchanged" in errors
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_index_of_another_folder_is_not_followed_on_loading(folder, tmp_path):
    from safetensors.torch import save_file

    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    os.remove(tmp_path / "dense" / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": "../other.safetensors"}}
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps(index))
    errors = refused("prune", tmp_path / "dense", "--output", tmp_path / "out", "--sparsity", "0.5", megabytes=2048)
    assert "which is not a file of its folder" in errors
