"""The size that a picture gets before the network sees it. Needs no torch."""

import math

from ..model.config import ResizeConfig

__all__ = ["padded_size", "resized_size"]


def resized_size(size: tuple[int, int], config: ResizeConfig) -> tuple[int, int]:
    """The (height, width) of a picture of ``size`` after scaling; at least one pixel each way.

    The two roundings are those of ``GeneralizedRCNNTransform`` (torchvision) and ``ResizeShortestEdge`` (Detectron2).
    """
    short, long = min(size), max(size)
    if config.round_half_up:
        scale = config.min_size / short
        if scale * long > config.max_size:
            scale = config.max_size / long
        new = [int(side * scale + 0.5) for side in size]
    else:
        scale = min(config.min_size / short, config.max_size / long)
        new = [math.floor(side * scale) for side in size]
    return max(new[0], 1), max(new[1], 1)


def padded_size(sizes: list[tuple[int, int]], divisor: int) -> tuple[int, int]:
    """The smallest (height, width), both multiples of ``divisor``, that holds every one of ``sizes``."""
    height, width = (math.ceil(max(side) / divisor) * divisor for side in zip(*sizes, strict=True))
    return height, width
