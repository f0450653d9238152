"""Weights drawn from a seed that make an untrained network find things: unit activations, spread scores."""

import zlib

import torch
from torch import Tensor

__all__ = ["seeded_state"]


def seeded_state(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """New values for every float tensor of a torchvision state dict, each from its name and the seed."""
    return {name: _values(name, tensor, seed) for name, tensor in state.items()}


def _values(name: str, old: Tensor, seed: int) -> Tensor:
    if not old.is_floating_point():
        return old
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    normal = torch.randn(old.shape, generator=rng)
    uniform = torch.rand(old.shape, generator=rng)
    if name.endswith("running_var"):
        return 0.6 + 0.8 * uniform
    if name.endswith("running_mean"):
        return 0.1 * normal
    if name.endswith("bias"):
        return 0.05 * normal
    if old.dim() == 1:  # the gain of a norm; small at the end of a residual branch, or fifty blocks explode
        return (0.8 + 0.4 * uniform) * (0.3 if ".bn3." in name else 1.0)
    fan_in = old[0].numel()
    gain = 1.0
    if name.endswith(("bbox_pred.weight",)):
        gain = 0.3
    elif name.endswith("cls_score.weight"):
        gain = 1.5
    elif "inner_blocks" in name and name.endswith(".0.weight"):
        gain = 0.06  # the deep trunk's maps are far above unit scale
    return normal * (2 / fan_in) ** 0.5 * gain
