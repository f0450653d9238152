"""The samples of bins, taken one by one: what the forward kernels of RoIAlign share."""

import triton
import triton.language as tl

from .arithmetic import divide
from .roi_geometry import sample, sample_range

__all__ = ["pool_samples"]


@triton.jit
def pool_samples(
    tile,
    wanted,
    valid,
    edge_y,
    edge_x,
    size_y,
    size_x,
    samples_y,
    samples_x,
    height,
    width,
    line,
    COLUMN: tl.constexpr,
    RATIO: tl.constexpr,
    REAL: tl.constexpr,
    MAX: tl.constexpr,
    DIM: tl.constexpr,
):
    """The average or the largest sample of each bin and channel, in REAL.

    Args:
        tile: Pointers to the first pixel of the image and channel; the channels lie along DIM.
        wanted: Which channels there are, with 1 bin.
        valid: Whether the bin's RoI is; [bins], as what follows.
        line, COLUMN: From a line to the next and from a column to the next, in values.
    """
    UNROLL: tl.constexpr = RATIO if RATIO < 3 else 1
    if RATIO > 0:
        steps_y = RATIO
        steps_x = RATIO
    else:
        first_y, count_y = sample_range(edge_y, size_y, samples_y, height)
        first_x, count_x = sample_range(edge_x, size_x, samples_x, width)
        count_y = tl.where(valid, count_y, 0)
        count_x = tl.where(valid, count_x, 0)
        steps_y = tl.max(count_y, 0)
        steps_x = tl.max(count_x, 0)
    result = tl.full(tile.shape, float("-inf") if MAX else 0.0, REAL)
    for i in tl.range(0, steps_y, loop_unroll_factor=UNROLL):
        here_y = valid
        step_y = i
        if RATIO == 0:
            here_y = i < count_y
            step_y = first_y + i
        top, bottom, above, below, inside_y = sample(edge_y, size_y, samples_y, step_y, height, RATIO)
        top = top * line
        bottom = bottom * line
        for j in tl.range(0, steps_x, loop_unroll_factor=UNROLL):
            here = here_y
            step_x = j
            if RATIO == 0:
                here = here_y & (j < count_x)
                step_x = first_x + j
            left, right, before, after, inside_x = sample(edge_x, size_x, samples_x, step_x, width, RATIO)
            left = left.to(line.dtype) * COLUMN
            right = right.to(line.dtype) * COLUMN
            mask = tl.expand_dims(here & inside_y & inside_x, DIM) & wanted
            value = tl.zeros(tile.shape, REAL) if MAX else result
            for corner in tl.static_range(4):
                offset = (bottom if corner // 2 else top) + (right if corner % 2 else left)
                weight = (below if corner // 2 else above) * (after if corner % 2 else before)
                pixel = tl.load(tile + tl.expand_dims(offset, DIM), mask=mask, other=0.0).to(REAL)
                value = tl.fma(tl.expand_dims(weight, DIM), pixel, value)
            if MAX:
                value = tl.where(tl.expand_dims(here, DIM), value, float("-inf"))
                result = tl.maximum(result, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                result = value
    if MAX:
        result = tl.where(tl.expand_dims(valid, DIM), result, 0.0)
    elif RATIO > 0:
        result *= 1.0 / (RATIO * RATIO)
    else:
        share = divide(tl.full(valid.shape, 1.0, REAL), samples_y * samples_x)
        result *= tl.expand_dims(share, DIM)
    return result
