"""Preprocessing: uint8 pictures of any size -> one batch, resized, normalised, padded with zeros, channels last.

What decides a pixel, on every device. `antialias` and `quantize` stand for what the published models were trained with:

- Neither (torchvision): pixel ``i`` of the result reads ``max((i + .5) * scale - .5, 0)``, with ``scale = in / out`` in
  float32, bilinearly between its two neighbours on each axis, as `torch.nn.functional.interpolate` does.
- `quantize` (MMDetection): OpenCV's ``INTER_LINEAR`` on bytes to the last bit: the same two neighbours, with weights
  rounded to 2048ths and bits dropped after each axis.
- `antialias` and `quantize` (Pillow, Detectron2): Pillow's ``BILINEAR`` to the last bit: a triangle as wide as the
  scale, weights in float64 rounded to 22 fractional bits, uint8 after each axis. Always across and then down: Pillow
  does so too, but from version 13 on not where the height loses more than twice as many pixels as the width
  (python-pillow/Pillow#9549), which changes some of them by a level.
- `antialias`: the same triangle on floats, as `torch.nn.functional.interpolate` with ``antialias=True``.

A picture that has its size already is not touched. Then ``(x - mean) / std`` in float32, each operation rounded once;
last of all the rounding to the dtype asked for. Pixels right of and below a picture are zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import resizing as _host
from .dispatch import use_triton
from .registration import register

__all__ = ["preprocess"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@register("trimask::preprocess")
def _preprocess(
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
    if use_triton(pictures[0].device):
        from .gpu.resizing import preprocess as run
    else:
        run = _host.preprocess
    return run(pictures, sizes, height, width, antialias, quantize, flip, mean, std, dtype)


@_preprocess.register_fake
def _(
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
    return pictures[0].new_empty((len(pictures), height, width, 3), dtype=dtype).permute(0, 3, 1, 2)


def preprocess(
    pictures: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    *,
    antialias: bool = False,
    quantize: bool = False,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    channel_order: str = "rgb",
) -> Tensor:
    """Resize, normalise and pad pictures into a batch.

    Args:
        pictures: uint8 `[H, W, 3]`, `[3, H, W]` (where both fit, it is the former) or grey `[H, W]`, of any strides and
            at least one pixel each; all on one device.
        sizes: (height, width) of each in the batch, at least one pixel.
        padded_size: (height, width) of the batch, at least that of every picture.
        antialias: Whether the filter widens as a picture shrinks.
        quantize: Whether resized pictures are whole levels, by OpenCV's or, with `antialias`, Pillow's arithmetic.
        mean: Of the channels, red first, on the scale 0..255.
        std: The same; not 0.
        dtype: float32, float16 or bfloat16.
        channel_order: "rgb", or "bgr" for pictures whose channels come in that order.

    Returns:
        RGB `[B, 3, height, width]` in channels_last memory, 0..255 unless normalised.

    Raises:
        ValueError: For a shape, dtype, device or number that does not fit, and for no pictures.
    """
    pictures = list(pictures)  # a batch in one tensor too
    if not pictures or len(pictures) != len(sizes):
        raise ValueError(f"sizes: expected one for each of {len(pictures)} (at least 1) pictures, got {len(sizes)}")
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f'channel_order: expected "rgb" or "bgr", got {channel_order!r}')
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {_DTYPES}, got {dtype}")
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(f"mean, std: expected three numbers each, no std of 0, got {list(mean)} and {list(std)}")
    height, width = padded_size
    for h, w in sizes:
        if not (1 <= h <= height and 1 <= w <= width):
            raise ValueError(f"sizes: expected between (1, 1) and padded_size {tuple(padded_size)}, got {(h, w)}")
    views = [_channels_last(picture) for picture in pictures]
    for view in views:
        if view.device != views[0].device:
            raise ValueError(f"pictures: expected all on {views[0].device}, got one on {view.device}")
    flat = [side for size in sizes for side in size]
    flip = channel_order == "bgr"
    return _preprocess(views, flat, height, width, antialias, quantize, flip, list(mean), list(std), dtype)


def _channels_last(picture: Tensor) -> Tensor:
    """The picture as `[H, W, 3]`."""
    view = picture
    if view.dim() == 2:
        view = view[..., None].expand(-1, -1, 3)
    elif view.dim() == 3 and view.shape[2] != 3:
        view = view.permute(1, 2, 0)
    if view.dim() != 3 or view.shape[2] != 3 or 0 in view.shape or view.dtype != torch.uint8:
        raise ValueError(
            "pictures: expected uint8 [H, W, 3], [3, H, W] or [H, W] with pixels, "
            f"got {picture.dtype} {list(picture.shape)}"
        )
    return view
