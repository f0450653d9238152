"""The gradient of RoIAlign with respect to its features: every level, image and RoI in one launch.

A bin averages bilinear samples, ``bin[i, j] = sum_y sum_x Ay[i, y] * Ax[j, x] * F[y, x]``, so that its gradient g adds
``Ay[i, y] * Ax[j, x] * g`` to each pixel. Neighbouring samples share pixels: the weights of a few are summed first, and
a pixel has one atomic addition for them, of all its channels side by side. The largest of the samples has the gradient
alone: it is looked for again in every channel, the first of equals, and adds to its four pixels.

Atomic sums of floats round differently from run to run. Where torch's deterministic algorithms are asked for, sums are
of 64-bit fixed-point numbers, which any order adds up alike. As b bins add no more than ``b * max|g|`` to a pixel, the
point is put where that is within 2^62: nothing overflows, and a term is cut off by less than ``2^(ceil(log2 b) - 60)``
of max|g|, or of the smallest normal number if that is larger. A gradient that is not finite, of any RoI that is there,
makes all of them NaN then.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from ..dispatch import current_device
from ..sampling import Sampling
from .arithmetic import divide
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
from .sizes import cdiv, next_power_of_2

__all__ = ["roi_align_backward"]

# A program has one bin, and its place is scalars: nothing is computed twice but by the threads of two warps, and many
# bins are under way at once. By reasoning and a look at the machine code; no others were tried on a GPU.
_BINS = 1
_CHANNELS = 256
_WARPS = 2
_ROUNDED = 2048  # sums that a program of 4 warps rounds


@triton.jit
def _uniform(x):
    """The same; of one number, which all threads have, the compiler is told so, and computes what follows once."""
    if x.shape[0] == 1:
        return tl.full((1,), tl.sum(x, 0), x.dtype)
    else:
        return x


@triton.jit
def _power(bits, INVERSE: tl.constexpr, REAL: tl.constexpr):
    """A power of two that brings the number of REAL with these bits, int64, below 4, and almost always above 1."""
    if REAL.primitive_bitwidth == 64:
        exponent = tl.minimum(tl.maximum(bits >> 52, 1), 2045)
        return ((exponent if INVERSE else 2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = tl.minimum(tl.maximum(bits >> 23, 1), 253).to(tl.int32)
        return ((exponent if INVERSE else 254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _not_finite(bits, REAL: tl.constexpr):
    return bits >= (0x7FF << 52 if REAL.primitive_bitwidth == 64 else 0xFF << 23)


@triton.jit
def _pixels(edge, size, samples, extent, step, end, RATIO: tl.constexpr, SAMPLES: tl.constexpr, PIXELS: tl.constexpr):
    """The pixels that a few samples of a bin lie between along one axis, each once, and their weights.

    Args:
        edge, size, samples, extent: As `sample` takes them, [B] or scalars.
        step: Number of the first of the samples, in the dtype of `edge`.
        end: The number that samples end before.
        SAMPLES: How many: 3 where sampling is adaptive, as they are up to a pixel apart, else 1 or 2.
        PIXELS: 4, or 2 for one sample.

    Returns:
        pixel: int32 [B, PIXELS], or [1, PIXELS] for scalars.
        weight: So too, in the dtype of `edge`. Zero for pixels beyond the extent or mentioned before.
    """
    number = tl.arange(0, PIXELS)[:, None]
    first, _, _, _, _ = sample(edge, size, samples, step, extent, RATIO)
    pixel = first + number
    once = number >= 0
    if RATIO > 1:
        second, _, _, _, _ = sample(edge, size, samples, step + 1, extent, RATIO)
        pixel = tl.where(number < 2, pixel, second + number - 2)
        once = (number < 2) | (pixel < first) | (pixel > first + 1)
    weight = tl.zeros(pixel.shape, edge.dtype)
    for i in tl.static_range(SAMPLES):
        low, _, lower, upper, inside = sample(edge, size, samples, step + i, extent, RATIO)
        counted = inside & (step + i < end)
        weight += tl.where(pixel == low, tl.where(counted, lower, 0.0), 0.0)
        weight += tl.where(pixel == low + 1, tl.where(counted, upper, 0.0), 0.0)
    return pixel, tl.where(once, weight, 0.0)


@triton.jit(do_not_specialize=["bins", "unit", *ROI_ARGUMENTS])
def _roi_align_backward_kernel(
    totals,
    largest_ptr,
    grad_ptr,
    features,
    bins,
    unit,
    stride_k,
    stride_c,
    stride_h,
    stride_w,
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
    FIXED: tl.constexpr,
    MEASURE: tl.constexpr,
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the gradients of bins to the totals; or to MEASURE, find the bits of the largest magnitude among them."""
    # Where four floats are added at once, they are one thread's. Else, neighbours are those of the next thread.
    SPREAD: tl.constexpr = MAX or FIXED or not cuda_capability_geq(9, 0)
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    q = tl.program_id(0) // blocks * BINS + tl.arange(0, BINS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    k = q // (BINS_Y * BINS_X)
    i = q // BINS_X % BINS_Y
    j = q % BINS_X

    x1, y1, x2, y2, image, there = load_roi(
        k,
        q < bins,
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
    x1, y1, x2, y2, image = _uniform(x1), _uniform(y1), _uniform(x2), _uniform(y2), _uniform(image)
    there = _uniform(there.to(tl.int32)) != 0
    level = level_of(x1, y1, x2, y2, THRESHOLDS)
    height = select(level, heights) // 16
    width = select(level, widths) // 16
    start_y, start_x, size_y, size_x, samples_y, samples_x, finite = place(
        x1, y1, x2, y2, select_scale(level, SCALES, REAL), BINS_Y, BINS_X, RATIO, ALIGNED, REAL
    )
    valid = there & finite
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    mask = valid[:, None] & (channel < C)  # [B, C], and so are all that are multiplied below
    offset = k.to(tl.int64) * stride_k + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    bin_ptr = grad_ptr + offset[:, None] + channel.to(tl.int64) * stride_c
    if SPREAD:
        bin_ptr = tl.multiple_of(bin_ptr, [1, 1])
    grad = tl.load(bin_ptr, mask=mask, other=0.0).to(REAL)
    if MEASURE:
        size = tl.abs(grad)  # a larger number has larger bits, and NaN the largest
        if REAL.primitive_bitwidth == 64:
            bits = size.to(tl.int64, bitcast=True)
        else:
            bits = size.to(tl.int32, bitcast=True)
        tl.atomic_max(largest_ptr, tl.max(tl.max(bits, 1), 0).to(tl.int64), sem="relaxed")
        return
    if FIXED:
        largest = tl.load(largest_ptr)
        if _not_finite(largest, REAL):
            return
        grad = grad * _power(largest, False, REAL) * unit

    edge_y = start_y + i.to(REAL) * size_y
    edge_x = start_x + j.to(REAL) * size_x
    if RATIO > 0:
        first_y = tl.zeros_like(edge_y)
        first_x = tl.zeros_like(edge_x)
        count_y = tl.zeros_like(height) + RATIO
        count_x = tl.zeros_like(width) + RATIO
        steps_y = RATIO
        steps_x = RATIO
    else:
        first_y, count_y = sample_range(edge_y, size_y, samples_y, height)
        first_x, count_x = sample_range(edge_x, size_x, samples_x, width)
        steps_y = tl.max(tl.where(valid, count_y, 0), 0)
        steps_x = tl.max(tl.where(valid, count_x, 0), 0)
    corner = image * height * width * C
    total_ptr = select(level, totals) + corner

    if MAX:
        pixels_ptr = select(level, features) + corner
        best = tl.full(grad.shape, float("-inf"), REAL)
        best_y = tl.zeros(grad.shape, tl.int32)
        best_x = tl.zeros(grad.shape, tl.int32)
        for step_y in range(steps_y):
            top, bottom, above, below, inside_y = sample(edge_y, size_y, samples_y, first_y + step_y, height, RATIO)
            for step_x in range(steps_x):
                left, right, before, after, inside_x = sample(edge_x, size_x, samples_x, first_x + step_x, width, RATIO)
                read = mask & (inside_y & inside_x)[:, None]
                value = tl.zeros(grad.shape, REAL)
                for n in tl.static_range(4):
                    row = (bottom if n // 2 else top).to(tl.int64) * width + (right if n % 2 else left)
                    weight = (below if n // 2 else above) * (after if n % 2 else before)
                    pixel_ptr = tl.multiple_of((pixels_ptr + row * C)[:, None] + channel, [1, 1])
                    pixel = tl.load(pixel_ptr, mask=read, other=0.0).to(REAL)
                    value = tl.fma(weight[:, None], pixel, value)
                larger = (value > best) | ((value != value) & (best == best))
                larger &= ((step_y < count_y) & (step_x < count_x))[:, None]
                best = tl.where(larger, value, best)
                best_y = tl.where(larger, step_y, best_y)
                best_x = tl.where(larger, step_x, best_x)

        best_y = first_y[:, None] + best_y
        best_x = first_x[:, None] + best_x
        top, bottom, above, below, inside_y = sample(
            edge_y[:, None], size_y[:, None], samples_y[:, None], best_y, height[:, None], RATIO
        )
        left, right, before, after, inside_x = sample(
            edge_x[:, None], size_x[:, None], samples_x[:, None], best_x, width[:, None], RATIO
        )
        for n in tl.static_range(4):
            row = (bottom if n // 2 else top).to(tl.int64) * width[:, None] + (right if n % 2 else left)
            weight = (below if n // 2 else above) * (after if n % 2 else before)
            term = weight * grad
            if FIXED:
                term = term.to(tl.int64)
            here = mask & inside_y & inside_x & (weight != 0)
            tl.atomic_add(total_ptr[:, None] + row * C + channel, term, mask=here, sem="relaxed")
    else:
        if RATIO > 0:
            grad *= 1.0 / (RATIO * RATIO)
        else:
            grad *= tl.where(valid, divide(tl.full(valid.shape, 1.0, REAL), samples_y * samples_x), 0.0)[:, None]
        PIXELS: tl.constexpr = 2 if RATIO == 1 else 4
        SAMPLES: tl.constexpr = 3 if RATIO == 0 else PIXELS // 2
        for step_y in range(0, steps_y, SAMPLES):
            y, weight_y = _pixels(
                edge_y, size_y, samples_y, height, first_y + step_y, first_y + count_y, RATIO, SAMPLES, PIXELS
            )
            for step_x in range(0, steps_x, SAMPLES):
                x, weight_x = _pixels(
                    edge_x, size_x, samples_x, width, first_x + step_x, first_x + count_x, RATIO, SAMPLES, PIXELS
                )
                weight = (weight_y[:, None] * weight_x[None, :])[:, :, :, None]  # [y, x, B, 1]
                row = (y.to(tl.int64) * width)[:, None] + x[None, :]
                term = weight * grad
                if FIXED:
                    term = term.to(tl.int64)
                here = mask & (weight != 0)
                pixel_ptr = (total_ptr + row * C)[:, :, :, None] + channel
                if SPREAD:
                    pixel_ptr = tl.multiple_of(pixel_ptr, [1, 1, 1, 1])
                tl.atomic_add(pixel_ptr, term, mask=here, sem="relaxed")


@triton.jit(do_not_specialize=["unit", "image_count"])
def _round_kernel(
    outs,
    totals,
    largest_ptr,
    unit,
    image_count,
    heights,
    widths,
    C: tl.constexpr,
    REAL: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Totals of all levels, fixed-point or float, in the dtype of the gradient; both start at multiples of 16 bytes."""
    level = tl.program_id(1)
    height = select(level, heights) // 16
    width = select(level, widths) // 16
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < height.to(tl.int64) * width * image_count * C
    total_ptr = tl.multiple_of(select(level, totals), 16)
    out_ptr = tl.multiple_of(select(level, outs), 16)
    total = tl.load(total_ptr + i, mask=mask, other=0).to(REAL)
    if FIXED:
        largest = tl.load(largest_ptr)
        total = total * unit * _power(largest, True, REAL)
        total = tl.where(_not_finite(largest, REAL), float("nan"), total)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


def roi_align_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor | None,
    counts: Tensor | None,
    shapes: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[Tensor]:
    """Gradients of `roi_align` with respect to the features.

    Args:
        grad: `[K, C, h, w]`, any strides, best in channels_last memory; not read where a RoI is not there.
        features: As given to `roi_align` for "max"; not looked at for "avg".
        boxes: `[K, 4]` xyxy in pixels of the picture, with `images`; else `[B, R, 4]`, K = B * R.
        images: `[K]`, which image.
        counts: `[B]` integers: boxes of an image from there on are padding.
        shapes: (N, C, H_l, W_l) of each level.
        sampling: As given to `roi_align`.

    Returns:
        `[N, H_l, W_l, C]` for each level, contiguous, in the dtype of `grad`; summed in float32 at least, or as 64-bit
        fixed-point numbers where torch's deterministic algorithms are enabled.
    """
    k, c, h, w = grad.shape
    n = shapes[0][0]
    planes = [(n, height, width, c) for _, _, height, width in shapes]
    if not grad.numel() or not n:
        return [grad.new_zeros(plane) for plane in planes]
    fixed = torch.are_deterministic_algorithms_enabled()
    real = torch.promote_types(grad.dtype, torch.float32)
    outs = [grad.new_empty(plane) for plane in planes]
    if fixed or grad.dtype != real:
        # All in one buffer, with the largest magnitude, so that one call fills it with zeros.
        sizes = [_ROUNDED * cdiv(prod(plane), _ROUNDED) for plane in planes]
        *totals, largest = torch.zeros(sum(sizes) + 1, dtype=torch.int64 if fixed else real, device=grad.device).split(
            [*sizes, 1]
        )
    else:
        totals, largest = outs, None
        torch._foreach_zero_(outs)
    if sampling.mode == "max":
        features = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    channels = min(_CHANNELS, next_power_of_2(c))
    bins = k * h * w
    # Magnitudes below 4, of as many bins, add up to less than 2^62.
    unit = 2.0 ** (60 - (bins - 1).bit_length())
    pyramid = pyramid_arguments(shapes, grad.dtype, sampling)
    with current_device(grad.device):
        for measure in (True, False) if fixed else (False,):
            _roi_align_backward_kernel[(cdiv(bins, _BINS) * cdiv(c, channels),)](
                totals=tuple(totals),
                largest_ptr=largest,
                grad_ptr=grad,
                features=tuple(features) if sampling.mode == "max" else (),
                bins=bins,
                unit=unit,
                stride_k=grad.stride(0),
                stride_c=grad.stride(1),
                stride_h=grad.stride(2),
                stride_w=grad.stride(3),
                **roi_arguments(boxes, images, counts, n),
                **pyramid,
                C=c,
                MAX=sampling.mode == "max",
                FIXED=fixed,
                MEASURE=measure,
                BINS=_BINS,
                CHANNELS=channels,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
        if totals is not outs:
            _round_kernel[(max(sizes) // _ROUNDED, len(shapes))](
                outs=tuple(outs),
                totals=tuple(totals),
                largest_ptr=largest,
                unit=1 / unit,
                image_count=n,
                heights=pyramid["heights"],
                widths=pyramid["widths"],
                C=c,
                REAL=pyramid["REAL"],
                FIXED=fixed,
                BLOCK=_ROUNDED,
                enable_fp_fusion=False,
            )
    return outs
