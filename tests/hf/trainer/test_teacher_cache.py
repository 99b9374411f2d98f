"""A teacher that is run once: cached equals live, padding and order do not matter, and another cache is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets.arrow_writer import ArrowWriter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    default_data_collator,
)

from hf_sparse import DistillationConfig, RecipeError, SparsityCallback, SparsityError
from hf_sparse.cli.main import main
from hf_sparse.distillation.distiller import Distiller
from hf_sparse.distillation.example_keys import Examples
from hf_sparse.errors import CheckpointError
from hf_sparse.hf.trainer.teacher import make_distiller
from hf_sparse.hf.trainer.teacher_cache import TeacherCache, batches_of, write_cache
from tests.helpers import tiny
from tests.helpers.training import arguments, bert

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def moved(model: Any) -> Any:
    """A teacher that is not the student."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def padded(batch: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    ends = {"labels": -100}
    return {
        name: torch.nn.functional.pad(value, (0, more), value=ends.get(name, 0)) if value.ndim == 2 else value
        for name, value in batch.items()
    }


def classes_batch() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    ids = torch.randint(5, 15, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    return bert(**NO_DROPOUT), moved(bert(**NO_DROPOUT)), batch


def causal_batch() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = [LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)) for _ in range(2)]
    _, _, batch = classes_batch()
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return models[0], models[1], {**batch, "labels": labels}


def writing_batch() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    sizes: Any = {
        "decoder_start_token_id": 0,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    models = [T5ForConditionalGeneration(T5Config(vocab_size=20, **sizes)) for _ in range(2)]
    _, _, batch = classes_batch()
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 1, -100]])
    return models[0], models[1], {**batch, "labels": labels}


BATCHES = {"classes": classes_batch, "causal": causal_batch, "writing": writing_batch}


@pytest.mark.parametrize("kind", BATCHES)
def test_cached_loss_is_the_live_one_whatever_padding_and_order(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher, batch = BATCHES[kind]()
    live = make_distiller(student, DistillationConfig(teacher="there"), teacher)
    assert write_cache(live, [padded(batch, 3)], tmp_path, None).examples == 3
    cached = make_distiller(student, DistillationConfig(teacher="there", cache=str(tmp_path)), teacher)
    assert isinstance(cached.teacher, TeacherCache)
    order = torch.tensor([2, 0, 1])
    turned = {name: value[order] for name, value in batch.items()}
    outputs = student.eval()(**turned)
    losses = [float(one.loss(outputs, (), turned, 1.0).detach()) for one in (live, cached)]
    assert losses[0] > 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_same_batches_give_the_same_bits(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    live = make_distiller(student, DistillationConfig(teacher="there"), teacher)
    write_cache(live, [batch], tmp_path, None)
    assert torch.equal(
        TeacherCache(tmp_path).look_up(live.examples(batch))["logits"], live.teacher_outputs((), batch)["logits"]
    )


def test_half_precision_is_near(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    live = make_distiller(student, DistillationConfig(teacher="there"), teacher)
    write_cache(live, [batch], tmp_path, None, dtype="fp16")
    found, exact = (
        TeacherCache(tmp_path).look_up(live.examples(batch))["logits"],
        live.teacher_outputs((), batch)["logits"],
    )
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    with pytest.raises(RecipeError, match="`dtype` must be one of 'fp32', 'fp16', got 'int8'"):
        write_cache(live, [batch], tmp_path, None, dtype="int8")


def test_logits_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    with torch.no_grad():
        teacher.classifier.bias.fill_(1e6)
    with pytest.raises(SparsityError, match="not finite as fp16"):
        write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None, dtype="fp16")
    with pytest.raises(CheckpointError, match="no complete cache"):
        TeacherCache(tmp_path)


def test_padding_is_not_stored(tmp_path: Path) -> None:
    student, teacher, batch = causal_batch()
    write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None)
    cache = TeacherCache(tmp_path)
    assert sorted(tuple(row["logits_shape"]) for row in cache._rows) == [(3, 20), (4, 20), (6, 20)]


def test_keys_differ_where_any_input_does() -> None:
    ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
    plain = {"input_ids": ids, "attention_mask": mask}
    others = [
        {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1]])},
        {"input_ids": torch.tensor([[6, 5, 0]]), "attention_mask": mask},
        {**plain, "token_type_ids": torch.tensor([[0, 1, 0]])},
        {**plain, "decoder_input_ids": torch.tensor([[1]])},
    ]
    keys = [Examples(inputs).names()[0] for inputs in (plain, *others)]
    assert len(set(keys)) == 5
    assert Examples({"input_ids": ids.int(), "attention_mask": mask}).names() == keys[:1]


