"""Where the samples of a RoI lie: what the kernels that pool RoIs, and their gradients, share.

The device functions work element by element, on scalars and on tensors of any shape, and round as plain torch does:
each operation in the same order, none fused, so that the samples at the very border of a picture are the same ones.
Kernels that call them are launched with `enable_fp_fusion=False`. A kernel takes the RoIs and the pyramid as keyword
arguments, which `roi_arguments` and `pyramid_arguments` make:

    boxes_ptr, images_ptr, counts_ptr, image_count, per_image, stride_box, stride_side, stride_images
    heights, widths, SCALES, THRESHOLDS, BINS_Y, BINS_X, RATIO, ALIGNED, REAL

and declares `@triton.jit(do_not_specialize=ROI_ARGUMENTS)`. In the kernel, for RoIs `k`:

    x1, y1, x2, y2, image, there = load_roi(k, live, boxes_ptr, ..., stride_images, REAL)
    level = level_of(x1, y1, x2, y2, THRESHOLDS)
    height, width = select(level, heights) // 16, select(level, widths) // 16
    scale = select_scale(level, SCALES, REAL)
    start_y, start_x, size_y, size_x, samples_y, samples_x, valid = place(...)
    valid &= there

and for one axis of bin i: `edge = start + i * size`, then `sample(edge, size, samples, step, extent, RATIO)` for each
step in 0..RATIO-1, or for the `count` steps from `first` on, of `sample_range`, where sampling is adaptive.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import Sampling
from .arithmetic import divide, is_finite

__all__ = [
    "ROI_ARGUMENTS",
    "level_of",
    "load_roi",
    "place",
    "pyramid_arguments",
    "roi_arguments",
    "sample",
    "sample_range",
    "select",
    "select_scale",
]

ROI_ARGUMENTS = (
    "boxes_ptr",
    "images_ptr",
    "counts_ptr",
    "image_count",
    "per_image",
    "stride_box",
    "stride_side",
    "stride_images",
)


def roi_arguments(boxes: Tensor, images: Tensor | None, counts: Tensor | None, image_count: int) -> dict[str, object]:
    """What `load_roi` needs, as keyword arguments of a kernel.

    Args:
        boxes: `[K, 4]` xyxy with `images`, else `[B, R, 4]`; any floating dtype, any strides.
        images: `[K]`, which image each box lies in; any dtype and stride. Or none: box (b, r) lies in image b.
        counts: `[B]` integers: boxes from r = counts[b] on are padding. Or none, then all are boxes.
        image_count: N, the images that there are.
    """
    flat = boxes.flatten(0, -2)
    return {
        "boxes_ptr": flat,
        "images_ptr": images,
        "counts_ptr": None if counts is None else counts.contiguous(),
        "image_count": image_count,
        "per_image": boxes.shape[-2],
        "stride_box": flat.stride(0),
        "stride_side": flat.stride(1),
        "stride_images": 0 if images is None else images.stride(0),
    }


def pyramid_arguments(shapes: Sequence[Sequence[int]], dtype: torch.dtype, sampling: Sampling) -> dict[str, object]:
    """What the rest of this file needs, as keyword arguments of a kernel.

    Triton compiles anew where a number in a tuple becomes a multiple of 16, or 1; sizes are passed times 16, so that
    pictures of all sizes share their machine code.

    Args:
        shapes: (N, C, H_l, W_l) of each level.
        dtype: Of the features. Coordinates are float64 where it is, else float32.
        sampling: Where the samples lie.
    """
    return {
        "heights": tuple(16 * shape[2] for shape in shapes),
        "widths": tuple(16 * shape[3] for shape in shapes),
        "SCALES": tuple(map(float, sampling.scales)),
        "THRESHOLDS": tuple(map(_least_area, sampling.thresholds[1:])),
        "BINS_Y": sampling.output_size[0],
        "BINS_X": sampling.output_size[1],
        "RATIO": max(sampling.sampling_ratio, 0),
        "ALIGNED": sampling.aligned,
        "REAL": tl.float64 if dtype == torch.float64 else tl.float32,
    }


@cache
def _least_area(side: float) -> float:
    """The smallest float32 whose square root, rounded to float32, is at least `side`, itself rounded to float32.

    That root is as large as the middle between `side` and the float32 below, or larger; it is not that middle, whose
    square takes more bits than a float32 has, but no more than a float64.
    """
    rounded = np.float32(side)
    middle = (float(rounded) + float(np.nextafter(rounded, np.float32(-np.inf)))) / 2
    if middle < 0:
        return -np.inf
    with np.errstate(over="ignore"):
        area = np.float32(middle * middle)
        return float(area if float(area) >= middle * middle else np.nextafter(area, np.float32(np.inf)))


@triton.jit
def load_roi(
    k,
    live,
    boxes_ptr,
    images_ptr,
    counts_ptr,
    image_count,
    per_image,
    stride_box,
    stride_side,
    stride_images,
    REAL: tl.constexpr,
):
    """The corners of RoI `k`, which image it lies in, and whether it is there.

    Args:
        k: Number of the RoI, int32 or int64, >= 0.
        live: Whether there is such a number; nothing is read where not.

    Returns:
        x1, y1, x2, y2 in picture pixels, REAL or, where the boxes are, float64;
        image, int64, in 0..image_count-1 whatever was read;
        there: False for padding, and for an image out of range or NaN. The corners of padding are 0.
    """
    there = live
    if images_ptr is None:
        image = (k // per_image).to(tl.int32)
        if counts_ptr is not None:
            there = live & (k % per_image < tl.load(counts_ptr + image, mask=live, other=0))
        image = tl.where(there, image, 0).to(tl.int64)
    else:
        number = tl.load(images_ptr + k.to(tl.int64) * stride_images, mask=live, other=-1)
        if number.dtype.is_floating() and number.dtype != tl.float64:
            number = number.to(tl.float32)
        there = live & (number >= 0) & (number < image_count)
        image = tl.where(there, number, 0).to(tl.int32).to(tl.int64)
    box_ptr = boxes_ptr + k.to(tl.int64) * stride_box
    x1 = _as_real(tl.load(box_ptr, mask=there, other=0.0), REAL)
    y1 = _as_real(tl.load(box_ptr + stride_side, mask=there, other=0.0), REAL)
    x2 = _as_real(tl.load(box_ptr + 2 * stride_side, mask=there, other=0.0), REAL)
    y2 = _as_real(tl.load(box_ptr + 3 * stride_side, mask=there, other=0.0), REAL)
    return x1, y1, x2, y2, image, there


@triton.jit
def _as_real(x, REAL: tl.constexpr):
    """Boxes of float64 are narrowed by `level_of` and `place`, each for itself."""
    if x.dtype != tl.float64:
        x = x.to(REAL)
    return x


@triton.jit
def level_of(x1, y1, x2, y2, THRESHOLDS: tl.constexpr):
    """Which level a box is pooled from, int32.

    Args:
        THRESHOLDS: Of the levels after the first, rising: the float32 area of a box from which on they are taken.
    """
    area = (x2.to(tl.float32) - x1.to(tl.float32)) * (y2.to(tl.float32) - y1.to(tl.float32))
    level = tl.zeros(area.shape, tl.int32)
    for i in tl.static_range(len(THRESHOLDS)):
        level += tl.where(area < THRESHOLDS[i], 0, 1)
    return level


@triton.jit
def select(level, values):
    """`values[level]` of a tuple of scalars, one per level, in the shape of `level`; pointers too.

    Hints about multiples are lost on the way.
    """
    if values[0].dtype.is_ptr():
        # By their distances from the first: Triton's compiler for AMD fails where tensors of pointers are selected.
        BYTES: tl.constexpr = values[0].dtype.element_ty.primitive_bitwidth // 8
        distance = tl.zeros(level.shape, tl.int64)
        for i in tl.static_range(1, len(values)):
            apart = (values[i].to(tl.int64) - values[0].to(tl.int64)) // BYTES
            distance = tl.where(level == i, apart, distance)
        return values[0] + distance
    else:
        chosen = tl.zeros(level.shape, values[0].dtype) + values[0]
        for i in tl.static_range(1, len(values)):
            chosen = tl.where(level == i, values[i], chosen)
        return chosen


@triton.jit
def select_scale(level, SCALES: tl.constexpr, REAL: tl.constexpr):
    """`SCALES[level]`, feature pixels per picture pixel, rounded once from float64 to REAL."""
    scale = tl.full(level.shape, SCALES[0], REAL)
    for i in tl.static_range(1, len(SCALES)):
        scale = tl.where(level == i, tl.full((), SCALES[i], REAL), scale)
    return scale


@triton.jit
def place(
    x1,
    y1,
    x2,
    y2,
    scale,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REAL: tl.constexpr,
):
    """The bins of a box on its level, in the pixels of that level, REAL.

    Args:
        x1, y1, x2, y2: In picture pixels, of any floating dtype.
        scale: Feature pixels per picture pixel, REAL.
        RATIO: Samples per bin and axis; 0 where sampling is adaptive.

    Returns:
        start_y, start_x: of the first bin;
        size_y, size_x: of a bin, negative in a mirrored box;
        samples_y, samples_x: of a bin, whole numbers, >= 1: RATIO, or ceil(size);
        valid: whether the box has samples (where sampling is adaptive, an empty or inverted one has none), and its
            coordinates are finite and their magnitudes add up. Where not, the RoI is zero; the rest is finite then,
            and safe to compute with, but without a meaning.
    """
    half: tl.constexpr = 0.5 if ALIGNED else 0.0
    start_x = x1.to(REAL) * scale - half
    start_y = y1.to(REAL) * scale - half
    end_x = x2.to(REAL) * scale - half
    end_y = y2.to(REAL) * scale - half
    valid = is_finite(tl.abs(start_x) + tl.abs(start_y) + tl.abs(end_x) + tl.abs(end_y))
    start_x = tl.where(valid, start_x, 0.0)
    start_y = tl.where(valid, start_y, 0.0)
    width = tl.where(valid, end_x - start_x, 1.0)
    height = tl.where(valid, end_y - start_y, 1.0)
    if not ALIGNED:
        width = tl.maximum(width, 1.0)
        height = tl.maximum(height, 1.0)
    size_y = divide(height, tl.full(height.shape, BINS_Y, REAL))
    size_x = divide(width, tl.full(width.shape, BINS_X, REAL))
    if RATIO > 0:
        samples_y = tl.full(height.shape, RATIO, REAL)
        samples_x = tl.full(width.shape, RATIO, REAL)
    else:
        valid = valid & (size_y > 0) & (size_x > 0)
        size_y = tl.where(valid, size_y, 1.0)
        size_x = tl.where(valid, size_x, 1.0)
        samples_y = tl.ceil(size_y)
        samples_x = tl.ceil(size_x)
    return start_y, start_x, size_y, size_x, samples_y, samples_x, valid


@triton.jit
def sample_range(edge, size, samples, extent):
    """The samples of a bin along one axis that can lie in the picture, where sampling is adaptive.

    A RoI far larger than the picture has any number of samples; adaptive ones are over half a pixel apart, so that no
    more than `2 * extent + 5` can matter, a few of them beyond the picture on either side.

    Args:
        edge: `start + i * size` of bin i.
        size, samples: As `place` returns them.
        extent: Pixels of the level along the axis, int32.

    Returns:
        first: The first step to look at, a whole number >= 0, in the dtype of `edge`;
        count: How many steps there are from it on, int32, >= 1.
    """
    count = tl.minimum(samples, (2 * extent + 5).to(samples.dtype))
    first = tl.floor(divide((-1.0 - edge) * samples, size) - 1.5)
    first = tl.maximum(tl.minimum(first, samples - count), 0.0)
    return first, count.to(tl.int32)


@triton.jit
def sample(edge, size, samples, step, extent, RATIO: tl.constexpr):
    """One axis of a sample: the two pixels that it lies between.

    Args:
        edge: `start + i * size` of bin i.
        size, samples: As `place` returns them.
        step: Number of the sample in its bin, in the dtype of `edge`, or a whole number.
        extent: Pixels of the level along the axis, int32.

    Returns:
        low, high: The pixels, int32, in 0..extent-1 whatever was given;
        lower, upper: Their weights, which add up to 1, in the dtype of `edge`;
        inside: Whether the sample lies in -1..extent. Where not it is zero, whatever the pixels hold.
    """
    distance = (step + 0.5) * size
    if RATIO > 0 and (RATIO & (RATIO - 1)) == 0:
        distance *= 1.0 / RATIO  # as exact, for a power of two, and a tenth of the instructions
    else:
        distance = divide(distance, samples)
    position = edge + distance
    inside = (position >= -1.0) & (position <= extent.to(edge.dtype))
    position = tl.minimum(tl.maximum(position, 0.0), (extent - 1).to(edge.dtype))
    whole = tl.floor(position)
    low = whole.to(tl.int32)
    upper = position - whole
    return low, tl.minimum(low + 1, extent - 1), 1.0 - upper, upper, inside
