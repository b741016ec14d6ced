"""Detection of the two code bases that are both named `llava`, by their methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MethodType
from typing import Any

from ..errors import PatchError, first_line
from ..patching import Patch, undo

_MODULE = "llava.model.llava_arch"
# Attributes for the wrapped module in DDP, FSDP, torch.compile and PEFT (a model in a tuner).
_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod", "base_model", "model")


@dataclass(frozen=True)
class CodeBase:
    """A code base that a patch supports.

    Attributes:
        title: Its name, for messages.
        patched_by: The function that patches it.
        methods: The methods that the patch needs, with their parameters after self.
    """

    title: str
    patched_by: str
    methods: dict[str, tuple[str, ...]]


SLOWFAST_LLAVA = CodeBase(
    "the published SF-LLaVA code",
    "patch_slowfast_llava",
    {
        "prepare_slowfast": ("image_features", "temporal_aggregation"),
        "temporal_aggregation": ("image_features", "temporal_aggregation"),
    },
)
LLAVA_NEXT = CodeBase(
    "LLaVA-NeXT / LLaVA-Video code",
    "patch_llava_next",
    {
        "get_2dPool": ("image_feature", "stride"),
        "add_token_per_grid": ("image_feature",),
        "add_token_per_frame": ("image_feature",),
    },
)
_CODE_BASES = SLOWFAST_LLAVA, LLAVA_NEXT
_NAMES = [name for code in _CODE_BASES for name in code.methods]


def find_owner(target: Any, code: CodeBase) -> Any:
    """The class or model with a code base's methods.

    Args:
        target: A class or a model, wrapped or not. None stands for the mixin class of the installed `llava`.
        code: The code base.

    Raises:
        PatchError: If there is none; the message has what was found and what is supported.
    """
    owner = _unwrap(_import_mixin(code) if target is None else target)
    found = _methods(owner)
    if code.methods.items() <= found.items():
        return owner
    kind = owner if isinstance(owner, type) else type(owner)
    others = [other.patched_by for other in _CODE_BASES if other.methods.items() <= found.items()]
    raise PatchError(
        f"{code.patched_by} supports {code.title}, with {_signatures(code.methods)}; "
        f"found {kind.__module__}.{kind.__qualname__}, with {_signatures(found) or 'none of them'}"
        + "".join(f": use {name}" for name in others)
    )


def replace_methods(owner: Any, make: Mapping[str, Callable[[Callable], Callable]]) -> Patch:
    """Patch methods of a class or a model.

    Args:
        owner: The class or the model.
        make: By name of a method, a function from the method, as a function of self, to the new one.
    """
    undo(owner)  # first, so that the original methods are wrapped
    methods = {name: wrap(_function(owner, name)) for name, wrap in make.items()}
    if not isinstance(owner, type):
        methods = {name: MethodType(method, owner) for name, method in methods.items()}
    return Patch(owner, [(owner, name, method) for name, method in methods.items()])


def _function(owner: Any, name: str) -> Any:
    """A method of a class or a model as a function of self; None if it has none."""
    held = getattr(owner, name, None)
    return getattr(held, "__func__", held)


def _import_mixin(code: CodeBase) -> type:
    try:
        return import_module(_MODULE).LlavaMetaForCausalLM
    except Exception as error:  # its models may raise any type with another release of transformers
        raise PatchError(
            f"{code.patched_by} could not import LlavaMetaForCausalLM from {_MODULE} ({first_line(error)}): "
            f"install {code.title}, or pass a model or class of it"
        ) from error


def _unwrap(target: Any) -> Any:
    """The target or the wrapped model, whichever has methods of a code base; the target if neither has."""
    inner = target
    while inner is not None and not isinstance(inner, type):
        if any(hasattr(type(inner), name) for name in _NAMES):
            return inner
        modules = getattr(inner, "_modules", {})
        inner = next((modules[name] for name in _WRAPPED if name in modules), None)
    return target


def _methods(owner: Any) -> dict[str, tuple[str, ...]]:
    """The parameters after self of the owner's methods that are in a code base."""
    functions = {name: _function(owner, name) for name in _NAMES}
    return {name: tuple(inspect.signature(f).parameters)[1:] for name, f in functions.items() if inspect.isfunction(f)}


def _signatures(methods: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{name}({', '.join(parameters)})" for name, parameters in methods.items())
