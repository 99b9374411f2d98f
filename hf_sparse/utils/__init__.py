"""Helpers on the standard library: strict YAML, Markdown, validation, atomic writes, text."""
