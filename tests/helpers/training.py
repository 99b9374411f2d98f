"""A real Trainer on a BERT of a few thousand weights, for the tests of the callback and of saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_sparse import SparsityCallback, SparsityConfig
from tests.helpers import tiny

RAMP = {"name": "cubic", "begin": 0.1, "end": 0.6}
Row = dict[str, torch.Tensor]


class Rows(Dataset[Row]):
    """Random token ids whose label can be learned: whether the first id is even."""

    def __init__(self, count: int = 64, length: int = 8) -> None:
        self.ids = torch.randint(
            0, tiny.config().vocab_size, (count, length), generator=torch.Generator().manual_seed(1)
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny.config(num_labels=2, **options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def sparse_trainer(
    folder: Path,
    config: SparsityConfig | None = None,
    model: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    config = config or SparsityConfig(sparsity=0.9, scorer="movement", schedule=RAMP)
    return Trainer(
        model=bert() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        callbacks=[SparsityCallback(config), *(callbacks or [])],
        **(trainer_options or {}),
    )
