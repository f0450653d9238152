"""Feature pyramid network (Lin et al., 2017), and what stands in its place where there is none."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .config import FPNConfig
from .layers import ConvNorm, norms_of

__all__ = ["FPN", "LastMap"]


class Nearest(nn.Module):
    """A coarse map [B, C, h, w] at the (height, width) of a finer one."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size=(size[0], size[1]), mode="nearest")


class FPN(nn.Module):
    """Four maps of any depth -> five of ``channels``; the fifth subsamples the fourth."""

    def __init__(self, inputs: Sequence[int], config: FPNConfig) -> None:
        super().__init__()
        norm = norms_of(config)
        self.lateral = nn.ModuleList(ConvNorm(depth, config.channels, 1, **norm) for depth in inputs)
        self.output = nn.ModuleList(ConvNorm(config.channels, config.channels, 3, **norm) for _ in inputs)
        self.enlarge: nn.Module = Nearest()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged: list[Tensor] = []  # coarsest first
        for lateral, x in zip(reversed(self.lateral), reversed(maps), strict=True):
            above = self.enlarge(merged[-1], x.shape[2:]) if merged else None
            merged.append(lateral(x, above))
        pyramid = [output(x) for output, x in zip(self.output, reversed(merged), strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]


class LastMap(nn.Module):
    """A trunk's coarsest map as a pyramid of one level."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [maps[-1]]
