"""Mask R-CNN (He et al., 2017), from a resized picture to boxes, classes and masks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import boxes as B
from .backbone import ResNet, build_backbone
from .config import DetectionConfig, MaskRCNNConfig
from .fpn import FPN, LastMap
from .heads import BoxHead, MaskHead, select_detections
from .pooling import pool
from .rpn import RPN
from .trimming import live_rows

__all__ = ["Detections", "MaskRCNN", "no_mark", "to_original"]


class Detections(NamedTuple):
    """What the model finds: capacity D, rows beyond ``count`` are zero.

    D is the config's ``max_detections``; where plain torch's ops run on a CPU, not compiled, the largest count.

    Attributes:
        boxes: float32 [B, D, 4], xyxy in the original picture.
        scores: float32 [B, D], falling.
        labels: int64 [B, D], 0 is the first foreground class.
        mask_logits: [B, D, m, m] of each detection's class, over its box; None without a mask head.
        count: int64 [B].
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_logits: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody misses


def no_mark(stage: str) -> None:
    """Nobody is timing."""


class MaskRCNN(nn.Module):
    """The network and the selection around it, one line per arrow of the paper."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.channels, config.fpn) if config.fpn else LastMap()
        channels = config.fpn.channels if config.fpn else self.backbone.channels[-1]
        self.rpn = RPN(channels, config.rpn, config.anchors, config.strides)
        if isinstance(self.backbone, ResNet) and config.backbone.last_on_rois:
            channels = self.backbone.roi_channels
        self.box_head = BoxHead(channels, config.num_classes, config.box_head)
        self.mask_head = MaskHead(channels, config.num_classes, config.mask_head) if config.mask_head else None
        self.rois_at_once: int | None = None  # of each picture, for the stage that sees RoIs; None: all
        for name, values in (("mean", config.input.mean), ("std", config.input.std)):
            levels = torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, levels, persistent=False)

    def forward(
        self,
        image: Tensor,
        image_sizes: Tensor,
        original_sizes: Tensor,
        *,
        detection: DetectionConfig | None = None,
        mark: Callable[[str], None] = no_mark,
    ) -> Detections:
        """Detect on a batch.

        Args:
            image: float32 RGB in 0..255, [B, 3, H, W]; with a feature pyramid, height and width are multiples of 32.
            image_sizes: int64 [B, 2], the valid (height, width) of each; what lies beyond is ignored.
            original_sizes: int64 [B, 2], (height, width) of the pictures before they were resized.
            detection: other thresholds than the config's.
            mark: called with a stage's name when it is done.
        """
        pyramid, boxes, found = self.find_boxes(
            image, image_sizes, original_sizes, detection=detection or self.config.detection, mark=mark
        )
        if self.mask_head is None:
            return found
        masks = self.find_masks(pyramid, boxes, found.labels, found.count)
        mark("masks")
        return found._replace(mask_logits=masks)

    def find_boxes(
        self,
        image: Tensor,
        image_sizes: Tensor,
        original_sizes: Tensor,
        *,
        detection: DetectionConfig,
        mark: Callable[[str], None] = no_mark,
    ) -> tuple[list[Tensor], Tensor, Detections]:
        """All but the masks; arguments as in :meth:`forward`.

        Returns:
            The pyramid, the boxes in the network's frame [B, D, 4], and the detections without masks.
        """
        padded_size = (image.shape[2], image.shape[3])
        pyramid = self.fpn(self.backbone(self.normalize(image, image_sizes)))
        mark("backbone")
        logits, deltas = self.rpn(pyramid)
        feature_sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
        proposals, count = self.rpn.select(logits, deltas, feature_sizes, padded_size, image_sizes)
        mark("proposals")
        proposals = proposals[:, : live_rows(count, proposals.shape[1])]
        pooled = self.pool(pyramid, proposals, count, self.config.box_head.resolution)  # [B, R, C, 7, 7]
        class_logits, box_deltas = (x.unflatten(0, pooled.shape[:2]) for x in self.box_head(pooled.flatten(0, 1)))
        boxes, scores, labels, _ = select_detections(class_logits, box_deltas, proposals, count, image_sizes, detection)
        boxes, original, scores, labels, count = to_original(boxes, scores, labels, image_sizes, original_sizes)
        mark("boxes")
        live = live_rows(count, boxes.shape[1])
        found = Detections(original[:, :live], scores[:, :live], labels[:, :live], None, count)
        return pyramid, boxes[:, :live], found

    def find_masks(self, pyramid: list[Tensor], boxes: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Mask logits [B, D, m, m] of boxes [B, D, 4] in the network's frame, and their labels [B, D]."""
        assert self.mask_head is not None
        assert self.config.mask_head is not None
        pooled = self.pool(pyramid, boxes, count, self.config.mask_head.resolution)  # [B, D, C, 14, 14]
        return self.mask_head(pooled.flatten(0, 1), labels.flatten()).unflatten(0, labels.shape)

    def normalize(self, image: Tensor, image_sizes: Tensor) -> Tensor:
        """Normalised picture in the dtype of the weights, zero where there is padding; [B, 3, H, W]."""
        below = torch.arange(image.shape[2], device=image.device) >= image_sizes[:, :1]  # [B, H]
        beside = torch.arange(image.shape[3], device=image.device) >= image_sizes[:, 1:]  # [B, W]
        padding = (below[:, :, None] | beside[:, None, :])[:, None]
        x = ((image - self.mean) / self.std).masked_fill_(padding, 0.0)
        return x.to(self.box_head.classes.weight.dtype)

    def pool(self, pyramid: list[Tensor], rois: Tensor, count: Tensor, resolution: int) -> Tensor:
        """RoI features of ``rois`` [B, R, 4] from the four finest levels -> [B, R, C, resolution, resolution].

        Where a stage of the trunk sees them, it has twice the channels and half the resolution.
        """
        if not self.config.backbone.last_on_rois:
            return self._pooled(pyramid, rois, count, resolution)
        batch, rows = rois.shape[:2]
        at_once = self.rois_at_once
        if at_once is None or rows <= at_once:
            pooled = self._pooled(pyramid, rois, count, resolution)
            return self.on_rois(pooled.flatten(0, 1)).unflatten(0, (batch, rows))
        features = rois.new_empty(0)
        for first in range(0, rows, at_once):
            pooled = self._pooled(pyramid, rois[:, first : first + at_once], count - first, resolution)
            seen = self.on_rois(pooled.flatten(0, 1))  # channels_last, and so is what holds all
            if first == 0:
                features = seen.new_empty(batch, rows, *seen.shape[2:], seen.shape[1]).movedim(4, 2)
            features[:, first : first + at_once] = seen.unflatten(0, pooled.shape[:2])
        return features

    def _pooled(self, pyramid: list[Tensor], rois: Tensor, count: Tensor, resolution: int) -> Tensor:
        return pool(pyramid[:4], self.config.strides[:4], rois, count, resolution, self.config.pool)

    def on_rois(self, pooled: Tensor) -> Tensor:
        """What the heads see of pooled features [N, C, h, w]: those, or what the stages make of them that see RoIs."""
        return self.backbone.on_rois(pooled) if isinstance(self.backbone, ResNet) else pooled


def to_original(
    boxes: Tensor, scores: Tensor, labels: Tensor, image_sizes: Tensor, original_sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Add the boxes in the original frame, drop detections that are empty there, keeping the order, and count.

    Returns:
        boxes in the network's frame [B, D, 4], boxes in the original one, scores, labels [B, D], count [B].
    """
    scale = (original_sizes.float() / image_sizes).flip(1).repeat(1, 2)  # [B, 4]
    original = B.clip(boxes * scale[:, None], original_sizes)
    empty = (original[..., 2:] <= original[..., :2]).any(-1)  # padding rows are
    last, order = empty.to(torch.int32).sort(dim=1, stable=True)  # of uint8 older ONNX Runtimes have no comparison
    four = order[..., None].expand(-1, -1, 4)
    keep = last == 0
    return (
        boxes.gather(1, four) * keep[..., None],
        original.gather(1, four) * keep[..., None],
        scores.gather(1, order) * keep,
        labels.gather(1, order) * keep,
        keep.sum(1),
    )
