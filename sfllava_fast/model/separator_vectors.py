"""Vectors of a layout's separators, from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..errors import InputError
from ..layouts.pathways import Separator

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

log = logging.getLogger("sfllava_fast")

# VideoLLM-online's interval is the token of a comma. A line break is the closest to a learned newline.
_TEXTS = {"interval": ","}
_ELSE = "\n"


def find_separators(
    separators: tuple[Separator, ...], checkpoint: Checkpoint, given: Mapping[str, Tensor] | None = None
) -> Tensor | None:
    """The vectors of a layout's separators.

    A vector is the given one, else LLaVA-NeXT's learned newline, else the embedding of a token, else the mean of all
    embeddings. A replacement for a learned vector is logged.

    Args:
        separators: The layout's separators.
        checkpoint: The checkpoint.
        given: Vectors [D] by name.

    Returns:
        [K, D] of the model's dtype and device, or None if the layout has no separators.

    Raises:
        InputError: If a given vector has another shape, or a name that the layout does not have.
    """
    names, given = [separator.name for separator in separators], dict(given or {})
    if unknown := set(given) - set(names):
        has = ", ".join(names) or "none"
        raise InputError(f"the layout has no separator {', '.join(sorted(unknown))}: it has {has}")
    if not names:
        return None
    return torch.stack([_find(name, checkpoint, given.get(name)) for name in names])


def _find(name: str, checkpoint: Checkpoint, given: Tensor | None) -> Tensor:
    model = checkpoint.model
    width = model.config.text_config.hidden_size
    vector = getattr(model.model, "image_newline", None) if given is None and name == "newline" else given
    if vector is None:
        vector = _embed(_TEXTS.get(name, _ELSE), name, checkpoint)
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (width,):
        found = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise InputError(f"the separator {name} must be a tensor [{width}], not {found}")
    return vector.detach().to(model.device, model.dtype)


def _embed(text: str, name: str, checkpoint: Checkpoint) -> Tensor:
    """The embedding of a text's last token; the mean of all embeddings if the tokenizer has no such token."""
    tokenizer, embeddings = checkpoint.tokenizer, cast(Tensor, checkpoint.model.get_input_embeddings().weight)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    spelled = bool(ids) and ids[-1] != tokenizer.unk_token_id
    if not spelled or name not in _TEXTS:
        stand_in = f"the embedding of {text!r}" if spelled else "the mean of its embeddings"
        log.warning("this checkpoint has no vector for the separator %s: using %s", name, stand_in)
    return embeddings[ids[-1]] if spelled else embeddings.mean(0)
