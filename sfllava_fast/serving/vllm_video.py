"""Videos of vLLM's requests, decoded by `video` and sampled by the published rule."""

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
    """The video backend "sfllava_fast" of --media-io-kwargs and of a request's media_io_kwargs."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = DEFAULT_FRAMES, decoder: str = "pyav", **unknown: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode and sample a video file. Damage is logged as a warning, once.

        Args:
            data: The file's bytes.
            num_frames: Frames to sample; all of a shorter video.
            decoder: One of `video.DECODERS`.
            **unknown: Refused.

        Returns:
            The frames, uint8 RGB [n, H, W, 3], and vLLM's metadata of them.

        Raises:
            VideoError, InputError: For the video or the options; vLLM's answer is then HTTP 400.
            BackendError: For a decoder that cannot be used.
        """
        if unknown:
            raise InputError(f"unknown video options {', '.join(unknown)}: only num_frames and decoder are known")
        check_count("num_frames", num_frames)
        with tempfile.TemporaryDirectory(prefix="vllm-request-") as folder:
            file = Path(folder, "video")
            file.write_bytes(data)
            try:
                video = open_video(file, decoder)
                indices = sample_frames(video.total, num_frames)
                frames = video.arrays(indices)
            except VideoError as error:  # without the name of our folder
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
