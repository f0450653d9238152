"""RoIAlign over a pyramid in one launch: every level, image, RoI and channel.

A bin is the average, or the largest, of bilinear samples, each of four pixels (He et al., Mask R-CNN, 2017). Bins are
numbered through all RoIs; a program takes a tile of bins by channels, and then further channels of the same bins, whose
level, image and samples each bin has found by itself before. With channels last, a pixel's channels are read 16 bytes
at a time.

Samples outside the picture, and all of a RoI that is not there, are not read; they count as zeros. Products are summed
by fused multiply-adds in float32, or float64 for float64 features.

Where the separable form was measured to be faster, `roi_align_separable` does the work instead.
"""

from collections.abc import Sequence
from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from ..sampling import Sampling
from .roi_align_separable import is_faster, separable_roi_align
from .roi_geometry import (
    ROI_ARGUMENTS,
    level_of,
    load_roi,
    place,
    pyramid_arguments,
    roi_arguments,
    select,
    select_scale,
)
from .roi_samples import pool_samples
from .sizes import cdiv, next_power_of_2
from .turning import to_channels_last

__all__ = ["roi_align"]

# Tiles, by reasoning and a look at the machine code; no others were tried on a GPU. A thread has one bin, whose samples
# take some 40 registers, and 16 bytes of each pixel: with two bins there would be half as many threads to hide waiting.
_WARPS = 8  # with 4, and so 16 bins, the compiler for sm_100 spills
_BINS = 1  # of a thread
_PIXEL_BYTES = 128  # of a pixel in a tile of channels_last features: a line of the cache, read by 8 threads
_PLANES = 32  # channels of a tile of planar features: a warp reads 32 bins of one, side by side
_PROGRAMS = 512  # about what a large GPU runs at a time: where there are fewer bins, programs share their channels
_WIDE = 2**31  # values of an image from which on offsets in it take 64 bits


