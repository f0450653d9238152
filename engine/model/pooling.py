"""RoI features of a fixed size: RoIAlign, and the operations that it was compared with (Mask R-CNN, table 2c)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import pyramid_roi_align, roi_pool
from ...kernels.roi_pooling import level_thresholds
from . import boxes as B
from .config import PoolConfig

__all__ = ["pool"]


def pool(
    maps: Sequence[Tensor], strides: Sequence[int], rois: Tensor, count: Tensor, resolution: int, config: PoolConfig
) -> Tensor:
    """Pool every RoI from the map that fits its size.

    Args:
        maps: [B, C, H, W] each, finest first.
        strides: pixels of the picture per pixel of each.
        rois: [B, R, 4], in pixels of the picture.
        count: int64 [B], how many RoIs of a picture are there.
        resolution: bins along each axis.
        config: how.

    Returns:
        [B, R, C, resolution, resolution], zeros beyond the count.
    """
    if config.quantized:
        thresholds = level_thresholds(
            strides, config.canonical_size, config.canonical_level, config.level_epsilon, config.epsilon_inside_log
        )
        return _roi_pool(maps, strides, rois, count, resolution, thresholds)
    return pyramid_roi_align(
        maps,
        rois,
        strides,
        resolution,
        sampling_ratio=config.sampling_ratio,
        aligned=config.aligned,
        mode="max" if config.maximum else "avg",
        canonical_size=config.canonical_size,
        canonical_level=config.canonical_level,
        level_epsilon=config.level_epsilon,
        epsilon_inside_log=config.epsilon_inside_log,
        counts=count,
    )


def _roi_pool(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    rois: Tensor,
    count: Tensor,
    resolution: int,
    thresholds: Sequence[float],
) -> Tensor:
    """RoIPool of every RoI on every map, to zeros on all but its own: shapes do not depend on who belongs where."""
    batch, rows = rois.shape[:2]
    image = torch.arange(batch, dtype=rois.dtype, device=rois.device)[:, None].expand(-1, rows)
    there = torch.arange(rows, device=rois.device) < count[:, None]
    side = B.area(rois).clamp(min=0).sqrt()
    total: Tensor | None = None
    for x, stride, low, high in zip(maps, strides, thresholds, [*thresholds[1:], torch.inf], strict=True):
        own = there & (side >= low) & (side < high)
        boxes = torch.where(own[..., None], rois, torch.nan)  # one that is not finite gives zeros
        picks = torch.cat([image[..., None], boxes], -1).flatten(0, 1)  # [B * R, 5]
        pooled = roi_pool(x, picks, resolution, 1 / stride)
        total = pooled if total is None else total + pooled
    assert total is not None
    return total.unflatten(0, (batch, rows))
