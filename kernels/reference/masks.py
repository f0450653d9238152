"""Pasted masks and run lengths, pixel by pixel and run by run, in the dtype that comes in."""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..paste_rule import PasteRule

__all__ = ["paste_masks", "paste_values", "runs_of_mask"]


def paste_values(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], *, rule: PasteRule) -> Tensor:
    """What each pixel reads from its mask, by the four cells around it, before any threshold: `[N, H, W]`.

    Takes finite probabilities `[N, m, m]` and finite boxes `[N, 4]` with positive sides, of one dtype.
    """
    padded = F.pad(probabilities, [rule.padding] * 4)  # [N, c, c]
    cells = padded.shape[-1]
    values = torch.zeros(len(boxes), *size, dtype=boxes.dtype)
    for value, mask, box in zip(values, padded, boxes, strict=True):
        at = []
        for low, high, pixels in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
            middle, side = (low + high) / 2, (high - low) * cells / probabilities.shape[-1]
            low, high = middle - side / 2, middle + side / 2
            if rule.integer_boxes:
                low, high = low.trunc(), high.trunc() + 1
            at.append((torch.arange(pixels, dtype=box.dtype) + 0.5 - low) / (high - low) * cells - 0.5)
        v, u = torch.meshgrid(*at, indexing="ij")  # [H, W]
        for row in (v.floor(), v.floor() + 1):
            for column in (u.floor(), u.floor() + 1):
                inside = (row >= 0) & (row < cells) & (column >= 0) & (column < cells)
                cell = mask[row.clamp(0, cells - 1).long(), column.clamp(0, cells - 1).long()]
                value += torch.where(inside, cell * (1 - (v - row).abs()) * (1 - (u - column).abs()), 0)
    return values


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], *, rule: PasteRule) -> Tensor:
    """bool `[N, H, W]`."""
    values = paste_values(probabilities, boxes, size, rule=rule)
    return values >= rule.threshold if rule.inclusive else values > rule.threshold


def runs_of_mask(mask: Tensor) -> list[int]:
    """COCO's counts of a dense mask `[H, W]`: down its columns, zeros first."""
    stretches = [(value, len(list(run))) for value, run in groupby(mask.T.flatten().tolist())]
    return [0] * (bool(stretches) and bool(stretches[0][0])) + [length for _, length in stretches]
