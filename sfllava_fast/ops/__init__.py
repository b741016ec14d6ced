"""Tokens from features: the torch ops, their backends and kernels, and what is built on them."""
