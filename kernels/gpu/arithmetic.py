"""Arithmetic that rounds as IEEE 754 says, for what decides an index, a level or a pixel.

Triton lowers `/` and `tl.sqrt` of float32 to approximations, and may fuse a product and a sum: kernels where a rounding
decides are launched with `enable_fp_fusion=False` and use these. Its interpreter rounds correctly either way, so that
only the machine code shows the difference; a test reads it.
"""

import triton
import triton.language as tl

__all__ = ["divide", "is_finite", "sqrt"]


@triton.jit
def divide(a, b):
    """a / b of float32 or float64 tensors, rounded once."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def sqrt(a):
    """The square root of a float32 or float64 tensor, rounded once."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def is_finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")
