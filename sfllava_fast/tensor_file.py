"""Safetensors files with a checksum, written atomically."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, first_line
from .output_folder import written_whole

CHECKSUM = "checksum"


def save_tensors(what: str, path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file atomically.

    Args:
        what: Name of the content, for messages.
        path: The file.
        tensors: By name, on any device.
        metadata: Text by name, to which a checksum is added.

    Returns:
        The path.

    Raises:
        InputError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    try:
        with written_whole(path) as part:
            # Copies, since safetensors refuses tensors that share memory, as tied weights do.
            copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(copies, part, metadata | {CHECKSUM: _checksum(copies, metadata)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {what} to {path}: {first_line(error)}") from error
    return path


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Returns:
        Tensors by name, on the CPU, and the metadata, which includes CHECKSUM if the file has one.

    Raises:
        ValueError: If the file cannot be read, is not a safetensors file, or has a wrong checksum.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = dict(file.metadata() or {}), list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # from the file system, safetensors, or torch for an unknown dtype
        raise ValueError(first_line(error)) from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata):
        raise ValueError("its checksum does not match its content: it is damaged, use a copy or make it again")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of a file's content without the checksum. It detects damage, not manipulation."""
    shapes = [[name, str(tensor.dtype), *tensor.shape] for name, tensor in sorted(tensors.items())]
    checksum = zlib.crc32(json.dumps([shapes, sorted({**metadata, CHECKSUM: ""}.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
