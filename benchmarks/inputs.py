"""Inputs of the size that COCO pictures give, the same on every device and in every run; and what they cost."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.roi_pooling import level_thresholds

__all__ = [
    "SIZE",
    "STRIDES",
    "class_scores",
    "dtype_name",
    "kinds_of_boxes",
    "levels_of",
    "pixels_under",
    "proposals",
    "smooth_masks",
]

STRIDES = (4, 8, 16, 32)  # of the levels P2..P5
SIZE = (800, 1333)  # height and width of a COCO picture inside the network


def proposals(count: int, rng: torch.Generator, objects: int, spread: float, size: tuple[int, int]) -> Tensor:
    """Boxes `[count, 4]` spread about objects of 20 to 400 pixels in a picture of (height, width)."""
    limit = torch.tensor([size[1], size[0]])
    side = 20 * 20 ** torch.rand(objects, 1, generator=rng) * torch.randn(objects, 2, generator=rng).mul(0.3).exp()
    centre = torch.rand(objects, 2, generator=rng) * limit
    of = torch.randint(objects, (count,), generator=rng)
    side = side[of] * torch.randn(count, 2, generator=rng).mul(spread).exp()
    centre = centre[of] + spread * side * torch.randn(count, 2, generator=rng)
    corners = torch.stack([centre - side / 2, centre + side / 2], dim=1)  # [count, 2, 2]
    return torch.minimum(corners.clamp(min=0), limit).flatten(1)


def kinds_of_boxes(count: int) -> dict[str, Tensor]:
    """At IoU 0.7 most of the proposals survive, all of the sparse boxes, and few of the crowd."""
    rng = torch.Generator().manual_seed(0)
    rows = int(count**0.5) + 1
    cell = SIZE[1] / rows
    corner = torch.cartesian_prod(torch.arange(rows), torch.arange(rows))[:count] * cell
    return {
        "proposals": proposals(count, rng, count // 8, 0.12, SIZE),
        "sparse": torch.cat([corner, corner + cell * (0.6 + 0.6 * torch.rand(count, 2, generator=rng))], dim=1),
        "crowd": proposals(count, rng, 20, 0.1, SIZE),
    }


def class_scores(count: int, classes: int, rng: torch.Generator) -> Tensor:
    """Probabilities `[count, classes]` as a box head gives them: mostly background, some sure of a class."""
    logits = torch.randn(count, classes + 1, generator=rng)
    logits[:, 0] += 4
    logits[torch.arange(count), 1 + torch.randint(classes, (count,), generator=rng)] += 5
    return logits.softmax(1)[:, 1:].contiguous()


def smooth_masks(count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smooth masks `[count, 28, 28]`, and their boxes `[count, 4]` in a picture of (height, width)."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 5, 5, generator=rng)
    masks = (3 * F.interpolate(coarse, size=(28, 28), mode="bicubic")).sigmoid()[:, 0]
    return masks, proposals(count, rng, count, 0.1, size)


def dtype_name(dtype: torch.dtype) -> str:
    """As rows name it: "float16"."""
    return str(dtype).removeprefix("torch.")


def levels_of(boxes: Tensor) -> Tensor:
    """Boxes [K, 4] -> int64 [K], the place of each one's level in `STRIDES`."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    thresholds = torch.tensor(level_thresholds(STRIDES)[1:], device=boxes.device)
    return torch.bucketize((width * height).sqrt(), thresholds, right=True)


def pixels_under(boxes: Tensor, size: tuple[int, int]) -> int:
    """How many pixels of the levels of pictures of (height, width) RoIAlign must read at least.

    They lie under boxes [B, R, 4], each on its own level.
    """
    count = 0
    for image in boxes:
        levels = levels_of(image)
        for level, stride in enumerate(STRIDES):
            seen = torch.zeros(size[0] // stride, size[1] // stride, dtype=torch.bool)
            for x1, y1, x2, y2 in (image[levels == level] / stride).tolist():
                seen[max(int(y1 - 0.5), 0) : math.ceil(y2 + 0.5), max(int(x1 - 0.5), 0) : math.ceil(x2 + 0.5)] = True
            count += int(seen.sum())
    return count
