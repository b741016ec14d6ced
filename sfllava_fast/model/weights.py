"""Loading of weights: all tensors in a checkpoint's files are matched to the stock model's before any is read."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import as_checkpoint_error, read_json
from .transformers_release import release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Renaming = tuple[str, str]  # pattern and replacement, as in re.sub

# From the names of transformers 4, and of 5.0, whose vision tower has one level more, to the current names.
HUGGING_FACE_NAMES: tuple[Renaming, ...] = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
# In order of preference.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WHOLE)

# Buffers that old checkpoints store and the model computes.
_COMPUTED = re.compile(r"\.embeddings\.position_ids$|\.rotary_emb\.inv_freq$")
_SAMPLES = 64  # values of each weight in a model's hash
_VISION_LAYER = re.compile(r"^model\.vision_tower\.encoder\.layers\.(\d+)\.")
_VISION_POST_NORM = "model.vision_tower.post_layernorm."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Its name in the stock model.
        key: Its name in the file.
        file: The file.
        shape: Its shape.
        read: Reads it, on the CPU.
    """

    name: str
    key: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def stored_tensors(path: Path, names: Sequence[Renaming]) -> list[StoredTensor]:
    """The tensors in a checkpoint directory; only headers are read.

    Safetensors files are preferred to pickles. An index gives the files, and the files give their tensors.

    Args:
        path: The directory.
        names: Renamings from the files' names to the stock model's.

    Raises:
        CheckpointError: If a file is missing, corrupt or truncated.
    """
    return [tensor for file in _weight_files(path) for tensor in _open(file, names)]


def _weight_files(path: Path) -> list[Path]:
    for whole, index_name in zip(_WHOLE, _INDICES):
        if (path / whole).is_file():
            return [path / whole]
        index = read_json(path / index_name)
        if index is None:
            continue
        with as_checkpoint_error(f"{path / index_name} is not an index of weights: download it again"):
            names = sorted(set(map(Path, index["weight_map"].values())))
        for name in names:
            if name.is_absolute() or ".." in name.parts:
                raise CheckpointError(f"{path / index_name} has {name}, which is outside its folder: correct it")
        files = [path / name for name in names]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{path} has no {file.name}: download the checkpoint again")
        return files
    raise CheckpointError(f"{path} has no {_WHOLE[0]}: download the checkpoint again")


def _open(file: Path, names: Sequence[Renaming]) -> list[StoredTensor]:
    with as_checkpoint_error(f"{file} is corrupt or truncated: download it again"):
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            opened = safe_open(file, framework="pt")
            keys = list(opened.keys())
            found = [(key, opened.get_slice(key).get_shape(), partial(opened.get_tensor, key)) for key in keys]
        else:
            # Pickles from before torch 1.6 are not archives and cannot be memory-mapped.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            found = [(key, tensor.shape, partial(tensors.get, key)) for key, tensor in tensors.items()]
    return [StoredTensor(_renamed(key, names), key, file, tuple(shape), read) for key, shape, read in found]


def _renamed(key: str, names: Sequence[Renaming]) -> str:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def load_weights(
    model: PreTrainedModel, tensors: Iterable[StoredTensor], path: Path, layers: int, device: torch.device
) -> None:
    """Load stored tensors into a model on the meta device, in the model's dtype.

    Args:
        model: The model; its vision tower may be cut.
        tensors: The stored tensors.
        path: The checkpoint, for messages.
        layers: Number of layers of the vision tower before it was cut. Layers that were cut, and the post-norm, are not
            read.
        device: Of the weights.

    Raises:
        CheckpointError: Before any tensor is read, unless every weight is stored once in its shape, and every stored
            tensor is a weight or known to be unused.
    """
    matched = _match(model, tensors, path, layers)
    own, dtype = model.state_dict(keep_vars=True), model.dtype
    values: dict[int, Tensor] = {}  # by id of the model's tensor, since tied weights are one tensor
    with as_checkpoint_error(f"{path}: the weights cannot be read"):
        for name, tensor in matched.items():
            # A copy, since the files may change while the model is in use.
            value = tensor.read().to(device, dtype, copy=True)
            first = values.setdefault(id(own[name]), value)
            if first is not value and not torch.equal(first, value):
                raise CheckpointError(f"{path}: config.json ties {name} to a weight that differs: correct it")
    given = {name: values[id(weight)] for name, weight in own.items() if id(weight) in values}
    model.load_state_dict(given, strict=False, assign=True)
    model.tie_weights()
    _compute_buffers(model, device)
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise CheckpointError(f"{path}: {', '.join(empty[:3])} has no value in {release()}: use another release")


def hash_weights(digest: hashlib._Hash, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Update a hash with the name, shape, dtype and `_SAMPLES` evenly spaced values of every weight.

    It takes milliseconds for a model of any size, and one copy from its device.
    """
    samples: list[Tensor] = []
    for name, weight in weights:
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode())
        flat = weight.detach().reshape(-1)
        step = flat.numel() // _SAMPLES | 1  # odd, so that the samples are of several columns
        samples.append(flat[::step][:_SAMPLES].float())
    if samples:
        digest.update(torch.cat([sample.to(samples[0].device) for sample in samples]).cpu().numpy().tobytes())


def _match(model: PreTrainedModel, tensors: Iterable[StoredTensor], path: Path, layers: int) -> dict[str, StoredTensor]:
    """The stored tensor of each of the model's weights, by the model's names."""
    expected = model.state_dict(keep_vars=True)
    own_names = {_renamed(name, HUGGING_FACE_NAMES): name for name in expected}
    matched: dict[str, StoredTensor] = {}
    unknown, misshapen = [], []
    for tensor in tensors:
        name = own_names.get(tensor.name)
        if name is None:
            if not _unread(tensor.name, layers):
                unknown.append(tensor.key)
        elif name in matched:
            first = matched[name]
            both = f"{first.key} in {first.file.name}, {tensor.key} in {tensor.file.name}"
            raise CheckpointError(f"{path} holds a weight twice ({both}): remove one")
        else:
            matched[name] = tensor
            if tensor.shape != expected[name].shape:
                misshapen.append(f"{tensor.key} {list(tensor.shape)}, not {list(expected[name].shape)}")
    given = {id(expected[name]) for name in matched}  # by id, since tied weights are one tensor
    missing = [name for name, weight in expected.items() if id(weight) not in given]
    for what, keys in (("lacks", missing), ("holds unknown", unknown), ("holds misshapen", misshapen)):
        if keys:
            raise CheckpointError(
                f"{path} {what} weights ({_shown(keys)}): it is damaged, or does not match its config.json"
            )
    return matched


def _shown(keys: list[str]) -> str:
    return f"{len(keys)}: {'; '.join(sorted(keys)[:3])}{'; ...' if len(keys) > 3 else ''}"


def _unread(name: str, layers: int) -> bool:
    """Whether a stored tensor that is not in the model is known to be unused."""
    layer = _VISION_LAYER.match(name)
    cut = layer is not None and int(layer.group(1)) < layers
    return cut or name.startswith(_VISION_POST_NORM) or _COMPUTED.search(name) is not None


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Set buffers that are not stored, from new instances of the modules that compute them."""
    for module in model.modules():
        absent = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if absent:
            with torch.random.fork_rng(devices=[]):  # the new instance may draw weights, which are not used
                fresh: Any = type(module)(module.config)
            for name in absent:
                setattr(module, name, getattr(fresh, name).to(device))
