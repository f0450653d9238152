"""Pasting of square masks into pictures, as one registered op.

`PasteRule` holds the formula and the coordinate convention, `cpu.masks` the computation. On a CPU it reads the tensors'
own memory; on a device that has no kernel of its own, the small inputs travel to the CPU and the masks travel back.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu import masks as host
from .paste_rule import PasteRule

__all__ = ["paste_masks"]


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor as numpy sees it: its own memory on a CPU, float32 for the half precisions."""
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy(force=True)


def check_inputs(probabilities: Tensor, boxes: Tensor) -> None:
    """Raise a `ValueError` for masks and boxes that do not belong together."""
    host.check_shapes(probabilities, boxes)
    if boxes.device != probabilities.device:
        raise ValueError(f"boxes: expected on {probabilities.device} as the probabilities, got on {boxes.device}")


@torch.library.custom_op("trimask::paste_masks", mutates_args=())
def _paste_masks(
    probabilities: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    padding: int,
    integer_boxes: bool,
    threshold: float,
    inclusive: bool,
    packed: bool,
) -> Tensor:
    rule = PasteRule(padding, integer_boxes, threshold, inclusive)
    masks = host.paste_masks(as_array(probabilities), as_array(boxes), (height, width), rule=rule, packed=packed)
    return torch.from_numpy(masks).to(probabilities.device)


@_paste_masks.register_fake
def _(
    probabilities: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    padding: int,
    integer_boxes: bool,
    threshold: float,
    inclusive: bool,
    packed: bool,
) -> Tensor:
    columns = (width + 7) // 8 if packed else width
    shape = (probabilities.shape[0], height, columns)
    return probabilities.new_empty(shape, dtype=torch.uint8 if packed else torch.bool)


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], *, rule: PasteRule, packed: bool = False
) -> Tensor:
    """Paste square masks into empty pictures.

    Args:
        probabilities: `[N, m, m]`, computed in float64 if they are float64, else in float32. A value that is not
            finite counts as 0.
        boxes: `[N, 4]`, continuous xyxy in pixels. A box that is not finite or has no positive width and height
            gives an empty mask.
        size: Height and width of the picture.
        rule: Which pixels belong to a mask.
        packed: Whether eight pixels share a byte: bit k (of value 2^k) of byte j is column 8 j + k, as
            `numpy.packbits(..., bitorder="little")` writes it.

    Returns:
        bool `[N, H, W]`, or uint8 `[N, H, ceil(W / 8)]`.

    Raises:
        ValueError: For a shape, a size or a device that does not fit.
    """
    check_inputs(probabilities, boxes)
    height, width = size
    if height < 0 or width < 0:
        raise ValueError(f"size: expected a height and a width of at least 0, got {tuple(size)}")
    return _paste_masks(
        probabilities, boxes, height, width, rule.padding, rule.integer_boxes, rule.threshold, rule.inclusive, packed
    )
