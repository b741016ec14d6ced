"""vLLM's video backend: decodes with `video`, samples by the published rule."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from vllm.multimodal.video import VideoLoader

from ..errors import InputError, VideoError, check_count
from ..layouts.sampling import DEFAULT_FRAMES, sample_frames
from ..video import open_video

VIDEO_BACKEND = "sfllava_fast"


class SlowFastVideoLoader(VideoLoader):
    """The backend "sfllava_fast" of --media-io-kwargs and of a request's media_io_kwargs."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = DEFAULT_FRAMES, decoder: str = "pyav", **unknown: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode and sample a video file.

        Damage is only logged, since models' processors accept no further keys in the metadata.

        Args:
            data: The file.
            num_frames: Maximum number of frames to sample.
            decoder: One of `video.DECODERS`.
            unknown: Other options, which are refused.

        Returns:
            The frames, uint8 RGB [n, H, W, 3], and vLLM's metadata.

        Raises:
            VideoError: If the file cannot be decoded; vLLM replies with status 400.
            InputError: If an option is wrong; vLLM replies with status 400.
            BackendError: If the decoder is unknown or not installed.
        """
        if unknown:
            raise InputError(f"unknown video options {', '.join(unknown)}: use num_frames or decoder")
        check_count("num_frames", num_frames)
        with tempfile.TemporaryDirectory(prefix="vllm-request-") as folder:
            file = Path(folder, "video")
            file.write_bytes(data)
            try:
                video = open_video(file, decoder)
                indices = sample_frames(video.total, num_frames)
                frames = video.arrays(indices)
            except VideoError as error:  # clients should not get the folder's name
                raise VideoError(str(error).replace(f"{folder}/", "the ")) from error
        fps = video.fps or 0.0
        return frames, {
            "total_num_frames": video.total,
            "fps": fps,
            "duration": video.total / fps if fps else 0.0,
            "video_backend": VIDEO_BACKEND,
            "frames_indices": indices,
            "do_sample_frames": False,
        }
