"""Vocabularies: remove the tokens that a domain does not need from a tokenizer and from the model that reads it."""

from .choice import Criteria
from .report import VocabularyReport, carry_report, read_report
from .trim import trim_vocabulary

__all__ = ["Criteria", "VocabularyReport", "carry_report", "read_report", "trim_vocabulary"]
