"""Studies of models and of runs: benchmarks, sensitivity, robustness, reports, comparisons."""
