"""Preprocessing in Triton: uint8 pictures -> a resized, normalised, padded batch, channels last.

Without antialiasing a picture takes one launch: each output reads its four neighbours. With it, three: the weights of
both axes, then a pass across the picture into a scratch of its own height, then a pass down it into the batch. The
weights follow Pillow's source (`Resample.c`). For output i of an axis, with `scale = in / out` and
`wide = max(scale, 1)`,

    centre = (i + .5) * scale;  first = max(int(centre - wide + .5), 0);  last = min(int(centre + wide + .5), in)
    weight[p] = max(1 - |(p - centre + .5) / wide|, 0) for p in first..last-1, divided by their sum

in float64, each operation rounded once and the sum taken in order, so that `int(weight * 2^22 + .5)` is Pillow's own
number. Nothing is uploaded. A pass is then 32-bit integers: `(2^21 + sum of level * weight) >> 22`, cut at 255.
OpenCV's arithmetic stands at `trimask.kernels.cpu.opencv`.

A row of the batch is a run of `3 * width` elements, x and channel in turn. Neighbouring lanes take neighbouring
elements, one each: what they read lies together, and their stores fill lines. The last pass writes every element of
its picture's part of the batch once, the padding too.

Contract and formulas stand at `trimask.kernels.preprocess`.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from .arithmetic import divide
from .sizes import cdiv

__all__ = ["preprocess"]

# Tiles, by reasoning; no others were tried on a GPU. Eight elements a thread keep enough bytes in flight, and the
# compiler sees that the rows of a tile share the places of their columns.
_ROWS = 4
_COLUMNS = 256
_WEIGHTS = 128  # outputs of an axis whose weights a program makes
_WARPS = 4

# Every picture runs the same machine code. That none of these is known to be aligned also keeps a thread's elements
# apart: the compiler would else give it all that it can store at once, and the lanes of a load would lie far apart.
_POINTERS = ("out_ptr", "picture_ptr", "first_ptr", "weights_ptr")
_STRIDES = ("stride_y", "stride_x", "stride_c")


@triton.jit
def _triangle(p, centre, inverse):
    """Height at pixels `p` of the triangle around `centre`; float64, in Pillow's order of operations."""
    return tl.maximum(1.0 - tl.abs((p.to(tl.float64) - centre + 0.5) * inverse), 0.0)


