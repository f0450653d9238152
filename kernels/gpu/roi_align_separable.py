"""RoIAlign as two small matrix products, which load each pixel under a RoI once.

A bilinear sample weighs pixels by their line and by their column separately, and so does the average of samples. Of a
RoI with bins (i, j) and pixels (y, x) of its window, for every channel::

    bin[i, j] = sum_y sum_x Wy[i, y] * Wx[j, x] * F[y, x] / (samples_y * samples_x)

where W counts, sample by sample, by how much a pixel is nearer than 1. A program takes one RoI, or a band of its bins,
by a block of channels. It walks down the window; of each line it multiplies the pixels, `[PIXELS, CHANNELS]`, by
``Wy[i, y] * Wx[j, x]``, `[64 bins, PIXELS]`, on the tensor cores, and sums in float32. Loads of the next lines go on
meanwhile. The products of weights are rounded to the features' dtype, by half an eps each; `roi_align`, which goes bin
by bin, rounds the result alone.

A product with a pixel that is not finite is not finite either, whatever its weight: a band where one came out, or a sum
beyond the dtype, is pooled again, sample by sample.

`is_faster` says where this takes over: where an H200 was measured to be faster with it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from ..sampling import Sampling
from .arithmetic import divide, is_finite
from .roi_geometry import (
    ROI_ARGUMENTS,
    level_of,
    load_roi,
    place,
    pyramid_arguments,
    roi_arguments,
    sample,
    sample_range,
    select,
    select_scale,
)
from .roi_samples import pool_samples
from .sizes import cdiv, next_power_of_2

__all__ = ["is_able", "is_faster", "separable_roi_align"]

# (Bins, samples a side, or 0 where they are adaptive) measured, with programs of `_CHANNELS` channels, to take 0.52 to
# 0.8 times as long in half precision; with 2 samples 7 x 7 bins take 1.2 times as long, and in float32, split into
# three products of TF32, all take many times as long (`benchmarks/results/gpu-nvidia-h200-separable.json`).
_FASTER = {((7, 7), 0), ((14, 14), 0), ((14, 14), 2)}
# 64 bins are the least that Hopper's tensor cores take; with 256 channels their sums are 128 registers a thread. 32
# pixels would take a tenth fewer instructions, but spill on Ampere. Three lines are under way while one is multiplied.
_BINS = 64
_CHANNELS = 256
_PIXELS = 16
_STAGES = 4
_WARPS = 4
_AGAIN = 4  # bins pooled together sample by sample: 8 channels a thread
_WIDE = 2**31  # values of an image from which on offsets in it take 64 bits, which these do not have


@triton.jit
def _weight(pixel, edge, size, samples, step, extent, RATIO: tl.constexpr):
    """How much one sample of each bin weighs at each pixel."""
    low, high, lower, upper, inside = sample(edge, size, samples, step, extent, RATIO)
    lower = tl.where(inside, lower, 0.0)  # beyond the border all of the weight is the lower one
    return tl.where(pixel == low, lower, tl.where(pixel == high, upper, 0.0))


@triton.jit
def _weights(pixel, edge, size, samples, extent, RATIO: tl.constexpr):
    """How much all samples of each bin weigh at each pixel, along one axis; shapes are broadcast.

    Args:
        pixel: Numbers of pixels, int32.
        edge, size, samples, extent: As `sample` takes them.
    """
    total = tl.zeros((edge + pixel.to(edge.dtype)).shape, edge.dtype)
    if RATIO > 0:
        for n in tl.static_range(RATIO):
            total += _weight(pixel, edge, size, samples, n, extent, RATIO)
    else:
        first, count = sample_range(edge, size, samples, extent)
        for n in range(count):
            total += _weight(pixel, edge, size, samples, first + n, extent, RATIO)
    return total


@triton.jit
def _position(edge, size, samples, step):
    """Where `sample` has a sample of adaptive ones, to the last bit."""
    return edge + divide((step + 0.5) * size, samples)


@triton.jit
def _steps_inside(edge, size, samples, extent):
    """The first and the last sample of a bin that lie in -1..extent, where sampling is adaptive.

    Places rise with the step, so that the samples next to an estimate tell.
    """
    extent = extent.to(edge.dtype)
    per_pixel = divide(samples, size)
    guess = tl.maximum(tl.minimum(tl.ceil((-1.0 - edge) * per_pixel - 0.5), samples), 0.0)
    first = tl.where(_position(edge, size, samples, guess - 1.0) < -1.0, guess, guess - 1.0)
    first = tl.where(_position(edge, size, samples, guess) < -1.0, guess + 1.0, first)
    guess = tl.maximum(tl.minimum(tl.floor((extent - edge) * per_pixel - 0.5), samples), -1.0)
    last = tl.where(_position(edge, size, samples, guess + 1.0) > extent, guess, guess + 1.0)
    last = tl.where(_position(edge, size, samples, guess) > extent, guess - 1.0, last)
    return first, tl.minimum(last, samples - 1.0)


@triton.jit
def _weights_nearby(pixel, edge, size, samples, first_inside, last_inside, extent):
    """`_weights` where sampling is adaptive, without a loop, so that loads around it can be pipelined.

    Samples are over half a pixel apart: no more than 4 lie within a pixel of one, and 5 looked at leave room for
    rounding.

    Args:
        first_inside, last_inside: As `_steps_inside` returns them.
    """
    step = divide(size, samples)
    pixel = pixel.to(edge.dtype)
    first = tl.floor((pixel - 1.0 - edge) * divide(samples, size) - 0.5)
    first = tl.maximum(tl.minimum(first, samples - 1.0), 0.0)
    total = tl.zeros(edge.shape, edge.dtype)
    for n in tl.static_range(5):
        position = edge + (first + (n + 0.5)) * step
        inside = (first + n >= first_inside) & (first + n <= last_inside)
        position = tl.minimum(tl.maximum(position, 0.0), (extent - 1).to(edge.dtype))
        total += tl.where(inside, tl.maximum(1.0 - tl.abs(pixel - position), 0.0), 0.0)
    return total


@triton.jit
def _window(first_edge, last_edge, size, samples, extent, RATIO: tl.constexpr):
    """The first and the last pixel that the bins from one edge to another read; mirrored boxes run backwards."""
    low, high, _, _, _ = sample(first_edge, size, samples, 0.0, extent, RATIO)
    other_low, other_high, _, _, _ = sample(last_edge, size, samples, samples - 1.0, extent, RATIO)
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit(do_not_specialize=ROI_ARGUMENTS)
def _roi_align_separable_kernel(
    features,
    out_ptr,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    STAGES: tl.constexpr,
    AGAIN: tl.constexpr,
):
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    bands: tl.constexpr = (BINS_Y + ROWS - 1) // ROWS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    band = tl.program_id(0) // blocks % bands * ROWS
    k = tl.program_id(0) // (blocks * bands)

    x1, y1, x2, y2, image, there = load_roi(
        k,
        k >= 0,
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
    start_y, start_x, size_y, size_x, samples_y, samples_x, finite = place(
        x1, y1, x2, y2, select_scale(level, SCALES, REAL), BINS_Y, BINS_X, RATIO, ALIGNED, REAL
    )
    valid = there & finite
    end = tl.minimum(band + ROWS, BINS_Y)
    top, bottom = _window(
        start_y + band.to(REAL) * size_y, start_y + (end - 1).to(REAL) * size_y, size_y, samples_y, height, RATIO
    )
    left, right = _window(start_x, start_x + (BINS_X - 1) * size_x, size_x, samples_x, width, RATIO)
    lines = tl.where(valid, bottom - top + 1, 0)
    columns = tl.where(valid, right - left + 1, 0)

    bin = tl.arange(0, ROWS * COLUMNS)
    i = band + bin // COLUMNS
    j = bin % COLUMNS
    edge_y = start_y + i.to(REAL) * size_y
    edge_x = start_x + j.to(REAL) * size_x
    if RATIO == 0:
        first_inside, last_inside = _steps_inside(edge_y, size_y, samples_y, height)
    map_ptr = select(level, features) + image * height * width * C
    line_ptr = tl.multiple_of(map_ptr + top * width * C, 16)
    result = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    for block in range(tl.cdiv(columns, PIXELS)):
        x = left + block * PIXELS + tl.arange(0, PIXELS)
        # Bins lie along the lanes of a warp, so that a thread computes the weights of few of them.
        weight_x = _weights(x[:, None], edge_x[None, :], size_x, samples_x, width, RATIO)  # [PIXELS, 64]
        tile_ptr = line_ptr + (x * C)[:, None] + channel[None, :]
        mask = (x <= right)[:, None] & (channel < C)[None, :]
        for line in tl.range(0, lines, num_stages=STAGES):
            if RATIO > 0:
                weight_y = _weights(top + line, edge_y, size_y, samples_y, height, RATIO)  # [64]
            else:
                weight_y = _weights_nearby(top + line, edge_y, size_y, samples_y, first_inside, last_inside, height)
            value = tl.load(tile_ptr + tl.cast(line, tl.int64) * (width * C), mask=mask, other=0.0)
            weight = (weight_x * weight_y[None, :]).to(value.dtype)
            result = tl.dot(tl.trans(weight), value, result)

    # Weights are rounded, so that the average of numbers next to the largest of their dtype may end up beyond it.
    rounded = (result * divide(tl.full((), 1.0, REAL), samples_y * samples_x)).to(out_ptr.dtype.element_ty)
    roi_ptr = out_ptr + k.to(tl.int64) * (BINS_Y * BINS_X * C)
    if tl.max(tl.where(is_finite(rounded.to(REAL)), 0, 1)) == 0:
        mask = ((i < end) & (j < BINS_X))[:, None] & (channel < C)[None, :]
        out = roi_ptr + ((i * BINS_X + j) * C)[:, None] + channel[None, :]
        tl.store(out, rounded, mask=mask)
    else:
        wanted = (channel < C)[None, :]
        for first in range(band * BINS_X, end * BINS_X, AGAIN):
            again = first + tl.arange(0, AGAIN)
            live = again < end * BINS_X
            zero = tl.zeros((AGAIN,), REAL)
            pooled = pool_samples(
                (map_ptr + tl.zeros((AGAIN,), tl.int32))[:, None] + channel[None, :],
                wanted,
                live & valid,
                start_y + (again // BINS_X).to(REAL) * size_y,
                start_x + (again % BINS_X).to(REAL) * size_x,
                size_y + zero,
                size_x + zero,
                samples_y + zero,
                samples_x + zero,
                height,
                width,
                width * C,
                C,
                RATIO,
                REAL,
                False,
                1,
            )
            here = roi_ptr + (again * C)[:, None] + channel[None, :]
            tl.store(here, pooled.to(out_ptr.dtype.element_ty), mask=live[:, None] & wanted)


def is_able(features: Sequence[Tensor], sampling: Sampling) -> bool:
    """Whether this can pool these features at all.

    Args:
        features: `[N, C, H_l, W_l]` for each level, in channels_last memory.
        sampling: Where the samples lie, and what is made of them.
    """
    c, dtype = features[0].shape[1], features[0].dtype
    return (
        sampling.mode == "avg"
        and dtype in (torch.float16, torch.bfloat16)
        and sampling.output_size[1] <= _BINS
        and c * dtype.itemsize % 16 == 0
        and all(feature.data_ptr() % 16 == 0 and feature[:1].numel() < _WIDE for feature in features)
    )


def is_faster(features: Sequence[Tensor], sampling: Sampling) -> bool:
    """Whether this was measured to be faster than going bin by bin; arguments as of `is_able`."""
    bins = tuple(sampling.output_size)
    measured = (bins, max(sampling.sampling_ratio, 0)) in _FASTER and features[0].shape[1] % _CHANNELS == 0
    return measured and is_able(features, sampling) and _is_hopper(features[0].device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def separable_roi_align(
    features: Sequence[Tensor], boxes: Tensor, counts: Tensor | None, sampling: Sampling, out: Tensor
) -> None:
    """Pool each RoI from one level of a pyramid.

    Args:
        features: `[N, C, H_l, W_l]` for each level, with pixels, in channels_last memory; such that `is_able`.
        boxes: `[N, R, 4]` xyxy in pixels of the picture.
        counts: `[N]` integers: from there on the boxes of an image are padding, and give zeros.
        sampling: Where the samples lie.
        out: `[N * R, h, w, C]`, contiguous, not empty, in the features' dtype: all of it is written.
    """
    k, h, w, c = out.shape
    columns = next_power_of_2(w)
    rows = _BINS // columns
    channels = min(_CHANNELS, max(16, next_power_of_2(c)))
    with current_device(out.device):
        _roi_align_separable_kernel[(k * cdiv(h, rows) * cdiv(c, channels),)](
            features=tuple(features),
            out_ptr=out,
            **roi_arguments(boxes, None, counts, len(features[0])),
            **pyramid_arguments([feature.shape for feature in features], out.dtype, sampling),
            C=c,
            ROWS=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            PIXELS=_PIXELS,
            STAGES=_STAGES,
            AGAIN=_AGAIN,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
