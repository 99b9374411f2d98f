"""Vocabularies: remove the tokens that a domain does not need from a tokenizer and from the model that reads it."""

from .report import VocabularyReport, read_report
from .trim import trim_vocabulary

__all__ = ["VocabularyReport", "read_report", "trim_vocabulary"]