@triton.jit(do_not_specialize=["total", "span", *ROI_ARGUMENTS])
def _roi_align_kernel(
    features,
    out_ptr,
    total,
    span,
    boxes_ptr,
    images_ptr,
    counts_ptr,
    image_count,
    per_image,
    stride_box,
    stride_side,
    stride_images,
    heights,
    widths,
    SCALES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    REAL: tl.constexpr,
    C: tl.constexpr,
    MAX: tl.constexpr,
    PLANAR: tl.constexpr,
    PLANAR_OUT: tl.constexpr,
    VECTORS: tl.constexpr,
    OFFSET: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Pool `total` bins, of which a program takes BINS by `span` times CHANNELS."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    groups = tl.cdiv(blocks, span)
    group = tl.program_id(0) % groups
    q = (tl.program_id(0) // groups).to(total.dtype) * BINS + tl.arange(0, BINS)
    live = q < total
    k = q // (BINS_Y * BINS_X)
    bin = (q % (BINS_Y * BINS_X)).to(tl.int32)

    x1, y1, x2, y2, image, there = load_roi(
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
        REAL,
    )
    level = level_of(x1, y1, x2, y2, THRESHOLDS)
    height = select(level, heights) // 16
    width = select(level, widths) // 16
    start_y, start_x, size_y, size_x, samples_y, samples_x, valid = place(
        x1, y1, x2, y2, select_scale(level, SCALES, REAL), BINS_Y, BINS_X, RATIO, ALIGNED, REAL
    )
    valid &= there
    edge_y = start_y + (bin // BINS_X).to(REAL) * size_y
    edge_x = start_x + (bin % BINS_X).to(REAL) * size_x

    plane = height.to(tl.int64) * width
    pixels = select(level, features) + image * plane * C
    if VECTORS:
        pixels = tl.multiple_of(pixels, 16)
    COLUMN: tl.constexpr = 1 if PLANAR else C
    line = width.to(OFFSET) * COLUMN
    busy = True  # not where all is padding, of which there may be much; adaptive sampling sees that by itself
    if RATIO > 0:
        busy = tl.max(there.to(tl.int32), 0) > 0
    DIM: tl.constexpr = 0 if PLANAR else 1
    OUT_DIM: tl.constexpr = 0 if PLANAR_OUT else 1
    for block in range(group * span, tl.minimum((group + 1) * span, blocks)):
        channel = block * CHANNELS + tl.arange(0, CHANNELS)
        wanted = tl.expand_dims(channel < C, 1 - DIM)
        tile = tl.expand_dims(pixels, DIM)
        if PLANAR:
            tile += tl.expand_dims(channel.to(OFFSET), 1 - DIM) * tl.expand_dims(plane.to(OFFSET), DIM)
        else:
            tile += tl.expand_dims(channel, 1 - DIM)
        result = tl.zeros(tile.shape, REAL)
        if busy:
            result = pool_samples(
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
                COLUMN,
                RATIO,
                REAL,
                MAX,
                DIM,
            )
        if DIM != OUT_DIM:
            result = tl.trans(result)
        if PLANAR_OUT:
            place_of_bin = k.to(tl.int64) * (C * BINS_Y * BINS_X) + bin
            place_of_channel = channel * (BINS_Y * BINS_X)
        else:
            place_of_bin = q.to(tl.int64) * C
            place_of_channel = channel
        values_ptr = out_ptr + tl.expand_dims(place_of_bin, OUT_DIM) + tl.expand_dims(place_of_channel, 1 - OUT_DIM)
        mask = tl.expand_dims(live, OUT_DIM) & tl.expand_dims(channel < C, 1 - OUT_DIM)
        tl.store(values_ptr, result.to(out_ptr.dtype.element_ty), mask=mask)


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor | None,
    counts: Tensor | None,
    sampling: Sampling,
    channels_last: bool,
) -> Tensor:
    """Pool each RoI from one level of a pyramid.

    Args:
        features: `[N, C, H_l, W_l]` for each level, with pixels. Read without a copy where they are channels_last, or
            contiguous and the RoIs few.
        boxes: `[K, 4]` xyxy in pixels of the picture, with `images`; else `[N, R, 4]`, K = N * R.
        images: `[K]`, which image; RoIs of images outside 0..N-1 give zeros, as those that are not finite do.
        counts: `[N]` integers: from there on the boxes of an image are padding, and give zeros.
        sampling: Where the samples lie, and what is made of them.
        channels_last: The layout wanted.

    Returns:
        `[K, h, w, C]` if `channels_last`, else `[K, C, h, w]`, contiguous, in the features' dtype.
    """
    n, c = features[0].shape[:2]
    h, w = sampling.output_size
    k = prod(boxes.shape[:-1])
    out = features[0].new_empty((k, h, w, c) if channels_last else (k, c, h, w))
    if not out.numel():
        return out
    planar = _stays_planar(features, out, sampling)
    if not planar:
        features = to_channels_last(features)
        if channels_last and images is None and is_faster(features, sampling):
            separable_roi_align(features, boxes, counts, sampling, out)
            return out
    vector = 16 // out.element_size()
    channels = min(_PLANES if planar else _PIXEL_BYTES // out.element_size(), next_power_of_2(c))
    threads = 1 if planar else min(channels // gcd(c, vector, channels), 32)  # of a bin
    bins = _BINS * 32 * (1 if planar else _WARPS) // threads
    total = k * h * w
    programs, blocks = cdiv(total, bins), cdiv(c, channels)
    span = min(max(programs * blocks // _PROGRAMS, 1), blocks)
    with current_device(out.device):
        _roi_align_kernel[(programs * cdiv(blocks, span),)](
            features=tuple(features),
            out_ptr=out,
            total=total,
            span=span,
            **roi_arguments(boxes, images, counts, n),
            **pyramid_arguments([feature.shape for feature in features], out.dtype, sampling),
            C=c,
            MAX=sampling.mode == "max",
            PLANAR=planar,
            PLANAR_OUT=not channels_last,
            VECTORS=not planar and c % vector == 0 and all(f.data_ptr() % 16 == 0 for f in features),
            OFFSET=tl.int32 if all(f[:1].numel() < _WIDE for f in features) else tl.int64,
            BINS=bins,
            CHANNELS=channels,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return out


def _stays_planar(features: Sequence[Tensor], out: Tensor, sampling: Sampling) -> bool:
    """Whether features that are not channels_last are read as they are, rather than copied to it first.

    By the bytes moved, of which a copy reads and writes all features: by themselves, the values that a warp reads of a
    plane lie in sectors of 32 bytes, four or so in each. Both ways were not timed side by side yet.
    """
    if all(f.is_contiguous(memory_format=torch.channels_last) for f in features):
        return False
    if not all(f.is_contiguous() for f in features):
        return False
    read = out.numel() * 4 * (2 if sampling.adaptive else sampling.sampling_ratio) ** 2
    copied = sum(f.numel() for f in features) * 2 * out.element_size()
    return read * 8 <= copied + read * out.element_size()
