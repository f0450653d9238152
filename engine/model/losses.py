"""The multi-task loss of Mask R-CNN: L = L_rpn_cls + L_rpn_box + L_cls + L_box + L_mask.

torchvision and Detectron2 agree on the terms and differ in a dozen conventions, all of which are values of
:class:`LossConfig`. Shapes are fixed, so that a GPU is never waited for; a CPU leaves out rows that are not there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from . import boxes as B
from .heads import BOX_WEIGHTS
from .loss_config import LossConfig
from .mask_rcnn import MaskRCNN
from .mask_targets import from_masks, from_polygons
from .matching import ANCHORS, IGNORED, OBJECTS, PROPOSALS, match, random_keys, sample
from .rpn import BOX_WEIGHTS as RPN_WEIGHTS
from .trimming import compact, live_rows

__all__ = ["LossConfig", "Targets", "losses"]

PAIRS = 1 << 25  # of boxes and objects that are compared at once, 128 MiB an array; a single picture may have more


class Targets(NamedTuple):
    """The objects of a batch in the frame of the network's input, padded to a common G of at least 1.

    Boxes without extent are left out, as padding is. Tensors are on the model's device.

    Attributes:
        boxes: float32 [B, G, 4].
        labels: int64 [B, G], 0 is the first foreground class; padding 0.
        crowd: bool [B, G], a region to ignore rather than an object.
        count: int64 [B], rows that are there, crowds included.
        masks: uint8 0/1 [B, G, H, W], at the size of the padded input; None without masks, or with polygons.
        polygons: by picture and object, float [P, 2] as (x, y); on the host, and looked at where there are no masks.
            Detectron2's other way of cutting masks, and the only part of the loss for which a GPU is waited for.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody misses
    masks: Tensor | None = None
    polygons: Sequence[Sequence[Sequence[NDArray[np.floating]]]] | None = None


