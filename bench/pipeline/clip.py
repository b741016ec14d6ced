"""The benchmark's videos: a drawn clip with camera noise, and frames that are decoded already."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sfllava_fast.embedded.scenes import draw_scene, frame_times, render
from sfllava_fast.video import Numbered, Video

HEIGHT, WIDTH, RATE, TOTAL = 720, 1280, 25, 250
_GRAIN = 4.0  # standard deviation, of 255; without noise a drawing decodes faster than camera footage


def write_clip(path: Path, total: int = TOTAL, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """Encode a drawn scene as H.264 with a key frame per second, at x264's fastest preset."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": str(RATE)})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for picture in draw(total, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_images(folder: Path, total: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """The same scene as JPEG frames, for machines without PyAV."""
    from PIL import Image

    folder.mkdir()
    for number, picture in enumerate(draw(total, size)):
        Image.fromarray(picture).save(folder / f"{number}.jpg")


def draw(total: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields frames of a scene with camera noise, uint8 RGB [H, W, 3]."""
    scene, noise = draw_scene("bench"), np.random.default_rng(0)
    grain = torch.from_numpy(noise.normal(0, _GRAIN, (8, *size, 1)).astype(np.float32))
    for i, moment in enumerate(frame_times(list(range(total)), total)):
        drawn = torch.from_numpy(render(scene, [moment])).permute(0, 3, 1, 2).float()
        frame = F.interpolate(drawn, size, mode="bilinear")[0].permute(1, 2, 0) + grain[i % len(grain)]
        yield frame.clamp_(0, 255).to(torch.uint8).numpy()


class DecodedVideo(Video):
    """A video whose frames are in memory; reading them makes no copy."""

    def __init__(self, video: Video, indices: list[int]) -> None:
        super().__init__(video.path)
        self.total, self.fps, self.size, self.decoder = video.total, video.fps, video.size, video.decoder
        self._pictures = video.frames(indices)
        self._row_of = {index: row for row, index in enumerate(indices)}

    def frames(self, indices: Iterable[int]) -> torch.Tensor:
        rows = [self._row_of[index] for index in indices]
        first = rows[0] if rows else 0
        together = rows == list(range(first, first + len(rows)))
        return self._pictures[first : first + len(rows)] if together else self._pictures[rows]

    def _stream(self, unique: list[int], stop: threading.Event) -> Numbered:
        for index in unique:
            if stop.is_set():
                return
            yield index, self._pictures[self._row_of[index]].numpy()
