"""The one building block of trunk, pyramid and heads."""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.cpu.winograd import differentiable_conv, worth_it
from .config import BoxHeadConfig, FPNConfig, MaskHeadConfig, ResNetConfig

__all__ = ["ConvNorm", "norms_of", "relu"]

WINOGRAD_CHANNELS = 128  # from which on it is faster than a direct convolution
WINOGRAD_PIXELS = 4  # of a batch for each channel, in training, where each step transforms the weights three times


def _trains_by_winograd(x: Tensor, weight: Tensor) -> bool:
    images, _, height, width = x.shape
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and images * height * width >= WINOGRAD_PIXELS * max(weight.shape[:2])
        and worth_it(images, height, width, min(weight.shape[:2]))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Affine(NamedTuple):
    """What a norm with frozen statistics does to each channel, computed from tensors as they were at some versions."""

    scale: Tensor
    shift: Tensor
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, known: "_Affine | None") -> "_Affine":
        """``known`` where nothing has changed since: a norm that does not learn costs no launches in a step."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        constant = not (
            torch.compiler.is_compiling() or any(x.requires_grad or x.is_inference() for x in tensors)
        )  # a compiler's tensors, and those of inference mode, have no versions
        versions = tuple(x._version for x in tensors) if constant else ()
        if known and versions and versions == known.versions and all(map(operator.is_, tensors, known.tensors)):
            return known
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return cls(scale, norm.bias - norm.running_mean * scale, tensors, versions)


def norms_of(config: ResNetConfig | FPNConfig | BoxHeadConfig | MaskHeadConfig) -> Any:
    """The arguments of a :class:`ConvNorm` that say which norm a part of the model has."""
    there = isinstance(config, ResNetConfig) or config.norm
    return {"norm_eps": config.norm_eps if there else None, "norm_groups": config.norm_groups}


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


class ConvNorm(nn.Module):
    """Convolution, then whatever of these there is: batch or group norm, the sum with a residual, an activation.

    Everything between two convolutions lives here, so that inference can fold and fuse it in one place.
    "Same" padding for odd kernels; a bias exactly where there is no norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm_eps: float | None = None,
        norm_groups: int = 0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=norm_eps is None)
        self.norm: nn.BatchNorm2d | nn.GroupNorm | None = None
        if norm_eps is not None:
            self.norm = (
                nn.GroupNorm(norm_groups, outputs, norm_eps) if norm_groups else nn.BatchNorm2d(outputs, norm_eps)
            )
        self.activation = activation
        self._affine: _Affine | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(self.norm, nn.BatchNorm2d) and not self.norm.training and torch.is_grad_enabled():
            x = self._convolve(x, *self._scaled(self.norm))
        else:
            x = self._convolve(x, self.conv.weight, self.conv.bias)
            if self.norm is not None:
                x = self.norm(x)
        if residual is not None:
            x = x + residual
        return x if self.activation is None else self.activation(x)

    def _scaled(self, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Weight and bias of a convolution that is also a norm with frozen statistics, for training.

        The norm would pass over the whole map, and its backward again; the weights are few. Its own weight and bias
        learn all the same, where they are to.
        """
        affine = _Affine.of(norm, self._affine)
        self._affine = affine if affine.versions else None
        return self.conv.weight * affine.scale[:, None, None, None], affine.shift

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.suits_winograd and _trains_by_winograd(x, weight):
            return differentiable_conv(x, weight, weight.new_zeros(len(weight)) if bias is None else bias)
        return self.conv._conv_forward(x, weight, bias)

    @property
    def suits_winograd(self) -> bool:
        """Whether Winograd's convolution computes it, and on a CPU in float32 is the faster one."""
        conv = self.conv
        return (
            conv.kernel_size == (3, 3)
            and conv.stride == conv.dilation == (1, 1)
            and conv.groups == 1
            and min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
        )

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """One convolution with a bias that equals convolution and batch norm, if there is one, in evaluation mode.

        Folded in float64, so that the only rounding is the last one.
        """
        old = self.conv
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            old.dilation,  # type: ignore[arg-type]
            old.groups,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        assert new.bias is not None
        weight = old.weight.double()
        bias = torch.zeros_like(weight[:, 0, 0, 0]) if old.bias is None else old.bias.double()
        if self.norm is not None:
            assert isinstance(self.norm, nn.BatchNorm2d)
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            scale = self.norm.weight.double() * (self.norm.running_var.double() + self.norm.eps).rsqrt()
            weight = weight * scale[:, None, None, None]
            bias = self.norm.bias.double() + (bias - self.norm.running_mean.double()) * scale
        new.weight.copy_(weight)
        new.bias.copy_(bias)
        return new
