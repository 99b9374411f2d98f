"""Recipes: YAML to configs, data, training, stages."""