@triton.jit(do_not_specialize=[*_POINTERS, *("width_in", "width", "taps_x", "height_in", "height", "taps_y")])
def _weights_kernel(
    first_ptr,
    weights_ptr,
    width_in,
    width,
    scale_x: tl.float64,
    taps_x,
    height_in,
    height,
    scale_y: tl.float64,
    taps_y,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    scale = tl.full((BLOCK,), scale_x, tl.float64)
    extent, size, taps = width_in, width, taps_x
    if block >= tl.cdiv(width, BLOCK):
        block -= tl.cdiv(width, BLOCK)
        first_ptr += width
        weights_ptr += width * taps_x
        scale = tl.full((BLOCK,), scale_y, tl.float64)
        extent, size, taps = height_in, height, taps_y

    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    wide = tl.maximum(scale, 1.0)
    inverse = 1.0 / wide
    centre = (i.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - wide + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + wide + 0.5).to(tl.int32), extent)
    total = tl.zeros((BLOCK,), tl.float64)
    for t in range(taps):
        total += tl.where(first + t < last, _triangle(first + t, centre, inverse), 0.0)
    tl.store(first_ptr + i, first, mask=inside)
    total = tl.where(inside, total, 1.0)
    for t in range(taps):
        weight = tl.where(first + t < last, _triangle(first + t, centre, inverse), 0.0) / total
        if weights_ptr.dtype.element_ty == tl.int32:
            weight = weight * 4194304.0 + 0.5
        tl.store(weights_ptr + t * size + i, weight.to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, elements of a row, and their columns and channels, of a program's tile of `[height, width, 3]`.

    The tile is laid out as a vector, so that every version of the compiler gives neighbouring elements to neighbouring
    lanes.
    """
    blocks = tl.cdiv(width * 3, COLUMNS)
    place = tl.arange(0, ROWS * COLUMNS)
    y = tl.program_id(0) // blocks * ROWS + place // COLUMNS
    element = tl.program_id(0) % blocks * COLUMNS + place % COLUMNS
    return y, element, element // 3, element % 3


@triton.jit
def _weighted(pixel_ptr, stride, first, extent, weights_ptr, output, size, taps, inside):
    """Weighted sums of `taps` levels along an axis: whole levels, int32, if the weights are integers.

    Args:
        pixel_ptr: Where pixel `first` of the axis lies, for each element.
        extent: Pixels of the axis.
        output: Which of `size` outputs of the axis an element belongs to.
    """
    if weights_ptr.dtype.element_ty == tl.int32:
        total = tl.full(inside.shape, 2097152, tl.int32)
    else:
        total = tl.zeros(inside.shape, tl.float32)
    for t in range(taps):
        weight = tl.load(weights_ptr + t * size + output, mask=output < size, other=0)
        level = tl.load(pixel_ptr, mask=inside & (first + t < extent), other=0)
        if weights_ptr.dtype.element_ty == tl.int32:
            total += level.to(tl.int32) * weight
        else:
            total = tl.fma(level.to(tl.float32), weight, total)
        pixel_ptr += stride
    if weights_ptr.dtype.element_ty == tl.int32:
        total = tl.minimum(total >> 22, 255)
    return total


@triton.jit
def _write(out_ptr, level, y, element, inside, padded_height, padded_width, means, stds, NORMALIZE: tl.constexpr):
    """Normalise, and store in row y of the batch; zero beyond the picture."""
    if NORMALIZE:
        c = element % 3
        mean = tl.where(c == 0, means[0], tl.where(c == 1, means[1], means[2]))
        level = divide(level - mean, tl.where(c == 0, stds[0], tl.where(c == 1, stds[1], stds[2])))
    level = tl.where(inside, level, 0.0).to(out_ptr.dtype.element_ty)
    length = padded_width * 3
    tl.store(out_ptr + y.to(tl.int64) * length + element, level, mask=(element < length) & (y < padded_height))


@triton.jit(do_not_specialize=[*_POINTERS, *_STRIDES, *("height", "width_in", "width", "taps")])
def _across_kernel(
    out_ptr,
    picture_ptr,
    first_ptr,
    weights_ptr,
    height,
    width_in,
    width,
    taps,
    stride_y,
    stride_x,
    stride_c,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y, element, x, c = _tile(width, ROWS, COLUMNS)
    inside = (x < width) & (y < height)
    first = tl.load(first_ptr + x, mask=x < width, other=0)
    pixel_ptr = picture_ptr + y.to(tl.int64) * stride_y + first.to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    level = _weighted(pixel_ptr, stride_x, first, width_in, weights_ptr, x, width, taps, inside)
    tl.store(out_ptr + y.to(tl.int64) * (width * 3) + element, level.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *_POINTERS,
        *_STRIDES,
        *("height_in", "height", "width", "padded_height", "padded_width", "taps"),
    ]
)
def _down_kernel(
    out_ptr,
    picture_ptr,
    first_ptr,
    weights_ptr,
    height_in,
    height,
    width,
    padded_height,
    padded_width,
    taps,
    stride_y,
    stride_x,
    stride_c,
    means,
    stds,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y, element, x, c = _tile(padded_width, ROWS, COLUMNS)
    inside = (x < width) & (y < height)
    first = tl.load(first_ptr + y, mask=y < height, other=0)
    pixel_ptr = picture_ptr + first.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    level = _weighted(pixel_ptr, stride_y, first, height_in, weights_ptr, y, height, taps, inside).to(tl.float32)
    _write(out_ptr, level, y, element, inside, padded_height, padded_width, means, stds, NORMALIZE)


@triton.jit
def _opencv_taps(i, extent, scale, INSIDE: tl.constexpr):
    """`trimask.kernels.cpu.opencv._taps` of output `i`."""
    at = ((i.to(tl.float64) + 0.5) * scale - 0.5).to(tl.float32)
    if INSIDE:
        at = tl.minimum(tl.maximum(at, 0.0), extent - 1.0)
    low = tl.floor(at)
    second = at - low
    # At 2^23 a float has no fraction: to the nearest, halves to even.
    u = ((1.0 - second) * 2048.0 + 8388608.0 - 8388608.0).to(tl.int32)
    v = (second * 2048.0 + 8388608.0 - 8388608.0).to(tl.int32)
    first = low.to(tl.int32)
    last = extent - 1
    return tl.minimum(tl.maximum(first, 0), last), tl.minimum(tl.maximum(first + 1, 0), last), u, v


@triton.jit
def _opencv_across(row_ptr, left, right, u, v, inside):
    """Levels between two pixels of a row, in 128ths."""
    first = tl.load(row_ptr + left, mask=inside, other=0).to(tl.int32)
    second = tl.load(row_ptr + right, mask=inside, other=0).to(tl.int32)
    return (first * u + second * v) >> 4


@triton.jit(
    do_not_specialize=[
        *_POINTERS,
        *_STRIDES,
        *("height_in", "width_in", "height", "width", "padded_height", "padded_width"),
    ]
)
def _opencv_kernel(
    out_ptr,
    picture_ptr,
    height_in,
    width_in,
    height,
    width,
    padded_height,
    padded_width,
    scale_y: tl.float64,
    scale_x: tl.float64,
    stride_y,
    stride_x,
    stride_c,
    means,
    stds,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y, element, x, c = _tile(padded_width, ROWS, COLUMNS)
    inside = (x < width) & (y < height)
    top, bottom, above_weight, below_weight = _opencv_taps(y, height_in, scale_y, INSIDE=False)
    left, right, u, v = _opencv_taps(x, width_in, scale_x, INSIDE=True)
    left = left.to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    right = right.to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    above = _opencv_across(picture_ptr + top.to(tl.int64) * stride_y, left, right, u, v, inside)
    below = _opencv_across(picture_ptr + bottom.to(tl.int64) * stride_y, left, right, u, v, inside)
    level = ((above * above_weight) >> 16) + ((below * below_weight) >> 16)
    level = ((level + 2) >> 2).to(tl.float32)
    _write(out_ptr, level, y, element, inside, padded_height, padded_width, means, stds, NORMALIZE)


@triton.jit
def _neighbours(i, extent, scale):
    """The pixels on either side of output `i` of an axis, and how far it lies from the first to the second."""
    at = tl.maximum((i.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), extent - 1)
    return low, tl.minimum(low + 1, extent - 1), at - low.to(tl.float32)


@triton.jit(
    do_not_specialize=[
        *_POINTERS,
        *_STRIDES,
        *("height_in", "width_in", "height", "width", "padded_height", "padded_width"),
    ]
)
def _bilinear_kernel(
    out_ptr,
    picture_ptr,
    height_in,
    width_in,
    height,
    width,
    padded_height,
    padded_width,
    scale_y,
    scale_x,
    stride_y,
    stride_x,
    stride_c,
    means,
    stds,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y, element, x, c = _tile(padded_width, ROWS, COLUMNS)
    inside = (x < width) & (y < height)
    top, bottom, v = _neighbours(y, height_in, scale_y)
    left, right, u = _neighbours(x, width_in, scale_x)
    above_ptr = picture_ptr + top.to(tl.int64) * stride_y
    below_ptr = picture_ptr + bottom.to(tl.int64) * stride_y
    left = left.to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    right = right.to(tl.int64) * stride_x + c.to(tl.int64) * stride_c
    above = (1.0 - u) * tl.load(above_ptr + left, mask=inside, other=0).to(tl.float32)
    above += u * tl.load(above_ptr + right, mask=inside, other=0).to(tl.float32)
    below = (1.0 - u) * tl.load(below_ptr + left, mask=inside, other=0).to(tl.float32)
    below += u * tl.load(below_ptr + right, mask=inside, other=0).to(tl.float32)
    level = (1.0 - v) * above + v * below
    _write(out_ptr, level, y, element, inside, padded_height, padded_width, means, stds, NORMALIZE)


def preprocess(
    pictures: Sequence[Tensor],
    sizes: Sequence[int],
    height: int,
    width: int,
    antialias: bool,
    quantize: bool,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The body of `trimask::preprocess` on a GPU; arguments and result as in `trimask.kernels.cpu.resizing`.

    One or three launches for each picture.
    """
    batch = pictures[0].new_empty((len(pictures), height, width, 3), dtype=dtype)
    write = {
        "padded_height": height,
        "padded_width": width,
        "means": tuple(mean),
        "stds": tuple(std),
        "NORMALIZE": any(mean) or any(s != 1 for s in std),
    }
    with current_device(batch.device):
        for out, picture, h, w in zip(batch, pictures, sizes[::2], sizes[1::2], strict=True):
            resize = _resize_antialiased if antialias and picture.shape[:2] != (h, w) else _resize_bilinear
            resize(out, picture, (h, w), quantize, flip, write)
    return batch.permute(0, 3, 1, 2)


def _resize_bilinear(
    out: Tensor, picture: Tensor, size: tuple[int, int], quantize: bool, flip: bool, write: dict[str, object]
) -> None:
    height_in, width_in = picture.shape[:2]
    height, width = size
    if quantize:
        kernel, scale_y, scale_x = _opencv_kernel, 1 / (height / height_in), 1 / (width / width_in)
    else:
        kernel = _bilinear_kernel
        scale_y = float(np.float32(height_in) / np.float32(height))
        scale_x = float(np.float32(width_in) / np.float32(width))
    kernel[_grid(out)](
        out_ptr=out,
        **_pixels(picture, flip),
        height_in=height_in,
        width_in=width_in,
        height=height,
        width=width,
        scale_y=scale_y,
        scale_x=scale_x,
        **write,
        **_options(),
    )


def _resize_antialiased(
    out: Tensor, picture: Tensor, size: tuple[int, int], quantize: bool, flip: bool, write: dict[str, object]
) -> None:
    height_in, width_in = picture.shape[:2]
    height, width = size
    scale_y, scale_x = height_in / height, width_in / width
    taps_y, taps_x = (2 * ceil(max(scale, 1.0)) + 1 for scale in (scale_y, scale_x))
    first = torch.empty(width + height, dtype=torch.int32, device=out.device)
    weights = torch.empty(
        width * taps_x + height * taps_y, dtype=torch.int32 if quantize else torch.float32, device=out.device
    )
    _weights_kernel[(cdiv(width, _WEIGHTS) + cdiv(height, _WEIGHTS),)](
        first_ptr=first,
        weights_ptr=weights,
        width_in=width_in,
        width=width,
        scale_x=scale_x,
        taps_x=taps_x,
        height_in=height_in,
        height=height,
        scale_y=scale_y,
        taps_y=taps_y,
        BLOCK=_WEIGHTS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    if width != width_in:
        scratch = torch.empty(
            (height_in, width, 3), dtype=torch.uint8 if quantize else torch.float32, device=out.device
        )
        _across_kernel[_grid(scratch)](
            out_ptr=scratch,
            **_pixels(picture, flip),
            first_ptr=first,
            weights_ptr=weights,
            height=height_in,
            width_in=width_in,
            width=width,
            taps=taps_x,
            **_options(),
        )
        picture, flip = scratch, False
    _down_kernel[_grid(out)](
        out_ptr=out,
        **_pixels(picture, flip),
        first_ptr=first[width:],
        weights_ptr=weights[width * taps_x :],
        height_in=height_in,
        height=height,
        width=width,
        taps=taps_y,
        **write,
        **_options(),
    )


def _grid(out: Tensor) -> tuple[int]:
    """Programs for the tiles of `[height, width, 3]`."""
    return (cdiv(out.shape[0], _ROWS) * cdiv(out.shape[1] * 3, _COLUMNS),)


def _pixels(picture: Tensor, flip: bool) -> dict[str, object]:
    """Where a picture's first pixel lies, and the steps to the others; channels backwards with `flip`."""
    stride_y, stride_x, stride_c = picture.stride()
    start = picture[:, :, 2] if flip else picture
    return {
        "picture_ptr": start,
        "stride_y": stride_y,
        "stride_x": stride_x,
        "stride_c": -stride_c if flip else stride_c,
    }


def _options() -> dict[str, object]:
    return {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS, "enable_fp_fusion": False}
