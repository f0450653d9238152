"""COCO's run lengths of pasted masks in Triton, in two launches and with no dense mask in between.

A run ends where pixel p = x * height + y differs from p - 1. The visible part of a box is dealt out to a fixed number
of programs, so that neither the grid nor the scratch memory depends on the pictures' sizes, which may be known to the
device alone: blocks of `_LANES` columns, each cut into pieces of rows while there are programs left. A lane walks down
its column, `_ROWS` pixels at a time as bits of a word, whose changes are `word ^ (word << 1 | the bit above)`.
The first launch counts the changes of every lane and notes the place of the last; in the second each lane sums up what
lies before it, which tells it the number and the start of its first run, walks again, and writes its runs.

Where the visible part is as high as the picture, a column continues the one before: its first pixel is compared with
the last one there, and behind the last column comes one of zeros. Elsewhere behind the last row comes one of zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from ..paste_rule import PasteRule
from .pasting import box_region, cells_beside, is_inside, paste_arguments

__all__ = ["masks_to_rle"]

# Chosen by counting instructions; no others were tried on a GPU. A program is one warp, whose threads have two columns
# over which the division of a row is spread, and never wait for another warp.
_PROGRAMS = 64  # for each mask
_LANES = 64
_ROWS = 4  # at a time, at most 32
_PIECE = 64  # rows for which a further program pays
_ZEROS = 1024
_WARPS = 1


@triton.jit
def _picture_size(sizes_ptr, n, height, width):
    """Height and width of picture n, int32, and whether it is one; 0 and 0 without pixels, or for 2^31 of them."""
    if sizes_ptr is not None:
        height = tl.load(sizes_ptr + 2 * n).to(tl.int64)
        width = tl.load(sizes_ptr + 2 * n + 1).to(tl.int64)
    limit = tl.full((), 1 << 31, tl.int64)
    pixels = tl.minimum(height, limit) * tl.minimum(width, limit)
    legal = (height >= 0) & (width >= 0) & (pixels < limit)
    some = legal & (pixels > 0)
    return tl.where(some, height, 0).to(tl.int32), tl.where(some, width, 0).to(tl.int32), legal


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _before(lanes_ptr, programs_ptr, block, piece, pieces, PROGRAMS: tl.constexpr, LANES: tl.constexpr):
    """How many changes come before those of each lane of a program, and where the last of them is (0 without one)."""
    program = tl.arange(0, PROGRAMS)
    earlier = program < block * pieces
    count = tl.sum(tl.load(programs_ptr + program, mask=earlier, other=0))
    place = tl.max(tl.load(programs_ptr + PROGRAMS + program, mask=earlier, other=0))
    lane = tl.arange(0, LANES)
    lanes_ptr += block * pieces * (2 * LANES)
    in_column = tl.zeros((LANES,), tl.int32)
    above = tl.zeros((LANES,), tl.int32)
    last_above = tl.zeros((LANES,), tl.int32)
    last_left = tl.zeros((LANES,), tl.int32)
    for other in range(pieces):
        changes = tl.load(lanes_ptr + lane)
        in_column += changes
        above += tl.where(other < piece, changes, 0)
        last_above = tl.maximum(last_above, tl.where(other < piece, tl.load(lanes_ptr + LANES + lane), 0))
        last_left = tl.maximum(last_left, tl.load(lanes_ptr + LANES + lane - 1, mask=lane > 0, other=0))
        lanes_ptr += 2 * LANES
    last_left = tl.associative_scan(last_left, 0, _larger)
    return (
        count + tl.cumsum(in_column) - in_column + above,
        tl.maximum(place, tl.maximum(last_left, last_above)),
    )


@triton.jit(do_not_specialize=["masks", "height", "width", "capacity"])
def _runs_kernel(
    runs_ptr,
    lengths_ptr,
    lanes_ptr,
    programs_ptr,
    masks_ptr,
    boxes_ptr,
    sizes_ptr,
    masks,
    height,
    width,
    capacity,
    threshold: tl.float64,
    M: tl.constexpr,
    PADDING: tl.constexpr,
    INTEGER_BOXES: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    REAL: tl.constexpr,
    WRITE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    ZEROS: tl.constexpr,
):
    program = tl.program_id(0) // masks  # the slower index: the programs that have nothing to do come last
    n = (tl.program_id(0) % masks).to(tl.int64)
    height, width, legal = _picture_size(sizes_ptr, n, height, width)
    y, high, top, bottom, x, wide, left, right = box_region(
        boxes_ptr, n, height, width, M, PADDING, INTEGER_BOXES, REAL
    )
    joined = (top == 0) & (bottom == height)
    end_row = tl.where(joined, height, bottom + 1)
    end_column = tl.where(top < bottom, tl.minimum(right + 1, width), left)

    columns = tl.cdiv(end_column - left, PROGRAMS * LANES)  # of a lane
    lanes = tl.cdiv(end_column - left, tl.maximum(columns, 1))
    blocks = tl.cdiv(lanes, LANES)
    pieces = tl.maximum(tl.minimum(PROGRAMS // tl.maximum(blocks, 1), tl.cdiv(end_row - top, PIECE)), 1)
    rows = tl.cdiv(tl.cdiv(end_row - top, pieces), ROWS) * ROWS  # of a piece

    lanes_ptr += n * (PROGRAMS * 2 * LANES)
    programs_ptr += n * (PROGRAMS * 2)
    runs_ptr += n * capacity
    mask_ptr = masks_ptr + n * (M * M)
    threshold = tl.full((), threshold, REAL)

    if WRITE:
        if program == PROGRAMS - 1:
            other = tl.arange(0, PROGRAMS)
            used = other < blocks * pieces
            total = tl.sum(tl.load(programs_ptr + other, mask=used, other=0))
            place = tl.max(tl.load(programs_ptr + PROGRAMS + other, mask=used, other=0))
            length = tl.where(legal, total + 1, 0)
            tl.store(lengths_ptr + n, length)
            tl.store(runs_ptr + total, height * width - place, mask=legal & (total < capacity))
            for start in range(length, capacity, ZEROS):
                padding = start + tl.arange(0, ZEROS)
                tl.store(runs_ptr + padding, 0, mask=padding < capacity)

    if program < blocks * pieces:
        block = program // pieces
        piece = program % pieces
        first_row = top + piece * rows
        lane = block * LANES + tl.arange(0, LANES)
        if WRITE:
            count, place = _before(lanes_ptr, programs_ptr, block, piece, pieces, PROGRAMS, LANES)
        else:
            count = tl.zeros((LANES,), tl.int32)
            place = tl.zeros((LANES,), tl.int32)
        for step in range(columns):
            column = left + lane * columns + step
            live = (lane < lanes) & (column < end_column)
            cell, before, behind = cells_beside(column, x, wide, M, PADDING)  # [LANES]
            last = tl.zeros((LANES,), tl.uint32)
            if joined | (piece > 0):
                # The pixel before the first one: above it, or at the foot of the column to the left.
                last_row, above, below = cells_beside(tl.where(piece > 0, first_row, height) - 1, y, high, M, PADDING)
                last_column = tl.where(piece > 0, column, column - 1)
                last_cell, last_before, last_behind = cells_beside(last_column, x, wide, M, PADDING)
                inside = is_inside(
                    mask_ptr, last_row, above, below, last_cell, last_before, last_behind, threshold, M, INCLUSIVE
                )
                last = (inside & (last_column >= left) & (last_column < right)).to(tl.uint32)
            for start in range(first_row, tl.minimum(first_row + rows, end_row), ROWS):
                bit = tl.arange(0, ROWS)
                row, above, below = cells_beside(start + bit, y, high, M, PADDING)  # [ROWS]
                inside = is_inside(
                    mask_ptr,
                    row[:, None],
                    above[:, None],
                    below[:, None],
                    cell[None, :],
                    before[None, :],
                    behind[None, :],
                    threshold,
                    M,
                    INCLUSIVE,
                )
                inside = inside & (start + bit < bottom)[:, None] & (column < right)[None, :]
                word = tl.sum(inside.to(tl.uint32) << bit.to(tl.uint32)[:, None], 0)  # [LANES]
                changes = tl.where(live, (word ^ (word << 1 | last)) & ((1 << ROWS) - 1), 0)
                last = word >> (ROWS - 1)
                while tl.max(changes) > 0:  # few columns change more than once in so few rows
                    lowest = changes & (0 - changes)
                    changes ^= lowest
                    exponent = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                    change = column * height + start + exponent
                    found = (lowest > 0) & (start + exponent < end_row) & (change < height * width)
                    if WRITE:
                        tl.store(runs_ptr + count, change - place, mask=found & (count < capacity))
                    count += found.to(tl.int32)
                    place = tl.where(found, change, place)
        if not WRITE:
            lanes_ptr += program * (2 * LANES)
            tl.store(lanes_ptr + tl.arange(0, LANES), count)
            tl.store(lanes_ptr + LANES + tl.arange(0, LANES), place)
            tl.store(programs_ptr + program, tl.sum(count))
            tl.store(programs_ptr + PROGRAMS + program, tl.max(place))


def masks_to_rle(
    probabilities: Tensor, boxes: Tensor, sizes: Tensor | tuple[int, int], *, rule: PasteRule, capacity: int
) -> tuple[Tensor, Tensor]:
    """The body of `trimask::masks_to_rle`; a size that no picture has gives no run at all."""
    masks = probabilities.shape[0]
    device = probabilities.device
    runs = torch.empty((masks, capacity), dtype=torch.int32, device=device)
    lengths = torch.empty((masks,), dtype=torch.int32, device=device)
    lanes = torch.empty((masks, _PROGRAMS, 2, _LANES), dtype=torch.int32, device=device)  # changes, place of the last
    programs = torch.empty((masks, 2, _PROGRAMS), dtype=torch.int32, device=device)  # the same of all lanes
    if isinstance(sizes, Tensor):
        sizes_ptr, height, width = sizes.contiguous(), 0, 0
    else:
        sizes_ptr, (height, width) = None, sizes
    arguments = paste_arguments(probabilities, boxes, rule)
    if masks:
        with current_device(device):
            for write in (False, True):
                _runs_kernel[(masks * _PROGRAMS,)](
                    runs_ptr=runs,
                    lengths_ptr=lengths,
                    lanes_ptr=lanes,
                    programs_ptr=programs,
                    sizes_ptr=sizes_ptr,
                    masks=masks,
                    height=height,
                    width=width,
                    capacity=capacity,
                    **arguments,
                    WRITE=write,
                    PROGRAMS=_PROGRAMS,
                    LANES=_LANES,
                    ROWS=max(_ROWS // 4, 1) if probabilities.dtype == torch.float64 else _ROWS,  # more would spill
                    PIECE=_PIECE,
                    ZEROS=_ZEROS,
                    num_warps=_WARPS,
                )
    return runs, lengths
