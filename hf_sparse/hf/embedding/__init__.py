"""Models of sentence-transformers: a transformer inside, with pooling, normalisation or a score behind it."""
