"""Logits into masks, and masks into pictures, in Triton: one launch each.

A pixel reads its mask bilinearly, from the cells k and k + 1 along each axis, with the weights `relu(1 - |u - k|)`;
`PasteRule` defines u. k is kept among the cells, so that the four reads of a pixel share one address and none needs a
bound: a cell that is not beside the pixel weighs nothing. What a row or a column shares is computed once for it. Each
operation is rounded once, in the order of `cpu.masks`.

`_paste_kernel` takes some rows of one picture and writes every byte of them once. Rows that no box meets are one
stretch of memory, cleared by 16 bytes a thread, wherever it begins; of the others, what lies beside the box is cleared
likewise, and the rest is sampled. So the work beyond the writing is proportional to the visible area of the boxes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from ..paste_rule import PasteRule
from .arithmetic import divide, is_finite
from .sizes import cdiv

__all__ = ["box_region", "cells_beside", "is_inside", "mask_probabilities", "paste_arguments", "paste_masks"]

# Chosen by counting instructions; no others were tried on a GPU. A thread has four rows of each of its columns, over
# which the division of a column is spread; taller tiles waste more on small boxes.
_ROWS, _COLUMNS = 16, 32
_PACKED_ROWS, _PACKED_BYTES = 32, 16
_CLEARED = 4096  # bytes at a time: two stores of 16 a thread
_PROBABILITIES = 1024
_WARPS = 4


@triton.jit
def _grow(low, high, M: tl.constexpr, PADDING: tl.constexpr, INTEGER_BOXES: tl.constexpr):
    """Where a padded mask begins along an axis, how far it reaches, and whether the box had such a side at all."""
    ordered = high > low
    if PADDING > 0:
        centre = (low + high) * 0.5
        half = (high - low) * 0.5 * ((M + 2 * PADDING) / M)
        low = centre - half
        high = centre + half
    if INTEGER_BOXES:
        low = tl.where(low < 0, tl.ceil(low), tl.floor(low))
        high = tl.where(high < 0, tl.ceil(high), tl.floor(high)) + 1
    extent = high - low
    return low, extent, ordered & (extent > 0) & (extent < float("inf"))


@triton.jit
def _cut(origin, extent, valid, pixels, M: tl.constexpr, PADDING: tl.constexpr):
    """The first pixel along an axis that can differ from zero, and the one behind the last."""
    cell = divide(extent, M + 2 * PADDING)
    first = tl.where(valid, tl.floor(origin + cell * (PADDING - 0.5) - 0.5), 0.0)
    last = tl.where(valid, tl.ceil(origin + cell * (PADDING + M + 0.5) + 0.5), 0.0)
    end = pixels.to(origin.dtype)
    first = tl.minimum(tl.maximum(first, 0.0), end).to(tl.int64)
    last = tl.minimum(tl.maximum(last, 0.0), end).to(tl.int64)
    first = tl.minimum(first, pixels)  # `end` was rounded
    return first.to(pixels.dtype), tl.maximum(first, tl.minimum(last, pixels)).to(pixels.dtype)


@triton.jit
def box_region(
    boxes_ptr, n, height, width, M: tl.constexpr, PADDING: tl.constexpr, INTEGER_BOXES: tl.constexpr, REAL: tl.constexpr
):
    """Where the padded mask n lies, and the pixels of its picture that can differ from zero.

    Args:
        height, width: Of the picture, integers.
        REAL: What coordinates are computed in, float32 or float64.

    Returns:
        y, height, top, bottom, x, width, left, right: the place and the extent of the mask in pixels, REAL, and the
        first row of pixels and the one behind the last, integers; then the same for columns.
    """
    box = boxes_ptr + n.to(tl.int64) * 4
    y, high, is_high = _grow(tl.load(box + 1).to(REAL), tl.load(box + 3).to(REAL), M, PADDING, INTEGER_BOXES)
    x, wide, is_wide = _grow(tl.load(box).to(REAL), tl.load(box + 2).to(REAL), M, PADDING, INTEGER_BOXES)
    top, bottom = _cut(y, high, is_high & is_wide, height, M, PADDING)
    left, right = _cut(x, wide, is_high & is_wide, width, M, PADDING)
    return y, high, top, bottom, x, wide, left, right


@triton.jit
def cells_beside(pixel, origin, extent, M: tl.constexpr, PADDING: tl.constexpr):
    """The cell k of each pixel along an axis, int32, and the weights of k and k + 1."""
    u = divide(pixel.to(origin.dtype) + 0.5 - origin, extent) * (M + 2 * PADDING) - (0.5 + PADDING)
    k = tl.minimum(tl.maximum(tl.floor(u), 0.0), M - 2.0 if M > 1 else 0.0)
    near = tl.maximum(1 - tl.abs(u - k), 0.0)
    far = tl.maximum(1 - tl.abs(u - (k + 1)), 0.0) if M > 1 else tl.zeros_like(u)
    return k.to(tl.int32), near, far


@triton.jit
def is_inside(mask_ptr, row, above, below, column, before, behind, threshold, M: tl.constexpr, INCLUSIVE: tl.constexpr):
    """Whether the pixels of some rows and columns, as `cells_beside` gives them, are part of a mask `[M, M]`."""
    cell = mask_ptr + row * M + column
    next_cell: tl.constexpr = 1 if M > 1 else 0
    upper = _probability(cell, above.dtype) * before + _probability(cell + next_cell, above.dtype) * behind
    cell += next_cell * M
    lower = _probability(cell, above.dtype) * before + _probability(cell + next_cell, above.dtype) * behind
    value = upper * above + lower * below
    return value >= threshold if INCLUSIVE else value > threshold


@triton.jit
def _probability(cell, REAL: tl.constexpr):
    value = tl.load(cell).to(REAL)
    return tl.where(is_finite(value), value, 0.0)


@triton.jit
def _clear(out_ptr, begin, end, BLOCK: tl.constexpr):
    """Zeros into the bytes from begin up to end of some stretches, int64 `[S]`, by 16 except at their ends."""
    first = (begin + 15) // 16 * 16
    last = end // 16 * 16
    edge = tl.arange(0, 16)[None, :]
    head = begin[:, None] + edge
    tail = last[:, None] + edge
    tl.store(out_ptr + head, 0, mask=head < tl.minimum(first, end)[:, None])
    tl.store(out_ptr + tail, 0, mask=(tail >= first[:, None]) & (tail < end[:, None]))
    for start in range(0, tl.max(last - first), BLOCK):
        byte = first[:, None] + (start + tl.arange(0, BLOCK))[None, :]
        tl.store(out_ptr + byte, 0, mask=byte < last[:, None])


@triton.jit(do_not_specialize=["height", "width"])
def _paste_kernel(
    out_ptr,
    masks_ptr,
    boxes_ptr,
    height,
    width,
    threshold: tl.float64,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    INTEGER_BOXES: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PACKED: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLEARED: tl.constexpr,
):
    blocks = tl.cdiv(height, ROWS)
    n = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    pixels_a_byte: tl.constexpr = 8 if PACKED else 1
    stride = tl.cdiv(width, pixels_a_byte)
    begin = (n.to(tl.int64) * height + start) * stride
    end = begin + tl.minimum(height - start, ROWS).to(tl.int64) * stride
    threshold = tl.full((), threshold, REAL)

    y, high, top, bottom, x, wide, left, right = box_region(
        boxes_ptr, n, height, width, M, PADDING, INTEGER_BOXES, REAL
    )
    if (top >= start + ROWS) | (bottom <= start) | (left >= right):
        whole = tl.zeros((1,), tl.int64)
        _clear(out_ptr, begin + whole, end + whole, CLEARED)
    else:
        rows = start + tl.arange(0, ROWS)
        seen = (rows >= top) & (rows < bottom)
        line = begin + tl.arange(0, ROWS).to(tl.int64) * stride  # where the rows begin
        next_line = tl.minimum(line + stride, end)
        line = tl.minimum(line, end)
        _clear(out_ptr, line, tl.where(seen, line + left // pixels_a_byte, next_line), CLEARED // ROWS)
        behind_box = tl.where(seen, line + tl.cdiv(right, pixels_a_byte), next_line)
        _clear(out_ptr, behind_box, next_line, CLEARED // ROWS)
        mask_ptr = masks_ptr + n.to(tl.int64) * (M * M)
        row, above, below = cells_beside(rows, y, high, M, PADDING)  # [ROWS]
        for at in range(left // pixels_a_byte, tl.cdiv(right, pixels_a_byte), COLUMNS):
            byte = at + tl.arange(0, COLUMNS)
            value = tl.zeros((ROWS, COLUMNS), tl.uint8)
            for bit in range(pixels_a_byte):
                columns = byte * pixels_a_byte + bit
                column, before, behind = cells_beside(columns, x, wide, M, PADDING)  # [COLUMNS]
                inside = is_inside(
                    mask_ptr,
                    row[:, None],
                    above[:, None],
                    below[:, None],
                    column[None, :],
                    before[None, :],
                    behind[None, :],
                    threshold,
                    M,
                    INCLUSIVE,
                )
                inside = inside & ((columns >= left) & (columns < right))[None, :]
                value |= (inside.to(tl.int32) << bit).to(tl.uint8)
            used = byte < tl.cdiv(right, pixels_a_byte)
            tl.store(out_ptr + line[:, None] + byte[None, :], value, mask=seen[:, None] & used[None, :])


@triton.jit(do_not_specialize=["classes"])
def _probabilities_kernel(
    out_ptr,
    logits_ptr,
    labels_ptr,
    classes,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    M: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (M * M + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + n).to(tl.int64) if labels_ptr is not None else n * 0
    known = (label >= 0) & (label < classes)
    place = n * stride_n + label * stride_c + (cell // M).to(tl.int64) * stride_h + (cell % M).to(tl.int64) * stride_w
    logit = tl.load(logits_ptr + place, mask=cell < tl.where(known, M * M, 0), other=0.0).to(REAL)
    one = tl.full((BLOCK,), 1, REAL)
    value = tl.where(known, divide(one, one + tl.exp(-logit)), 0.0)
    tl.store(out_ptr + n * (M * M) + cell, value, mask=cell < M * M)


def paste_arguments(probabilities: Tensor, boxes: Tensor, rule: PasteRule) -> dict[str, object]:
    """What the kernels need of masks `[N, m, m]`, boxes `[N, 4]` and a rule."""
    return {
        "masks_ptr": probabilities.contiguous(),
        "boxes_ptr": boxes.contiguous(),
        "threshold": rule.threshold,
        "M": probabilities.shape[1],
        "PADDING": rule.padding,
        "INTEGER_BOXES": rule.integer_boxes,
        "INCLUSIVE": rule.inclusive,
        "REAL": tl.float64 if probabilities.dtype == torch.float64 else tl.float32,
        "enable_fp_fusion": False,  # rounding decides pixels
    }


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], *, rule: PasteRule, packed: bool
) -> Tensor:
    """The body of `trimask::paste_masks`."""
    height, width = size
    shape = (probabilities.shape[0], height, -(-width // 8) if packed else width)
    out = torch.empty(shape, dtype=torch.uint8, device=probabilities.device)
    rows, columns = (_PACKED_ROWS, _PACKED_BYTES) if packed else (_ROWS, _COLUMNS)
    if out.numel():
        with current_device(out.device):
            _paste_kernel[(shape[0] * cdiv(height, rows),)](
                out_ptr=out,
                height=height,
                width=width,
                **paste_arguments(probabilities, boxes, rule),
                PACKED=packed,
                ROWS=rows,
                COLUMNS=columns,
                CLEARED=_CLEARED,
                num_warps=_WARPS,
            )
    return out if packed else out.view(torch.bool)


def mask_probabilities(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The body of `trimask::mask_probabilities`; labels that there are none of give zeros."""
    count, classes, cells, _ = logits.shape
    real = torch.promote_types(logits.dtype, torch.float32)
    out = torch.empty((count, cells, cells), dtype=real, device=logits.device)
    if out.numel():
        with current_device(out.device):
            _probabilities_kernel[(count * cdiv(cells * cells, _PROBABILITIES),)](
                out_ptr=out,
                logits_ptr=logits,
                labels_ptr=labels,
                classes=classes,
                stride_n=logits.stride(0),
                stride_c=logits.stride(1),
                stride_h=logits.stride(2),
                stride_w=logits.stride(3),
                M=cells,
                REAL=tl.float64 if real == torch.float64 else tl.float32,
                BLOCK=_PROBABILITIES,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return out