@pytest.mark.parametrize("kind", ["causal", "writing"])
def test_most_likely_tokens_alone_are_the_live_loss_when_they_are_all(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher, batch = BATCHES[kind]()
    given = DistillationConfig(teacher="there", temperature=3.0)
    live = make_distiller(student, given, teacher)
    outputs = student.eval()(**batch)
    expected = float(live.loss(outputs, (), batch, 1.0).detach())
    found = {}
    for top in (4, 19, 20):
        written = write_cache(live, [padded(batch, 3)], tmp_path, None, top=top)
        positions = sum(len(row) for row in datasets.Dataset.from_file(str(tmp_path / "logits.arrow"))["logits_rest"])
        assert written == (3, positions * (8 * min(top, 19) + 4))
        cached = make_distiller(student, DistillationConfig(**given.to_dict(), cache=str(tmp_path)), teacher)
        found[top] = float(cached.loss(outputs, (), batch, 1.0).detach())
    assert found[19] == pytest.approx(expected, rel=1e-4)
    assert found[20] == found[19]
    assert 0.01 * expected < found[4] < 0.98 * expected


def test_most_likely_tokens_are_of_one_temperature(tmp_path: Path) -> None:
    student, teacher, batch = causal_batch()
    write_cache(make_distiller(student, DistillationConfig(temperature=1.0), teacher), [batch], tmp_path, None, top=3)
    with pytest.raises(CheckpointError, match=r"3 most likely tokens at temperature 1, and .* is 2\..*--top 3"):
        make_distiller(student, DistillationConfig(cache=str(tmp_path), temperature=2.0), teacher)


def test_most_likely_tokens_need_a_model_that_predicts_tokens(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    with pytest.raises(RecipeError, match="the teacher returns logits for whole examples"):
        write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None, top=3)


@pytest.mark.parametrize("facts", [{"top": 0}, {"top": "3"}, {"top": None}, {"top": 2}, {"temperature": 0}])
def test_facts_of_most_likely_tokens_that_cannot_be_right_are_no_cache(facts: dict[str, Any], tmp_path: Path) -> None:
    student, teacher, batch = causal_batch()
    write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None, top=3)
    path = tmp_path / "teacher_cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    if facts == {"top": 2}:  # a number that nothing depends on but the report
        assert TeacherCache(tmp_path).layout.top == 2
        return
    with pytest.raises(CheckpointError, match="no complete cache of a teacher"):
        TeacherCache(tmp_path)


def test_damaged_tokens_are_refused(tmp_path: Path) -> None:
    student, teacher, batch = causal_batch()
    distiller = make_distiller(student, DistillationConfig(), teacher)
    write_cache(distiller, [batch], tmp_path, None, top=3)

    def swapped(columns: dict[str, Any]) -> dict[str, Any]:
        return {**columns, "logits_index": [row[::-1] for row in columns["logits_index"]]}

    change_rows(tmp_path, swapped)
    with pytest.raises(CheckpointError, match="checksum does not match"):
        TeacherCache(tmp_path).look_up(distiller.examples(batch))


def test_logits_that_do_not_fit_on_the_disk_are_refused_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, batch = causal_batch()
    distiller = make_distiller(student, DistillationConfig(), teacher)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
    batches = batches_of(rows, default_data_collator, batch, size=1)  # type: ignore[arg-type]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SparsityError, match=r"logits of 3 examples take about 1\.4 kB, and .* has 1\.0 kB left.*--top"):
        write_cache(distiller, batches, tmp_path, None)
    assert write_cache(distiller, batches, tmp_path, None, top=2) == (3, 13 * 20)


def test_an_example_that_is_not_in_the_cache_is_an_error_that_says_so(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    distiller = make_distiller(student, DistillationConfig(), teacher)
    write_cache(distiller, [batch], tmp_path, None)
    new = {**batch, "input_ids": batch["input_ids"].clone()}
    new["input_ids"][1, 0] = 3
    with pytest.raises(SparsityError, match="has no logits for example 1 of this batch"):
        TeacherCache(tmp_path).look_up(distiller.examples(new))


@pytest.mark.parametrize("key", ["hidden_weight", "attention_weight"])
def test_a_cache_has_logits_alone(key: str) -> None:
    with pytest.raises(RecipeError, match=r"must be 0 with `distillation.cache`"):
        DistillationConfig.from_dict({"cache": "somewhere", key: 0.5})


def test_no_cache_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    student, teacher, _ = classes_batch()
    with pytest.raises(CheckpointError, match="hf-sparse cache-teacher RECIPE"):
        make_distiller(student, DistillationConfig(cache=str(tmp_path)), teacher)


def test_facts_that_are_no_mapping_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "teacher_cache.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no complete cache"):
        TeacherCache(tmp_path)


