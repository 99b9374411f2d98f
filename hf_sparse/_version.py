"""The version of hf_sparse, where every floor can read it."""

__version__ = "0.1.0"
