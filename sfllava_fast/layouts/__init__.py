"""Layouts: which frames, rows and columns of a video are pooled into which tokens. Imports numpy alone."""

from .layout import Layout
from .pathway_layout import Pathways
from .presets import PRESETS, parse_layout
from .sampling import sample_frames
from .slowfast import SlowFastLayout

__all__ = ["PRESETS", "Layout", "Pathways", "SlowFastLayout", "parse_layout", "sample_frames"]
