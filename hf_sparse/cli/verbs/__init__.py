"""Verbs of the command line. A new verb is one file here and one line below."""

from .agree import Agree
from .bench import Bench
from .cache_teacher import CacheTeacher
from .card import Card
from .compact import Compact
from .compare import Compare
from .convert import Convert
from .doctor import Doctor
from .drop import Drop
from .export import Export
from .head_importance import HeadImportance
from .inspect import Inspect
from .perplexity import Perplexity
from .prune import Prune
from .push import Push
from .report import Report
from .run import Run
from .sensitivity import Sensitivity
from .train import Train
from .trim_vocab import TrimVocab

__all__ = [
    "Agree", "Bench", "CacheTeacher", "Card", "Compact", "Compare", "Convert", "Doctor", "Drop",
    "Export", "HeadImportance", "Inspect", "Perplexity", "Prune", "Push", "Report", "Run", "Sensitivity", "Train",
    "TrimVocab",
]  # fmt: skip
