"""The multi-task loss of Mask R-CNN: L = L_rpn_cls + L_rpn_box + L_cls + L_box + L_mask.

Matching and sampling follow Faster R-CNN (Ren et al., 2015) as torchvision and Detectron2 agree on it. Pictures are
taken one by one; those without objects are legal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import roi_align
from . import boxes as B
from .heads import BOX_WEIGHTS
from .mask_rcnn import MaskRCNN
from .rpn import BOX_WEIGHTS as RPN_WEIGHTS

__all__ = ["Target", "Targets", "losses"]


class Targets(NamedTuple):
    """The objects of a batch, padded to a common G of at least 1.

    Attributes:
        boxes: float32 [B, G, 4], in the network's frame.
        labels: int64 [B, G], 0 is the first foreground class.
        crowd: bool [B, G], a region to ignore rather than an object.
        count: int64 [B], the rows that are real, crowds included.
        masks: uint8 0 or 1 [B, G, H, W], at the size of the padded input; None for boxes only, or with polygons.
        polygons: [B][G] lists of float [P, 2] (x, y) in the network's frame, on the host.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    masks: Tensor | None
    polygons: Sequence[Sequence[Sequence[NDArray]]] | None = None


RPN_FOREGROUND, RPN_BACKGROUND, RPN_SAMPLES, RPN_POSITIVE = 0.7, 0.3, 256, 0.5
ROI_FOREGROUND, ROI_SAMPLES, ROI_POSITIVE = 0.5, 512, 0.25
RPN_BETA = 1 / 9  # where smooth L1 turns from a parabola into a line


