"""Inputs of the size that COCO pictures give, the same on every device and in every run."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SIZE", "STRIDES", "class_scores", "kinds_of_boxes", "proposals", "smooth_masks"]

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
