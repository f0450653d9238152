"""COCO run lengths of pasted masks straight from the square ones, as one registered op.

A picture's pixels are read down its columns; the runs are the lengths of its stretches of zeros and ones in turn, zeros
first. Computed as in `paste_masks`, with no dense mask in between and results of a fixed shape.
"""

from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from .cpu import masks as host
from .dispatch import use_triton
from .paste_rule import PasteRule
from .pasting import as_array, check_inputs
from .registration import register

__all__ = ["masks_to_rle"]


@register("trimask::masks_to_rle")
def _masks_to_rle(
    probabilities: Tensor,
    boxes: Tensor,
    sizes: Tensor | None,
    padding: int,
    integer_boxes: bool,
    threshold: float,
    inclusive: bool,
    capacity: int,
    height: int = 0,
    width: int = 0,
) -> tuple[Tensor, Tensor]:
    rule = PasteRule(padding, integer_boxes, threshold, inclusive)
    if sizes is None:
        _check_pixels(height * width)
    if use_triton(probabilities.device):
        from .gpu import rle as gpu

        pictures = (height, width) if sizes is None else sizes
        return gpu.masks_to_rle(probabilities, boxes, pictures, rule=rule, capacity=capacity)
    if sizes is not None:
        areas = sizes.cpu().double().prod(1)  # in int64 the product of two long sides wraps
        _check_pixels(max(areas.tolist(), default=0))
    on_host = np.array([height, width]) if sizes is None else sizes.cpu().numpy()
    counts = host.paste_to_runs(as_array(probabilities), as_array(boxes), on_host, rule=rule)
    runs = np.zeros((len(counts), capacity), np.int32)
    for row, values in zip(runs, counts, strict=True):
        row[: len(values)] = values[:capacity]
    lengths = np.array([len(values) for values in counts], np.int32)
    return torch.from_numpy(runs).to(boxes.device), torch.from_numpy(lengths).to(boxes.device)


def _check_pixels(most: float) -> None:
    if most >= 1 << 31:
        raise ValueError(f"sizes: expected pictures of fewer than 2^31 pixels, got one of {int(most)}")


@_masks_to_rle.register_fake
def _(
    probabilities: Tensor,
    boxes: Tensor,
    sizes: Tensor | None,
    padding: int,
    integer_boxes: bool,
    threshold: float,
    inclusive: bool,
    capacity: int,
    height: int = 0,
    width: int = 0,
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
            than 2^31 pixels. Where a tensor on a GPU has more, or a negative side, which nobody waits to find out, that
            mask has no run, not even one of zeros: its length is 0.
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
    arguments = (rule.padding, rule.integer_boxes, rule.threshold, rule.inclusive, capacity)
    if not isinstance(sizes, Tensor):
        if len(sizes) != 2 or not all(isinstance(side, (Integral, torch.SymInt)) for side in sizes):
            raise ValueError(f"sizes: expected a height and a width, or a tensor [N, 2], got {tuple(sizes)}")
        height, width = sizes
        if height < 0 or width < 0:
            raise ValueError(f"sizes: expected a height and a width of at least 0, got {tuple(sizes)}")
        return _masks_to_rle(probabilities, boxes, None, *arguments, height, width)
    wanted = (boxes.shape[0], 2)
    if tuple(sizes.shape) != wanted or sizes.device != boxes.device or sizes.is_floating_point():
        raise ValueError(
            f"sizes: expected integers {list(wanted)} on {boxes.device}, "
            f"got {sizes.dtype} {list(sizes.shape)} on {sizes.device}"
        )
    return _masks_to_rle(probabilities, boxes, sizes, *arguments)
