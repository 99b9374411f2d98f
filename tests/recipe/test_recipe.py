from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_sparse  # noqa: F401 - fills the registries
from hf_sparse.config.sparsity import PATTERNS, RECONSTRUCTIONS, SCHEDULES, SCORERS, SELECTIONS, SparsityConfig
from hf_sparse.errors import RecipeError
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.sections import DataSection, ModelSection
from hf_sparse.recipe.stages import has_stages, load_stages
from hf_sparse.utils.strict_yaml import read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
REGISTRIES: dict[str, Any] = {
    "scorer": SCORERS,
    "pattern": PATTERNS,
    "selection": SELECTIONS,
    "schedule": SCHEDULES,
    "reconstruction": RECONSTRUCTIONS,
}
DATA = {"train": "t.jsonl", "validation": "v.jsonl"}


def recipe(**sections):
    return Recipe.from_dict({"model": "bert", "data": DATA, **sections})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory, with a folder of recipes and data in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("t.jsonl", "v.jsonl"):
        (tmp_path / "recipes" / name).write_text("{}")
    return tmp_path / "recipes"


def write(folder, **sections):
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump({"model": "bert", "data": DATA, **sections}))
    return path


def test_recipe_has_defaults_for_all_but_model_and_data():
    assert recipe() == Recipe(
        model=ModelSection("bert", "sequence-classification", None, None, False),
        data=DataSection("t.jsonl", "v.jsonl", None, None, "text", "label", 128, None, None, None),
        metric=("accuracy",),
        freeze=(),
        sparsity=None,
        distillation=None,
        training={},
        seed=0,
    )


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"date": {}}, "the recipe has no key 'date'; did you mean 'data'"),
        ({"model": {"name": "bert", "tusk": "x"}}, "the model section has no key 'tusk'; did you mean 'task'"),
        ({"model": {"task": "sequence-classification"}}, "`name` is missing in the model section"),
        (
            {"model": {"name": "bert", "task": "chess"}},
            "`model.task` must be one of 'causal-lm', 'embedding', 'image-classification', 'reranking', 'seq2seq', ",
        ),
        (
            {"model": {"name": "t5", "task": "seq2seq", "num_labels": 3}},
            "`model.num_labels` must be left out for `model.task` 'seq2seq'.*got 3",
        ),
        ({"training": {"generation_num_beams": 4}}, "the training section has no key 'generation_num_beams'"),
        ({"model": {"name": "bert", "num_labels": 0}}, "`model.num_labels` must be a positive integer, got 0"),
        ({"model": 3}, "the model section must be a mapping"),
        ({"model": None}, "`model` is missing: the recipe needs"),
        ({"data": {**DATA, "trian": "x"}}, "the data section has no key 'trian'; did you mean 'train'"),
        ({"data": {"train": "t.jsonl"}}, "`data.validation` is missing"),
        (
            {"data": {"train": "t.jsonl", "validation": "t.jsonl"}},
            "`data.validation` must be another file .*measured on the training examples",
        ),
        ({"data": {**DATA, "config": "sst2"}}, "`data.config` must be left out for local files, got 'sst2'"),
        ({"data": {**DATA, "text": ["a", "b", "c"]}}, "`data.text` must be a column name or a list of two, got"),
        ({"data": {**DATA, "max_length": None}}, "`data.max_length` must be a positive integer, got None"),
        ({"data": {**DATA, "train_samples": True}}, "`data.train_samples` must be a positive integer, got True"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"metric": 3}, "`metric` must be a string or a list of strings, got 3"),
        ({"freeze": [1]}, "`freeze` must be a string or a list of strings, got"),
        ({"sparsity": {"sparsty": 0.9}}, "a group has no key 'sparsty'; did you mean 'sparsity'"),
        ({"sparsity": {"sparsity": 1.0}}, r"`sparsity` must be in \[0, 1\), got 1\.0"),
        ({"sparsity": 0.9}, "a sparsity section must be a mapping"),
        ({"sparsity": {"sparsity": 0.5}, "distillation": {"techer": "x"}}, "no key 'techer'; did you mean 'teacher'"),
        ({"distillation": {"teacher": "self"}}, "there is no student to be pruned"),
        (
            {"training": {"lerning_rate": 1.0}},
            "the training section has no key 'lerning_rate'; did you mean 'learning_rate'",
        ),
        ({"training": {"learning_rate": "fast"}}, "`training.learning_rate` must be a finite number, got 'fast'"),
        ({"training": {"max_steps": 1.5}}, "`training.max_steps` must be an integer, got 1.5"),
        ({"training": {"per_device_train_batch_size": 0}}, "`training.per_device_train_batch_size` must be at least 1"),
        ({"training": {"bf16": "no"}}, "`training.bf16` must be true or false, got 'no'"),
        ({"training": {"seed": 1}}, "`training.seed` must be left out: the seed stands at the top"),
        ({"training": {"hub_token": "secret"}}, "`training.hub_token` must be left out: a recipe is saved and shared"),
        ({"training": [1]}, "the training section must be a mapping"),
        ({"seed": -1}, r"`seed` must be an integer in \[0, 4294967296\), got -1"),
        ({"seed": True}, r"`seed` must be an integer in \[0, 4294967296\), got True"),
    ],
)
def test_recipe_refuses(sections, reason):
    with pytest.raises(RecipeError, match=reason):
        recipe(**sections)


