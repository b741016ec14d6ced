"""Helpers for tests of the engine: a clip in memory, a small layout, a question, spies on a model."""

from pathlib import Path

import torch

from sfllava_fast.engine.session import Session
from sfllava_fast.engine.token_sources import FileTokens
from sfllava_fast.video import FramesVideo

LAYOUT = "slowfast-slow_3frms_spatial_1d_max_pool-fast_2x2"
QUESTION = "What is it?"


class Clip(FramesVideo):
    """A video of noise; each frame has its own brightness."""

    fps = 25.0

    def __init__(self, total=20):
        generator = torch.Generator().manual_seed(total)
        light = torch.linspace(1, 200, total).view(-1, 1, 1, 1)
        noise = torch.randint(0, 55, (total, 30, 40, 3), generator=generator)
        super().__init__((light + noise).to(torch.uint8))
        self.path, self.pictures = Path("clip"), torch.from_numpy(self._frames)


class Unreadable(Clip):
    def stream(self, *_):
        raise AssertionError("frames were decoded although the question cannot be answered")


def file_session(model, frames):
    """A session about all of these frames: `open` would sample other ones, even as many."""
    pipeline = model.pipeline
    return Session(pipeline, "file", FileTokens(pipeline, FramesVideo(frames), range(len(frames))))


def count_calls(monkeypatch, owner, name):
    """A list that gets the arguments of every later call of a method."""
    calls, plain = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(a) or plain(*a, **k))
    return calls


def logits_of(pipeline, ask):
    """The answer, and the logits that its first token was taken from."""
    seen, plain = [], pipeline.generate
    pipeline.generate = lambda cache, logits, *rest: seen.append(logits.clone()) or plain(cache, logits, *rest)
    try:
        return ask().token_ids, seen[0]
    finally:
        del pipeline.generate
