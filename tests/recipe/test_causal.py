"""Recipes for causal language models: packed text, zeros that stay, a teacher, LoRA beside a packed base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_sparse import RecipeError, SparsityConfig, sparsify, summarize
from hf_sparse.hf.auto import load_tokenizer
from hf_sparse.recipe.cache_teacher import teach
from hf_sparse.recipe.recipe import Recipe
from hf_sparse.recipe.train import run
from tests.helpers import oneshot


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Write a dense model, the same pruned 2:4, and two texts."""
    dense = oneshot.save_llama(tmp_path / "dense", num_hidden_layers=2)
    train = oneshot.write_text(tmp_path / "train.txt", 1500)
    validation = oneshot.write_text(tmp_path / "validation.txt", 300, seed=1)
    model = AutoModelForCausalLM.from_pretrained(dense)
    sparsify(model, SparsityConfig(scorer="wanda", pattern="2:4"), oneshot.token_batches())
    model.save_pretrained(tmp_path / "pruned")
    load_tokenizer(str(dense)).save_pretrained(tmp_path / "pruned")
    return {"dense": str(dense), "pruned": str(tmp_path / "pruned"), "train": str(train), "validation": str(validation)}


def recipe(files: dict[str, str], output: Path, **sections: Any) -> Recipe:
    training = {"max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "report_to": "none"}
    return Recipe.from_dict({
        "model": {"name": files["pruned"], "task": "causal-lm"},
        "data": {"train": files["train"], "validation": files["validation"], "max_length": 21},
        "training": {**training, "save_strategy": "no", "disable_tqdm": True, "output_dir": str(output)},
        **sections,
    })  # fmt: skip


def test_text_is_packed_into_sequences_that_begin_with_bos(files: dict[str, str], tmp_path: Path) -> None:
    made = recipe(files, tmp_path / "out")
    train, validation = made.model.kind.load_examples(made).tokenized(load_tokenizer(files["dense"]), 21)
    assert (len(train), len(validation)) == (75, 15)
    rows = validation["input_ids"][:]
    assert all(len(row) == 21 and row[0] == 1 for row in rows)
    text = Path(files["validation"]).read_text().split()
    assert [word for row in rows for word in row[1:]] == [3 + oneshot.WORDS.index(word) for word in text]
    assert rows == validation["labels"][:]


def test_examples_are_packed_with_eos_between_them(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": "w0 w1 w2"}) for _ in range(10)), encoding="utf-8")
    made = recipe({**files, "train": str(path)}, tmp_path / "out", data={
        "train": str(path), "validation": files["validation"], "text": "body", "max_length": 11, "train_samples": 6,
    })  # fmt: skip
    with pytest.raises(RecipeError, match=r"data\.train has 23 tokens, and a sequence has 899"):
        made.model.kind.load_examples(made).tokenized(load_tokenizer(files["dense"]), 900)
    train, _ = made.model.kind.load_examples(made).tokenized(load_tokenizer(files["dense"]), 11)
    assert train["input_ids"][:] == [[1, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4], [1, 5, 2, 3, 4, 5, 2, 3, 4, 5, 2]]


def test_pruned_model_recovers_with_its_zeros_and_a_teacher(files: dict[str, str], tmp_path: Path) -> None:
    made = recipe(files, tmp_path / "out", distillation={"teacher": files["dense"], "task_weight": 0.5})
    before: Any = AutoModelForCausalLM.from_pretrained(files["pruned"])
    result = run(made)
    assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(result.metrics["eval_loss"]))
    assert result.metrics["eval_perplexity"] < 40  # 50 words at random
    after: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert summarize(after).sparsity == 0.5
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (before, after)]
    assert torch.equal(weights[0] == 0, weights[1] == 0)
    assert not torch.equal(*weights)
    assert "perplexity on the validation examples" in (tmp_path / "out" / "report.md").read_text()


