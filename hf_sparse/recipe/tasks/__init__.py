"""The tasks: what is loaded, trained and measured. A new one is one file here and one line below."""

from .classification import SequenceClassification
from .embedding import Embedding
from .reranking import Reranking
from .seq2seq import Seq2Seq

__all__ = ["Embedding", "Reranking", "Seq2Seq", "SequenceClassification"]
