"""SlowFast-LLaVA, exact and fast: the aggregator as an op, and a video question answered with it."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "FusedProjectorAggregator": "modules",
    "MemoryStream": "memory",
    "MixtureOfDepths": "reduction.mixture",
    "PathwayProjectors": "modules",
    "SlowFastConfig": "config",
    "SlowFastAggregator": "modules",
    "SlowFastLlava": "engine",
    "SlowFastStream": "stream",
    "SfllavaError": "errors",
    "parse_layout": "layouts",
    "project_and_aggregate": "projector",
    "sample_frames": "config",
    "slowfast_aggregate": "ops",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .config import SlowFastConfig as SlowFastConfig
    from .config import sample_frames as sample_frames
    from .engine import SlowFastLlava as SlowFastLlava
    from .errors import SfllavaError as SfllavaError
    from .layouts import parse_layout as parse_layout
    from .memory import MemoryStream as MemoryStream
    from .modules import FusedProjectorAggregator as FusedProjectorAggregator
    from .modules import PathwayProjectors as PathwayProjectors
    from .modules import SlowFastAggregator as SlowFastAggregator
    from .ops import slowfast_aggregate as slowfast_aggregate
    from .projector import project_and_aggregate as project_and_aggregate
    from .reduction.mixture import MixtureOfDepths as MixtureOfDepths
    from .stream import SlowFastStream as SlowFastStream


def __getattr__(name: str):
    """Public names are imported when first used: `import sfllava_fast` loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
