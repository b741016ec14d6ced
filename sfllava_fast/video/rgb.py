"""Decoded frames as upright RGB arrays, with FFmpeg's own filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_SIDE_DATA = 48  # number of kinds of side data to try


def rgb_converter(av: Any) -> Callable[[Any, tuple[int, int]], np.ndarray]:
    """A function from a decoded frame and a size (height, width) to uint8 RGB [H, W, 3] of that size.

    It runs FFmpeg's scale filter with the flags of the ffmpeg command. PyAV's `reformat` differs: it treats fields as
    pictures of half the height, shifts the chroma of 10-bit frames, and has other defaults.
    """
    graphs: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def convert(frame: Any, size: tuple[int, int]) -> np.ndarray:
        key = *_kind(frame), *size
        if key not in graphs:
            graphs.clear()
            scale = "scale", f"h={size[0]}:w={size[1]}:flags=bicubic"
            graphs[key] = _graph(av, *_kind(frame), scale, ("format", "rgb24"))
        _, source, sink = graphs[key]
        source.push(frame)
        return sink.pull().to_ndarray()

    return convert


def _kind(frame: Any) -> tuple[int, int, str, int, int]:
    return frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range)


def _graph(
    av: Any, width: int, height: int, pixels: str, matrix: int, levels: int, *filters: tuple[str, str]
) -> tuple[Any, Any, Any]:
    """(graph, source, sink) of FFmpeg filters. Keep the graph as long as the source and the sink."""
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):
        graph.threads = 1  # the decoder's threads use the cores already
    source = graph.add(
        "buffer", f"video_size={width}x{height}:pix_fmt={pixels}:time_base=1/1000:colorspace={matrix}:range={levels}"
    )
    sink = graph.add("buffersink")
    graph.link_nodes(source, *(graph.add(*one) for one in filters), sink).configure()
    return graph, source, sink


class Orientation(NamedTuple):
    """The steps that turn a frame upright: transpose, then reverse columns and rows."""

    transposed: bool
    right_to_left: bool
    upside_down: bool

    def upright(self, rgb: np.ndarray) -> np.ndarray:
        """RGB [H, W, 3] as it is shown, contiguous in memory."""
        rgb = rgb.transpose(1, 0, 2) if self.transposed else rgb
        return np.ascontiguousarray(rgb[:: -1 if self.upside_down else 1, :: -1 if self.right_to_left else 1])


def orientation(av: Any, frame: Any) -> Orientation:
    """The orientation in a frame's display matrix, which may mirror the frame too (phones, EXIF of images).

    The matrix [a b u, c d v, x y w] maps the pixel (x, y) to (a x + c y, b x + d y).
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        matrix = _known_side_data(av, frame).get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation(False, False, False)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def _known_side_data(av: Any, frame: Any) -> Any:
    """Side data of a frame, without kinds such as EXIF that PyAV 17 and 18 do not have: these raise for all kinds."""
    unknown = [("sidedata", f"mode=delete:type={kind}") for kind in range(_SIDE_DATA) if not _is_known(av, kind)]
    _graph_kept, source, sink = _graph(av, *_kind(frame), *unknown)
    source.push(frame)
    return sink.pull().side_data


def _is_known(av: Any, kind: int) -> bool:
    try:
        av.sidedata.sidedata.Type(kind)
    except ValueError:
        return False
    return True
