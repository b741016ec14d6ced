"""What a model sees of lmms-eval, written from its interface, for environments without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        self.task_name = self.metadata["task"]

    @property
    def args(self):
        return self.arguments


class lmms:
    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size

    def clean(self):
        pass


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


def install(monkeypatch) -> None:
    """Make it importable as lmms_eval."""
    homes = {
        "lmms_eval": (),
        "lmms_eval.api": (),
        "lmms_eval.api.instance": (GenerationResult, Instance, TokenCounts),
        "lmms_eval.api.model": (lmms,),
        "lmms_eval.models": (),
        "lmms_eval.models.model_utils": (),
        "lmms_eval.models.model_utils.gen_metrics": (log_metrics,),
        "lmms_eval.models.registry_v2": (ModelManifest,),
    }
    for name, members in homes.items():
        module = ModuleType(name)
        vars(module).update({member.__name__: member for member in members})
        monkeypatch.setitem(sys.modules, name, module)


def log_metrics(total_elapsed_time: float, total_gen_tokens: int, avg_speed: float) -> None:
    pass
