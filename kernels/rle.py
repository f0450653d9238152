"""COCO run lengths of pasted masks straight from the square ones, as one registered op.

A picture's pixels are read down its columns; the runs are the lengths of its stretches of zeros and ones in turn, zeros
first. Computed as in `paste_masks`, with no dense mask in between and results of a fixed shape.
"""

import numpy as np
import torch
from torch import Tensor

from .cpu import masks as host
from .paste_rule import PasteRule
from .pasting import as_array, check_inputs

__all__ = ["masks_to_rle"]


@torch.library.custom_op("trimask::masks_to_rle", mutates_args=())
def _masks_to_rle(
    probabilities: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    padding: int,
    integer_boxes: bool,
    threshold: float,
    inclusive: bool,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    rule = PasteRule(padding, integer_boxes, threshold, inclusive)
    areas = sizes.cpu().double().prod(1)  # in int64 the product of two long sides wraps
    if (areas >= 1 << 31).any():
        raise ValueError(f"sizes: expected pictures of fewer than 2^31 pixels, got one of {int(areas.max())}")
    counts = host.mask_runs(as_array(probabilities), as_array(boxes), as_array(sizes), rule=rule)
    runs = np.zeros((len(counts), capacity), np.int32)
    for row, values in zip(runs, counts, strict=True):
        row[: len(values)] = values[:capacity]
    lengths = np.array([len(values) for values in counts], np.int32)
    return torch.from_numpy(runs).to(boxes.device), torch.from_numpy(lengths).to(boxes.device)


@_masks_to_rle.register_fake
def _(
    probabilities: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    padding: int,
    integer_boxes: bool,
    threshold: float,
    inclusive: bool,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    masks = probabilities.shape[0]
    runs = probabilities.new_empty((masks, capacity), dtype=torch.int32)
    return runs, probabilities.new_empty((masks,), dtype=torch.int32)


def masks_to_rle(
    probabilities: Tensor, boxes: Tensor, sizes: Tensor | tuple[int, int], *, rule: PasteRule, capacity: int
) -> tuple[Tensor, Tensor]:
    """The run lengths of pasted masks.

    Args:
        probabilities: `[N, m, m]`, as in `paste_masks`.
        boxes: `[N, 4]`, as in `paste_masks`.
        sizes: int `[N, 2]`, height and width of each mask's picture, or one such pair for all. A picture holds fewer
            than 2^31 pixels.
        rule: Which pixels belong to a mask.
        capacity: How many runs there is room for.

    Returns:
        runs: int32 `[N, capacity]`, padded with 0.
        lengths: int32 `[N]`, how many runs each mask has. Where that exceeds the capacity, the first ones are there
            and the rest are not: ask again with more room.

    Raises:
        ValueError: For a shape, a size, a capacity or a device that does not fit.
    """
    check_inputs(probabilities, boxes)
    if capacity < 0:
        raise ValueError(f"capacity: expected an int of at least 0, got {capacity}")
    if not isinstance(sizes, Tensor):
        sizes = torch.stack([boxes.new_full(boxes.shape[:1], side, dtype=torch.int64) for side in sizes], 1)
    if tuple(sizes.shape) != (boxes.shape[0], 2) or sizes.device != boxes.device:
        raise ValueError(
            f"sizes: expected [{boxes.shape[0]}, 2] on {boxes.device}, got {list(sizes.shape)} on {sizes.device}"
        )
    return _masks_to_rle(
        probabilities, boxes, sizes, rule.padding, rule.integer_boxes, rule.threshold, rule.inclusive, capacity
    )
