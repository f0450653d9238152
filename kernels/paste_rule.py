"""How a small mask becomes pixels: the two published rules, as values of one formula.

A mask of m x m cells is padded by `padding` cells of zero on every side, its box grows with it about its centre, and
pixel i of the picture, whose centre lies at i + 0.5, reads the mask at

    u = (i + 0.5 - x1) / (x2 - x1) * (m + 2 * padding) - 0.5 - padding

bilinearly, with zeros outside. With `integer_boxes` the grown box is first cut to whole pixels, and its last pixel
belongs to it (`x2 - x1 + 1` pixels wide). The value is compared with `threshold`, by `>=` where `inclusive`, else `>`.

Sources: `paste_masks_in_image` of torchvision.models.detection.roi_heads; `paste_masks_in_image` of
detectron2.layers.mask_ops.
"""

from dataclasses import dataclass
from typing import ClassVar

__all__ = ["PasteRule"]


@dataclass(frozen=True)
class PasteRule:
    """What decides the pixels of a pasted mask.

    Args:
        padding: Cells of zero around the mask before it is resampled, at least 0.
        integer_boxes: Whether the padded box is cut to whole pixels, towards zero, both ends included.
        threshold: The probability that makes a pixel part of the mask, above 0 (all else is 0) and at most 1.
        inclusive: Whether a value equal to the threshold is inside.

    Raises:
        ValueError: For a negative padding, or a threshold outside (0, 1].
    """

    TORCHVISION: ClassVar["PasteRule"]
    DETECTRON2: ClassVar["PasteRule"]

    padding: int
    integer_boxes: bool
    threshold: float = 0.5
    inclusive: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding: expected an int of at least 0, got {self.padding}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: expected a number in (0, 1], got {self.threshold}")


PasteRule.TORCHVISION = PasteRule(padding=1, integer_boxes=True, inclusive=False)
PasteRule.DETECTRON2 = PasteRule(padding=0, integer_boxes=False, inclusive=True)
