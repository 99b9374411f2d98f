"""Zero-shot tasks of lm_eval on a packed model, with a task of local files: the same figures as of the dense zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hf_sparse import sparsify
from hf_sparse.hf.auto import load_tokenizer
from tests.helpers import oneshot
from tests.helpers.ranks import ROOT

TASK = """
task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: ROWS
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


def write_task(folder: Path) -> Path:
    """Write a task of 24 questions with two answers each, and return its folder."""
    words = oneshot.WORDS
    rows = [
        {
            "text": " ".join(words[(i * 7 + j) % len(words)] for j in range(6)),
            "choices": [f" {words[(i + 3) % len(words)]}", f" {words[(2 * i + 11) % len(words)]}"],
            "label": i % 2,
        }
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "task").mkdir()
    text = TASK.replace("ROWS", str(folder / "rows.jsonl"))
    (folder / "task" / "words.yaml").write_text(text, encoding="utf-8")
    return folder / "task"


def likelihoods(model: Path, task: Path, output: Path) -> list[Any]:
    """Let lm_eval evaluate a model, and return the log-likelihoods of all answers."""
    options = {"model": "hf", "model_args": f"pretrained={model},dtype=float32", "tasks": "local_words"}
    options |= {"include_path": str(task), "device": "cpu", "batch_size": "8", "output_path": str(output)}
    given = [part for key, value in options.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "hf_sparse", "run", "--", "lm_eval", *given, "--log_samples"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (samples,) = output.rglob("samples_local_words_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return [row["resps"] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_packed_model_answers_as_its_zeros_do(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    dense = oneshot.save_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(dense)
    sparsify(model, {"scorer": "wanda", "pattern": "2:4"}, oneshot.token_batches())
    model.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "zeros", format="dense")
    for name in ("packed", "zeros"):
        load_tokenizer(str(dense)).save_pretrained(tmp_path / name)
    task = write_task(tmp_path)
    found = {name: likelihoods(tmp_path / name, task, tmp_path / f"of-{name}") for name in ("packed", "zeros", "model")}
    assert len(found["packed"]) == 24
    assert found["packed"] == found["zeros"] != found["model"]
