"""The Hub: push, and the model card."""
