"""Faults of Triton's interpreter, which no kernel can help, repaired for a module of tests that imports the fixture."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True, scope="module")
def repaired_interpreter():
    """It holds scalars in arrays of one element, which NumPy >= 2.4 does not take for an index. Between float32 and
    bfloat16 it drops bits instead of rounding, and loses denormals; processors, like torch, do neither. And it
    multiplies the bits of bfloat16 matrices as integers. What a comparison gives is of its operands' type by name, so
    that a scalar one joined to a vector of them is a mask of numbers, which Triton 3.9 does not take.
    """
    patch = pytest.MonkeyPatch()
    patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float
    create_dot, binary_op = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.binary_op

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def converted(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert_float(data, source, target, rounding)

    def binary(self, lhs, rhs, operation):
        result = binary_op(self, lhs, rhs, operation)
        return interpreter.TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, wide(a), wide(b), *rest)

    patch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    patch.setattr(interpreter, "_convert_float", converted)
    patch.setattr(interpreter.InterpreterBuilder, "binary_op", binary)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    yield
    patch.undo()
