"""Videos of vLLM's requests: decoded by `video`, sampled by the published rule."""

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
    """The backend "sfllava_fast" of --media-io-kwargs and of a request's media_io_kwargs.

    num_frames: frames to sample, fewer where the video is shorter. decoder: one of `video.DECODERS`.
    """

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = DEFAULT_FRAMES, decoder: str = "pyav", **unknown: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The sampled frames of a video file, uint8 RGB [n, H, W, 3], and what vLLM wants to know about them.

        Damage is logged, as a warning, once: the dict may hold no word that models' processors do not know.

        Raises VideoError or InputError, which vLLM answers with status 400, and BackendError for an unusable decoder.
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
            except VideoError as error:  # the folder's name would tell a client nothing
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
