"""Mixture of depths: decoder layers that skip a part of the video's tokens."""
