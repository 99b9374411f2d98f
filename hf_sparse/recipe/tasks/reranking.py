"""Rerankers: a score for a pair of sentences."""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import RecipeError
from ..sentence_data import SentenceExamples
from ..sentence_evaluation import reranking_metrics
from ..task import TASKS
from .sentence import SentenceTask


@TASKS.register("reranking")
class Reranking(SentenceTask):
    """A CrossEncoder with one score."""

    kind: ClassVar[str] = "CrossEncoder"
    labelled: ClassVar[bool] = True

    def check_data(self, section: Any) -> None:
        super().check_data(section)
        if len(section.text_columns) != 2 or section.reference is not None:
            raise RecipeError(
                "model.task reranking needs pairs: data.text must be two columns, and data.reference none"
            )

    def options(self) -> dict[str, Any]:
        return {"num_labels": 1}

    def metrics(self, model: Any, recipe: Any, examples: SentenceExamples, batch: int) -> dict[str, float]:
        def score(pairs: list[tuple[str, str]]) -> Any:
            return model.predict(pairs, batch_size=batch, show_progress_bar=False)

        return reranking_metrics(score, examples, recipe.metric, recipe.data.candidates)
