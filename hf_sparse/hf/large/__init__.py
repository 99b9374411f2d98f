"""Pruning checkpoints that do not fit into memory: one block at a time."""