def change_rows(folder: Path, change: Any) -> None:
    """Write the rows of a cache again, changed."""
    path = folder / "logits.arrow"
    rows = datasets.Dataset.from_file(str(path))
    columns = change({name: rows[name][:] for name in rows.column_names})
    path.unlink()
    with ArrowWriter(path=str(path), features=rows.features) as writer:
        writer.write_batch(columns)
        writer.finalize()


def flipped(columns: dict[str, Any]) -> dict[str, Any]:
    bits = np.array(columns["logits"], dtype=np.float32)
    bits.view(np.uint32)[1, 0] ^= 1 << 30
    return {**columns, "logits": bits.tolist()}


@pytest.mark.parametrize(
    "change",
    [
        flipped,
        lambda columns: {**columns, "logits": columns["logits"][1:] + columns["logits"][:1]},
        lambda columns: {**columns, "logits_shape": [[1, 2]] * 3},
        lambda columns: {**columns, "logits_shape": [[2**40]] * 3},
        lambda columns: {**columns, "checksum": [0] * 3},
    ],
)
def test_damaged_logits_are_refused_when_they_are_needed(change: Any, tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    distiller = make_distiller(student, DistillationConfig(), teacher)
    write_cache(distiller, [batch], tmp_path, None)
    cache = TeacherCache(tmp_path)
    assert cache.look_up(distiller.examples(batch))["logits"].shape == (3, 2)
    change_rows(tmp_path, change)
    damaged = TeacherCache(tmp_path)
    with pytest.raises(CheckpointError, match=r"are corrupted: the checksum does not match\. Create the cache again"):
        damaged.look_up(distiller.examples(batch))


@pytest.mark.parametrize(
    "change",
    [
        lambda columns: {**columns, "key": ["x", *columns["key"][1:]]},
        lambda columns: {name: column[1:] for name, column in columns.items()},
        lambda columns: {name: column + column[:1] for name, column in columns.items()},
    ],
)
def test_examples_that_were_not_written_are_no_cache(change: Any, tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None)
    change_rows(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"no complete cache .*are not those that were written"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("column", ["key", "checksum", "logits", "logits_shape"])
def test_missing_column_is_no_cache(column: str, tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None)
    rows = datasets.Dataset.from_file(str(tmp_path / "logits.arrow")).remove_columns(column)
    with ArrowWriter(path=str(tmp_path / "fewer.arrow"), features=rows.features) as writer:
        writer.write_batch({name: rows[name][:] for name in rows.column_names})
        writer.finalize()
    (tmp_path / "fewer.arrow").replace(tmp_path / "logits.arrow")
    with pytest.raises(CheckpointError, match=r"no complete cache .*has the columns"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"logits": None}, {"logits": []}, {"logits": ["../x"]}, {"logits": "logits"}, {"dtype": "fp8"}, {"dtype": []},
        {"examples": 0}, {"examples": "3"}, {"teacher": None}, {"tokenizer": 5}, {"data": ""}, {"version": 1},
        {"version": None}, {"examples": 4},
    ],
)  # fmt: skip
def test_facts_that_cannot_be_right_are_no_cache(change: dict[str, Any], tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    write_cache(make_distiller(student, DistillationConfig(), teacher), [batch], tmp_path, None)
    facts = json.loads((tmp_path / "teacher_cache.json").read_text())
    for changed in ({**facts, **change}, {key: value for key, value in facts.items() if key not in change}):
        if changed != facts and not ("tokenizer" in change and "tokenizer" not in changed):
            (tmp_path / "teacher_cache.json").write_text(json.dumps(changed))
            with pytest.raises(CheckpointError, match=r"no complete cache of a teacher .*Create one"):
                TeacherCache(tmp_path)


def test_a_cache_that_is_being_read_stays_while_another_is_written_in_its_place(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    first = make_distiller(student, DistillationConfig(), teacher)
    write_cache(first, [batch], tmp_path, None)
    reader, expected = TeacherCache(tmp_path), first.teacher_outputs((), batch)["logits"].clone()
    write_cache(make_distiller(student, DistillationConfig(), moved(teacher)), [batch], tmp_path, None)
    assert torch.equal(reader.look_up(first.examples(batch))["logits"], expected)


# -- the command, and training with it -------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(9)
    moved(bert(**NO_DROPOUT)).save_pretrained(tmp_path / "teacher")
    bert(**NO_DROPOUT).save_pretrained(tmp_path / "student")
    tiny.save_tokenizer(tmp_path / "student")
    tiny.save_tokenizer(tmp_path / "teacher")
    tiny.write_sentences(tmp_path / "train.jsonl", slice(0, 18))
    tiny.write_sentences(tmp_path / "dev.jsonl", slice(18, None))
    sections = {
        "model": "student",
        "data": {"train": "train.jsonl", "validation": "dev.jsonl", "max_length": 12},
        "sparsity": {"sparsity": 0.5, "schedule": {"name": "cubic", "begin": 0.0, "end": 0.5}},
        "distillation": {"teacher": "teacher"},
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, "save_strategy": "no", "output_dir": "out",
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["distillation_kl"] for log in history if "distillation_kl" in log]


@pytest.mark.parametrize("teacher", ["teacher", "self"])
def test_training_with_the_cache_is_training_with_the_teacher(teacher: str, recipe: Path, capsys: Any) -> None:
    given = ["--set", f"distillation.teacher={teacher}"]
    assert main(["teach", str(recipe), "--output", "cache", *given]) == 0
    assert "Logits for 18 examples" in capsys.readouterr().out
    assert main(["train", str(recipe), "--output", "live", *given]) == 0
    assert main(["train", str(recipe), "--output", "read", "--set", "distillation.cache=cache", *given]) == 0
    live, read = losses(Path("live")), losses(Path("read"))
    assert len(live) == 6
    assert read == pytest.approx(live, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("changed", ["teacher", "tokenizer", "data"])
def test_a_cache_of_something_else_is_refused_before_step_one(changed: str, recipe: Path, capsys: Any) -> None:
    assert main(["teach", str(recipe), "--output", "cache"]) == 0
    if changed == "teacher":
        bert(**NO_DROPOUT).save_pretrained("teacher")
    elif changed == "tokenizer":
        for name in ("tokenizer.json", "vocab.txt"):
            path = Path("student", name)
            if path.exists():
                path.write_text(path.read_text().replace("lovely", "lively"))
    else:
        tiny.write_sentences(Path("train.jsonl"), slice(0, 17))
    capsys.readouterr()
    assert main(["train", str(recipe), "--set", "distillation.cache=cache"]) == 2
    assert f"made with another {changed}" in capsys.readouterr().err
    assert not Path("out", "trainer_state.json").exists()


def test_teach_needs_a_teacher_and_a_folder(recipe: Path, capsys: Any) -> None:
    assert main(["teach", str(recipe)]) == 2
    assert "give --output DIR" in capsys.readouterr().err
    assert main(["teach", str(recipe), "--output", "cache", "--set", "distillation=null"]) == 2
    assert "no teacher to run" in capsys.readouterr().err
    assert main(["teach", str(recipe), "--output", "cache", "--set", "distillation.hidden_weight=0.1"]) == 2
    assert "must be 0 with `distillation.cache`" in capsys.readouterr().err


def test_a_stream_is_checked_example_by_example(tmp_path: Path) -> None:
    student, teacher, batch = classes_batch()
    distiller: Distiller = make_distiller(student, DistillationConfig(), teacher)
    write_cache(distiller, [batch], tmp_path / "cache", None)
    known = [{name: value[row] for name, value in batch.items()} for row in range(3)]

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __init__(self, rows: list[Any]) -> None:
            self.rows = rows

        def __iter__(self) -> Any:
            return iter(self.rows * 20)

    def train(rows: list[Any]) -> None:
        callback = SparsityCallback(
            {"sparsity": 0.5, "schedule": {"name": "linear", "begin": 0.0, "end": 0.5}},
            teacher=moved(bert(**NO_DROPOUT)),
            distillation={"cache": str(tmp_path / "cache")},
        )
        options = arguments(tmp_path, max_steps=3, per_device_train_batch_size=3)
        Trainer(bert(**NO_DROPOUT), options, train_dataset=Stream(rows), callbacks=[callback]).train()

    train(known)
    with pytest.raises(SparsityError, match="has no logits for example"):
        train([*known[:2], {**known[2], "input_ids": known[2]["input_ids"] + 1}])
