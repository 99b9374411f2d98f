"""Text from text, by encoder-decoders such as T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from ...errors import RecipeError
from ...hf.auto import load
from ..data import LabelledExamples
from ..metrics import Predicts
from ..task import TASKS, Setup
from .labelled import LabelledTask


@TASKS.register("seq2seq")
class Seq2Seq(LabelledTask):
    """A model that generates the label."""

    trainer_class = Seq2SeqTrainer

    def arguments(self) -> type[TrainingArguments]:
        return Seq2SeqTrainingArguments

    def default_arguments(self) -> Mapping[str, Any]:
        return {"predict_with_generate": True}  # the metrics are of generated text, not of next tokens

    def check_model(self, section: Any) -> None:
        if section.num_labels is not None:
            raise RecipeError(
                f"`model.num_labels` must be left out for `model.task` 'seq2seq', which generates text, got "
                f"{section.num_labels}"
            )

    def predicts(self, section: Any) -> Predicts:
        return "text"

    def load_head(self, section: Any, examples: LabelledExamples) -> Any:
        return load(AutoModelForSeq2SeqLM, section.name, section.revision or "main", **self.options(section))

    def collator(self, setup: Setup) -> Any:
        return DataCollatorForSeq2Seq(setup.tokenizer, setup.model)
