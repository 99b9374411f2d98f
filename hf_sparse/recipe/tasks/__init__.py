"""The tasks: what is loaded, trained and measured. A new one is one file here and one line below."""

from .causal import CausalLM
from .classification import SequenceClassification
from .embedding import Embedding
from .images import ImageClassification
from .reranking import Reranking
from .seq2seq import Seq2Seq

__all__ = ["CausalLM", "Embedding", "ImageClassification", "Reranking", "Seq2Seq", "SequenceClassification"]
