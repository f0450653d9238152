"""RoIAlign as two small matrix products, which load each pixel under a RoI once.

A bilinear sample weighs pixels by their line and by their column separately, and so does the average of samples. Of a
RoI with bins (i, j) and pixels (y, x) of its window, for every channel::

    bin[i, j] = sum_y sum_x Wy[i, y] * Wx[j, x] * F[y, x] / (samples_y * samples_x)

where W counts, sample by sample, by how much a pixel is nearer than 1. A program takes one RoI, or a band of its bins,
by a block of channels. It walks down the window; of each line it multiplies the pixels, `[PIXELS, CHANNELS]`, by
``Wy[i, y] * Wx[j, x]``, `[64 bins, PIXELS]`, on the tensor cores, and sums in float32. Loads of the next lines go on
meanwhile. For float16 and bfloat16 features the weights are rounded to their dtype, which with the rounding of the
result is off by one eps of the largest pixel at most; float32 takes three products in TF32 (ieee ones on AMD).

Why it may win, and where not
-----------------------------
By counting, for 256 channels of `benchmarks.inputs.proposals` in a picture of 800 x 1344, strides 4 to 32, not aligned.
Loads are of pixels, in MB of float16, through whatever cache. Instructions are of warps, in millions, from the machine
code for sm_90 (triton 3.7.1) and the lines, blocks and samples that each RoI takes. "Per bin" is the shipped kernel.
**No GPU has measured it yet.**

=============================  ==============  ===============  =====================  ======================
case                           loads, per bin  loads, this one  instructions, per bin  instructions, this one
=============================  ==============  ===============  =====================  ======================
1000 x 7 x 7, ratio 2          401             167              24                     16
1000 x 7 x 7, adaptive         887             175              75                     28
100 x 14 x 14, ratio 2         161             21               9.4                    3.2
100 x 14 x 14, adaptive        117             21               12                     4.7
=============================  ==============  ===============  =====================  ======================

Against it: 210 to 230 registers leave two programs a multiprocessor, every line waits for a barrier and a product,
windows that are no multiple of PIXELS wide fill the tensor cores with zeros, and per bin, neighbouring bins find each
other's pixels in the first cache. In float32 it takes 4.7 times the instructions at 7 x 7, ratio 2, and 1.3 to 1.7
times in the other cases, as each value is split for TF32, and should lose. For Turing, Triton uses no tensor cores: it
compiles, spills, and is of no use there.

It differs from the shipped op in that a NaN or infinite pixel makes all bins of the RoI, or of the band, NaN; and in
adaptive sampling lines are placed by a step rounded beforehand, so that a sample that lies within a rounding of the
border may or may not count.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.dispatch import current_device
from ...kernels.gpu.arithmetic import divide
from ...kernels.gpu.roi_geometry import (
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
from ...kernels.roi_pooling import level_thresholds
from ...kernels.sampling import Sampling

__all__ = ["separable_roi_align"]

# 64 bins are the least that Hopper's tensor cores take; with 256 channels their sums are 128 registers a thread. 32
# pixels would take a tenth fewer instructions, but spill on Ampere. Three lines are under way while one is multiplied.
_BINS = 64
_CHANNEL_BYTES = 512
_PIXELS = 16
_STAGES = 4
_WARPS = 4


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
def _weights_nearby(pixel, edge, size, samples, extent):
    """`_weights` where sampling is adaptive, without a loop, so that loads around it can be pipelined.

    Samples are over half a pixel apart: no more than 4 lie within a pixel of one, and 5 looked at leave room for
    rounding.
    """
    step = divide(size, samples)
    pixel = pixel.to(edge.dtype)
    first = tl.floor((pixel - 1.0 - edge) * divide(samples, size) - 0.5)
    first = tl.maximum(tl.minimum(first, samples - 1.0), 0.0)
    total = tl.zeros(edge.shape, edge.dtype)
    for n in tl.static_range(5):
        position = edge + (first + (n + 0.5)) * step
        inside = (position >= -1.0) & (position <= extent.to(edge.dtype)) & (first + n < samples)
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
def _separable_roi_align_kernel(
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
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    STAGES: tl.constexpr,
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
    line_ptr = tl.multiple_of(select(level, features) + (image * height + top) * width * C, 16)
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
                weight_y = _weights_nearby(top + line, edge_y, size_y, samples_y, height)
            value = tl.load(tile_ptr + tl.cast(line, tl.int64) * (width * C), mask=mask, other=0.0)
            weight = (weight_x * weight_y[None, :]).to(value.dtype)
            result = tl.dot(tl.trans(weight), value, result, input_precision=PRECISION)

    result *= divide(tl.full((), 1.0, REAL), samples_y * samples_x)
    out = (k.to(tl.int64) * (BINS_Y * BINS_X) + i * BINS_X + j) * C
    mask = ((i < end) & (j < BINS_X))[:, None] & (channel < C)[None, :]
    tl.store(out_ptr + out[:, None] + channel[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


def separable_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[float],
    output_size: Sequence[int],
    *,
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float = 224,
    canonical_level: float = 4,
    level_epsilon: float = 1e-6,
    epsilon_inside_log: bool = False,
    counts: Tensor | None = None,
) -> Tensor:
    """`pyramid_roi_align` of mode "avg", forward only.

    Args:
        features: `[B, C, H_l, W_l]` in channels_last memory, float16, bfloat16 or float32; a pixel of a multiple of 16
            bytes.
        boxes: `[B, R, 4]` xyxy in pixels of the picture.
        strides: Picture pixels per feature pixel of each level.
        output_size: Bins, height and width; at most 64 in a row.
        sampling_ratio: As for `pyramid_roi_align`; so are the rest.

    Returns:
        `[B, R, C, h, w]`, strided as a contiguous `[B, R, h, w, C]`; zero beyond `counts`.

    Raises:
        ValueError: For features or a size that it does not take.
    """
    n, c = features[0].shape[:2]
    h, w = output_size
    dtype = features[0].dtype
    for feature in features:
        whole = feature.is_contiguous(memory_format=torch.channels_last) and c * dtype.itemsize % 16 == 0
        if not whole or dtype not in (torch.float16, torch.bfloat16, torch.float32):
            got = f"{dtype} {list(feature.shape)} strided {feature.stride()}"
            raise ValueError(f"features: expected channels_last, up to float32, of pixels of 16n bytes, got {got}")
    columns = triton.next_power_of_2(w)
    if columns > _BINS:
        raise ValueError(f"output_size: expected at most {_BINS} bins in a row, got {w}")
    thresholds = level_thresholds(strides, canonical_size, canonical_level, level_epsilon, epsilon_inside_log)
    sampling = Sampling([1.0 / stride for stride in strides], thresholds, (h, w), sampling_ratio, aligned, "avg")
    out = features[0].new_empty(*boxes.shape[:2], h, w, c)
    if out.numel():
        rows = _BINS // columns
        channels = min(_CHANNEL_BYTES // dtype.itemsize, max(16, triton.next_power_of_2(c)))
        precision = None if dtype != torch.float32 else "ieee" if torch.version.hip else "tf32x3"
        grid = (boxes.shape[0] * boxes.shape[1] * triton.cdiv(h, rows) * triton.cdiv(c, channels),)
        with current_device(out.device):
            _separable_roi_align_kernel[grid](
                features=tuple(features),
                out_ptr=out,
                **roi_arguments(boxes, None, counts, n),
                **pyramid_arguments([feature.shape for feature in features], dtype, sampling),
                C=c,
                PRECISION=precision,
                ROWS=rows,
                COLUMNS=columns,
                CHANNELS=channels,
                PIXELS=_PIXELS,
                STAGES=_STAGES,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return out.permute(0, 1, 4, 2, 3)
