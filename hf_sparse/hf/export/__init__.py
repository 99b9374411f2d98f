"""Export to ONNX and to torch programs."""
