"""The inference graph as ONNX can say it: the model's own layers, folded, and a selection in standard operators."""

import torch
from torch import Tensor, nn

from ..engine.inference.graph import fold
from ..engine.model.config import DetectionConfig
from ..engine.model.heads import candidates
from ..engine.model.mask_rcnn import MaskRCNN
from ..kernels import segmented_nms

__all__ = ["ExportGraph", "select_by_class"]


class ExportGraph(nn.Module):
    """The contract of the exported file, version 1; ``docs/export.md`` is its text.

    Args:
        model: left as it is.
        detection: thresholds and capacity.
        dtype: of weights and features; boxes, scores and what RoIAlign does stay in float32.
        masks: whether to make them, where the model has a mask head.
        compact: run the mask head on the detections that there are, rather than on as many as there is room for. That
            makes a shape that depends on the data.
    """

    def __init__(
        self, model: MaskRCNN, detection: DetectionConfig, dtype: torch.dtype, *, masks: bool, compact: bool
    ) -> None:
        super().__init__()
        self.model = fold(model, dtype)
        self.detection = detection
        self.masks = masks and model.mask_head is not None
        self.compact = compact

    def forward(self, image: Tensor, image_sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """Arguments as in :meth:`MaskRCNN.forward`.

        Returns:
            num_detections int64 [B], boxes float32 [B, D, 4], scores float32 [B, D], labels int64 [B, D] with -1 beyond
            the count and, with masks, their probabilities float32 [B, D, m, m].
        """
        pyramid, boxes, found = self.model.find_boxes(
            image, image_sizes, original_sizes, detection=self.detection, select=select_by_class
        )
        there = torch.arange(found.labels.shape[1]) < found.count[:, None]  # [B, D]
        labels = torch.where(there, found.labels, -1)
        outputs = found.count, found.boxes, found.scores, labels
        if not self.masks:
            return outputs
        return *outputs, self._masks(pyramid, boxes, found.labels, found.count, there)

    def _masks(self, pyramid: list[Tensor], boxes: Tensor, labels: Tensor, count: Tensor, there: Tensor) -> Tensor:
        if not self.compact:
            logits = self.model.find_masks(pyramid, boxes, labels, count)
            return logits.float().sigmoid() * there[..., None, None]
        head, config = self.model.mask_head, self.model.config.mask_head
        assert head is not None
        assert config is not None
        pooled = self.model.pool(pyramid, boxes, count, config.resolution).flatten(0, 1)  # [B * D, C, 14, 14]
        rows = there.flatten().nonzero()[:, 0]  # [n]
        masks = head(pooled[rows], labels.flatten()[rows]).float().sigmoid()  # [n, m, m]
        cells = masks.shape[-1]
        empty = masks.new_zeros(labels.shape[0] * labels.shape[1], cells, cells)
        return empty.index_put((rows,), masks).unflatten(0, labels.shape)


def select_by_class(
    logits: Tensor, deltas: Tensor, proposals: Tensor, count: Tensor, image_sizes: Tensor, config: DetectionConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`..engine.model.heads.select_detections`, with a segment for each (picture, class).

    ONNX's suppression knows no labels. Apart from the order of equal scores the result is the same: what is among the
    best of a picture is among as many of its class.
    """
    boxes, scores = candidates(logits, deltas, proposals, image_sizes, config)
    batch, rows, classes = scores.shape
    boxes = boxes.expand(-1, -1, classes, -1).transpose(1, 2)  # [B, K, R, 4]
    scores = scores.transpose(1, 2)  # [B, K, R]
    each = min(config.max_detections, rows)
    keep, _ = segmented_nms(
        boxes.flatten(0, 1),
        scores.flatten(0, 1),
        config.nms_threshold,
        each,
        score_threshold=config.score_threshold,
        counts=count[:, None].expand(-1, classes).flatten(),
    )
    keep = keep.unflatten(0, (batch, classes))  # [B, K, each]
    row = keep.clamp(min=0)
    ranked = torch.where(keep >= 0, scores.gather(2, row), -1.0).flatten(1)
    boxes = boxes.gather(2, row[..., None].expand(-1, -1, -1, 4)).flatten(1, 2)  # [B, K * each, 4]
    best, index = ranked.topk(min(config.max_detections, classes * each))
    missing = config.max_detections - best.shape[1]
    best = nn.functional.pad(best, (0, missing), value=-1.0)
    index = nn.functional.pad(index, (0, missing))
    kept = best >= 0
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * kept[..., None]
    return boxes, best * kept, index // each * kept, kept.sum(1)
