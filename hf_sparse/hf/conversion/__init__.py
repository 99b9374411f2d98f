"""Conversion: checkpoints of any origin to packed or dense ones of ours. An origin is one file in `sources/`."""
