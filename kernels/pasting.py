"""From the logits of square masks to pictures, as two registered ops.

`PasteRule` holds the formula and the coordinate convention, `gpu.pasting` and `cpu.masks` the computation. The latter
reads the tensors' own memory on a CPU; from a device without Triton, the small inputs travel to the CPU and the masks
travel back.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu import masks as host
from .dispatch import use_triton
from .paste_rule import PasteRule
from .registration import register

__all__ = ["mask_probabilities", "paste_masks"]


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor as numpy sees it: its own memory on a CPU, float32 for the half precisions."""
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy(force=True)


def check_inputs(probabilities: Tensor, boxes: Tensor) -> None:
    """Raise a `ValueError` for masks and boxes that do not belong together."""
    host.check_shapes(probabilities, boxes)
    if boxes.device != probabilities.device:
        raise ValueError(f"boxes: expected on {probabilities.device} as the probabilities, got on {boxes.device}")


@register("trimask::paste_masks")
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
    if use_triton(probabilities.device):
        from .gpu import pasting as gpu

        return gpu.paste_masks(probabilities, boxes, (height, width), rule=rule, packed=packed)
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


@register("trimask::mask_probabilities")
def _mask_probabilities(logits: Tensor, labels: Tensor | None) -> Tensor:
    if use_triton(logits.device):
        from .gpu import pasting as gpu

        return gpu.mask_probabilities(logits, labels)
    if labels is None:
        return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    known = (labels >= 0) & (labels < logits.shape[1])
    if labels.device.type == "cpu" and not known.all():
        raise ValueError(f"labels: expected classes of 0 to {logits.shape[1] - 1}, got {labels[~known].tolist()}")
    chosen = logits[torch.arange(len(labels), device=labels.device), torch.where(known, labels, 0).long()]
    probabilities = chosen.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    return torch.where(known[:, None, None], probabilities, 0)


@_mask_probabilities.register_fake
def _(logits: Tensor, labels: Tensor | None) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=dtype)


def mask_probabilities(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """The sigmoid of square masks, of the chosen class where there are several.

    Args:
        logits: Floating point `[N, C, m, m]`, or `[N, m, m]` without labels; any strides.
        labels: Integers `[N]`, the class of each. A class out of range gives zeros on a GPU, where checking it would
            mean waiting for the device.

    Returns:
        `[N, m, m]`, float64 of float64 logits, else float32. Gradients do not pass.

    Raises:
        ValueError: For a shape, a dtype or a device that does not fit; on a CPU, for a label out of range.
    """
    expected = 3 if labels is None else 4
    if logits.dim() != expected or logits.shape[-1] != logits.shape[-2] or not logits.is_floating_point():
        shape = "[N, m, m] without labels" if labels is None else "[N, C, m, m] with labels"
        raise ValueError(f"logits: expected floating point {shape}, got {logits.dtype} {list(logits.shape)}")
    if labels is None:
        return _mask_probabilities(logits.detach()[:, None], None)
    if tuple(labels.shape) != (logits.shape[0],) or labels.is_floating_point() or labels.device != logits.device:
        raise ValueError(
            f"labels: expected integers [{logits.shape[0]}] on {logits.device}, "
            f"got {labels.dtype} {list(labels.shape)} on {labels.device}"
        )
    return _mask_probabilities(logits.detach(), labels)
