"""Checks that a decoder supports layers that skip tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import InputError, PatchError
from ...model.transformers_release import CACHE_NAMES, cache_in, name_of_cache, release

_NEEDED = {"position_embeddings", "attention_mask"}
# Further parameters that a layer may have: not per token, or unused if rotary embeddings are given.
_OTHERS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "kwargs"}


def find_decoder(model: nn.Module) -> Any:
    """The Llama-like decoder of a transformers model. Raises PatchError if its layers are not supported."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]  # a method
    layers = getattr(decoder, "layers", None)
    found = type(decoder).__name__ if decoder is model else f"{type(model).__name__} with {type(decoder).__name__}"
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise PatchError(f"{found} has no list of decoder layers ({release()}): give a Llama-like model")
    for layer in layers:
        if obstacle := _obstacle(layer):
            raise PatchError(f"{found} is not supported: {type(layer).__name__} {obstacle} ({release()})")
    return decoder


def _obstacle(layer: nn.Module) -> str | None:
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    if not hasattr(layer, "self_attn"):
        return "has no self_attn"
    if names[:1] != ["hidden_states"]:
        return f"takes {', '.join(names) or 'nothing'}, not hidden_states first"
    lacking = sorted(_NEEDED - set(names))
    if name_of_cache(names) is None:
        lacking.append(" or ".join(CACHE_NAMES))
    if lacking:
        return f"does not take {', '.join(lacking)}"
    if unknown := [name for name in names[1:] if name not in _NEEDED | _OTHERS | {*CACHE_NAMES}]:
        return f"takes {', '.join(unknown)}, which may be per token"
    return None


def measured_layers(decoder: Any) -> set[int]:
    """Layers whose length transformers takes as the cache's: the first of each attention type. They keep all tokens."""
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"]
    return {0} | {kinds.index(kind) for kind in kinds}


def check_layers(decoder: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The mixed layers, ascending; None for every other one, from the second. Raises InputError for wrong ones."""
    count, measured = len(decoder.layers), measured_layers(decoder)
    if layers is None:
        layers = [number for number in range(1, count, 2) if number not in measured]
    if not all(isinstance(number, int) and 0 <= number < count for number in layers):
        raise InputError(f"layers must be among 0 to {count - 1}, not {list(layers)}")
    if len(set(layers)) != len(layers) or not layers:
        raise InputError(f"layers must be at least one, each once, not {list(layers)}")
    if wrong := sorted(measured.intersection(layers)):
        raise InputError(f"layer {wrong[0]} must keep all tokens, as transformers takes its length: leave it out")
    return tuple(sorted(layers))


def check_pass(decoder: Any, layers: Sequence[int], arguments: dict[str, Any], end: int) -> None:
    """Raise InputError if a forward pass up to token `end` cannot skip tokens."""
    attention, cache = decoder.config._attn_implementation, cache_in(arguments)
    if attention == "flex_attention":
        raise InputError("flex_attention's masks cannot be sliced: call model.set_attn_implementation('sdpa')")
    if getattr(cache, "is_compileable", False):
        raise InputError("a static cache has one capacity in all layers: use a DynamicCache, transformers' default")
    if arguments.get("cu_seq_lens_q") is not None:
        raise InputError("sequences that are packed in a row have no common frames: give each sequence a row")
    windows = [getattr(decoder.layers[number].self_attn, "sliding_window", None) for number in layers]
    window = min((window for window in [*windows, _window(decoder)] if window), default=end)
    if "flash" in attention and window < end:
        raise InputError(
            f"flash attention applies its window of {window} tokens to the kept tokens alone: "
            "call model.set_attn_implementation('sdpa')"
        )


def _window(decoder: Any) -> int | None:
    """The sliding window of a decoder whose layers all have one, like Mistral's, which is in the config."""
    kinds = getattr(decoder.config, "layer_types", None)
    return None if kinds else getattr(decoder.config, "sliding_window", None)
