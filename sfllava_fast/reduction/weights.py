"""Weights of a decoder that were trained with a reduction, as replacements in a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, dtype_name


def weight_replacements(
    model: nn.Module, decoder: nn.Module, weights: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """What a `Patch` takes to put weights into a model, tied ones in every place.

    weights: by name as in `decoder.named_parameters()`, and "lm_head.weight".
    Raises InputError where the model lacks a weight of that name and shape, or it is not floating point.
    """
    own, head = dict(decoder.named_parameters()), getattr(model, "lm_head", None)
    if head is not None:
        own["lm_head.weight"] = head.weight
    swaps: dict[nn.Parameter, nn.Parameter] = {}
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape or not weight.is_floating_point():
            given = f"{list(weight.shape)} {dtype_name(weight.dtype)}"
            raise InputError(f"this model has no {name} {given}, which the reduction brings")
        # A copy: memory of a file is not aligned, by which kernels may round otherwise.
        put = nn.Parameter(weight.to(own[name], copy=True), own[name].requires_grad)
        if not torch.equal(swaps.setdefault(own[name], put), put):
            raise InputError(f"this model ties {name} to another weight, of which the reduction has other values")
    return [
        (module, name, swaps[held])
        for module in model.modules()
        for name, held in module.named_parameters(recurse=False)
        if held in swaps
    ]