def losses(
    model: MaskRCNN,
    image: Tensor,
    image_sizes: Tensor,
    targets: Targets,
    config: LossConfig | None = None,
    *,
    seeds: Tensor | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The terms ``rpn_cls``, ``rpn_box``, ``cls``, ``box`` and ``mask`` (with a mask head); their sum is minimised.

    Every parameter gets a gradient, if of zeros, also from a batch without objects. Terms are float32 under autocast.

    Several processes with a part of a batch each learn what one would of the whole, if each picture has the seed that
    it has there, ``average`` is the mean over the processes, and so are the gradients.

    Args:
        model: in the mode to train in.
        image, image_sizes: as in :meth:`MaskRCNN.forward`.
        targets: the objects.
        config: the conventions; ``LossConfig()`` by default.
        seeds: int64 [B], of what is sampled at random in each picture, on the model's device; by default torch's own
            generator draws them.
        average: the mean over processes of float32 [3], how many anchors, RoIs and foreground RoIs were sampled, by
            which terms are divided. Called once, without gradients. By default this process is alone.

    Returns:
        a scalar for each term.

    Raises:
        ValueError: for targets that do not fit the pictures, or the model.
    """
    _check(model, image, targets, seeds)
    config = config or LossConfig()
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(image),), device=image.device)
    padded = (image.shape[2], image.shape[3])
    objects = _Objects.of(targets)

    pyramid = model.fpn(model.backbone(model.normalize(image, image_sizes)))
    logits, deltas = model.rpn(pyramid)
    sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
    anchors = torch.cat([model.rpn.anchors.grid(level, size, padded) for level, size in enumerate(sizes)])  # [N, 4]

    with torch.no_grad():
        before = config.anchors_before_nms(len(pyramid))
        training = replace(model.config.rpn, pre_nms=before, post_nms=config.post_nms)
        proposals, count = model.rpn.select(logits, deltas, sizes, padded, image_sizes, config=training)
        proposals = proposals[:, : live_rows(count, proposals.shape[1])]
        candidates = len(anchors), proposals.shape[1], objects.boxes.shape[1]
        anchor_keys, *roi_keys = random_keys(seeds, *zip((ANCHORS, PROPOSALS, OBJECTS), candidates, strict=True))
        rois = _sample_rois(proposals, count, objects, config, roi_keys)

    sampled, sums = _rpn_losses(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, objects, config, anchor_keys)
    counts = torch.stack([sampled.sum(), rois.there.sum(), rois.foreground.sum()]).float()
    if average is not None:
        counts = average(counts)
    anchor_count, roi_count, positive_count = torch.where(counts > 0, counts, 1.0)
    if not config.rpn_mean:
        anchor_count = torch.full_like(anchor_count, len(image) * config.rpn_samples)

    sums |= _box_losses(model, pyramid, rois, config)
    if model.mask_head is not None:
        sums["mask"] = _mask_loss(model, pyramid, rois.foremost(), targets, config)
    divisors = {
        "rpn_cls": anchor_count,
        "rpn_box": anchor_count,
        "cls": roi_count,
        "box": roi_count,
        "mask": positive_count,
    }
    return {name: total / divisors[name] for name, total in sums.items()}


class _Objects(NamedTuple):
    """The objects of a batch, and which of their rows are some."""

    boxes: Tensor  # [B, G, 4]
    labels: Tensor  # [B, G]
    real: Tensor  # bool [B, G], what can be learned
    crowd: Tensor  # bool [B, G]

    @classmethod
    def of(cls, targets: Targets) -> "_Objects":
        there = torch.arange(targets.boxes.shape[1], device=targets.count.device) < targets.count[:, None]
        there &= (targets.boxes[..., 2:] > targets.boxes[..., :2]).all(-1)
        used = live_rows(targets.count, targets.boxes.shape[1])
        rows = (targets.boxes, targets.labels, there & ~targets.crowd, there & targets.crowd)
        return cls(*(x[:, :used] for x in rows))

    def match(
        self, boxes: Tensor, foreground: float, background: float, allow_low_quality_matches: bool, crowd: float | None
    ) -> Tensor:
        """For boxes [N, 4] of every picture, or [B, N, 4] of each, their objects as in :func:`match`; [B, N]."""
        boxes = boxes.expand(len(self.boxes), -1, 4)
        at_once = max(1, PAIRS // (boxes.shape[1] * self.boxes.shape[1]))  # pictures
        parts = zip(*(x.split(at_once) for x in (boxes, self.boxes, self.real, self.crowd)), strict=True)
        return torch.cat(
            [
                match(
                    *part,
                    foreground=foreground,
                    background=background,
                    allow_low_quality_matches=allow_low_quality_matches,
                    crowd_threshold=crowd,
                )
                for part in parts
            ]
        )


def _rpn_losses(
    logits: Tensor,  # [B, N]
    deltas: Tensor,  # [B, N, 4]
    anchors: Tensor,  # [N, 4]
    objects: _Objects,
    config: LossConfig,
    keys: Tensor,  # [B, N]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which anchors are sampled, bool [B, S], and the sums of the terms over them."""
    matches = objects.match(
        anchors,
        config.rpn_foreground,
        config.rpn_background,
        allow_low_quality_matches=True,
        crowd=config.crowd_threshold,
    )
    positives = int(config.rpn_samples * config.rpn_positive)
    index, foreground, there = sample(matches, config.rpn_samples, positives, keys)  # [B, S]
    scores = _wide(logits.gather(1, index))
    classification = F.binary_cross_entropy_with_logits(scores, foreground.to(scores.dtype), reduction="none")
    index, foreground = index[:, :positives], foreground[:, :positives]
    wanted = _rows(objects.boxes, matches.gather(1, index).clamp(min=0))
    wanted = B.encode(wanted, anchors[index], RPN_WEIGHTS)  # [B, P, 4]
    regression = _box_loss(_wide(_rows(deltas, index)), wanted, foreground, config.rpn_beta)
    return there, {"rpn_cls": _sum(classification, there), "rpn_box": regression}


class _RoIs(NamedTuple):
    """Regions to learn from, the foreground first."""

    boxes: Tensor  # [B, S, 4]
    objects: Tensor  # int64 [B, S], the object's row, 0 for the background
    labels: Tensor  # int64 [B, S], of the object
    truth: Tensor  # [B, S, 4], its box
    foreground: Tensor  # bool [B, S]
    there: Tensor  # bool [B, S]
    positives: int  # how many of the first rows may be foreground

    def foremost(self) -> "_RoIs":
        """The foreground alone."""
        rows = min(self.positives, live_rows(self.foreground.sum(1), self.foreground.shape[1]))
        boxes, objects, labels, truth, foreground, _ = (x[:, :rows] for x in self[:6])
        return _RoIs(boxes, objects, labels, truth, foreground, foreground, rows)


def _sample_rois(
    proposals: Tensor,  # [B, R, 4]
    count: Tensor,  # [B]
    objects: _Objects,
    config: LossConfig,
    keys: list[Tensor],  # [B, R] and [B, G]
) -> _RoIs:
    key = keys[0]
    there = torch.arange(proposals.shape[1], device=count.device) < count[:, None]
    if config.add_objects:
        proposals, there = torch.cat([proposals, objects.boxes], 1), torch.cat([there, objects.real], 1)
        key = torch.cat(keys, 1)
    matches = objects.match(
        proposals,
        config.roi_foreground,
        config.roi_foreground,
        allow_low_quality_matches=False,
        crowd=config.crowd_threshold,
    )
    positives = int(config.roi_samples * config.roi_positive)
    index, foreground, there = sample(torch.where(there, matches, IGNORED), config.roi_samples, positives, key)
    used = live_rows(there.sum(1), there.shape[1])
    index, foreground, there = index[:, :used], foreground[:, :used], there[:, :used]
    matched = matches.gather(1, index).clamp(min=0)
    labels, truth = objects.labels.gather(1, matched), _rows(objects.boxes, matched)
    return _RoIs(_rows(proposals, index), matched, labels, truth, foreground, there, positives)


def _box_losses(model: MaskRCNN, pyramid: list[Tensor], rois: _RoIs, config: LossConfig) -> dict[str, Tensor]:
    """Sums over the RoIs."""
    pooled = model.pool(pyramid, rois.boxes, rois.there.sum(1), model.config.box_head.resolution)  # [B, S, C, 7, 7]
    there, features, labels, boxes, truth, foreground = compact(
        rois.there, pooled, rois.labels, rois.boxes, rois.truth, rois.foreground
    )
    logits, deltas = map(_wide, model.box_head(features))  # [N, K + 1], [N, K or 1, 4]
    classes = torch.where(foreground, labels, model.config.num_classes)
    classification = F.cross_entropy(logits, classes, reduction="none")
    own = torch.zeros_like(labels) if model.config.box_head.class_agnostic else labels
    wanted = B.encode(truth, boxes, BOX_WEIGHTS)
    regression = _box_loss(_rows(deltas, own[:, None])[:, 0], wanted, foreground, config.roi_beta)
    return {"cls": _sum(classification, there), "box": regression}


def _mask_loss(model: MaskRCNN, pyramid: list[Tensor], rois: _RoIs, targets: Targets, config: LossConfig) -> Tensor:
    """The sum over the RoIs."""
    assert model.mask_head is not None
    assert model.config.mask_head is not None
    side = model.config.mask_side
    assert side is not None
    pooled = model.pool(pyramid, rois.boxes, rois.there.sum(1), model.config.mask_head.resolution)  # [B, F, C, 14, 14]
    if targets.masks is not None:
        truth = from_masks(
            targets.masks,
            rois.objects,
            rois.boxes,
            rois.there,
            side,
            aligned=config.mask_aligned,
            threshold=config.mask_threshold,
        )
    else:
        assert targets.polygons is not None
        truth = from_polygons(targets.polygons, rois.objects, rois.boxes, rois.there, side)
    there, features, labels, truth = compact(rois.there, pooled, rois.labels, truth)
    if model.config.mask_head.softmax:
        own, background = model.mask_head.log_probabilities(features, labels)  # [N, m, m]
        loss = -(truth * own + (1 - truth) * background)
    else:
        logits = _wide(model.mask_head(features, labels))  # [N, m, m]
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return _sum(loss.mean((1, 2)), there)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, S, 4] of ``x`` [B, N, 4]."""
    return x.gather(1, index[..., None].expand(-1, -1, 4))


def _sum(loss: Tensor, there: Tensor) -> Tensor:
    """The sum over the rows that are there, whatever the others hold."""
    return torch.where(there, loss, 0.0).sum()


def _box_loss(deltas: Tensor, wanted: Tensor, foreground: Tensor, beta: float) -> Tensor:
    """Smooth L1, summed over the foreground; of other rows we want the deltas that they have."""
    wanted = torch.where(foreground[..., None], wanted, deltas.detach())
    return F.smooth_l1_loss(deltas, wanted, reduction="sum", beta=beta)


def _check(model: MaskRCNN, image: Tensor, targets: Targets, seeds: Tensor | None) -> None:
    batch, rows = len(image), targets.boxes.shape[1] if targets.boxes.dim() == 3 else 0
    wanted = {"boxes": (batch, max(rows, 1), 4), "labels": (batch, rows), "crowd": (batch, rows), "count": (batch,)}
    if targets.masks is not None:
        wanted["masks"] = (batch, rows, *image.shape[2:])
    for name, shape in wanted.items():
        if (found := tuple(getattr(targets, name).shape)) != shape:
            raise ValueError(f"targets.{name}: expected {list(shape)}, got {list(found)}")
    if seeds is not None and (seeds.shape != (batch,) or seeds.dtype != torch.int64):
        raise ValueError(f"seeds: expected int64 {[batch]}, got {seeds.dtype} {list(seeds.shape)}")
    if model.mask_head is not None and targets.masks is None and targets.polygons is None:
        raise ValueError("targets: expected masks or polygons for a model with a mask head, got neither")
