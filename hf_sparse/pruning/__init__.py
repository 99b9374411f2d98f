"""Pruning: scorers, patterns, selection, schedules, masks, the pruner, one-shot, compaction."""
