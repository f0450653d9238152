"""Padded rows: left out where the host can know how many there are, without waiting for a device.

Everything per picture is a padded tensor with a count. A GPU computes the padding, or its kernels leave it out; on a
CPU it is cut off first.
"""

import torch
from torch import Tensor

from ...kernels.dispatch import use_triton

__all__ = ["compact", "live_rows", "may_trim"]


def may_trim(device: torch.device) -> bool:
    """Whether values on ``device`` are the host's for the asking, and shapes may depend on them."""
    return device.type == "cpu" and not use_triton(device) and not torch.compiler.is_compiling()


def live_rows(count: Tensor, capacity: int) -> int:
    """How many of ``capacity`` rows to compute: the largest count (at least one) where it may be known, else all."""
    if not may_trim(count.device):
        return capacity
    return max(1, min(capacity, int(count.max())))


def compact(there: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``there`` bool [B, R] and tensors [B, R, ...] as rows [N, ...]; only those that are there, where it may be known.

    At least one row is left, there or not, so that every layer that sees the rows has a gradient.
    """
    flat = tuple(x.flatten(0, 1) for x in (there, *tensors))
    if not may_trim(there.device) or bool(there.all()):
        return flat
    rows = flat[0].nonzero()[:, 0]
    if len(rows) == 0:
        return tuple(x[:1] for x in flat)
    return tuple(x.index_select(0, rows) for x in flat)
