"""What follows a convolution, in Triton: one pass over a map in channels_last memory instead of up to four.

Lanes take neighbouring elements of the output, of which channels are the fastest index, so that loads and stores are
whole lines. The time is that of reading and writing each element once; the residual of a pyramid is read from its
coarser level where it lies, and the maps of the pooling's windows overlap in the cache.

Contract and formulas stand at `trimask.kernels.epilogue`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from .sizes import cdiv, next_power_of_2

__all__ = ["add_bias", "pool_bias_relu"]

# Elements of a program, and warps: 8 elements a lane, which are 16 bytes of a half-precision map. On an H200 the bias
# of a large map takes 1.07 times as long as moving its bytes, with a coarser map 1.19 times.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _finish(x, bias_ptr, channel, inside, RELU: tl.constexpr):
    x += tl.load(bias_ptr + channel, inside, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    return x


@triton.jit
def _in_eights(x, CHANNELS: tl.constexpr):
    """Tells the compiler that eight neighbouring lanes read what lies together, where channels come in eights."""
    if CHANNELS % 8 == 0:
        return tl.max_contiguous(tl.multiple_of(x, 8), 8)
    else:
        return x


@triton.jit
def _alike(x, CHANNELS: tl.constexpr):
    """Tells it that eight neighbouring lanes have the same number."""
    if CHANNELS % 8 == 0:
        return tl.max_constancy(x, 8)
    else:
        return x


@triton.jit
def _places(start, height, width, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Channel, image, row and column of a run of elements; 64 bits for its start alone, as their divisions are slow."""
    lane = (start % CHANNELS).to(tl.int32) + tl.arange(0, BLOCK)
    pixel = start // CHANNELS
    column = (pixel % width).to(tl.int32) + _alike(lane // CHANNELS, CHANNELS)
    row = pixel // width
    down = (row % height).to(tl.int32) + _alike(column // width, CHANNELS)
    image = row // height + _alike(down // height, CHANNELS)
    channel = _in_eights(lane % CHANNELS, CHANNELS)
    return channel, image, _alike(down % height, CHANNELS), _alike(column % width, CHANNELS)


# A size of another kind, 1 or a multiple of 16, compiles nothing anew.
@triton.jit(do_not_specialize=["height", "width", "residual_height", "residual_width"])
def _add_bias_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    total,
    height,
    width,
    residual_height,
    residual_width,
    scale_y: tl.float32,
    scale_x: tl.float32,
    CHANNELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < total
    channel, image, row, column = _places(start, height, width, CHANNELS, BLOCK)
    x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    if RESIDUAL == "same":
        x += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
    if RESIDUAL == "nearest":
        # As torch's nearest neighbour: the product with a float32 scale, cut.
        down = tl.minimum((row.to(tl.float32) * scale_y).to(tl.int32), residual_height - 1)
        right = tl.minimum((column.to(tl.float32) * scale_x).to(tl.int32), residual_width - 1)
        source = ((image * residual_height + down) * residual_width + right) * CHANNELS + channel
        x += tl.load(residual_ptr + _in_eights(source, CHANNELS), inside, other=0.0).to(tl.float32)
    x = _finish(x, bias_ptr, channel, inside, RELU)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def _pool_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    height,
    width,
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of pixels by all channels, so that the compiler sees channels side by side whichever pixels are there."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)[None, :]
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)
    row = pixel // out_width
    image = row // out_height
    top, left = (row % out_height) * 2 - 1, (pixel % out_width) * 2 - 1
    best = tl.full((ROWS, PADDED), float("-inf"), tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            y, x = top + i, left + j
            there = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None] & inside
            source = ((image * height + y) * width + x)[:, None] * CHANNELS + channel
            value = tl.load(x_ptr + source, there, other=float("-inf")).to(tl.float32)
            best = tl.where((value > best) | (value != value), value, best)  # NaN wins, as in torch
    best = _finish(best, bias_ptr, channel, channel < CHANNELS, True).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel[:, None] * CHANNELS + channel, best, inside)


def add_bias(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """See `trimask.kernels.epilogue`."""
    _, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    low_height, low_width = height, width
    kind = "none"
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
        low_height, low_width = residual.shape[2:]
        kind = "same" if (low_height, low_width) == (height, width) else "nearest"
    if x.numel():
        with current_device(x.device):
            _add_bias_kernel[(cdiv(x.numel(), _BLOCK),)](
                x_ptr=x,
                bias_ptr=bias,
                residual_ptr=x if residual is None else residual,
                out_ptr=out,
                total=x.numel(),
                height=height,
                width=width,
                residual_height=low_height,
                residual_width=low_width,
                scale_y=low_height / height,
                scale_x=low_width / width,
                CHANNELS=channels,
                RESIDUAL=kind,
                RELU=relu,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return out


def pool_bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """See `trimask.kernels.epilogue`."""
    images, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (images, channels, (height + 1) // 2, (width + 1) // 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel():
        with current_device(x.device):
            pixels = out.numel() // channels
            padded = next_power_of_2(channels)
            rows = max(1, _BLOCK // padded)
            _pool_kernel[(cdiv(pixels, rows),)](
                x_ptr=x,
                bias_ptr=bias,
                out_ptr=out,
                pixels=pixels,
                height=height,
                width=width,
                out_height=shape[2],
                out_width=shape[3],
                CHANNELS=channels,
                PADDED=padded,
                ROWS=rows,
                num_warps=_WARPS,
            )
    return out
