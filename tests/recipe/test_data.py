from __future__ import annotations

import json

import datasets
import pytest
from transformers import ByT5Tokenizer

from hf_sparse.errors import RecipeError
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.recipe.data import load_examples, load_split
from hf_sparse.recipe.sections import DataSection
from tests.helpers.tiny import config, save_tokenizer

ROWS = [{"text": "the film is fine", "label": "pos"}, {"text": "the plot is dull", "label": "neg"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep what `datasets` writes out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def section(tmp_path):
    """Write rows as JSON lines and return the section that names them."""

    def make(train=ROWS, validation=ROWS, **keys):
        for name, rows in (("train", train), ("validation", validation)):
            text = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
        files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
        return DataSection(**{**files, **keys})

    return make


def with_labels(*labels):
    return [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]


def test_load_texts_numbers_strings_in_sorted_order(section):
    texts = load_examples(section())
    assert texts.names == ("neg", "pos")
    assert list(texts.train["labels"]) == [1, 0]


def test_load_texts_numbers_integers_in_sorted_order(section):
    texts = load_examples(section(with_labels(10, -1, 2), with_labels(2)))
    assert texts.names == ("-1", "2", "10")
    assert list(texts.train["labels"]) == [2, 0, 1]
    assert list(texts.validation["labels"]) == [1]


def test_load_texts_takes_whole_numbers_written_as_floats_for_classes(section):
    assert load_examples(section(with_labels(0.0, 1.0), with_labels(1.0))).names == ("0", "1")


def test_load_texts_keeps_numbers_as_they_are_for_regression(section):
    texts = load_examples(section(with_labels(5, 2.5), with_labels(0)), predicts="number")
    assert texts.names == ()
    assert list(texts.train["labels"]) == [5.0, 2.5]
    assert texts.train.features["labels"].dtype == "float32"


@pytest.mark.parametrize("suffix", ["json", "csv", "tsv", "parquet"])
def test_load_texts_reads_every_format(section, tmp_path, suffix):
    rows = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"other.{suffix}"
    write = {
        "json": lambda: path.write_text(json.dumps(ROWS)),
        "csv": lambda: rows.to_csv(path),
        "tsv": lambda: rows.to_csv(path, sep="\t"),
        "parquet": lambda: rows.to_parquet(path),
    }
    write[suffix]()
    texts = load_examples(DataSection(str(path), section().validation))
    assert list(texts.train["text"]) == [row["text"] for row in ROWS]
    assert list(texts.train["labels"]) == [1, 0]


def test_load_texts_asks_the_hub_for_both_splits(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
        )
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = load_examples(DataSection(name="glue", config="mnli", validation="validation_matched", text="sentence"))
    assert asked == [("glue", "mnli", "train"), ("glue", "mnli", "validation_matched")]
    assert texts.names == ("negative", "positive")
    assert list(texts.train["labels"]) == [1, 1]


def test_load_texts_takes_the_same_random_subset_every_time(section):
    rows = with_labels(*([0] * 50 + [1] * 50))
    first, second = (load_examples(section(rows, rows, train_samples=20)) for _ in range(2))
    assert len(first.train) == 20
    assert len(first.validation) == 100
    assert list(first.train["text"]) == list(second.train["text"])
    assert 0 < sum(first.train["labels"]) < 20


@pytest.mark.parametrize(
    ("train", "keys", "reason"),
    [
        (ROWS, {"text": "txt"}, "data.train has no column 'txt'; did you mean 'text'. Its columns: text, label"),
        (ROWS, {"label": "y"}, "data.train has no column 'y'"),
        ([*ROWS, {"text": None, "label": "pos"}], {}, "column 'text' is empty in 1 rows, first in row 2"),
        ([*ROWS, {"text": "a", "label": None}], {}, "column 'label' is empty in 1 rows, first in row 2"),
        ([{"text": 3, "label": 1}], {}, "column 'text' holds 3, which is not text"),
        (with_labels(1, 1), {}, "all training examples have the same label 1"),
        (with_labels(0.5, 1), {}, r"the labels are fractions, such as 0\.5, .* num_labels: 1"),
        (with_labels("neg", "new"), {}, "data.validation: row 0 has label 'pos', but the classes are 'neg', 'new'"),
    ],
)
def test_load_texts_refuses(section, train, keys, reason):
    with pytest.raises(RecipeError, match=reason):
        load_examples(section(train, **keys))


def test_load_texts_refuses_words_as_labels_of_a_regression(section):
    with pytest.raises(RecipeError, match="row 0 has label 'pos', but a regression needs numbers"):
        load_examples(section(), predicts="number")


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "{broken"), ("a.parquet", "no parquet"), ("a.csv", "")])
def test_load_texts_names_a_file_that_cannot_be_read(section, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=f"data.train: cannot read .*{name}"):
        load_examples(DataSection(str(tmp_path / name), section().validation))


