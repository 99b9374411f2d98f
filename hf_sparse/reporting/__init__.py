"""Drawing primitives without knowledge of sparsity: HTML, plots, label placement."""
