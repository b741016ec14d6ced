"""Fused kernels for SlowFast-LLaVA's video tokens: a PyTorch op, and a video question-answering engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "FusedProjectorAggregator": "ops.modules",
    "MemoryStream": "ops.memory_stream",
    "MixtureOfDepths": "reduction.mixture.wrapper",
    "PathwayProjectors": "ops.modules",
    "SlowFastLayout": "layouts",
    "SlowFastAggregator": "ops.modules",
    "SlowFastLlava": "engine.slowfast_llava",
    "SlowFastStream": "ops.stream",
    "SfllavaError": "errors",
    "aggregate_by_pathway": "ops.aggregate",
    "parse_layout": "layouts",
    "project_and_aggregate": "ops.projector",
    "sample_frames": "layouts",
    "slowfast_aggregate": "ops.aggregate",
}
__all__ = ["__version__", *_HOMES]  # the keys are strings

if TYPE_CHECKING:
    from .engine.slowfast_llava import SlowFastLlava as SlowFastLlava
    from .errors import SfllavaError as SfllavaError
    from .layouts.presets import parse_layout as parse_layout
    from .layouts.sampling import sample_frames as sample_frames
    from .layouts.slowfast import SlowFastLayout as SlowFastLayout
    from .ops.aggregate import aggregate_by_pathway as aggregate_by_pathway
    from .ops.aggregate import slowfast_aggregate as slowfast_aggregate
    from .ops.memory_stream import MemoryStream as MemoryStream
    from .ops.modules import FusedProjectorAggregator as FusedProjectorAggregator
    from .ops.modules import PathwayProjectors as PathwayProjectors
    from .ops.modules import SlowFastAggregator as SlowFastAggregator
    from .ops.projector import project_and_aggregate as project_and_aggregate
    from .ops.stream import SlowFastStream as SlowFastStream
    from .reduction.mixture.wrapper import MixtureOfDepths as MixtureOfDepths


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import sfllava_fast` is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
