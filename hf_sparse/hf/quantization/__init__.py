"""The plug into `from_pretrained` and `save_pretrained`."""
