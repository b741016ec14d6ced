"""Two code bases have the module name `llava`: they are recognized by their methods."""

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
# Names under which DDP, FSDP, torch.compile and PEFT (a model in a tuner) hold the module that they wrap.
_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod", "base_model", "model")


@dataclass(frozen=True)
class CodeBase:
    """The methods that a drop-in relies on, and their parameters after self."""

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
    """The class or model that has the code base's methods.

    Args:
        target: A model, wrapped or not, or a class. None: the mixin class of the installed `llava`.
        code: The code base.

    Raises:
        PatchError: If it has other methods; the message has what was found and what is supported.
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


def replace_methods(owner: Any, make: Mapping[str, Callable[[Any], Callable]]) -> Patch:
    """Patch a class or a model: `make` has, by name, a function from a method (with self) to its replacement."""
    undo(owner)  # first, so that the methods are those from before
    methods = {name: wrap(_function(owner, name)) for name, wrap in make.items()}
    bind = (lambda method: method) if isinstance(owner, type) else (lambda method: MethodType(method, owner))
    return Patch(owner, [(owner, name, bind(method)) for name, method in methods.items()])


def _function(owner: Any, name: str) -> Callable | None:
    """A method of a class or a model as a function of self; None if it has none."""
    held = getattr(owner, name, None)
    return getattr(held, "__func__", held)


def _import_mixin(code: CodeBase) -> type:
    try:
        return import_module(_MODULE).LlavaMetaForCausalLM
    except Exception as error:  # it imports its models, which fail in their own ways on another transformers
        raise PatchError(
            f"{code.patched_by} could not import LlavaMetaForCausalLM from {_MODULE} ({first_line(error)}): "
            f"install {code.title}, or pass a model or class of it"
        ) from error


def _unwrap(target: Any) -> Any:
    """The target or the module that it wraps, whichever has methods of a code base; the target if none has."""
    inner = target
    while inner is not None and not isinstance(inner, type):
        if any(hasattr(type(inner), name) for name in _NAMES):
            return inner
        modules = getattr(inner, "_modules", {})
        inner = next((modules[name] for name in _WRAPPED if name in modules), None)
    return target


def _methods(owner: Any) -> dict[str, tuple[str, ...]]:
    """The parameters after self of the owner's methods that either code base has."""
    functions = {name: _function(owner, name) for name in _NAMES}
    return {name: tuple(inspect.signature(f).parameters)[1:] for name, f in functions.items() if inspect.isfunction(f)}


def _signatures(methods: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{name}({', '.join(parameters)})" for name, parameters in methods.items())
