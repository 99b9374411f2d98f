"""Recipes from YAML to the files of a run, on a model and texts made here."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_sparse import CheckpointError, Pruner, RecipeError, SparsityConfig, compact, sparsify, summarize
from hf_sparse.cli.main import main
from hf_sparse.formats.inspection import inspect
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.stages import has_stages
from hf_sparse.recipe.train import run
from tests.helpers import convolutional, oneshot, sentence
from tests.helpers.tiny import save_bert, save_t5, write_sentences, write_spellings

SHIPPED = Path(__file__).parents[2] / "recipes"
TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 4,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep what `datasets` writes out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe, its model and its data, and return its path."""
    save_bert(tmp_path / "bert")
    write_sentences(tmp_path / "train.jsonl", slice(0, 18))
    write_sentences(tmp_path / "validation.jsonl", slice(18, None))

    def write(**sections):
        data = {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 8}
        path = tmp_path / "recipe.yaml"
        made = {"model": "bert", "data": data, "training": TRAINING, **sections}
        path.write_text(yaml.safe_dump(made))
        return path

    return write


def train(path, *overrides, output):
    return run(Recipe.load(path, [*overrides, f"training.output_dir={output}"]))


def test_train_writes_model_recipe_state_metrics_and_report(recipe, tmp_path, capsys):
    path = recipe(sparsity={"sparsity": 0.75, "schedule": {"name": "cubic", "begin": 0.0, "end": 0.5}})
    assert main(["train", str(path), "--output", str(tmp_path / "out"), "--set", "seed=3"]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "report.md", "trainer_state.json"}
    assert expected | {"all_results.json", "eval_results.json", "train_results.json"} <= names

    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0.0 <= results["eval_accuracy"] <= 1.0
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["sparsity"] > 0
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert resolved["seed"] == 3
    assert resolved["sparsity"]["groups"][0]["schedule"]["end"] == 0.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| sparsity of the targeted weights | 75.0000% |" in report
    assert "18 training examples, 6 validation examples" in report
    assert "75.00%" in capsys.readouterr().out