def test_recipe_refuses_a_training_value_that_transformers_refuses():
    made = recipe(training={"eval_strategy": "sometimes"})
    with pytest.raises(RecipeError, match=r"`training` must be arguments that transformers accepts.*sometimes"):
        made.training_arguments()


def test_training_arguments_have_one_seed_for_data_and_all_else():
    arguments = recipe(seed=7).training_arguments()
    assert (arguments.seed, arguments.data_seed) == (7, 7)


def test_training_arguments_keep_a_data_seed_of_their_own():
    assert recipe(seed=7, training={"data_seed": 1}).training_arguments().data_seed == 1


def test_load_finds_files_beside_the_recipe(folder):
    assert Recipe.load(write(folder)).data.train == str((folder / "t.jsonl").resolve())


def test_load_prefers_files_of_the_working_directory(folder):
    Path("t.jsonl").write_text("{}")
    assert Recipe.load(write(folder)).data.train == str(Path("t.jsonl").resolve())


def test_load_says_where_it_looked_when_a_file_is_missing(folder):
    (folder / "v.jsonl").unlink()
    with pytest.raises(
        RecipeError,
        match=r"`data.validation` must be a file, and there is no v.jsonl in the working directory .*recipes",
    ):
        Recipe.load(write(folder))


def test_load_leaves_the_name_of_a_model_on_the_hub(folder):
    assert Recipe.load(write(folder)).model.name == "bert"


def test_load_finds_a_model_beside_the_recipe(folder):
    (folder / "bert").mkdir()
    assert Recipe.load(write(folder)).model.name == str((folder / "bert").resolve())


def test_load_writes_to_runs_unless_told(folder):
    assert Recipe.load(write(folder)).training_arguments().output_dir == str(Path("runs") / "test")
    assert Recipe.load(write(folder), ["training.output_dir=here"]).training_arguments().output_dir == "here"


def test_load_applies_overrides_in_order(folder):
    path = write(folder, sparsity={"sparsity": 0.9})
    made = Recipe.load(path, ["seed=1", "sparsity.sparsity=0.5", "seed=2", "sparsity.scorer.name=random"])
    assert made.seed == 2
    assert made.sparsity == SparsityConfig(sparsity=0.5, scorer={"name": "random"})


def test_load_names_the_nearest_key_when_an_override_is_unknown(folder):
    with pytest.raises(RecipeError, match="no key 'max_step'; did you mean 'max_steps'"):
        Recipe.load(write(folder), ["training.max_step=3"])


def test_load_trains_dense_when_sparsity_is_null(folder):
    assert Recipe.load(write(folder, sparsity={"sparsity": 0.9}), ["sparsity=null"]).sparsity is None


@pytest.mark.parametrize("text", ["[1, 2]", "{model: [}", ""])
def test_load_refuses_what_is_no_yaml_mapping(folder, text):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        Recipe.load(folder / "bad.yaml")


@pytest.mark.parametrize("key", ["model.name", "distillation.teacher"])
def test_a_run_says_where_it_looked_when_a_folder_is_missing(folder, key):
    found = f"there is no folder {Path('out/a/model').absolute()} or {folder.absolute() / 'out/a/model'}"
    with pytest.raises(RecipeError, match=re.escape(found)):
        Recipe.load(write(folder), [f"{key}=out/a/model"]).check_models(folder)


