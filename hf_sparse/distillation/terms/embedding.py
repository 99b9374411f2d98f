"""Sentence embeddings of teacher and student: no labels are needed."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from ...config.distillation import TERMS
from ...errors import SparsityError
from ..losses import cosine_distance, masked_mse, similarity_mse
from .base import EMBEDDING, Comparison, Term


@dataclasses.dataclass
class EmbeddingTerm(Term):
    """Base: hand both embeddings to `distance`."""

    cached: ClassVar[bool] = True
    embeds: ClassVar[bool] = True

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how far apart the embeddings of a batch are."""
        raise NotImplementedError

    def value(self, pair: Comparison) -> Tensor:
        student, teacher = (outputs.get(EMBEDDING) for outputs in (pair.student, pair.teacher))
        if student is None or teacher is None:
            raise SparsityError(
                f"'{self.name}' compares sentence embeddings, and the {'model' if student is None else 'teacher'} "
                "returns none. Give a SentenceTransformer, or a model without a head, whose hidden states are pooled"
            )
        return pair.share * self.distance(student, teacher)


@TERMS.register("embedding_cosine")
@dataclasses.dataclass
class EmbeddingCosine(EmbeddingTerm):
    """`losses.cosine_distance`: one minus the cosine of each sentence's two embeddings."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine_distance(student, teacher)


@TERMS.register("embedding_mse")
@dataclasses.dataclass
class EmbeddingMse(EmbeddingTerm):
    """The squared difference of the embeddings, averaged over sentences and features.

    Source: Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge
    Distillation", equation 1.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return masked_mse(student, teacher)


@TERMS.register("embedding_similarity")
@dataclasses.dataclass
class EmbeddingSimilarity(EmbeddingTerm):
    """`losses.similarity_mse`: the similarities of all pairs within the batch, for teachers of any width."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_mse(student, teacher)
