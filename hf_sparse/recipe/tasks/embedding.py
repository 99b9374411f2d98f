"""Sentence embeddings: distilled from a teacher, on sentences without labels."""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import RecipeError
from ..sentence_data import SentenceExamples
from ..sentence_evaluation import embedding_metrics
from ..task import TASKS
from .sentence import SentenceTask


@TASKS.register("embedding")
class Embedding(SentenceTask):
    """A SentenceTransformer."""

    kind: ClassVar[str] = "SentenceTransformer"
    knn: ClassVar[bool] = True

    def load_examples(self, recipe: Any) -> SentenceExamples:
        distillation = recipe.distillation
        if distillation is None or distillation.task_weight:
            raise RecipeError(
                "model.task embedding learns from a teacher, without labels: give a section "
                "`distillation: {teacher: self, task_weight: 0}`"
            )
        return super().load_examples(recipe)

    def metrics(self, model: Any, recipe: Any, examples: SentenceExamples, batch: int) -> dict[str, float]:
        def encode(texts: list[str]) -> Any:
            return model.encode(texts, batch_size=batch, show_progress_bar=False)

        return embedding_metrics(encode, examples, recipe.metric, recipe.data.candidates)
