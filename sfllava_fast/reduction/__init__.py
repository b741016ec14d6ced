"""Fewer vision tokens inside the language model: mixture of depths, pruning, compression into a few."""
