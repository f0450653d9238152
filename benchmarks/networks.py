"""Whole models for the benchmarks, and torchvision's own with the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.model.checkpoints import family
from ..engine.model.checkpoints.torchvision import TORCHVISION
from ..engine.model.config import MaskRCNNConfig, MobileNetV2Config
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.model.presets import detectron2, torchvision_v1
from .matching import Found

__all__ = ["drawn", "random_detectron2", "random_resnet", "torchvision_twin", "twin_detecting", "without_masks"]

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # of ResNets by depth


def random_resnet(depth: int = 50, proposals: int = 1000, detections: int = 100) -> MaskRCNN:
    """torchvision's v1 architecture with random weights that find as many objects as they may."""
    names = tuple(f"class {i}" for i in range(1, 91))
    config = torchvision_v1(names, tuple(range(1, 91)))
    config = replace(
        config,
        backbone=replace(config.backbone, blocks=BLOCKS[depth]),  # type: ignore[arg-type]
        rpn=replace(config.rpn, pre_nms=proposals, post_nms=proposals),
        detection=replace(config.detection, max_detections=detections),
    )
    return drawn(config)


def random_detectron2(depth: int = 50) -> MaskRCNN:
    """Detectron2's R-CNN FPN baseline with random weights that find as many objects as they may."""
    config = detectron2(tuple(f"class {i}" for i in range(1, 81)), tuple(range(1, 81)))
    model = drawn(replace(config, backbone=replace(config.backbone, blocks=BLOCKS[depth])))  # type: ignore[arg-type]
    stem: Any = model.backbone.stem
    with torch.no_grad():
        stem.conv.weight /= 58  # inputs that no standard deviation divides
    return model


def drawn(config: MaskRCNNConfig) -> MaskRCNN:
    """Random weights that find things: unit activations, spread scores."""
    torch.manual_seed(0)
    model = MaskRCNN(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gain = 0.06 if "lateral" in name else 0.3 if "deltas" in name else 1.5 if "classes" in name else 1.0
            torch.nn.init.normal_(parameter, std=gain * (2 / parameter[0].numel()) ** 0.5)
        elif name.endswith("conv3.norm.weight"):
            torch.nn.init.constant_(parameter, 0.3)  # the end of a residual branch, or fifty layers explode
    return model


def without_masks(model: MaskRCNN) -> MaskRCNN:
    """The same weights without the mask head: Faster R-CNN."""
    boxes_only = MaskRCNN(replace(model.config, mask_head=None)).eval()
    boxes_only.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mask_head.")})
    return boxes_only


def torchvision_twin(torchvision: Any, source: MaskRCNN, config: MaskRCNNConfig, **options: Any) -> torch.nn.Module:
    """torchvision's own model with the weights of ``source`` and the limits of ``config``.

    Args:
        torchvision: the package.
        source: a model with masks.
        config: how pictures are resized, and which detections are kept.
        **options: more of `torchvision.models.detection.MaskRCNN`.
    """
    detection = torchvision.models.detection
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
        depth = next(depth for depth, blocks in BLOCKS.items() if blocks == config.backbone.blocks)
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name=f"resnet{depth}", weights=None, norm_layer=frozen
        )
        model = detection.MaskRCNN(backbone, classes, **limits)
    detection._utils.overwrite_eps(model, config.backbone.norm_eps)
    model.load_state_dict(family.export(TORCHVISION, source))
    return model.eval()


def twin_detecting(
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
            found = twin(images)
        return [
            Found(
                one["boxes"].float().cpu().numpy(),
                one["scores"].float().cpu().numpy(),
                one["labels"].cpu().numpy() - 1,  # label 0 is the background
                (one["masks"][:, 0] > 0.5).cpu().numpy(),
            )
            for one in found
        ]

    return call
