"""The files of a checkpoint: its directory, here or from the hub, and the JSON in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, first_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]
_HUB_PICKLES = ["pytorch_model*.bin"]


def locate(path_or_hub_id: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is downloaded, or taken from the local cache."""
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

    with one_line(f"{name} is neither a directory here nor a checkpoint that the hub gives out"):
        path = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        if not any(path.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=_HUB_PICKLES)
        return path


_PARTS = {
    "an adapter": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    "a projector alone": ("mm_projector.bin", "non_lora_trainables.bin"),
}
_WHOLE = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
_MOST_LAYERS = 1000


def refuse_part(path: Path) -> None:
    """CheckpointError for a directory of a part of a checkpoint: an adapter (LoRA), or a projector."""
    if any(not file.name.startswith("adapter_") for name in _WHOLE for file in path.glob(name)):
        return
    for what, names in _PARTS.items():
        found = next((name for name in names if (path / name).is_file()), None)
        if found:
            raise CheckpointError(
                f"{path} holds {what} ({found}) and no whole model: merge it into its base model first, and give the "
                "directory that this writes"
            )


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    if not file.is_file():
        return None
    with one_line(f"{file} is not readable JSON"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a checkpoint; None if it has none.

    Raises CheckpointError for more layers than any model has, each of which takes memory before a weight is read, and
    for a number of heads that no model has.
    """
    file = folder / "config.json"
    config = read_json(file)
    parts = [config, config.get("text_config"), config.get("vision_config")] if config else []
    for part in (part for part in parts if isinstance(part, dict)):
        for name, least in (("num_hidden_layers", 0), ("num_attention_heads", 1)):
            count = part.get(name, least)
            if isinstance(count, (int, float)) and not least <= count <= _MOST_LAYERS:
                raise CheckpointError(f"{file} has {name} {count}, and {least} to {_MOST_LAYERS} are read: correct it")
    return config


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one line; a device out of memory is no fault of the checkpoint."""
    try:
        yield
    except (torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({first_line(error)})") from error
