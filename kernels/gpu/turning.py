"""Feature maps turned from NCHW to channels_last memory: `[C, H * W]` transposed in tiles, all levels at once.

Each side is read and written along its own direction, 16 bytes a thread where rows are aligned to them; in between a
tile goes through shared memory. Values are moved as integers, so that every bit is kept and dtypes of a size share
their machine code. On an H200 it runs at 85 to 90 % of a large copy's bandwidth, torch's copies of the levels one by
one at 15 to 26 %.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import current_device
from .roi_geometry import select
from .sizes import cdiv, next_power_of_2

__all__ = ["to_channels_last"]

# A tile of 16 KB, four accesses of 16 bytes a thread: rows of 256 bytes on one side, of 128 at least on the other.
_ROW_BYTES = 256
_CHANNELS = 64
_WARPS = 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _turn(source_ptr, target_ptr, plane, channel, pixel, C: tl.constexpr):
    """Move a tile of a map `[C, plane]`."""
    mask = (channel < C)[:, None] & (pixel < plane)[None, :]
    value = tl.load(source_ptr + (channel.to(tl.int64) * plane)[:, None] + pixel[None, :], mask=mask)  # [C, P]
    mask = (pixel < plane)[:, None] & (channel < C)[None, :]
    tl.store(target_ptr + (pixel.to(tl.int64) * C)[:, None] + channel[None, :], tl.trans(value), mask=mask)


@triton.jit(do_not_specialize=["images"])
def _turning_kernel(
    sources,
    targets,
    planes,
    images,
    C: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """A program moves CHANNELS by PIXELS; levels, images, stretches of pixels and channels come in this order.

    Args:
        planes: Pixels of each level times 16, which spares compiling anew (see `pyramid_arguments`).
        VECTOR: Values in 16 bytes.
        ALIGNED: Whether all maps begin at multiples of 16 bytes.
    """
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0)
    level = tl.zeros((), tl.int32)
    for i in tl.static_range(len(planes) - 1):
        tiles = images * tl.cdiv(planes[i] // 16, PIXELS) * blocks
        beyond = (level == i) & (tile >= tiles)
        tile = tl.where(beyond, tile - tiles, tile)
        level = tl.where(beyond, i + 1, level)
    plane = (select(level, planes) // 16).to(tl.int32)
    channel = tile % blocks * CHANNELS + tl.arange(0, CHANNELS)
    stretches = tl.cdiv(plane, PIXELS)
    pixel = tile // blocks % stretches * PIXELS + tl.arange(0, PIXELS)
    image = (tile // (blocks * stretches)).to(tl.int64)
    source_ptr = select(level, sources)
    target_ptr = select(level, targets) + image * plane * C
    if ALIGNED and C % VECTOR == 0:
        target_ptr = tl.multiple_of(target_ptr, 16)
    # Rows of a source are aligned where `plane` is a multiple of VECTOR, which Triton sees of a product with it.
    whole = plane // VECTOR * VECTOR
    if ALIGNED and whole == plane:
        _turn(tl.multiple_of(source_ptr + image * whole * C, 16), target_ptr, whole, channel, pixel, C)
    else:
        _turn(source_ptr + image * plane * C, target_ptr, plane, channel, pixel, C)


def to_channels_last(features: Sequence[Tensor]) -> list[Tensor]:
    """The features in channels_last memory: those that are already, themselves; others, copied bit by bit.

    Args:
        features: `[N, C, H_l, W_l]` for each level, of the same N, C, dtype and device.

    Returns:
        The same shapes and values.
    """
    ours = [_is_ours(feature) for feature in features]
    turned = iter(_turned([f for f, own in zip(features, ours, strict=True) if own]) if any(ours) else ())
    return [
        next(turned) if own else feature.contiguous(memory_format=torch.channels_last)
        for feature, own in zip(features, ours, strict=True)
    ]


def _is_ours(feature: Tensor) -> bool:
    """Whether the kernel turns a map, and not torch: `return False` gives all of them back to torch."""
    dense = feature.is_contiguous() and not feature.is_contiguous(memory_format=torch.channels_last)
    return dense and feature.numel() > 0


def _turned(sources: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous maps of one shape but for their size, in channels_last memory."""
    n, c = sources[0].shape[:2]
    targets = [torch.empty_like(source, memory_format=torch.channels_last) for source in sources]
    itemsize = sources[0].itemsize
    integer = _INTEGERS[itemsize]
    channels, pixels = min(_CHANNELS, next_power_of_2(c)), _ROW_BYTES // itemsize
    tiles = sum(cdiv(source[0, 0].numel(), pixels) for source in sources) * n * cdiv(c, channels)
    with current_device(sources[0].device):
        _turning_kernel[(tiles,)](
            sources=tuple(source.view(integer) for source in sources),
            targets=tuple(target.view(integer) for target in targets),
            planes=tuple(16 * source[0, 0].numel() for source in sources),
            images=n,
            C=c,
            VECTOR=max(16 // itemsize, 1),
            ALIGNED=all(x.data_ptr() % 16 == 0 for x in [*sources, *targets]),
            CHANNELS=channels,
            PIXELS=pixels,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return targets
