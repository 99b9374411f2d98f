"""Every error hf_sparse raises on purpose. Each message says what was asked, what was found, where, and what to do."""

from __future__ import annotations


class SparsityError(Exception):
    """Base of all errors of hf_sparse: catch this one to catch them all."""


class RecipeError(SparsityError, ValueError):
    """What was asked for is contradictory, unknown or cannot be reached by this run."""


class PatternError(RecipeError):
    """A pattern does not fit the shape of a weight."""


class CheckpointError(SparsityError, ValueError):
    """A file is damaged, inconsistent, or from a version that this one cannot read."""


class BackendError(SparsityError, RuntimeError):
    """A kernel or a runtime cannot do what was asked on this machine."""


class HubError(SparsityError, RuntimeError):
    """The Hub refused something, or could not be reached."""
