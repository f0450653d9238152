"""What follows a convolution, for inference: bias, residual, rectifier and pooling in one pass over the map.

Torch runs each as a kernel of its own, and on the large maps of a trunk each takes as long as reading and writing the
map does. Two ways out, of which a layer takes the first that there is:

- `conv_relu`: cuDNN computes ``relu(conv(x) + bias + residual)`` in one kernel, in half precision on an NVIDIA GPU.
- `add_bias`: ``x + bias + residual``, rectified or not, in one pass; the residual may be a coarser map, enlarged to its
  nearest neighbours as a feature pyramid does. `pool_bias_relu`: ``relu(max_pool(x, 3, stride 2, padding 1) + bias)``,
  which is the pooled map of ``relu(x + bias)``, since both rise with x.

Sums are float32 and rounded once.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import use_triton
from .registration import register

__all__ = ["CONV_RELU", "add_bias", "conv_relu", "has_conv_relu", "pool_bias_relu"]


def has_conv_relu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `conv_relu` is one kernel on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    # cuDNN has bfloat16 from Ampere on; torch's own convolutions go another way before, these do not.
    return dtype == torch.float16 or (dtype == torch.bfloat16 and _has_bfloat16(device))


@cache
def _has_bfloat16(device: torch.device) -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@register("trimask::conv_relu")
def _conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    cudnn = torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    # Fewer than 2^31 values: torch's own convolutions divide such work, or leave cuDNN; these do neither.
    if cudnn and has_conv_relu(x.device, x.dtype) and x.numel() * max(len(weight) / x.shape[1], 1) < 2**31:
        geometry = (stride, padding, dilation, groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    out = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return (out if residual is None else out.add_(residual)).relu_()


@_conv_relu.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


@register("trimask::add_bias")
def _add_bias(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if use_triton(x.device):
        from .gpu.epilogue import add_bias as run

        return run(x, bias, residual, relu)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide)
    if residual is not None:
        out = out + F.interpolate(residual.to(wide), size=x.shape[2:], mode="nearest")
    out = out + bias.to(wide)[:, None, None]
    return (out.relu() if relu else out).to(x.dtype, memory_format=torch.channels_last)


@_add_bias.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@register("trimask::pool_bias_relu")
def _pool_bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    if use_triton(x.device):
        from .gpu.epilogue import pool_bias_relu as run

        return run(x, bias)
    return _add_bias(F.max_pool2d(x, 3, 2, 1), bias, None, True)


@_pool_bias_relu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    shape = (*x.shape[:2], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)


CONV_RELU = torch.ops.trimask.conv_relu


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """relu(conv(x) + bias + residual), without gradients.

    Args:
        x: [B, C, H, W] in channels_last memory.
        weight: [O, C / groups, h, w] in channels_last memory, and ``bias`` [O].
        residual: like the output, [B, O, H', W'] in channels_last memory.
    """
    return _conv_relu(x, weight, bias, residual, stride, padding, dilation, groups)


def add_bias(x: Tensor, bias: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """x + bias + residual, then perhaps max(0, .); without gradients.

    Args:
        x: [B, C, H, W], best in channels_last memory.
        bias: [C].
        residual: [B, C, h, w]; where it has another height or width, it is brought to that of ``x`` by
            `torch.nn.functional.interpolate` with ``mode="nearest"``.

    Returns:
        [B, C, H, W] in channels_last memory.
    """
    return _add_bias(x, bias, residual, relu)


def pool_bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """relu(max_pool2d(x, 3, stride=2, padding=1) + bias), without gradients.

    Args:
        x: [B, C, H, W], best in channels_last memory.
        bias: [C].

    Returns:
        [B, C, ceil(H / 2), ceil(W / 2)] in channels_last memory.
    """
    return _pool_bias_relu(x, bias)