def test_gradual_pruning_while_a_causal_model_trains(files: dict[str, str], tmp_path: Path) -> None:
    model = {"name": files["dense"], "task": "causal-lm"}
    sparsity = {"sparsity": 0.6, "schedule": {"name": "cubic", "end": 0.7}}
    run(recipe(files, tmp_path / "out", model=model, sparsity=sparsity))
    assert summarize(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"metric": "accuracy"}, "predicts the next token, so metric 'accuracy' does not apply; use perplexity"),
        ({"data": {"max_length": 900}}, "at most 64"),
    ],
)
def test_sections_that_do_not_fit_are_refused(
    files: dict[str, str], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    if "data" in sections:
        data = {"train": files["train"], "validation": files["validation"]}
        sections = {"data": {**data, **sections["data"]}}
    with pytest.raises(RecipeError, match=message):
        run(recipe(files, tmp_path / "out", **sections))


def test_recipe_with_lora_leaves_a_plain_model_with_the_same_zeros(files: dict[str, str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers takes PEFT {MIN_PEFT_VERSION} or later, and PEFT is {peft.__version__}")
    model = {"name": files["pruned"], "task": "causal-lm", "lora": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}
    made = recipe(files, tmp_path / "out", model=model, distillation={"teacher": files["dense"], "task_weight": 0.5})
    before: Any = AutoModelForCausalLM.from_pretrained(files["pruned"])
    stored = {name: weight.clone() for name, weight in before.state_dict().items()}
    _, validation = made.model.kind.load_examples(made).tokenized(load_tokenizer(files["dense"]), 21)
    rows = torch.tensor(validation["input_ids"][:])
    with torch.no_grad():
        loss = float(before(input_ids=rows, labels=rows).loss)
    result = run(made)
    assert result.metrics["eval_loss"] < loss
    after: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert summarize(after).sparsity == 0.5
    for name, weight in after.state_dict().items():
        assert torch.equal(weight == 0, stored[name] == 0), name
        assert torch.equal(weight, stored[name]) != (("q_proj" in name) or ("up_proj" in name)), name
    batch = oneshot.token_batches()[0]
    beside = peft.PeftModel.from_pretrained(before, tmp_path / "out" / "adapter").eval()
    assert not torch.equal(
        beside(**batch).logits, AutoModelForCausalLM.from_pretrained(files["pruned"])(**batch).logits
    )
    merged = beside.merge_and_unload()
    torch.testing.assert_close(after(**batch).logits, merged(**batch).logits)
    assert '"r": 4' in json.dumps(Recipe.load(tmp_path / "out" / "recipe.yaml").to_dict())


@pytest.mark.parametrize(
    ("model", "others", "message"),
    [
        ({"lora": 8}, {}, "`model.lora` must be a mapping"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, {}, "modules_to_save` trains layers in whole"),
        ({"lora": {"r": 4}, "task": "seq2seq"}, {}, "is for `model.task` 'causal-lm', got 'seq2seq'"),
        ({"lora": {"rank": 4}}, {}, "does not fit peft.LoraConfig"),
        ({"lora": {"r": 4}}, {"sparsity": {"sparsity": 0.6}}, "and sparsity was given too"),
        ({"lora": {"r": 4}}, {"training": {"max_steps": 1}}, "set training.save_strategy to 'no', got 'steps'"),
    ],
)
def test_lora_that_does_not_fit_is_refused(
    files: dict[str, str], tmp_path: Path, model: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    pytest.importorskip("peft")
    with pytest.raises(RecipeError, match=message):
        run(recipe(files, tmp_path / "out", model={"name": files["pruned"], "task": "causal-lm", **model}, **others))


def test_lora_beside_a_packed_base_and_merged_with_its_zeros(files: dict[str, str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base: Any = AutoModelForCausalLM.from_pretrained(files["pruned"])
    stored = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": ids, "labels": ids} for batch in oneshot.token_batches() for ids in batch["input_ids"]]
    options: Any = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(tmp_path / "runs"), use_cpu=True, per_device_train_batch_size=2, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    batch = oneshot.token_batches()[0]
    trained = model(**batch).logits
    assert float((trained - AutoModelForCausalLM.from_pretrained(files["pruned"])(**batch).logits).abs().max()) > 1e-3

    # In another process: the packed base, the adapter beside it, and both merged.
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files["pruned"]), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(**batch).logits, trained)
    for name, weight in again.get_base_model().state_dict().items():
        if (own := name.replace(".base_layer", "")) in stored:
            assert torch.equal(weight, stored[own]), own
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert summarize(loaded).sparsity == 0.5
    for name, module in loaded.model.layers.named_modules():
        if name.endswith("_proj"):
            before = stored[f"model.layers.{name}.weight"]
            assert torch.equal(module.weight == 0, before == 0), name
            assert torch.equal(module.weight, before) != name.endswith(("q_proj", "up_proj"))
    torch.testing.assert_close(loaded(**batch).logits, merged(**batch).logits)


def test_cached_most_likely_tokens_teach_as_the_live_teacher_does(files: dict[str, str], tmp_path: Path) -> None:
    given = {"teacher": files["dense"], "task_weight": 0.0, "logits_weight": 1.0, "temperature": 1.0}
    few: Any = {"max_steps": 4, "learning_rate": 3e-3, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    losses = {}
    for name, top in (("live", None), ("top", 1000)):
        section = given if top is None else {**given, "cache": str(tmp_path / "cache")}
        made = recipe(files, tmp_path / name, distillation=section, training={
            **few, "save_strategy": "no", "output_dir": str(tmp_path / name)
        })  # fmt: skip
        if top is not None:
            assert teach(made, tmp_path / "cache", "fp16", 8) == (75, 75 * 21 * (6 * 8 + 2))
            assert teach(made, tmp_path / "cache", "fp32", top).examples == 75  # all words: the very same loss
        run(made)
        logs = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [log["distillation_kl"] for log in logs if "distillation_kl" in log]
    assert len(losses["live"]) == len(losses["top"]) == 4
    assert losses["live"][0] > 1e-4
    assert losses["top"] == pytest.approx(losses["live"], rel=1e-3)
