"""Arguments of wrong types to the tensor functions: each is served, or refused in one line of an SfllavaError."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sfllava_fast import (
    FusedProjectorAggregator,
    MemoryStream,
    PathwayProjectors,
    SlowFastAggregator,
    SlowFastLayout,
    SlowFastLlava,
    SlowFastStream,
    aggregate_by_pathway,
    project_and_aggregate,
    slowfast_aggregate,
)
from sfllava_fast.errors import InputError, SfllavaError
from sfllava_fast.layouts.presets import parse_layout, parse_patches_only
from sfllava_fast.ops.aggregate import resolve_plan
from sfllava_fast.ops.projector import why_not_commuted
from sfllava_fast.ops.rows import attention_received, gather_rows, gather_rows_of, scatter_rows, top_per_frame
from sfllava_fast.ops.stream import kept_frames

LAYOUT = "slowfast-slow_2frms_spatial_1d_max_pool-fast_2x2"
X, INDEX, ROWS = torch.randn(2, 16, 8), torch.tensor([[0, 2, 5]]), torch.randn(1, 3, 8)
HIDDEN = torch.randn(1, 6, 8)
HEADS = torch.randn(1, 2, 6, 8)
WRONG = [
    None, 7, -1, 0, 2.5, float("nan"), 1 << 70, True, "x", "", b"x", [], (), [1, 2, 3], [0.5, None], [[1], [2, 3]], {},
    {"a": 1}, {1}, object(), SlowFastLayout, np.zeros(3), np.array("x"), torch.tensor(3), torch.tensor(2.5),
    torch.zeros(2, 2), torch.zeros(2, 3, 4, 5, 6), torch.zeros(0),
    torch.zeros(1, 6, 8, dtype=torch.complex64), torch.zeros(1, 3, dtype=torch.bool),
]  # fmt: skip


def projector() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)).requires_grad_(False)


def stream(**changed):
    made = SlowFastStream(**{"layout": LAYOUT, "most": 4, "grid": None, "backend": "auto", "encode": None} | changed)
    made.push(X)
    return made.tokens()


def memory(**changed):
    usual = {"layout": LAYOUT, "clip_layout": "clip:adaptive1,adaptive2,adaptive2,mean", "recent_frames": 2}
    usual |= {"clip_frames": 1, "held_clips": 4, "shown_clips": 2, "grid": None, "backend": "auto", "encode": None}
    made = MemoryStream(**usual | changed)
    made.push(torch.randn(5, 16, 8))
    return made


def module(make, **changed):
    given = {"layout": LAYOUT, "backend": "auto", "grid": None} | changed
    call = {name: given.pop(name) for name in ("features", "frame_offsets", "out", "separators") if name in given}
    return make(**given)(call.pop("features", X), **call)


OP = {"features": X, "layout": LAYOUT, "out": None, "backend": "auto", "grid": (4, 4), "frame_offsets": None}
OP |= {"separators": None}
PLAIN = {"layout": LAYOUT, "backend": "auto", "grid": None, "features": X, "frame_offsets": None, "out": None}
CALLS = {
    "slowfast_aggregate": (slowfast_aggregate, OP),
    "slowfast_aggregate of separators": (
        slowfast_aggregate, OP | {"layout": "llava_next_video-newline_grid", "separators": torch.zeros(1, 8)}
    ),
    "aggregate_by_pathway": (
        aggregate_by_pathway, {name: OP[name] for name in ("features", "layout", "out", "backend", "grid")}
    ),
    "resolve_plan": (resolve_plan, {name: OP[name] for name in ("features", "layout", "grid", "frame_offsets")}),
    "project_and_aggregate": (
        lambda features, **call: project_and_aggregate(features, **call),
        OP | {"projector": projector(), "mode": "commuted"},
    ),
    "project_and_aggregate, pooled first": (
        lambda features, **call: project_and_aggregate(features, **call),
        OP | {"projector": projector(), "mode": "exact", "layout": "videollm_online-interval",
              "features": torch.randn(2, 17, 8), "separators": torch.zeros(1, 4)},
    ),
    "why_not_commuted": (why_not_commuted, {"projector": projector()}),
    "SlowFastAggregator": (lambda **call: module(SlowFastAggregator, **call), PLAIN),
    "FusedProjectorAggregator": (
        lambda **call: module(FusedProjectorAggregator, **call), PLAIN | {"projector": projector(), "mode": "auto"}
    ),
    "PathwayProjectors": (
        lambda projectors, **call: module(lambda **made: PathwayProjectors(projectors, **made), **call),
        {"projectors": {"slow": nn.Identity(), "fast": nn.Identity()}, "layout": LAYOUT, "backend": "auto",
         "grid": None, "features": X},
    ),
    "parse_layout": (parse_layout, {"layout": LAYOUT}),
    "parse_patches_only": (parse_patches_only, {"layout": LAYOUT}),
    "Layout.plan": (SlowFastLayout().plan, {"frames": 2, "grid": (4, 4)}),
    "top_per_frame": (
        top_per_frame,
        {"scores": torch.randn(1, 6), "token_offsets": (0, 3, 6), "ratio": 0.5, "nan": None, "backend": "auto"},
    ),
    "gather_rows": (gather_rows, {"hidden": HIDDEN, "index": INDEX, "backend": "auto"}),
    "gather_rows_of": (gather_rows_of, {"tensors": [HIDDEN, HIDDEN], "index": INDEX, "backend": "auto"}),
    "scatter_rows": (
        scatter_rows,
        {"hidden": HIDDEN, "index": INDEX, "rows": ROWS, "weights": torch.rand(1, 3), "out": None, "backend": "auto"},
    ),
    "attention_received": (attention_received, {"queries": HEADS, "keys": HEADS, "scale": 0.5, "backend": "auto"}),
    "kept_frames": (kept_frames, {"seen": 5, "most": 4}),
    "SlowFastStream": (stream, {"layout": LAYOUT, "most": 4, "grid": None, "backend": "auto", "encode": None}),
    "SlowFastStream.push": (lambda frames: SlowFastStream(LAYOUT, 4).push(frames), {"frames": X}),
    "MemoryStream": (
        memory,
        {"layout": LAYOUT, "clip_layout": LAYOUT, "recent_frames": 2, "clip_frames": 1, "held_clips": 4,
         "shown_clips": 2, "grid": None, "backend": "auto", "encode": None},
    ),
    "MemoryStream.push": (lambda frames: MemoryStream(LAYOUT, LAYOUT).push(frames), {"frames": X}),
    "MemoryStream.tokens of scores": (
        lambda scores, out: memory().tokens(scores=scores, out=out), {"scores": None, "out": None}
    ),
    "MemoryStream.tokens of a question": (
        lambda question: memory().tokens(question=question), {"question": torch.randn(8)}
    ),
}  # fmt: skip
CASES = [(name, argument) for name, (_, usual) in CALLS.items() for argument in usual]


@pytest.mark.parametrize("name", CALLS)
def test_the_usual_arguments_are_served(name):
    run, usual = CALLS[name]
    run(**usual)


@pytest.mark.parametrize("name, argument", CASES, ids=lambda part: part.replace(" ", "_"))
def test_a_wrong_argument_is_served_or_refused_in_a_line(name, argument):
    run, usual = CALLS[name]
    for wrong in (*WRONG, torch.zeros(2, 16, 8).to_sparse()):  # a sparse one must not live on: others count bytes
        try:
            run(**usual | {argument: wrong})
        except SfllavaError as error:
            assert str(error) and "\n" not in str(error), error
        except Exception as error:
            pytest.fail(f"{argument}={wrong!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path_or_hub_id": 3}, "a checkpoint is a directory or a hub id such as owner/name, not a int"),
        ({"max_sessions": "a"}, "max_sessions must be an integer of at least 1, not 'a'"),
        ({"max_session_bytes": -1}, "max_session_bytes must be a number of bytes of at least 1, not -1"),
        ({"separators": 3}, "separators must be a dict of vectors by name, not a int"),
        ({"layout": "llava_next_video-newline_grid", "separators": {"newline": 3}}, "newline must be a tensor"),
    ],
)
def test_wrong_settings_of_a_model_are_refused_in_a_line(settings, message):
    with pytest.raises(SfllavaError, match=message):
        SlowFastLlava.from_pretrained(**settings)


def test_a_batch_of_no_videos():
    with pytest.raises(InputError, match="the batch holds no video"):
        slowfast_aggregate(torch.randn(0, 4, 16, 8), "slowfast-slow_2frms_concat-fast_2x2")
