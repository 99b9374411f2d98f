"""Compressions: other forms for the layers of a group. A new compression is one file here and one line below."""

from .base import Compression, FormGroup, bind_beside, bind_forms
from .hashed import Hashed
from .low_rank import LowRank

__all__ = ["Compression", "FormGroup", "Hashed", "LowRank", "bind_beside", "bind_forms"]