def test_trained_model_loads_as_sparse_as_asked_and_exactly(recipe, tmp_path):
    path = recipe(sparsity={"sparsity": 0.75, "schedule": {"name": "cubic", "begin": 0.0, "end": 0.5}})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "speed.json").write_text("of a model that was there before")
    (tmp_path / "out" / "README.md").write_text("# By hand")
    result = train(path, output=tmp_path / "out")
    assert not (tmp_path / "out" / "speed.json").exists()
    assert (tmp_path / "out" / "README.md").read_text() == "# By hand"
    assert result.summary.sparsity == 0.75
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert summarize(model).sparsity == 0.75
    listed = {tensor.name: tensor for tensor in inspect(tmp_path / "out").weights}
    assert {name: tensor.nonzeros for name, tensor in listed.items()} == {
        weight.name: weight.nonzeros for weight in result.summary.weights
    }
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("the film is great", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()


def test_resolved_recipe_repeats_the_run_to_the_last_bit(recipe, tmp_path):
    path = recipe(sparsity={"sparsity": 0.5, "scorer": "movement", "schedule": {"name": "linear", "every": 2}})
    train(path, output=tmp_path / "one")
    train(tmp_path / "one" / "recipe.yaml", output=tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_methods_start_from_the_same_head_and_see_the_same_batches(recipe, tmp_path, monkeypatch):
    heads: list[torch.Tensor] = []
    batches: list[list[list[int]]] = []
    forward = torch.nn.Embedding.forward

    def watched(self, ids):
        if self.num_embeddings == 17 and torch.is_grad_enabled():
            batches[-1].append(ids.tolist())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
    loaded = AutoModelForSequenceClassification.from_pretrained

    def load(*args, **kwargs):
        model = loaded(*args, **kwargs)
        heads.append(model.classifier.weight.detach().clone())
        return model

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    path = recipe(sparsity={"sparsity": 0.5, "scorer": "soft_movement", "schedule": "linear"})
    for index, override in enumerate(("sparsity=null", "sparsity.scorer=magnitude", "sparsity.scorer=soft_movement")):
        batches.append([])
        train(path, override, output=tmp_path / f"out{index}")
    assert len(batches[0]) == 12
    assert batches[0] == batches[1] == batches[2]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_null_sparsity_trains_dense_and_learns_the_texts(recipe, tmp_path):
    path = recipe(sparsity={"sparsity": 0.9})
    overrides = ("sparsity=null", "training.max_steps=60", "training.learning_rate=3e-3")
    result = train(path, *overrides, output=tmp_path / "out")
    assert result.metrics["eval_accuracy"] == 1.0
    assert not inspect(tmp_path / "out").packed
    assert "No manifest" in str(inspect(tmp_path / "out"))


def test_frozen_parameters_do_not_change(recipe, tmp_path):
    result = train(recipe(freeze=["*embeddings*", "*.layer.0.*"]), output=tmp_path / "out")
    assert result.output == tmp_path / "out"
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not {name for name in changed if "embeddings" in name or ".layer.0." in name}
    assert {name for name in changed if ".layer.1." in name}


def test_regression_is_trained_on_numbers(recipe, tmp_path):
    path = recipe(model={"name": "bert", "num_labels": 1}, metric=["pearson", "spearman"])
    result = train(path, output=tmp_path / "out")
    assert {"eval_pearson", "eval_spearman"} <= set(result.metrics)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").classifier.out_features == 1


def test_encoder_decoder_is_pruned_while_it_learns_to_write(recipe, tmp_path):
    save_t5(tmp_path / "t5")
    write_spellings(tmp_path / "words.jsonl", "cat dog cow hen pig ant bee fly")
    write_spellings(tmp_path / "held_out.jsonl", "dog bat")
    path = recipe(
        model={"name": "t5", "task": "seq2seq"},
        data={
            "train": "words.jsonl", "validation": "held_out.jsonl", "text": "source", "label": "target",
            "max_length": 8, "max_target_length": 12,
        },
        metric=["wer", "exact_match"],
        sparsity={"sparsity": 0.5, "schedule": {"name": "cubic", "begin": 0.0, "end": 0.5}},
        training={**TRAINING, "max_steps": 120, "learning_rate": 1e-2, "generation_max_length": 12},
    )  # fmt: skip
    result = train(path, output=tmp_path / "out")
    assert result.metrics["eval_wer"] < 0.5  # "dog" was trained on
    assert result.metrics["eval_exact_match"] in (0.0, 0.5, 1.0)
    assert result.summary.sparsity == pytest.approx(0.5, abs=1e-3)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = loaded.generate(**tokenizer("dog", return_tensors="pt"), max_length=12)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == "d o g"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"freeze": ["*embedings*"]}, r"freeze: '\*embedings\*' matches no parameter"),
        (
            {"data": {"train": "train.jsonl", "validation": "validation.jsonl"}},
            "cut at 128 tokens, .* at most 16: set data.max_length",
        ),
        (
            {"model": {"name": "bert", "num_labels": 3}},
            "num_labels is 3, but the training examples have 2 classes: 0, 1",
        ),
        ({"model": "missing"}, "cannot load the tokenizer of model 'missing'"),
        ({"sparsity": {"sparsity": 0.5, "targets": "*.quarry"}}, r"'\*\.quarry' matches no layer"),
        ({"sparsity": {"sparsity": 0.5, "pattern": {"name": "block", "rows": 5, "cols": 5}}}, "block"),
        ({"sparsity": {"sparsity": 0.5, "schedule": {"name": "cubic", "every": 500}}}, "every 500 steps"),
        (
            {"training": {**TRAINING, "eval_strategy": "sometimes"}},
            "`training` must be arguments that transformers accepts",
        ),
    ],
)
def test_recipe_that_does_not_fit_is_refused_before_training(recipe, tmp_path, sections, reason):
    with pytest.raises(RecipeError, match=reason):
        train(recipe(**sections), output=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_inspect_refuses_a_folder_with_a_missing_shard(recipe, tmp_path):
    path = recipe(sparsity={"sparsity": 0.75, "schedule": "constant"})
    train(path, output=tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    whole = inspect(tmp_path / "shards")
    assert [(t.name, t.nonzeros) for t in sorted(whole.weights, key=lambda t: t.name)] == [
        (t.name, t.nonzeros) for t in sorted(inspect(tmp_path / "out").weights, key=lambda t: t.name)
    ]
    alone = inspect(shards[0])
    assert 0 < len(alone.tensors) < len(whole.tensors)
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=r"is not complete: .* is missing"):
        inspect(tmp_path / "shards")


STAGED = [path for path in sorted(SHIPPED.glob("*.yaml")) if has_stages(path)]


@pytest.mark.parametrize("path", STAGED, ids=lambda path: path.stem)
def test_shipped_recipe_with_stages_trains_a_tiny_model_through_all_of_them(recipe, tmp_path, path):
    recipe()
    overrides = {
        "model.name": tmp_path / "bert",
        "data": f"{{train: {tmp_path}/train.jsonl, validation: {tmp_path}/validation.jsonl, max_length: 8}}",
        "training.max_steps": 8,
        "training.logging_steps": 4,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.use_cpu": "true",
        "training.disable_tqdm": "true",
    }
    out = tmp_path / "out"
    changes = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    assert main(["train", str(path), "--output", str(out), *changes]) == 0
    if "vocabulary" in path.stem:
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
        assert model.config.vocab_size < AutoConfig.from_pretrained(tmp_path / "bert").vocab_size
        assert summarize(model).sparsity == pytest.approx(0.9, abs=1e-3)
        return
    pruned = AutoModelForSequenceClassification.from_pretrained(out / "pruned")
    assert summarize(pruned).sparsity == pytest.approx(0.5, abs=1e-3)
    small = AutoModelForSequenceClassification.from_pretrained(out)
    layer = small.bert.encoder.layer[0]
    assert layer.intermediate.dense.out_features == 32  # of 64
    assert layer.attention.self.query.out_features == 16  # two of four heads, 8 wide each
    for folder in ("pruned", "."):
        history = json.loads((out / folder / "trainer_state.json").read_text())["log_history"]
        assert history[0]["distillation_kl"] >= 0
        taught = yaml.safe_load((out / folder / "recipe.yaml").read_text())["distillation"]["teacher"]
        assert taught == str(out / "dense")


CAUSAL = [path for path in sorted(SHIPPED.glob("*.yaml")) if "task: causal-lm" in path.read_text(encoding="utf-8")]
SENTENCES = [
    path
    for path in sorted(SHIPPED.glob("*.yaml"))
    if any(f"task: {task}" in path.read_text(encoding="utf-8") for task in ("embedding", "reranking"))
]
IMAGES = [path for path in sorted(SHIPPED.glob("*.yaml")) if "task: image-class" in path.read_text(encoding="utf-8")]
WHOLE = [path for path in sorted(SHIPPED.glob("*.yaml")) if path not in (*STAGED, *CAUSAL, *SENTENCES, *IMAGES)]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_shipped_recipe_of_images_prunes_a_tiny_vgg(tmp_path, path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.parquet").touch()
    made = Recipe.load(path, [f"data.{split}={tmp_path}/{split}.parquet" for split in ("train", "validation")])
    if made.sparsity is None:
        assert "dense" in path.stem  # the baseline of the others
        return
    model = convolutional.build("vgg")
    pruner = Pruner(model, made.sparsity).attach()
    assert {unit.source is not None for unit in pruner.units} == {"filters" in path.stem}


@pytest.mark.parametrize("path", SENTENCES, ids=lambda path: path.stem)
def test_shipped_recipe_trains_a_tiny_model_of_sentences(tmp_path, path):
    embeds = "task: embedding" in path.read_text(encoding="utf-8")
    model = (sentence.sentence_transformer if embeds else sentence.cross_encoder)(tmp_path)
    model.save_pretrained(str(tmp_path / "dense"))
    begins_sparse = path.stem in ("embed_minilm", "rerank_stsb")
    if begins_sparse:
        sparsify(model, SparsityConfig(sparsity=0.8))
    model.save_pretrained(str(tmp_path / "model"))
    rows = [{"text": one, "one": one, "two": two, "score": float(n % 5)}
            for n, (one, two) in enumerate(zip(sentence.TEXTS, reversed(sentence.TEXTS), strict=True))]  # fmt: skip
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "model.name": tmp_path / "model",
        "data": f"{{train: {tmp_path}/train.jsonl, text: {'text' if embeds else '[one, two]'}, label: score, "
        f"validation: {tmp_path}/validation.jsonl, validation_text: [one, two], max_length: 12}}",
        "training.max_steps": 40,
        "training.per_device_train_batch_size": 4,
        "training.eval_strategy": "no",
        "training.use_cpu": "true",
        "training.disable_tqdm": "true",
    }
    if begins_sparse:
        overrides["distillation.teacher"] = tmp_path / "dense"
    if path.stem == "embed_minilm_hybrid":
        overrides["sparsity.groups.0.pattern"] = "{name: block, rows: 8, cols: 8}"
    made = Recipe.load(path, [f"{key}={value}" for key, value in overrides.items()])
    result = train(path, *(f"{key}={value}" for key, value in overrides.items()), output=tmp_path / "out")
    assert result.metrics["eval_spearman"] <= 1
    if begins_sparse:
        assert result.summary.sparsity == pytest.approx(0.8, abs=1e-3)
    if made.sparsity is not None and len(made.sparsity.groups) == 1:
        asked = made.sparsity.groups[0].sparsity or 0.5
        assert result.summary.sparsity == pytest.approx(asked, abs=4 / 1024)


@pytest.mark.parametrize("path", CAUSAL, ids=lambda path: path.stem)
def test_shipped_recipe_trains_a_tiny_decoder_with_its_zeros(tmp_path, path):
    model = AutoModelForCausalLM.from_pretrained(oneshot.save_llama(tmp_path / "dense"))
    sparsify(model, SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "pruned")
    files = [oneshot.write_text(tmp_path / name) for name in ("train.txt", "validation.txt")]
    overrides = {
        "model.name": tmp_path / "pruned",
        "data": f"{{train: {files[0]}, validation: {files[1]}, max_length: 16}}",
        "distillation.teacher": tmp_path / "dense",
        "training.max_steps": 8,
        "training.use_cpu": "true",
        "training.disable_tqdm": "true",
    }
    result = train(path, *(f"{key}={value}" for key, value in overrides.items()), output=tmp_path / "out")
    assert result.summary.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.metrics["eval_perplexity"] > 1


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_shipped_recipe_trains_a_tiny_model_to_the_sparsity_it_asks(recipe, tmp_path, path):
    recipe()
    writes = "task: seq2seq" in path.read_text(encoding="utf-8")
    if writes:
        save_t5(tmp_path / "t5")
        write_spellings(tmp_path / "train.jsonl", "cat dog cow hen")
        write_spellings(tmp_path / "validation.jsonl", "ant bee")
    elif "fill: true" in path.read_text(encoding="utf-8"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
        sparsify(model, SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "bert")
    elif "keep_zeros: true" in path.read_text(encoding="utf-8"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
        sparsify(model, SparsityConfig(sparsity=0.5)).save_pretrained(tmp_path / "bert", format="dense")
    columns = ", text: source, label: target" if writes else ""
    files = f"train: {tmp_path}/train.jsonl, validation: {tmp_path}/validation.jsonl"
    overrides = {
        "model.name": tmp_path / ("t5" if writes else "bert"),
        "data": f"{{{files}, max_length: 8{columns}}}",
        "training.max_steps": 40,
        "training.logging_steps": 10,
        "training.eval_strategy": "no",
        "training.use_cpu": "true",
        "training.disable_tqdm": "true",
    }
    if "block" in path.stem and "filled" not in path.stem:
        overrides["sparsity.groups.0.pattern"] = "{name: block, rows: 8, cols: 8}"
    if "effective_resistance" in path.stem:
        overrides["sparsity.schedule.every"] = 5
    made = Recipe.load(path, [f"{key}={value}" for key, value in overrides.items()])
    result = train(path, *(f"{key}={value}" for key, value in overrides.items()), output=tmp_path / "out")
    if made.sparsity is None:
        assert result.summary.sparsity == (pytest.approx(0.5, abs=1e-3) if made.model.keep_zeros else 0.0)
        return
    if made.sparsity.groups[0].compress is not None:
        assert result.summary.sparsity == 0.0, "hashed weights have no zeros"
    elif "hybrid" not in path.stem:
        asked = made.sparsity.groups[0].sparsity or 0.5
        # Of 256 blocks of four in the smallest weight, 25 are kept, and a whole number of inputs by each output.
        coarse = {"bert_cpu_4x1": 4 / 1024, "sst2_expander": 1 / 64}
        assert result.summary.sparsity == pytest.approx(asked, abs=coarse.get(path.stem, 1e-3))
    elif writes:
        _check_t5_hybrid(tmp_path / "out")
    else:
        _check_hybrid(tmp_path / "out")


def _check_hybrid(folder):
    """Blocks of 8 in the attention, and neurons: 30 % kept of each over the whole model.

    That is 38 of 2 x 4 x 16 blocks, and 38 of 2 x 64 neurons, whose rows and columns go together.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    blocks, neurons = [], []
    for layer in model.bert.encoder.layer:
        own = layer.attention.self
        for linear in (own.query, own.key, own.value, layer.attention.output.dense):
            blocks += linear.weight.unfold(0, 8, 8).unfold(1, 8, 8).ne(0).sum((-1, -2)).flatten().tolist()
        rows = layer.intermediate.dense.weight.ne(0).sum(1).tolist()
        assert layer.output.dense.weight.ne(0).sum(0).tolist() == rows
        neurons += rows
    assert sorted(blocks) == [0] * 90 + [64] * 38
    assert sorted(neurons) == [0] * 90 + [32] * 38
    compact(model)
    assert sum(layer.output.dense.in_features for layer in model.bert.encoder.layer) == 38


def _check_t5_hybrid(folder):
    """Half of the blocks of 8 in the attention, whole, and half of the neurons."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    blocks, neurons = [], []
    for name, module in model.named_modules():
        if "Attention." in name and isinstance(module, torch.nn.Linear):
            blocks += module.weight.unfold(0, 8, 8).unfold(1, 8, 8).ne(0).sum((-1, -2)).flatten().tolist()
        if name.endswith("DenseReluDense"):
            left = module.wo.weight.ne(0).any(0)
            inputs = [layer for key, layer in module.named_children() if key.startswith("wi")]
            assert all(torch.equal(layer.weight.ne(0).any(1), left) for layer in inputs)
            neurons += left.tolist()
    assert sorted(set(blocks)) == [0, 64]
    assert blocks.count(0) == len(blocks) / 2
    assert sum(neurons) == len(neurons) / 2
