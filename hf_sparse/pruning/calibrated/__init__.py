"""One-shot pruning block by block, with the inputs that each layer has on calibration data."""
