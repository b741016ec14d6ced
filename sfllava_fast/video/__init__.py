"""Frames of videos, by number or as they arrive. Imports numpy alone; PyAV, decord, Pillow and torch when used.

The modules `preprocess`, `pixels` and `canvas` compute with tensors and need torch.
"""

from .base import Numbered, Video
from .container import FORMATS
from .files import DECODERS, FramesVideo, Source, as_frames, import_decoder, open_video
from .folder import IMAGE_SUFFIXES
from .live import LiveVideo, open_live

__all__ = [
    "DECODERS",
    "FORMATS",
    "IMAGE_SUFFIXES",
    "FramesVideo",
    "LiveVideo",
    "Numbered",
    "Source",
    "Video",
    "as_frames",
    "import_decoder",
    "open_live",
    "open_video",
]
