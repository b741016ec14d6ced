"""Frames of videos, by their number or as they come. Imports numpy alone; PyAV, decord, Pillow and torch when used.

What makes tensors of frames is in `preprocess`, `pixels` and `canvas`, which need torch.
"""

from .base import Numbered, Video
from .files import DECODERS, FramesVideo, Source, as_frames, import_decoder, open_video
from .folder import IMAGE_SUFFIXES
from .live import LiveVideo, open_live
from .pyav import FORMATS

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
