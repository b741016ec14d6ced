"""A safetensors file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .errors import InputError, first_line


def save_tensors(what: str, path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write tensors by name, from any device. Raises InputError, which calls them `what`, where that cannot be done."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        # Copies: tensors that share memory, as tied weights do, are not taken.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, part, metadata)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {what} to {path}: {first_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return path
