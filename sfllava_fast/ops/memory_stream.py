"""A stream with a memory: recent frames in full, older ones as condensed clips, in a constant number of tokens.

Merging the most similar neighbours is the idea of MovieChat (arXiv 2307.16449); showing the language model only the
condensed clips that matter to the question is that of VideoStreaming (arXiv 2405.16009). The differences:

- A clip is condensed by a layout, that is by pooling; VideoStreaming trains a small language model for it.
- A merged clip is the mean over all of its frames; MovieChat takes the mean of two clips of any lengths.
- Neighbours are compared by Ward's criterion: those two are merged whose merging adds least to the squared distance of
  all frames from their clips. By cosine, as in MovieChat, a mean of many noisy frames is similar to every frame: one
  clip grows, across changes of scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, check_count
from ..layouts.layout import Layout
from ..layouts.plan import Plan
from ..layouts.presets import parse_patches_only
from .aggregate import as_tensor, check_out, resolve_plan, slowfast_aggregate
from .stream import Encode, check_encode, count_frames, encode_frames, slice_frames

DEFAULT_LAYOUT = "slowfast-slow_8frms_spatial_1d_max_pool-fast_4x4"
DEFAULT_CLIP_LAYOUT = "clip:adaptive1,adaptive4,adaptive4,mean"


@dataclass(frozen=True, eq=False)
class Clip:
    """Consecutive frames of a stream, condensed.

    Attributes:
        frames: their numbers, without a gap.
        tokens: [K, D], float32 (float64 for a stream of float64): the layout's tokens, or their mean over several clips,
            weighted by the number of frames.
    """

    frames: range
    tokens: Tensor

    def cost(self, after: Clip) -> float:
        """The increase of the squared distance of frames from their clip by merging with the next; inf for NaN."""
        ours, theirs = len(self.frames), len(after.frames)
        distance = (self.tokens - after.tokens).square().sum().item()
        return math.inf if math.isnan(distance) else distance * ours * theirs / (ours + theirs)

    def merge(self, after: Clip) -> Clip:
        """This clip and the next one as one clip."""
        share = len(after.frames) / (len(self.frames) + len(after.frames))
        return Clip(range(self.frames.start, after.frames.stop), self.tokens.lerp(after.tokens, share))


@dataclass
class _Memory:
    """Clips in temporal order; `costs[i]` is the cost of merging clips i and i + 1."""

    clips: list[Clip] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def copy(self) -> _Memory:
        return _Memory(self.clips.copy(), self.costs.copy())

    def append(self, clip: Clip) -> None:
        if self.clips:
            self.costs.append(self.clips[-1].cost(clip))
        self.clips.append(clip)

    def merge_down(self, most: int) -> None:
        """Merges neighbours with the least cost, the oldest of equal ones, until `most` clips are left."""
        while len(self.clips) > most:
            i = self.costs.index(min(self.costs))
            self.clips[i : i + 2] = [self.clips[i].merge(self.clips[i + 1])]
            before = max(i - 1, 0)
            around = self.clips[before : i + 2]
            self.costs[before : i + 2] = [clip.cost(after) for clip, after in pairwise(around)]


@dataclass(frozen=True)
class _State:
    """The mutable state, replaced as a whole: a push that fails, or is interrupted, changes nothing."""

    seen: int = 0
    recent: tuple[Tensor, ...] = ()  # [N, D] each
    memory: _Memory = field(default_factory=_Memory)


class MemoryStream:
    """A growing video: the most recent frames in full and, before them, condensed clips.

    Each frame is encoded once. `clip_frames` consecutive frames are a clip, which is condensed when its first frame
    leaves the recent ones: so every frame is a recent one, in a clip or, for some of the last clip, both. Beyond
    `held_clips`, the two most similar neighbours are merged. Memory and time per frame do not grow with the stream; once
    there are `shown_clips`, the number of tokens is constant. Not differentiable. The defaults make 2560 tokens of 16
    recent frames of 24 x 24 patches, and 1024 of 64 clips.

    Args:
        layout: layout of the recent frames, or its text.
        clip_layout: layout of the frames of a clip, or its text.
        recent_frames: frames kept in full, at least `clip_frames`.
        clip_frames: frames of a clip.
        held_clips: clips held at most.
        shown_clips: clips that `tokens` shows at most.
        grid, backend: as in `slowfast_aggregate`.
        encode: a function of frames [r, ...], at most `clip_frames` of those pushed, that returns features [r, N, D].
            None if the frames are features already.

    Raises:
        InputError: a number is below 1, `recent_frames` below `clip_frames`, or `held_clips` below `shown_clips`.
    """

    def __init__(
        self,
        layout: Layout | str = DEFAULT_LAYOUT,
        clip_layout: Layout | str = DEFAULT_CLIP_LAYOUT,
        *,
        recent_frames: int = 16,
        clip_frames: int = 8,
        held_clips: int = 128,
        shown_clips: int = 64,
        grid: tuple[int, int] | None = None,
        backend: str = "auto",
        encode: Encode | None = None,
    ) -> None:
        check_count("recent_frames", recent_frames)
        check_count("clip_frames", clip_frames)
        check_count("held_clips", held_clips)
        check_count("shown_clips", shown_clips)
        check_encode(encode)
        if clip_frames > recent_frames:
            raise InputError(
                f"recent_frames={recent_frames} is less than clip_frames={clip_frames}, and a clip is made of recent "
                f"frames: keep {clip_frames} or more"
            )
        if shown_clips > held_clips:
            raise InputError(f"only {held_clips} clips are held: show at most {held_clips}, not {shown_clips}")
        self.recent_frames, self.clip_frames = recent_frames, clip_frames
        self.held_clips, self.shown_clips = held_clips, shown_clips
        self.layout, self.clip_layout = parse_patches_only(layout), parse_patches_only(clip_layout)
        self.grid, self.backend = grid, backend
        self._encode = encode
        self._state = _State()

    @torch.no_grad()
    def push(self, frames: Any) -> None:
        """Adds the next frames. If it raises, the stream is unchanged.

        Args:
            frames: [t, ...], at least one, or anything with a length and slices that `encode` takes.

        Raises:
            InputError: no frames, or features that are not [r, N, D] of the first ones' shape, dtype and device.
            LayoutError: a layout does not fit the features.
        """
        seen, recent, memory = self.seen, list(self._state.recent), self._state.memory.copy()
        for start in range(0, count_frames(frames), self.clip_frames):
            like = recent[-1] if recent else None
            part = slice_frames(frames, slice(start, start + self.clip_frames))
            features = encode_frames(self._encode, part, like)
            if not recent:
                self._check_layouts(features)
            for frame in features:
                recent.append(frame.clone())  # encode may write its next features into the same memory
                seen += 1
                if len(recent) > self.recent_frames:
                    self._remember(seen - len(recent), recent, memory)
                    del recent[0]
        self._state = _State(seen, tuple(recent), memory)

    def tokens(
        self,
        scores: Tensor | Sequence[float] | None = None,
        question: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Tokens [S, D] of the clips that `select` returns, then of the recent frames.

        Args:
            scores, question: as in `select`.
            out: as in `slowfast_aggregate`.

        Raises:
            InputError: there are no frames yet, or an argument does not fit.
        """
        self._check_begun()
        clips, recent = self.select(scores, question), torch.stack(self._state.recent)
        total, channels = self.count_tokens(), recent.shape[2]
        if out is None:
            out = recent.new_empty(total, channels)
        check_out(out, recent, (total, channels))
        row = 0
        for clip in clips:
            row += len(clip.tokens)
            out[row - len(clip.tokens) : row].copy_(clip.tokens)
        slowfast_aggregate(recent, self.layout, out=out[row:], backend=self.backend, grid=self.grid)
        return out

    def select(
        self, scores: Tensor | Sequence[float] | None = None, question: Tensor | None = None
    ) -> tuple[Clip, ...]:
        """Selects at most `shown_clips` clips; without arguments by merging similar neighbours, in this call only.

        Args:
            scores: [clips], one for each of `clips`, to select the highest, the oldest of equal ones.
            question: [D], an embedding, to select the clips whose mean token has the highest cosine with it.

        Returns:
            Clips in temporal order.

        Raises:
            InputError: both arguments are given, or one does not fit.
        """
        if scores is not None and question is not None:
            raise InputError("clips are selected by scores or by a question's embedding: pass one of them")
        if question is not None:
            scores = self._relevance(question)
        if scores is None:
            memory = self._state.memory.copy()
            memory.merge_down(self.shown_clips)
            return tuple(memory.clips)
        scores = as_tensor(scores, torch.float64)
        if scores is None or scores.shape != (len(self.clips),) or scores.isnan().any():
            raise InputError(f"scores must be {len(self.clips)} numbers, one for each clip, none of them NaN")
        best = scores.sort(descending=True, stable=True).indices[: self.shown_clips]
        return tuple(self.clips[i] for i in sorted(best.tolist()))

    def count_tokens(self) -> int:
        """The number of tokens that `tokens` returns now."""
        clips = sum(len(clip.tokens) for clip in self.clips[: self.shown_clips])
        return clips + self.plan.tokens["total"]

    @property
    def plan(self) -> Plan:
        """The layout's plan for the recent frames, numbered from 0. InputError before the first frame."""
        self._check_begun()
        return self._plan(self.layout, self._state.recent[0], len(self._state.recent))

    @property
    def clips(self) -> tuple[Clip, ...]:
        """The clips held, in temporal order."""
        return tuple(self._state.memory.clips)

    @property
    def frames(self) -> range:
        """The numbers of the recent frames in the stream."""
        return range(self.seen - len(self._state.recent), self.seen)

    @property
    def seen(self) -> int:
        """Frames pushed."""
        return self._state.seen

    @property
    def nbytes(self) -> int:
        """Bytes that the stream holds."""
        return sum(tensor.nbytes for tensor in (*self._state.recent, *(clip.tokens for clip in self.clips)))

    def _remember(self, first: int, frames: list[Tensor], memory: _Memory) -> None:
        """Condenses the clip that begins with frame `first`, the first of `frames`, if one does."""
        if first % self.clip_frames:
            return
        features = torch.stack(frames[: self.clip_frames])
        tokens = slowfast_aggregate(features, self.clip_layout, backend=self.backend, grid=self.grid)
        wide = torch.promote_types(tokens.dtype, torch.float32)  # merged many times, and rounded once, when shown
        memory.append(Clip(range(first, first + self.clip_frames), tokens.to(wide)))
        memory.merge_down(self.held_clips)

    def _relevance(self, question: Tensor) -> Tensor:
        """Cosine of each clip's mean token with the question; -inf for NaN."""
        self._check_begun()
        channels = self._state.recent[0].shape[1]
        embedding = as_tensor(question, torch.float64)
        if embedding is None or embedding.shape != (channels,):
            shape = type(question).__name__ if embedding is None else list(embedding.shape)
            raise InputError(f"the question's embedding must be [{channels}], not {shape}")
        means = [clip.tokens.mean(0) for clip in self.clips]
        cosines = [F.cosine_similarity(mean, embedding.to(mean), dim=0).item() for mean in means]
        return torch.tensor(cosines, dtype=torch.float64).nan_to_num(nan=-torch.inf)

    def _check_layouts(self, features: Tensor) -> None:
        self._plan(self.layout, features[0], self.recent_frames)
        self._plan(self.clip_layout, features[0], self.clip_frames)

    def _plan(self, layout: Layout, frame: Tensor, frames: int) -> Plan:
        return resolve_plan(frame.expand(frames, -1, -1), layout, self.grid)

    def _check_begun(self) -> None:
        if not self.seen:
            raise InputError("the stream has no frames yet: push some first")