def test_load_texts_names_the_formats_it_knows(section, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RecipeError, match=r"must be a file with suffix \.json, .*got .*a\.txt"):
        load_examples(DataSection(str(tmp_path / "a.txt"), section().validation))


def test_tokenized_has_ids_and_labels_only_and_cuts_long_texts(section, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    train, _ = load_examples(section()).tokenized(tokenizer, max_length=4)
    assert set(train.column_names) == {"labels", "input_ids", "token_type_ids", "attention_mask"}
    assert tokenizer.convert_ids_to_tokens(train[0]["input_ids"]) == ["[CLS]", "the", "film", "[SEP]"]


def test_tokenized_cuts_texts_to_be_written_at_a_length_of_their_own(section):
    rows = [{"text": "cat", "label": "K AE T"}, {"text": "dog", "label": "D AO G"}]
    train, validation = load_examples(section(rows, rows), predicts="text").tokenized(ByT5Tokenizer(), 3, 5)
    assert set(train.column_names) == {"labels", "input_ids", "attention_mask"}
    assert ByT5Tokenizer().decode(validation[0]["labels"]) == "K AE</s>"
    assert ByT5Tokenizer().decode(train[1]["input_ids"]) == "do</s>"


def test_load_texts_refuses_numbers_as_texts_to_be_written(section):
    with pytest.raises(RecipeError, match="row 0 has label 1, but task seq2seq generates text"):
        load_examples(section(with_labels(1), with_labels(1)), predicts="text")


def test_tokenized_joins_two_columns_as_a_pair(section, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    rows = [{"a": "film", "b": "is fine", "label": 0}, {"a": "plot", "b": "is dull", "label": 1}]
    train, _ = load_examples(section(rows, rows, text=["a", "b"])).tokenized(tokenizer, max_length=8)
    assert tokenizer.convert_ids_to_tokens(train[0]["input_ids"]) == ["[CLS]", "film", "[SEP]", "is", "fine", "[SEP]"]
    assert train[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_load_tokenizer_refuses_the_empty_one_that_transformers_makes_up(tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"model '{tmp_path}' has no tokenizer beside it"):
        load_tokenizer(str(tmp_path))


def test_load_tokenizer_says_which_model_cannot_be_loaded(tmp_path):
    with pytest.raises(RecipeError, match="cannot load the tokenizer of model 'nowhere'"):
        load_tokenizer("nowhere")


def test_name_of_a_file_is_no_pattern(tmp_path):
    (tmp_path / "dev1.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    path = tmp_path / "dev[1].jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    assert len(load_split(DataSection(train=str(path), validation="none"), "train")) == 2


def test_empty_file_of_json_has_no_rows(tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"data\.train has no rows"):
        load_split(DataSection(train=str(tmp_path / "empty.jsonl"), validation="none"), "train")


@pytest.mark.parametrize("key", ["train", "validation"])
def test_file_in_place_of_a_split_of_a_hub_dataset_is_refused(key):
    with pytest.raises(
        RecipeError, match=rf"`data\.{key}` must be a split of the dataset 'glue', got the file a\.JSONL"
    ):
        DataSection(name="glue", config="sst2", train="a.JSONL" if key == "train" else None, validation="a.JSONL")


@pytest.mark.parametrize("text", ["label", ["a", "label"]])
def test_label_that_is_a_text_column_is_refused(text):
    with pytest.raises(RecipeError, match=r"`data\.label` must be another column than `data\.text`, got 'label'"):
        DataSection(train="a.jsonl", validation="b.jsonl", text=text)
