"""An hour of a stream at a frame per second: time per frame, memory, and time of an answer, as the stream grows.

Drawn scenes are encoded to a file and read back. Every mode of `SlowFastLlava.open_stream` watches it, and a question
is asked every minute. The target is that figures do not grow: the ratio is the median over the second quarter of the
stream, when all buffers are full, over that of the last quarter.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from sfllava_fast import SlowFastLlava
from sfllava_fast.embedded.scenes import CANVAS, draw_scene, frame_times, render
from sfllava_fast.engine.slowfast_llava import STREAM_MODES
from sfllava_fast.video import open_live

from .harness.progress import progress
from .harness.record import ResultError, guarded, machine
from .harness.tables import make_table, show_machine, show_notes

QUESTION = "what number is on the sign?"
_SCENE_SECONDS = 24
LEAST_MINUTES = 4
_MINUTE = 60
# Least ratios; below 1, because machines are noisy and allocators keep pages.
BARS = {"time for a frame": 0.8, "time of an answer": 0.8, "resident memory": 0.98}


def write_stream(path: Path, seconds: int) -> None:
    """Encode drawn scenes one after the other as H.264, a frame per second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast", "g": "10"})
        stream.width = stream.height = CANVAS
        stream.pix_fmt = "yuv420p"
        for start in range(0, seconds, _SCENE_SECONDS):
            scene = draw_scene(f"stream {start}")
            times = frame_times(list(range(_SCENE_SECONDS)), _SCENE_SECONDS)[: seconds - start]
            for picture in render(scene, times):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def run(minutes: int, only: str, save: Callable[[dict], None]) -> dict:
    """Every mode whose name contains `only`; `save` gets the result after each. ResultError below 4 minutes."""
    if minutes < LEAST_MINUTES:
        raise ResultError(f"{minutes} minutes have no quarters: give --minutes {LEAST_MINUTES} or more")
    result: dict = {"kind": "stream", "minutes": minutes, "machine": machine("cpu"), "works": {}, "errors": {}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "stream.mp4"
        write_stream(path, minutes * _MINUTE)

        def add(mode: str) -> None:
            result["works"][mode] = _figures(watch(path, mode))

        for mode in progress([mode for mode in STREAM_MODES if only in mode]):
            guarded(mode, result["errors"], lambda mode=mode: add(mode))
            save(result)
    return result


def show(result: dict, console: Console) -> None:
    show_machine(result, console)
    title = f"{result['minutes']} minutes at a frame a second; second quarter / last"
    table = make_table(title, ("mode", "ms for a frame", *BARS))
    for mode, figures in result["works"].items():
        bars = (f"{bar['ratio']:.3f} of {bar['bar']}" for bar in figures["bars"].values())
        table.add_row(mode, f"{figures['providers']['stream']['p50_ms']:.4g}", *bars)
    console.print(table)
    show_notes(result, console)


def watch(path: Path, mode: str) -> dict[str, np.ndarray]:
    """By minute: mean seconds per frame, median resident bytes, bytes of the session, seconds of the answer."""
    model = SlowFastLlava.from_pretrained()
    minutes: dict[str, list[float]] = {"frame": [], "answer": [], "resident": [], "held": []}
    frames, resident = [], []
    with open_live(path, rate=1) as video, model.open_stream(mode) as session:
        gc.collect()
        last = time.perf_counter()
        for number, (_, frame) in enumerate(video, 1):
            session.push(frame[None])
            frames.append(time.perf_counter() - last)
            resident.append(_resident_bytes())
            if number % _MINUTE == 0:
                start = time.perf_counter()
                session.ask(QUESTION)
                minutes["answer"].append(time.perf_counter() - start)
                minutes["frame"].append(sum(frames) / len(frames))
                minutes["resident"].append(median(resident))
                minutes["held"].append(session.nbytes)
                frames, resident = [], []
            last = time.perf_counter()
    return {name: np.array(values) for name, values in minutes.items()}


def _figures(minutes: dict[str, np.ndarray]) -> dict:
    flat = zip(BARS, (flatness(minutes[name]) for name in ("frame", "answer", "resident")))
    frame = minutes["frame"]
    return {
        "providers": {"stream": {"p50_ms": 1e3 * median(frame), "ratio": 1.0}},
        "bars": {name: {"ratio": ratio, "bar": BARS[name]} for name, ratio in flat},
        "minutes": {name: values.tolist() for name, values in minutes.items()},
    }


def flatness(values: np.ndarray) -> float:
    quarter = len(values) // 4
    return float(np.median(values[quarter : 2 * quarter]) / np.median(values[-quarter:]))


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def plot(result: dict, path: Path) -> None:
    """Write a picture of time per frame, time of an answer and memory against the minutes of the stream."""
    from matplotlib.figure import Figure

    panels = {
        "frame": ("milliseconds for a frame", 1e3),
        "answer": ("milliseconds to answer", 1e3),
        "resident": ("resident memory, MB", 1e-6),
        "held": ("held by the session, MB", 1e-6),
    }
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (name, (label, scale)) in zip(figure.subplots(2, 2).flat, panels.items()):
        for mode, figures in result["works"].items():
            values = np.array(figures["minutes"][name]) * scale
            axes.plot(range(1, len(values) + 1), values, label=mode)
        axes.set(xlabel="minutes of the stream, a frame a second", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
