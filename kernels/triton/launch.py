"""Compiles a kernel once per kind of call, and launches it without examining its arguments again."""

from functools import lru_cache

import torch

from sfllava_fast.ops.backends.registry import refuse_to_be_captured


def refuse_to_compile_in_a_capture(device):
    """BackendError there: loading a kernel is nothing that a CUDA graph can hold."""
    if torch.cuda.is_available():
        refuse_to_be_captured("triton", f"cuda:{device}")


def device_of(tensor):
    """Makes the tensor's device the current one."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def vector_of(tensors, steps):
    """Elements in 16 bytes where every address that a kernel forms is a multiple of that; else 1.

    tensors: of one size of element. steps: strides and widths, in elements.
    """
    vector = 16 // tensors[0].element_size()
    aligned = not any(tensor.data_ptr() % 16 for tensor in tensors)
    return vector if aligned and not any(step % vector for step in steps) else 1


def launch(kernel, programs, tensors, numbers, constants, **options):
    """A tensor that is None is never read. No programs, no launch."""
    if not programs:
        return
    tensors = [tensors[0] if tensor is None else tensor for tensor in tensors]
    device = tensors[0].device.index
    if device is None:  # the interpreter
        kernel[(programs,)](*tensors, *numbers, *constants)
        return
    compiled = compile_kernel(kernel, tuple(tensor.dtype for tensor in tensors), constants, device, **options)
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled[(programs, 1, 1)](*[tensor.data_ptr() for tensor in tensors], *numbers, *constants, stream=stream)


@lru_cache(maxsize=256)
def compile_kernel(kernel, dtypes, constants, device, **options):
    """The kernel for tensors of these dtypes, on a device, which must be the current one."""
    refuse_to_compile_in_a_capture(device)
    numbers = len(kernel.arg_names) - len(dtypes) - len(constants)
    options.setdefault("enable_fp_fusion", True)  # Triton 3.9 warns where it is not said, and will turn it off
    return kernel.warmup(*dtypes, *[0] * numbers, *constants, grid=(1,), **options)
