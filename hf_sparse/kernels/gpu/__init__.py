"""Kernels for NVIDIA GPUs: 2:4 and blocks."""
