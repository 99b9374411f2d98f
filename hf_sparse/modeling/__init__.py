"""What a model is made of: layer matching, architectures, class swaps, preserved zeros."""
