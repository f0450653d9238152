"""The conventions in which losses of the same name differ. Needs no torch."""

from dataclasses import dataclass
from typing import ClassVar

__all__ = ["TERMS", "LossConfig"]

TERMS = ("rpn_cls", "rpn_box", "cls", "box", "mask")  # what the losses are of, in the order of the network


@dataclass(frozen=True)
class LossConfig:
    """How the loss is made. The default is torchvision's, but for the crowds.

    Attributes:
        rpn_foreground, rpn_background: IoU from which on an anchor is foreground, and below which it is background.
        rpn_samples, rpn_positive: anchors to learn of a picture, and the largest share of foreground among them.
        rpn_beta: where the smooth L1 of the deltas turns from a parabola into a line; 0 is L1.
        rpn_mean: both terms are divided by the number of anchors sampled; otherwise by ``rpn_samples`` for every
            picture, also where fewer were found.
        pre_nms, post_nms: proposals in training; see :class:`RPNConfig`. With ``pre_nms`` None, 2000 of each level of
            a pyramid, 12000 of a single map.
        roi_foreground: IoU from which on a RoI is foreground; below, it is background.
        roi_samples, roi_positive, roi_beta: as those of the RPN, for the RoIs and the box head's deltas.
        add_objects: the objects' own boxes are RoIs, too.
        crowd_threshold: what would be background, but lies with more than this share of its area in a crowd's box, is
            not learned; with None, as both peers have it, crowds are as if nobody had marked them. A crowd is never
            an object.
        mask_aligned: whether RoIAlign cuts the masks with the half-pixel shift.
        mask_threshold: the share of an object from which on a cell of its mask is 1, else 0; with None, the share
            itself is learned.
    """

    TORCHVISION: ClassVar["LossConfig"]
    DETECTRON2: ClassVar["LossConfig"]

    rpn_foreground: float = 0.7
    rpn_background: float = 0.3
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    rpn_beta: float = 1 / 9
    rpn_mean: bool = True
    pre_nms: int | None = None
    post_nms: int = 2000
    roi_foreground: float = 0.5
    roi_samples: int = 512
    roi_positive: float = 0.25
    roi_beta: float = 1 / 9
    add_objects: bool = True
    crowd_threshold: float | None = 0.7
    mask_aligned: bool = False
    mask_threshold: float | None = None

    def __post_init__(self) -> None:
        def check(good: bool, name: str, expected: str) -> None:
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("rpn_samples", "roi_samples"):
            check(getattr(self, name) >= 1, name, "at least 1")
        check(self.pre_nms is None or self.pre_nms >= 1, "pre_nms", "at least 1")
        least = 0 if self.add_objects else 1  # without proposals the objects' own boxes are left
        check(self.post_nms >= least, "post_nms", f"at least {least}")
        for name in ("rpn_foreground", "rpn_background", "rpn_positive", "roi_foreground", "roi_positive"):
            check(0 <= getattr(self, name) <= 1, name, "a number in 0..1")
        for name in ("crowd_threshold", "mask_threshold"):
            check(getattr(self, name) is None or 0 <= getattr(self, name) <= 1, name, "a number in 0..1, or none")
        for name in ("rpn_beta", "roi_beta"):
            check(getattr(self, name) >= 0, name, "at least 0")
        check(self.rpn_background <= self.rpn_foreground, "rpn_background", f"at most {self.rpn_foreground}")

    def anchors_before_nms(self, levels: int) -> int:
        """How many anchors of each level may become proposals."""
        return self.pre_nms or (2000 if levels > 1 else 12000)


LossConfig.TORCHVISION = LossConfig(crowd_threshold=None)
LossConfig.DETECTRON2 = LossConfig(
    rpn_beta=0.0,
    rpn_mean=False,
    post_nms=1000,
    roi_beta=0.0,
    crowd_threshold=None,
    mask_aligned=True,
    mask_threshold=0.5,
)