class Target(NamedTuple):
    """The objects of one picture, in the frame of the network's input.

    Attributes:
        boxes: float32 [N, 4].
        labels: int64 [N], 0 is the first foreground class.
        masks: bool or float [N, H, W], at the size of the padded input.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor


def losses(model: MaskRCNN, image: Tensor, image_sizes: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
    """The five terms, each a scalar; their sum is what is minimised.

    Args:
        image, image_sizes: as in :meth:`MaskRCNN.forward`.
        targets: one for each picture.
    """
    if len(targets) != len(image):
        raise ValueError(f"targets: expected one for each of {len(image)} pictures, got {len(targets)}")
    padded = (image.shape[2], image.shape[3])
    pyramid = model.fpn(model.backbone(model.normalize(image, image_sizes)))
    logits, deltas = model.rpn(pyramid)
    sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
    terms = _rpn_losses(model, logits, deltas, sizes, padded, targets)
    with torch.no_grad():
        proposals, count = model.rpn.select(logits, deltas, sizes, padded, image_sizes)
        samples = [_sample_rois(p[:n], t) for p, n, t in zip(proposals, count.tolist(), targets, strict=True)]
    rois = torch.nn.utils.rnn.pad_sequence([sample.rois for sample in samples], batch_first=True)  # [B, R, 4]
    counts = torch.tensor([len(sample.rois) for sample in samples], device=image.device)
    real = torch.arange(rois.shape[1], device=image.device) < counts[:, None]  # [B, R]
    terms |= _box_losses(model, model.pool(pyramid, rois, counts, model.config.box_head.resolution)[real], samples)
    if model.mask_head is not None:
        terms["mask"] = _mask_loss(model, pyramid, samples, targets)
    return terms


def _match(boxes: Tensor, objects: Tensor, foreground: float, background: float, force: bool) -> Tensor:
    """For each box the index of its object, -1 for background, -2 for neither; int64 [N].

    With ``force`` each object also gets the boxes that overlap it most, whatever their IoU.
    """
    if len(objects) == 0:
        return torch.full((len(boxes),), -1, device=boxes.device)
    overlap = B.iou(objects, boxes)  # [G, N]
    best, match = overlap.max(0)
    result = torch.where(best >= foreground, match, torch.where(best < background, -1, -2))
    if force:
        most = overlap.max(1, keepdim=True).values
        favourite = ((overlap == most) & (most > 0)).any(0)
        result = torch.where(favourite, match, result)
    return result


def _sample(match: Tensor, total: int, positive: float) -> tuple[Tensor, Tensor]:
    """Random indices of at most ``positive * total`` foreground boxes, and of background ones up to ``total``."""
    foreground, background = (match >= 0).nonzero()[:, 0], (match == -1).nonzero()[:, 0]
    wanted = min(len(foreground), int(total * positive))
    return (
        foreground[torch.randperm(len(foreground), device=match.device)[:wanted]],
        background[torch.randperm(len(background), device=match.device)[: total - wanted]],
    )


def _rpn_losses(
    model: MaskRCNN,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    targets: Sequence[Target],
) -> dict[str, Tensor]:
    anchors = torch.cat(
        [
            model.rpn.anchors.at(level, torch.arange(x.shape[1], device=x.device), size, padded)
            for level, (x, size) in enumerate(zip(logits, sizes, strict=True))
        ]
    )  # [N, 4]
    score, delta = torch.cat(list(logits), 1).float(), torch.cat(list(deltas), 1).float()  # [B, N], [B, N, 4]
    classification, regression, sampled = score.sum() * 0, delta.sum() * 0, 0
    for i, target in enumerate(targets):
        match = _match(anchors, target.boxes, RPN_FOREGROUND, RPN_BACKGROUND, force=True)
        foreground, background = _sample(match, RPN_SAMPLES, RPN_POSITIVE)
        chosen = torch.cat([foreground, background])
        truth = (match[chosen] >= 0).float()
        classification = classification + F.binary_cross_entropy_with_logits(score[i, chosen], truth, reduction="sum")
        wanted = B.encode(target.boxes[match[foreground]], anchors[foreground], RPN_WEIGHTS)
        regression = regression + F.smooth_l1_loss(delta[i, foreground], wanted, reduction="sum", beta=RPN_BETA)
        sampled += len(chosen)
    return {"rpn_cls": classification / max(sampled, 1), "rpn_box": regression / max(sampled, 1)}


class _Sample(NamedTuple):
    """RoIs of one picture to learn from; the first ``len(objects)`` are foreground."""

    rois: Tensor  # [R, 4]
    labels: Tensor  # [R], -1 for background
    objects: Tensor  # [F], index of each foreground RoI's object
    boxes: Tensor  # [F, 4], the box of that object


def _sample_rois(proposals: Tensor, target: Target) -> _Sample:
    candidates = torch.cat([proposals, target.boxes.to(proposals.dtype)])
    match = _match(candidates, target.boxes, ROI_FOREGROUND, ROI_FOREGROUND, force=False)
    foreground, background = _sample(match, ROI_SAMPLES, ROI_POSITIVE)
    objects = match[foreground]
    labels = torch.cat([target.labels[objects], torch.full_like(background, -1)])
    return _Sample(candidates[torch.cat([foreground, background])], labels, objects, target.boxes[objects])


def _box_losses(model: MaskRCNN, features: Tensor, samples: Sequence[_Sample]) -> dict[str, Tensor]:
    logits, deltas = (x.float() for x in model.box_head(features))  # [N, K + 1], [N, K or 1, 4]
    labels = torch.cat([sample.labels for sample in samples])
    rois = torch.cat([sample.rois for sample in samples])
    foreground = (labels >= 0).nonzero()[:, 0]
    truth = torch.where(labels < 0, model.config.num_classes, labels)
    wanted = B.encode(torch.cat([sample.boxes for sample in samples]), rois[foreground], BOX_WEIGHTS)
    column = torch.zeros_like(foreground) if model.config.box_head.class_agnostic else labels[foreground]
    scale = max(len(labels), 1)
    return {
        "cls": F.cross_entropy(logits, truth, reduction="sum") / scale,
        "box": F.smooth_l1_loss(deltas[foreground, column], wanted, reduction="sum", beta=RPN_BETA) / scale,
    }


def _mask_loss(model: MaskRCNN, pyramid: list[Tensor], samples: Sequence[_Sample], targets: Sequence[Target]) -> Tensor:
    assert model.mask_head is not None
    assert model.config.mask_head is not None
    rois = [sample.rois[: len(sample.objects)] for sample in samples]
    counts = torch.tensor([len(r) for r in rois], device=pyramid[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(rois, batch_first=True)  # [B, F, 4]
    real = torch.arange(padded.shape[1], device=counts.device) < counts[:, None]
    features = model.pool(pyramid, padded, counts, model.config.mask_head.resolution)[real]
    labels = torch.cat([sample.labels[: len(sample.objects)] for sample in samples])
    logits = model.mask_head(features, labels).float()  # [F, m, m]
    if len(logits) == 0:
        return features.sum() * 0 + sum(p.sum() * 0 for p in model.mask_head.parameters())
    side = logits.shape[-1]
    truth = []
    for sample, roi, target in zip(samples, rois, targets, strict=True):
        picks = torch.cat([sample.objects[:, None].float(), roi], 1)  # each RoI in its own object's mask
        truth.append(roi_align(target.masks[:, None].float(), picks, side)[:, 0])
    return F.binary_cross_entropy_with_logits(logits, torch.cat(truth))
