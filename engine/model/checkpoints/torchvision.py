"""torchvision's ``maskrcnn_resnet50_fpn``, its ``_v2``, the Faster R-CNN beside them, and the same on other trunks.

Checkpoints are state dicts. The classes begin with the background; the input is RGB.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from .. import presets
from .family import Conventions, Family
from .mapping import Layout, Rule, conv_norm, mobilenet_rules, resnet_rules
from .options import Options

__all__ = ["TORCHVISION"]

BODY = "backbone.body."
MOBILENET_STEM = f"{BODY}0.0.weight"


def _layout(names: Iterable[str]) -> Layout:
    names = set(names)
    convs = sum(bool(re.fullmatch(r"roi_heads\.box_head\.\d+\.0\.weight", name)) for name in names)
    return Layout(mobilenet=MOBILENET_STEM in names, box_convs=convs)


def _rules(layout: Layout) -> list[Rule]:
    if not layout.pyramid:
        raise ValueError("expected a feature pyramid, without which torchvision has no Mask R-CNN")
    # The head with convolutions is one Sequential: convolutions, Flatten, then each Linear and its ReLU.
    fcs = (
        [Rule(f"box_head.fcs.{j}", f"roi_heads.box_head.{layout.box_convs + 1 + 2 * j}") for j in range(4)]
        if layout.box_convs
        else [Rule("box_head.fcs.{j}", "roi_heads.box_head.fc{j+6}")]
    )
    return [
        *(mobilenet_rules(BODY) if layout.mobilenet else resnet_rules(BODY)),
        *conv_norm("fpn.lateral.{i}", "backbone.fpn.inner_blocks.{i}.0", "backbone.fpn.inner_blocks.{i}.1"),
        *conv_norm("fpn.output.{i}", "backbone.fpn.layer_blocks.{i}.0", "backbone.fpn.layer_blocks.{i}.1"),
        Rule("rpn.convs.{i}.conv", "rpn.head.conv.{i}.0"),
        Rule("rpn.objectness", "rpn.head.cls_logits"),
        Rule("rpn.deltas", "rpn.head.bbox_pred"),
        *conv_norm("box_head.convs.{i}", "roi_heads.box_head.{i}.0", "roi_heads.box_head.{i}.1"),
        *fcs,
        Rule("box_head.classes", "roi_heads.box_predictor.cls_score"),
        Rule("box_head.deltas", "roi_heads.box_predictor.bbox_pred"),
        *conv_norm("mask_head.convs.{i}", "roi_heads.mask_head.{i}.0", "roi_heads.mask_head.{i}.1"),
        Rule("mask_head.deconv", "roi_heads.mask_predictor.conv5_mask"),
        Rule("mask_head.logits", "roi_heads.mask_predictor.mask_fcn_logits"),
    ]


def _conventions(
    names: tuple[str, ...], ids: tuple[int, ...], state: Mapping[str, Tensor], options: Options
) -> Conventions:
    if options.style is not None:
        raise ValueError(f"style: expected none for a torchvision checkpoint, got {options.style!r}")
    config = presets.torchvision_v1(names, ids)
    if not _is_resnet50_v1(state):
        return Conventions(replace(config, backbone=replace(config.backbone, norm_eps=1e-5)))
    note = "frozen batch norms are taken to have epsilon 0, as the published COCO weights; else give norm_eps=1e-5"
    return Conventions(config, notes=() if options.norm_eps is not None else (note,))


def _is_resnet50_v1(state: Mapping[str, Tensor]) -> bool:
    """Whether it may be the published first version, which was trained without an epsilon.

    That is a ResNet-50 with frozen batch norms, and none in the pyramid. All else has torchvision's default.
    """
    frozen = f"{BODY}bn1.running_var" in state and not any(name.endswith("num_batches_tracked") for name in state)
    if not frozen or "backbone.fpn.inner_blocks.0.1.weight" in state:
        return False
    depths = [sum(bool(re.match(rf"{BODY}layer{i}\.\d+\.conv3\.weight", name)) for name in state) for i in range(1, 5)]
    return depths == [3, 4, 6, 3] and state[f"{BODY}layer1.0.conv2.weight"].shape[:2] == (64, 64)


TORCHVISION = Family(
    name="torchvision",
    marks=r"backbone\.(body|fpn)\.|rpn\.head\.",
    unsupported=(
        (r"roi_heads\.keypoint", "Keypoint R-CNN"),
        (r"head\.", "a one-stage detector (RetinaNet, FCOS)"),
        (r"backbone\.body\.\d+\.block\.", "a MobileNetV3 trunk"),
    ),
    background_first=True,
    layout=_layout,
    rules=_rules,
    conventions=_conventions,
    # Before 0.13 the blocks of the pyramid, the RPN and the mask head were single layers.
    old_names=(
        Rule("backbone.fpn.inner_blocks.{i}.0", "backbone.fpn.inner_blocks.{i}"),
        Rule("backbone.fpn.layer_blocks.{i}.0", "backbone.fpn.layer_blocks.{i}"),
        Rule("rpn.head.conv.0.0", "rpn.head.conv"),
        Rule("roi_heads.mask_head.{i}.0", "roi_heads.mask_head.mask_fcn{i+1}"),
    ),
)
