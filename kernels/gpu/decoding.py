"""Proposals in Triton: gather, decode, clip and check in one launch for all levels and images.

A program takes a block of rows of one (image, level), and a lane takes a row: index -> delta and anchor -> box. The
memory it touches is a few hundred kilobytes, so its time is that of three loads in a row.

Contract and formula stand at `trimask.kernels.proposals`. Everything is rounded as the plain version rounds; the
exponential is taken in float64, because Triton's own in float32 is approximate.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from .arithmetic import is_finite
from .roi_geometry import select
from .sizes import cdiv

__all__ = ["proposals"]

# Rows of a program, one a lane of 4 warps: 1000 anchors on each of 5 levels make 40 programs, which take an H200
# 5 us, little more than a launch.
_BLOCK = 128
_WARPS = 4


@triton.jit
def _cut(x, limit):
    """x within 0..limit; NaN stays NaN, which `tl.minimum` would lose."""
    x = tl.where(x < 0, 0.0, x)
    return tl.where(x > limit, limit, x)


@triton.jit
def _decode(low, high, shift, log_scale, limit):
    """One axis of an anchor -> that of its box, cut to the picture."""
    size = high - low
    centre = shift * size + (low + 0.5 * size)
    half = 0.5 * (tl.exp(log_scale.to(tl.float64)).to(size.dtype) * size)
    return _cut(centre - half, limit), _cut(centre + half, limit)


@triton.jit(do_not_specialize=["capacity"])
def _proposals_kernel(
    score_ptrs,
    index_ptrs,
    delta_ptrs,
    cells_ptr,
    sizes_ptr,
    boxes_ptr,
    out_scores_ptr,
    chosen,
    anchors,
    widths,
    downs,
    rights,
    capacity,
    min_size: tl.float64,
    max_log_scale: tl.float64,
    SHAPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = boxes_ptr.dtype.element_ty
    blocks = tl.cdiv(capacity, BLOCK)
    segment = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = (segment // len(chosen)).to(tl.int64)
    level = segment % len(chosen)

    k, n = select(level, chosen) // 16, select(level, anchors) // 16
    width, right, down = select(level, widths) // 16, select(level, rights) // 16, select(level, downs) // 16
    picked = image * k + row
    score = tl.load(select(level, score_ptrs) + picked, mask=row < k, other=float("-inf")).to(
        out_scores_ptr.dtype.element_ty
    )
    index = tl.load(select(level, index_ptrs) + picked, mask=row < k, other=-1)
    there = (index >= 0) & (index < n)
    index = tl.where(there, index, 0).to(tl.int32)  # a level has fewer than 2^31 anchors
    delta_ptr = select(level, delta_ptrs) + (image * n + index) * 4
    dx = tl.load(delta_ptr, mask=there, other=0.0).to(dtype)
    dy = tl.load(delta_ptr + 1, mask=there, other=0.0).to(dtype)
    dw = tl.load(delta_ptr + 2, mask=there, other=0.0).to(dtype)
    dh = tl.load(delta_ptr + 3, mask=there, other=0.0).to(dtype)

    cell = index // SHAPES
    right = (cell % width * right).to(dtype)
    down = (cell // width * down).to(dtype)
    cells_ptr += (level * SHAPES + index % SHAPES) * 4
    x1 = tl.load(cells_ptr).to(dtype) + right
    y1 = tl.load(cells_ptr + 1).to(dtype) + down
    x2 = tl.load(cells_ptr + 2).to(dtype) + right
    y2 = tl.load(cells_ptr + 3).to(dtype) + down

    limit = tl.full((BLOCK,), max_log_scale, dtype)
    x1, x2 = _decode(x1, x2, dx, tl.where(dw > limit, limit, dw), tl.load(sizes_ptr + image * 2 + 1).to(dtype))
    y1, y2 = _decode(y1, y2, dy, tl.where(dh > limit, limit, dh), tl.load(sizes_ptr + image * 2).to(dtype))
    smallest = tl.full((BLOCK,), min_size, dtype)
    # What is cut to the picture is finite or NaN, and a NaN fails the comparisons.
    usable = (x2 - x1 >= smallest) & (y2 - y1 >= smallest) & ((x2 - x1) * (y2 - y1) > 0) & there & is_finite(score)

    out = segment.to(tl.int64) * capacity + row
    inside = row < capacity
    tl.store(out_scores_ptr + out, tl.where(usable, score, float("-inf")), mask=inside)
    box = tl.join(tl.join(x1, x2), tl.join(y1, y2)).reshape(BLOCK, 4)  # x1, y1, x2, y2
    tl.store(
        boxes_ptr + out[:, None] * 4 + tl.arange(0, 4)[None, :],
        tl.where(usable[:, None], box, 0.0),
        mask=inside[:, None],
    )


def proposals(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    deltas: Sequence[Tensor],
    cells: Tensor,
    widths: Sequence[int],
    strides: Sequence[int],
    image_sizes: Tensor,
    capacity: int,
    min_size: float,
    max_log_scale: float,
) -> tuple[Tensor, Tensor]:
    """The body of `trimask::proposals` on a GPU; arguments and result as in `trimask.kernels.cpu.decoding`."""
    segments = len(image_sizes) * len(scores)
    coordinates, ranks = (torch.promote_types(x[0].dtype, torch.float32) for x in (deltas, scores))
    boxes = cells.new_empty((segments, capacity, 4), dtype=coordinates)
    out_scores = cells.new_empty((segments, capacity), dtype=ranks)
    if not out_scores.numel():
        return boxes, out_scores
    with current_device(cells.device):
        _proposals_kernel[(segments * cdiv(capacity, _BLOCK),)](
            # The network's outputs and those of topk are contiguous already.
            score_ptrs=tuple(x.contiguous() for x in scores),
            index_ptrs=tuple(x.contiguous() for x in indices),
            delta_ptrs=tuple(x.contiguous() for x in deltas),
            cells_ptr=cells.contiguous(),
            sizes_ptr=image_sizes.contiguous(),
            boxes_ptr=boxes,
            out_scores_ptr=out_scores,
            # Times 16: Triton compiles anew where a number in a tuple becomes a multiple of 16, or 1.
            chosen=tuple(16 * x.shape[1] for x in indices),
            anchors=tuple(16 * x.shape[1] for x in deltas),
            widths=tuple(16 * width for width in widths),
            downs=tuple(16 * down for down in strides[::2]),
            rights=tuple(16 * right for right in strides[1::2]),
            capacity=capacity,
            min_size=min_size,
            max_log_scale=max_log_scale,
            SHAPES=cells.shape[1],
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return boxes, out_scores
