"""Mixture of depths: layers in which the video's tokens are partly left out."""
