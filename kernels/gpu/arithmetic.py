"""Arithmetic that rounds as IEEE 754 says, for what decides an index, a level or a pixel.

Triton lowers `/` of float32 to an approximation, and may fuse a product and a sum: kernels where a rounding decides are
launched with `enable_fp_fusion=False` and use these. Its interpreter rounds correctly either way, so that only the
machine code shows the difference; a test reads it.
"""

import triton
import triton.language as tl

__all__ = ["divide", "is_finite"]


@triton.jit
def divide(a, b):
    """a / b of float32 or float64 tensors, rounded once."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def is_finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")
