"""The size that a picture gets before the network sees it. Needs no torch."""

import math

from ..model.config import ResizeConfig

__all__ = ["padded_size", "resized_size"]


def resized_size(size: tuple[int, int], config: ResizeConfig) -> tuple[int, int]:
    """The (height, width) of a picture of ``size`` after scaling; at least one pixel each way.

    The two roundings are those of ``GeneralizedRCNNTransform`` (torchvision) and ``ResizeShortestEdge`` (Detectron2).
    """
    short, long = min(size), max(size)
    if config.limit_second:
        sides = [float(config.min_size) if side == short else config.min_size / short * side for side in size]
        if max(sides) > config.max_size:
            shrink = config.max_size / max(sides)
            sides = [side * shrink for side in sides]
    else:
        scale = min(config.min_size / short, config.max_size / long)
        sides = [side * scale for side in size]
    new = [math.floor(side + 0.5 if config.round_half_up else side) for side in sides]
    return max(new[0], 1), max(new[1], 1)


def padded_size(sizes: list[tuple[int, int]], divisor: int) -> tuple[int, int]:
    """The smallest (height, width), both multiples of ``divisor``, that holds every one of ``sizes``."""
    height, width = (math.ceil(max(side) / divisor) * divisor for side in zip(*sizes, strict=True))
    return height, width
