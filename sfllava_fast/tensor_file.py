"""A safetensors file, written whole or not at all, and read as it was written or not at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, first_line
from .output_folder import written_whole

CHECKSUM = "checksum"


def save_tensors(what: str, path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write tensors by name, from any device. Raises InputError, which calls them `what`, where that cannot be done."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    try:
        with written_whole(path) as part:
            # Copies: tensors that share memory, as tied weights do, are not taken.
            copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(copies, part, metadata | {CHECKSUM: _checksum(copies, metadata)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {what} to {path}: {first_line(error)}") from error
    return path


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the metadata with them, CHECKSUM among it if the file has one.

    Raises ValueError where the file cannot be read, is no safetensors file, or has a checksum that is not its own.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # of the file system, safetensors, or torch for an unknown dtype
        raise ValueError(first_line(error)) from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata):
        raise ValueError("its checksum does not match its content: the file is damaged, take a copy or make it again")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of everything in a file but itself, against damage; it is faster than a longer sum."""
    shapes = [[name, str(tensor.dtype), *tensor.shape] for name, tensor in sorted(tensors.items())]
    crc = zlib.crc32(json.dumps([shapes, sorted({**metadata, CHECKSUM: ""}.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # a buffer, in types from Python 3.12 on
        crc = zlib.crc32(data, crc)
    return f"{crc:08x}"
