"""How many groups survive, and compared with which others: one file for each selection."""

from . import base, budget  # they register themselves
from .base import Selection

__all__ = ["Selection", "base", "budget"]
