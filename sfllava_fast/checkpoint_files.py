"""The files of a checkpoint: its directory, here or from the hub, and the JSON in it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, first_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]
_HUB_PICKLES = ["pytorch_model*.bin"]
_MOST_LAYERS = 1000


def locate(path_or_hub_id: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is downloaded, or taken from the local cache."""
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
    """config.json of a checkpoint; None where it has none.

    Raises CheckpointError for more layers than any model has: each takes memory before a single weight is compared.
    """
    config = read_json(folder / "config.json")
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else ():
            if "layers" in name and isinstance(value, int) and value > _MOST_LAYERS:
                raise CheckpointError(f"{folder / 'config.json'} has {name} {value}, above {_MOST_LAYERS}: correct it")
            parts.append(value)
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
