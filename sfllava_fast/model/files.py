"""The files of a checkpoint: its directory, local or from the hub, and the JSON in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]
_HUB_PICKLES = ["pytorch_model*.bin"]


def locate(path_or_hub_id: str | Path) -> Path:
    """The directory of a checkpoint. A hub id is downloaded unless it is in the local cache.

    Raises:
        CheckpointError: If there is no such directory or hub id.
    """
    if not isinstance(path_or_hub_id, (str, os.PathLike)):
        kind = type(path_or_hub_id).__name__
        raise CheckpointError(f"a checkpoint is a directory or a hub id such as owner/name, not a {kind}")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the directory of a checkpoint")
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"no checkpoint directory {name}: give a directory or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    with as_checkpoint_error(f"{name} is neither a directory nor a checkpoint on the hub"):
        path = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        if not any(path.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=_HUB_PICKLES)
        return path


_PARTS = {
    "an adapter": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "a projector alone": ("mm_projector.bin", "non_lora_trainables.bin"),
}
_WHOLE = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
_MOST = 1000
_COUNTED = re.compile(r"layers?$|^num_attention_heads$")
_LEAST = {"num_hidden_layers": 0, "num_attention_heads": 1}


def refuse_part(path: Path) -> None:
    """Raise CheckpointError if a directory has only a part of a checkpoint: an adapter (LoRA) or a projector."""
    if any(not file.name.startswith("adapter_") for name in _WHOLE for file in path.glob(name)):
        return
    for what, names in _PARTS.items():
        found = next((name for name in names if (path / name).is_file()), None)
        if found:
            raise CheckpointError(
                f"{path} holds {what} ({found}) and no whole model: merge it into its base model, and give the merged "
                "model's directory"
            )


def refuse_outer(path: Path) -> None:
    """Raise CheckpointError if a checkpoint, or a part of one, is in a subfolder such as checkpoint-500."""
    with as_checkpoint_error(f"{path} cannot be listed"):
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    for folder in folders:
        refuse_part(folder)
        if (folder / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json, and its folder {folder.name} has one: give that folder")


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file does not exist."""
    if not file.is_file():
        return None
    with as_checkpoint_error(f"{file} is not readable JSON"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a checkpoint, after `check_sizes`; None if it has none."""
    file = folder / "config.json"
    config = read_json(file)
    with as_checkpoint_error(f"{file} is not usable"):
        check_sizes(file, config)
    return config


def check_sizes(file: Path, value: Any, name: str = "") -> None:
    """Raise CheckpointError for an implausible size in a config, which would take memory before any weight is read.

    The numbers of layers (under any name that ends in "layer" or "layers"), of attention heads, and of entries of lists
    may be at most `_MOST`, at any depth.

    Args:
        file: The config, for the message.
        value: The value of `name`, or the whole config.
        name: The key of the value.
    """
    if isinstance(value, dict):
        for inner, part in value.items():
            check_sizes(file, part, inner)
    elif isinstance(value, list):
        if len(value) > _MOST:
            raise CheckpointError(f"{file} has {name} of {len(value)} entries, and {_MOST} are read: correct it")
        for part in value:
            check_sizes(file, part, name)
    elif isinstance(value, (int, float)) and _COUNTED.search(name):
        least = _LEAST.get(name, -_MOST)
        if not least <= value <= _MOST:
            raise CheckpointError(f"{file} has {name} {value}, and {least} to {_MOST} are read: correct it")


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Context that turns any exception into a CheckpointError of one line, except that a device is out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({first_line(error)})") from error
