"""torchvision's own model with the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...engine.model import presets
from ...engine.model.checkpoints import family
from ...engine.model.checkpoints.torchvision import TORCHVISION
from ...engine.model.config import MaskRCNNConfig, MobileNetV2Config
from ...engine.model.mask_rcnn import MaskRCNN
from ..installed import optional
from ..matching import Found
from .likeness import depth

__all__ = ["detecting", "found", "twin", "unlike"]


def unlike(config: MaskRCNNConfig) -> str:
    """The parts of a config that torchvision's models have otherwise, in words; "" where it can run the weights."""
    v1 = presets.torchvision_v1(config.class_names, config.category_ids)
    resize, rpn, limits = config.input.resize, config.rpn, config.detection
    like = replace(
        config,
        input=replace(
            v1.input, resize=replace(v1.input.resize, min_size=resize.min_size, max_size=resize.max_size)
        ),
        anchors=replace(v1.anchors, sizes=config.anchors.sizes, aspect_ratios=config.anchors.aspect_ratios),
        rpn=replace(v1.rpn, pre_nms=rpn.pre_nms, post_nms=rpn.post_nms),
        pool=v1.pool,
        detection=replace(
            v1.detection, score_threshold=limits.score_threshold, max_detections=limits.max_detections
        ),
        paste=v1.paste,
    )  # fmt: skip
    parts = [one.name for one in fields(config) if getattr(config, one.name) != getattr(like, one.name)]
    trunk = config.backbone
    if not isinstance(trunk, MobileNetV2Config):
        other = trunk.stride_in_1x1 or trunk.groups > 1 or trunk.norm_groups > 0 or depth(trunk) is None
        parts += ["anchors"] * (like.anchors != v1.anchors) + ["backbone"] * other
    if config.mask_head is None:
        parts.append("mask_head")
    return ", ".join(dict.fromkeys(parts))


def twin(source: MaskRCNN, **options: Any) -> torch.nn.Module:
    """torchvision's own model with the weights and the config of ``source``, in which nothing may be `unlike`.

    Args:
        source: a model with masks.
        **options: more of `torchvision.models.detection.MaskRCNN`.
    """
    torchvision, config = optional("torchvision"), source.config
    detection = optional("torchvision.models.detection")
    limits = {
        "min_size": config.input.resize.min_size,
        "max_size": config.input.resize.max_size,
        "rpn_pre_nms_top_n_test": config.rpn.pre_nms,
        "rpn_post_nms_top_n_test": config.rpn.post_nms,
        "box_score_thresh": config.detection.score_threshold,
        "box_detections_per_img": config.detection.max_detections,
        **options,
    }
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    classes = config.num_classes + 1
    if isinstance(config.backbone, MobileNetV2Config):
        trunk = torchvision.models.mobilenet_v2(weights=None, norm_layer=frozen).features
        for module in trunk.modules():  # ReLU, where the config says so
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU6) and not config.backbone.relu6:
                    setattr(module, name, torch.nn.ReLU(inplace=True))
        levels = {str(tap): str(i) for i, tap in enumerate(config.backbone.taps)}
        assert config.fpn is not None
        channels = config.fpn.channels
        backbone = detection.backbone_utils.BackboneWithFPN(trunk, levels, [24, 32, 96, 320], channels)
        assert config.mask_head is not None
        model = detection.MaskRCNN(
            backbone,
            rpn_anchor_generator=detection.rpn.AnchorGenerator(
                config.anchors.sizes, (config.anchors.aspect_ratios,) * len(config.anchors.sizes)
            ),
            box_head=detection.faster_rcnn.TwoMLPHead(channels * 49, config.box_head.fcs[0]),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(config.box_head.fcs[-1], classes),
            mask_head=detection.mask_rcnn.MaskRCNNHeads(channels, config.mask_head.convs, 1),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(channels, config.mask_head.deconv_channels, classes),
            **limits,
        )
    else:
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name=f"resnet{depth(config.backbone)}", weights=None, norm_layer=frozen
        )
        model = detection.MaskRCNN(backbone, classes, **limits)
    detection._utils.overwrite_eps(model, config.backbone.norm_eps)
    model.load_state_dict(family.export(TORCHVISION, source))
    return model.eval()


def detecting(
    twin: Any, pictures: Sequence[NDArray[np.uint8]], device: str = "cpu", autocast: torch.dtype | None = None
) -> Callable[[], list[Found]]:
    """A call of torchvision's model, which gets its float tensors ready made, on the device.

    Args:
        autocast: lower precision, of what autocast lowers.
    """
    images = [torch.from_numpy(x).permute(2, 0, 1).float().to(device) / 255 for x in pictures]

    @torch.inference_mode()
    def call() -> list[Found]:
        with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
            output = twin(images)
        return [found(one, one["masks"][:, 0] > 0.5) for one in output]

    return call


def found(one: dict[str, Tensor], masks: Tensor | None) -> Found:
    """torchvision's detections in one picture, with these masks, on the host."""
    boxes, scores, labels = (one[name].cpu() for name in ("boxes", "scores", "labels"))
    return Found(
        boxes.float().numpy(),
        scores.float().numpy(),
        labels.numpy() - 1,  # label 0 is the background
        None if masks is None else masks.cpu().numpy(),
    )
