"""Compiles a kernel once for each kind of call, and launches it without examining its arguments again."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfllava_fast.ops.backends.registry import refuse_to_be_captured


def device_of(tensor: Tensor) -> torch.cuda.device:
    """A context in which the tensor's device is the current one."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def is_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor begins at a multiple of 16 bytes."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def vector_of(aligned: bool, item_size: int, steps: Sequence[int]) -> int:
    """The elements of 16 bytes if every address that a kernel forms is a multiple of 16 bytes, else 1.

    Args:
        aligned: whether the tensors begin at such addresses.
        item_size: bytes of an element, the smallest of all tensors.
        steps: strides and widths in elements.
    """
    vector = 16 // item_size
    return vector if aligned and not any(step % vector for step in steps) else 1


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    constants: tuple,
    **options: Any,
) -> None:
    """Launches `programs` programs, if any, on the current device. A tensor that is None is never read."""
    if not programs:
        return
    first = next(tensor for tensor in tensors if tensor is not None)
    given = [first if tensor is None else tensor for tensor in tensors]
    device = first.device.index
    start = prepare(kernel, programs, tuple(tensor.dtype for tensor in given), constants, device, **options)
    run(start, device, (*(given if device is None else [x.data_ptr() for x in given]), *numbers, *constants))


def prepare(
    kernel: Any, programs: int, dtypes: tuple[torch.dtype, ...], constants: tuple, device: int | None, **options: Any
) -> Callable:
    """What `run` starts. device: the current CUDA device; None for the interpreter."""
    if device is None:
        return kernel[(programs,)]
    # Not kernel[...], which would examine every argument of every call again.
    return compile_kernel(kernel, dtypes, constants, device, **options)[(programs, 1, 1)]


def run(start: Callable, device: int | None, arguments: Sequence[Any]) -> None:
    """Starts what `prepare` returned, with addresses in place of tensors on a CUDA device."""
    if device is None:
        start(*arguments)
    else:
        start(*arguments, stream=torch._C._cuda_getCurrentRawStream(device))


@lru_cache(maxsize=256)
def compile_kernel(kernel: Any, dtypes: tuple[torch.dtype, ...], constants: tuple, device: int, **options: Any) -> Any:
    """The kernel for tensors of these dtypes, on a device, which must be the current one."""
    if torch.cuda.is_available():
        refuse_to_be_captured("triton", f"cuda:{device}")
    numbers = len(kernel.arg_names) - len(dtypes) - len(constants)
    options.setdefault("enable_fp_fusion", True)  # Triton 3.9 warns if it is left out, and will turn it off
    return kernel.warmup(*dtypes, *[0] * numbers, *constants, grid=(1,), **options)
