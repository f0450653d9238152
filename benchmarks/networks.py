"""Whole models for the benchmarks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..engine.model.checkpoints import load_model
from ..engine.model.config import DEPTHS, MaskRCNNConfig
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.model.presets import detectron2, mmdet, torchvision_v1

__all__ = ["drawn", "named", "random_detectron2", "random_mmdetection", "random_resnet", "without_masks"]

Preset = Callable[..., MaskRCNNConfig]


def random_resnet(depth: int = 50, proposals: int = 1000, detections: int = 100) -> MaskRCNN:
    """torchvision's v1 architecture with random weights that find as many objects as they may."""
    names = tuple(f"class {i}" for i in range(1, 91))
    config = torchvision_v1(names, tuple(range(1, 91)))
    config = replace(
        config,
        backbone=replace(config.backbone, blocks=DEPTHS[True][str(depth)]),  # type: ignore[arg-type]
        rpn=replace(config.rpn, pre_nms=proposals, post_nms=proposals),
        detection=replace(config.detection, max_detections=detections),
    )
    return drawn(config)


def random_detectron2(depth: int = 50, preset: Preset = detectron2) -> MaskRCNN:
    """A baseline of Detectron2 with random weights that find as many objects as they may."""
    return _of_eighty_classes(preset, depth)


def random_mmdetection(depth: int = 50, preset: Preset = mmdet) -> MaskRCNN:
    """MMDetection's Mask R-CNN, pytorch style, with such weights."""
    return _of_eighty_classes(preset, depth)


def _of_eighty_classes(preset: Preset, depth: int) -> MaskRCNN:
    config = preset(tuple(f"class {i}" for i in range(1, 81)), tuple(range(1, 81)))
    backbone = replace(config.backbone, blocks=DEPTHS[True][str(depth)])  # type: ignore[arg-type]
    return drawn(replace(config, backbone=backbone))


def named(name: str, build: Callable[[int], MaskRCNN] = random_resnet) -> MaskRCNN:
    """The bundled model by its name, or one that is built of a ResNet's depth."""
    return load_model("people") if name == "people" else build(int(name))


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
    if config.input.std == (1.0, 1.0, 1.0):
        stem: Any = model.backbone.stem
        with torch.no_grad():
            stem.conv.weight /= 58  # inputs that no standard deviation divides
    return model


def without_masks(model: MaskRCNN) -> MaskRCNN:
    """The same weights without the mask head: Faster R-CNN."""
    boxes_only = MaskRCNN(replace(model.config, mask_head=None)).eval()
    boxes_only.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mask_head.")})
    return boxes_only
