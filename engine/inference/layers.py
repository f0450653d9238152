"""The layers of the inference copy of a model: what takes the place of convolutions on each kind of device."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cpu.winograd import transform_weight, winograd_conv
from ...kernels.dispatch import use_triton
from ...kernels.epilogue import add_bias, conv_relu, has_conv_relu, pool_bias_relu
from ..model.layers import ConvNorm

__all__ = ["BiasedConv", "BiasedDeconv", "BiasedPool", "FusedLinear", "Unchanged", "folded", "has_onednn", "lean"]


class FusedConv(nn.Module):
    """A :class:`ConvNorm` on a CPU as one oneDNN primitive: convolution, bias, residual and activation.

    On a trunk this saves a third of the time against convolution, addition and rectifier one by one: each of those
    passes over a large map that no cache holds.
    """

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.folded()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.activation, self.limits = {
            type(None): ("none", []),
            nn.ReLU: ("relu", []),
            nn.ReLU6: ("hardtanh", [0.0, 6.0]),
        }[type(layer.activation)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return operation(x, self.weight, self.bias, *self.geometry, self.activation, self.limits, "")
        then = None if self.activation == "none" else self.activation
        return operation.binary(x, residual, self.weight, self.bias, *self.geometry, "add", 1.0, then, self.limits, "")


class RectifiedConv(nn.Module):
    """A :class:`ConvNorm` with a rectifier on an NVIDIA GPU as one kernel of cuDNN."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.folded()
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry: Any = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_relu(x, self.weight, self.bias, residual, **self.geometry)


class BiasedConv(nn.Module):
    """A :class:`ConvNorm` on a GPU as a convolution and one kernel for the rest; a smaller residual is enlarged."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        self.conv = layer.folded()
        assert self.conv.bias is not None
        self.bias, self.conv.bias = self.conv.bias, None
        self.relu = layer.activation is not None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return add_bias(self.conv(x), self.bias, residual, relu=self.relu)


class BiasedDeconv(nn.Module):
    """The mask head's transposed convolution on a GPU, with one kernel for bias and rectifier."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        assert layer.bias is not None
        self.weight, self.bias, self.stride = layer.weight, layer.bias, layer.stride

    def forward(self, x: Tensor) -> Tensor:
        return add_bias(F.conv_transpose2d(x, self.weight, None, self.stride), self.bias, relu=True)


class BiasedPool(nn.Module):
    """What follows the first convolution of a ResNet on a GPU, as one kernel."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return pool_bias_relu(x, self.bias)


class Unchanged(nn.Module):
    """Leaves a coarse map to the layer that adds it."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return x


class WinogradConv(nn.Module):
    """A :class:`ConvNorm` of a 3x3 convolution on a CPU, with 4 times fewer multiplications."""

    def __init__(self, layer: ConvNorm) -> None:
        super().__init__()
        conv = layer.folded()
        assert conv.bias is not None
        self.weight, self.bias = nn.Parameter(transform_weight(conv.weight)), conv.bias
        self.limits = {
            type(None): (-torch.inf, torch.inf),
            nn.ReLU: (0.0, torch.inf),
            nn.ReLU6: (0.0, 6.0),
        }[type(layer.activation)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return winograd_conv(x, self.weight, self.bias, *self.limits)
        x = winograd_conv(x, self.weight, self.bias, -torch.inf, torch.inf)
        return x.add_(residual).clamp_(*self.limits)


class FusedLinear(nn.Module):
    """A linear layer on a CPU by oneDNN: 1.1 times the speed of the default BLAS for the box head's thousand RoIs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has the operations, which its own compiler uses, for this dtype on this processor."""
    wanted = ("_convolution_pointwise", "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in wanted)):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def lean(layer: ConvNorm, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """What takes the layer's place."""
    if device.type == "cpu":
        if dtype == torch.float32 and layer.suits_winograd:
            return WinogradConv(layer)
        if has_onednn(dtype):
            return FusedConv(layer)
    if device.type == "cuda" and type(layer.activation) in (nn.ReLU, type(None)):
        # Of 3 channels, as the stem has, cuDNN's fused kernels are far slower than its others (pytorch#68506).
        plain = layer.conv.groups == 1 and layer.conv.in_channels % 8 == 0
        if layer.activation is not None and plain and has_conv_relu(device, dtype):
            return RectifiedConv(layer)
        if use_triton(device):
            return BiasedConv(layer)
    return folded(layer)


def folded(layer: ConvNorm) -> nn.Module:
    """The layer with its norm in the convolution."""
    layer.conv, layer.norm = layer.folded(), None
    return layer
