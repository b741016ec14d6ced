"""Replacement of a decoder's weights by those that were trained with a reduction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, dtype_name


def weight_replacements(
    model: nn.Module, decoder: nn.Module, weights: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The replacements for a `Patch` that put weights into a model, tied weights in all modules.

    Args:
        model: The model.
        decoder: Its decoder.
        weights: By name as in `decoder.named_parameters()`, and "lm_head.weight".

    Raises:
        InputError: If the model has no weight with this name and shape, or if it is not floating point.
    """
    own, head = dict(decoder.named_parameters()), getattr(model, "lm_head", None)
    if head is not None:
        own["lm_head.weight"] = head.weight
    swaps: dict[nn.Parameter, nn.Parameter] = {}
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape or not weight.is_floating_point():
            given = f"{list(weight.shape)} {dtype_name(weight.dtype)}"
            raise InputError(f"this model has no {name} {given}, which the reduction replaces")
        # A copy, since the memory of a file is not aligned, and kernels may then round differently.
        put = nn.Parameter(weight.to(own[name], copy=True), own[name].requires_grad)
        if not torch.equal(swaps.setdefault(own[name], put), put):
            raise InputError(f"this model ties {name} to another weight, for which the reduction has other values")
    return [
        (module, name, swaps[held])
        for module in model.modules()
        for name, held in module.named_parameters(recurse=False)
        if held in swaps
    ]
