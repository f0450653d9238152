"""Models of the tests: small ones, and one of published size whose weights need no file."""

import importlib.util
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seeded import seeded_state
from trimask import MaskRCNN, MaskRCNNConfig
from trimask.engine.model.config import (
    AnchorConfig,
    BoxHeadConfig,
    DetectionConfig,
    FPNConfig,
    InputConfig,
    MaskHeadConfig,
    MobileNetV2Config,
    PoolConfig,
    ResizeConfig,
    ResNetConfig,
    RPNConfig,
)

__all__ = ["PEOPLE_OPTIONS", "SMALL", "VARIANTS", "golden_checkpoint", "small_model"]

SMALL = MaskRCNNConfig(
    ("cat", "dog", "bird"),
    (17, 18, 16),
    input=InputConfig(resize=ResizeConfig(min_size=128, max_size=192)),
    backbone=ResNetConfig(blocks=(1, 1, 1, 1), bottleneck=False),
    fpn=FPNConfig(channels=32),
    anchors=AnchorConfig(sizes=((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))),
    rpn=RPNConfig(pre_nms=200, post_nms=100),
    detection=DetectionConfig(min_size=4.0),  # rounding moves the IoU of sub-pixel boxes by percents
    box_head=BoxHeadConfig(fcs=(64, 64)),
    mask_head=MaskHeadConfig(convs=(32, 32), deconv_channels=32),
)

# What the keys of the people checkpoint, in torchvision's format, cannot say.
PEOPLE_OPTIONS: dict[str, Any] = {
    "min_size": 320,
    "max_size": 512,
    "anchor_sizes": [16, 32, 64, 128, 256],
    "aspect_ratios": [0.5, 1, 2, 3],
    "activation": "relu",
    "norm_eps": 1e-5,
    "classes": ["person"],
}

VARIANTS = {
    "two linear layers": SMALL,
    "boxes only": replace(SMALL, mask_head=None),
    "class-agnostic": replace(
        SMALL,
        box_head=replace(SMALL.box_head, class_agnostic=True),
        mask_head=MaskHeadConfig(convs=(32,), deconv_channels=32, class_agnostic=True),
    ),
    "norms and convolutions": replace(
        SMALL,
        fpn=FPNConfig(channels=32, norm=True),
        rpn=replace(SMALL.rpn, convs=2),
        box_head=BoxHeadConfig(convs=2, conv_channels=32, fcs=(64,), norm=True),
        mask_head=MaskHeadConfig(convs=(32, 32), deconv_channels=32, norm=True),
    ),
    "MobileNetV2": replace(SMALL, backbone=MobileNetV2Config()),
    "bottlenecks, stride in the 1x1": replace(SMALL, backbone=ResNetConfig((1, 1, 1, 1), stride_in_1x1=True)),
    "RoIAlign by the largest sample": replace(SMALL, pool=PoolConfig(maximum=True)),
    "RoIPool": replace(SMALL, pool=PoolConfig(quantized=True)),
    "softmax masks": replace(SMALL, mask_head=replace(SMALL.mask_head, softmax=True)),
    "ResNeXt": replace(SMALL, backbone=ResNetConfig((1, 1, 1, 1), groups=32, group_width=4)),
    "group norms": replace(
        SMALL,
        backbone=ResNetConfig((1, 1, 1, 1), bottleneck=False, norm_groups=8),
        fpn=FPNConfig(channels=32, norm=True, norm_groups=8),
        box_head=BoxHeadConfig(convs=2, conv_channels=32, fcs=(64,), norm=True, norm_groups=8),
        mask_head=MaskHeadConfig(convs=(32, 32), deconv_channels=32, norm=True, norm_groups=8),
    ),
    "C4": replace(
        SMALL,
        input=replace(SMALL.input, size_divisible=1),
        backbone=ResNetConfig((1, 1, 1, 1), bottleneck=False, last_on_rois=True),
        fpn=None,
        anchors=AnchorConfig(sizes=((16.0, 32.0, 64.0),), round=False, stride_from_size=False),
        box_head=BoxHeadConfig(resolution=14, fcs=(), average=True),
        mask_head=MaskHeadConfig(convs=(), deconv_channels=32),
    ),
    "DC5": replace(
        SMALL,
        backbone=ResNetConfig((1, 1, 1, 1), dilated=True),
        fpn=None,
        anchors=AnchorConfig(sizes=((16.0, 32.0, 64.0),), round=False, stride_from_size=False),
    ),
}


def small_model(config: MaskRCNNConfig = SMALL, seed: int = 3) -> MaskRCNN:
    """A model in evaluation mode whose random weights find things."""
    model = MaskRCNN(config).eval()
    state = seeded_state(model.state_dict(), seed)
    state["box_head.classes.weight"] = state["box_head.classes.weight"] * 2
    state["box_head.deltas.weight"] = state["box_head.deltas.weight"] * 0.3
    state["rpn.deltas.weight"] = state["rpn.deltas.weight"] * 0.3
    if config.fpn is None:  # the trunk's own maps are large
        for layer in ("rpn.objectness", "rpn.deltas", "box_head.classes", "box_head.deltas"):
            state[f"{layer}.weight"] = state[f"{layer}.weight"] * 0.1
    model.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    return model


def golden_checkpoint(golden: Path, folder: Path) -> Path:
    """A ResNet-50 that finds a hundred things in every picture, as a .pkl of the kind that Detectron2 publishes."""
    recorded = json.loads((golden / "detectron2_r50_fpn_3x.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_weights", golden / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    model = weights.fill(recorded["shapes"], recorded["stem_scale"], recorded["pyramid_scale"])
    path = folder / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": model, "__author__": "test", "matching_heuristics": True}))
    return path
