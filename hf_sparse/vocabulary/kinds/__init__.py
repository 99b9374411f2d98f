"""Kinds of tokenizers. A new kind is one file here and one line below."""

from .base import KINDS, TokenizerKind
from .bpe import BPE
from .unigram import Unigram
from .wordpiece import WordPiece

__all__ = ["BPE", "KINDS", "TokenizerKind", "Unigram", "WordPiece"]