def test_load_refuses_a_missing_file(folder):
    with pytest.raises(RecipeError, match=r"cannot read recipe .*nowhere\.yaml"):
        Recipe.load(folder / "nowhere.yaml")


def test_save_and_load_is_the_same_run_with_everything_spelled_out(folder):
    made = Recipe.load(write(folder, sparsity={"scorer": "movement", "pattern": "2:4"}, training={"max_steps": 3}))
    made.save("resolved.yaml")
    written = yaml.safe_load(Path("resolved.yaml").read_text())
    assert written["sparsity"]["groups"][0]["scorer"] == {
        "name": "movement",
        "learning_rate": 0.01,
        "warmup": 0.0,
        "dtype": "float32",
    }
    assert written["sparsity"]["groups"][0]["pattern"] == {"name": "n:m", "n": 2, "m": 4}
    again = Recipe.load("resolved.yaml")
    assert dataclasses.replace(again, sparsity=None) == dataclasses.replace(made, sparsity=None)
    again.save("again.yaml")
    assert Path("again.yaml").read_text() == Path("resolved.yaml").read_text()


@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key, registry in REGISTRIES.items() for name in sorted(registry)]
)
def test_every_entry_of_a_registry_survives_a_saved_recipe(folder, key, name):
    options = {"block": {"rows": 2, "cols": 2}, "n:m": {"n": 2, "m": 4}}.get(name, {})
    sparsity = {} if name in ("n:m", "budget") else {"sparsity": 0.5}
    made = Recipe.load(write(folder, sparsity={**sparsity, key: {"name": name, **options}}))
    made.save("resolved.yaml")
    assert Recipe.load("resolved.yaml").to_dict() == made.to_dict()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path):
    made = [stage.recipe for stage in load_stages(path)] if has_stages(path) else [Recipe.from_dict(read_yaml(path))]
    for recipe in made:
        recipe.training_arguments()
    assert path.read_text().startswith("# "), "a recipe says what it is for"


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if "\nsparsity:" in path.read_text()], ids=lambda path: path.stem
)
def test_shipped_recipe_means_the_same_to_sparsity_config(path):
    assert SparsityConfig.from_recipe(path) == Recipe.from_dict(read_yaml(path)).sparsity


def test_unquoted_pattern_and_number_mean_the_same_to_both_readers(tmp_path):
    """YAML 1.1 would read `2:4` as 124 (base 60) and `1e-2` as text."""
    path = tmp_path / "recipe.yaml"
    for name in ("t.jsonl", "v.jsonl"):
        (tmp_path / name).write_text('{"t": "a", "l": 0}\n')
    path.write_text(
        "model: {name: somewhere}\ndata: {train: t.jsonl, validation: v.jsonl, text: t, label: l}\n"
        "sparsity:\n  groups:\n  - {targets: '*.query', pattern: 2:4}\n"
        "  - {targets: '*.key', sparsity: 5e-1, scorer: {name: movement, learning_rate: 1e-2}}\n"
    )
    config = SparsityConfig.from_recipe(path)
    assert config == Recipe.load(path).sparsity
    assert config.groups[0].pattern == "2:4"
    assert config.groups[1].sparsity == 0.5
    assert config.groups[1].scorer == {"name": "movement", "learning_rate": 0.01}


def test_shipped_recipes_are_there():
    names = {path.stem for path in RECIPES}
    bert = {"bert_magnitude", "bert_movement", "bert_soft_movement", "bert_block_hybrid", "bert_2_4", "bert_cpu_4x1"}
    sst2 = {"sst2_dense", "sst2_magnitude", "sst2_movement", "sst2_soft_movement"}
    assert bert | sst2 | {"demo"} <= names


def test_shipped_sst2_recipes_differ_in_their_sparsity_alone():
    made = [Recipe.from_dict(read_yaml(path)) for path in RECIPES if path.stem.startswith("sst2_")]
    assert len(made) >= 4
    assert {repr(dataclasses.replace(one, sparsity=None)) for one in made} == {
        repr(dataclasses.replace(made[0], sparsity=None))
    }
