"""The inference graph as ONNX can say it: the model's own layers, folded, and a selection in standard operators."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.inference.graph import fold
from ..engine.model.config import DetectionConfig
from ..engine.model.heads import BoxHead, candidates
from ..engine.model.mask_rcnn import MaskRCNN, to_original
from ..kernels import segmented_nms
from ..kernels.registration import register
from ..kernels.roi_pooling import level_thresholds

__all__ = ["ExportGraph", "select_by_class"]


@register("trimask::pool_live")
def _pool_live(
    features: Sequence[Tensor],
    boxes: Tensor,
    counts: Tensor,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """`trimask::pyramid_roi_align` of the boxes `[B, R, 4]` that are there alone.

    Returns:
        `[n, C, h, w]`, in any order, and int64 `[n]`, which of the `B * R` boxes each belongs to.
    """
    pooled = torch.ops.trimask.pyramid_roi_align(
        features, boxes, counts, scales, thresholds, output_size, sampling_ratio, aligned, "avg"
    )
    rows = (torch.arange(boxes.shape[1]) < counts[:, None]).flatten().nonzero()[:, 0]
    return pooled.flatten(0, 1)[rows].contiguous(), rows


@_pool_live.register_fake
def _(
    features: Sequence[Tensor],
    boxes: Tensor,
    counts: Tensor,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    live = torch.library.get_ctx().new_dynamic_size()
    channels = features[0].shape[1]
    return features[0].new_empty(live, channels, *output_size), boxes.new_empty(live, dtype=torch.int64)


class ExportGraph(nn.Module):
    """The contract of the exported file; ``docs/export.md`` is its text.

    Args:
        model: left as it is.
        detection: thresholds and capacity.
        dtype: of weights and features; boxes, scores and what RoIAlign does stay in float32.
        masks: whether to make them, where the model has a mask head.
        compact: run the heads on the boxes that there are, rather than on as many as there is room for. That makes
            shapes that depend on the data.

    Raises:
        ValueError: a model that pools otherwise than by RoIAlign's average.
    """

    def __init__(
        self, model: MaskRCNN, detection: DetectionConfig, dtype: torch.dtype, *, masks: bool, compact: bool
    ) -> None:
        super().__init__()
        if model.config.pool.quantized or model.config.pool.maximum:
            raise ValueError(
                "pool: expected RoIAlign by the average, which alone is exported, got RoIPool or a maximum"
            )
        self.model = fold(model, dtype)
        self.box_head = _BoxHead(self.model.box_head, model.config.box_head.resolution)
        self.detection = detection
        self.masks = masks and model.mask_head is not None
        self.compact = compact

    def forward(self, image: Tensor, image_sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """Arguments as in :meth:`MaskRCNN.forward`, whose steps these are.

        Returns:
            num_detections int64 [B], boxes float32 [B, D, 4], scores float32 [B, D], labels int64 [B, D] with -1 beyond
            the count and, with masks, their probabilities float32 [B, D, m, m].
        """
        model, config = self.model, self.model.config
        image_sizes = image_sizes.clamp(min=1)  # by which is divided: a request of 0 has no detections either
        pyramid = model.fpn(model.backbone(model.normalize(image, image_sizes)))
        logits, deltas = model.rpn(pyramid)
        sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
        proposals, count = model.rpn.select(logits, deltas, sizes, (image.shape[2], image.shape[3]), image_sizes)
        scores, moves = self._per_box(self.box_head, pyramid, proposals, count, config.box_head.resolution)
        boxes, scores, labels, _ = select_by_class(scores, moves, proposals, count, image_sizes, self.detection)
        boxes, original, scores, labels, count = to_original(boxes, scores, labels, image_sizes, original_sizes)
        there = torch.arange(labels.shape[1]) < count[:, None]  # [B, D]
        outputs = count, original, scores, torch.where(there, labels, -1)
        if not self.masks:
            return outputs
        assert config.mask_head is not None
        chosen = labels.flatten()

        def masks(features: Tensor, rows: Tensor | None) -> tuple[Tensor]:
            assert model.mask_head is not None
            return (model.mask_head(features, chosen if rows is None else chosen[rows]).float().sigmoid(),)

        (probabilities,) = self._per_box(masks, pyramid, boxes, count, config.mask_head.resolution)
        return *outputs, probabilities * there[..., None, None]

    def _per_box(
        self,
        head: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
        pyramid: list[Tensor],
        boxes: Tensor,
        count: Tensor,
        resolution: int,
    ) -> list[Tensor]:
        """What a head makes of the features of boxes [B, R, 4], each [B, R, ...].

        Args:
            head: takes features [n, C, h, w], and which of the boxes they belong to, None for all of them.
            count: int64 [B], boxes that are there.
        """
        if not self.compact:
            pooled = self.model.pool(pyramid, boxes, count, resolution)
            return [x.unflatten(0, boxes.shape[:2]) for x in head(pooled.flatten(0, 1), None)]
        config, strides = self.model.config.pool, self.model.config.strides[:4]
        thresholds = level_thresholds(
            strides, config.canonical_size, config.canonical_level, config.level_epsilon, config.epsilon_inside_log
        )
        pooled, rows = torch.ops.trimask.pool_live(
            pyramid[:4],
            boxes,
            count,
            [1 / stride for stride in strides],
            thresholds,
            [resolution, resolution],
            config.sampling_ratio,
            config.aligned,
        )
        pooled = self.model.on_rois(pooled)
        capacity = boxes.shape[0] * boxes.shape[1]
        whole = [x.new_zeros(capacity, *x.shape[1:]).index_put((rows,), x) for x in head(pooled, rows)]
        return [x.unflatten(0, boxes.shape[:2]) for x in whole]


class _BoxHead(nn.Module):
    """A :class:`BoxHead` whose first linear layer takes features in the order that ONNX pools them in."""

    def __init__(self, head: BoxHead, resolution: int) -> None:
        super().__init__()
        self.convs, self.fcs, self.classes, self.deltas = head.convs, head.fcs, head.classes, head.deltas
        self.average = head.average
        if head.average:  # of no order
            return
        for layer in [*self.fcs[:1]] or [self.classes, self.deltas]:
            assert isinstance(layer, nn.Linear)
            cells = layer.weight.unflatten(1, (resolution, resolution, -1))  # [out, h, w, C]
            layer.weight = nn.Parameter(cells.permute(0, 3, 1, 2).flatten(1).contiguous(), requires_grad=False)

    def forward(self, features: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.convs(features)
        x = x.mean((2, 3)) if self.average else x.flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return self.classes(x), self.deltas(x).unflatten(1, (-1, 4))


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
    best = F.pad(best, (0, missing), value=-1.0)
    index = F.pad(index, (0, missing))
    kept = best >= 0
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * kept[..., None]
    return boxes, best.clamp(min=0), index // each * kept, kept.sum(1)
