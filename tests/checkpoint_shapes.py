"""Names and shapes of the checkpoints of every family, written out apart from the library's key maps."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Architecture", "assert_same_weights", "checkpoint", "shapes", "zeros"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """By default a small Mask R-CNN on ResNet-18, with three classes."""

    blocks: Shape = (2, 2, 2, 2)
    bottleneck: bool = False
    groups: int = 1
    group_width: int = 64
    channels: int = 16
    width: int = 24  # of the linear layers
    classes: int = 3
    modern: bool = False  # norms everywhere, two RPN convolutions, four convolutions before one linear layer
    mask: bool = True
    agnostic: bool = False
    anchors: int = 3
    trunk: str = "FPN"  # or "C4" or "DC5", without a pyramid
    group_norms: bool = False

    @property
    def depths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(64 * 2**i * (4 if self.bottleneck else 1) for i in range(4))


def _conv(found: dict[str, Shape], conv: str, shape: Shape, norm: str | None, grouped: bool = False) -> None:
    """A convolution with a bias, or without one and a norm after it."""
    found[f"{conv}.weight"] = shape
    if norm is None:
        found[f"{conv}.bias"] = shape[:1]
        return
    for leaf in ("weight", "bias", *(() if grouped else ("running_mean", "running_var"))):
        found[f"{norm}.{leaf}"] = shape[:1]


def _trunk(found: dict[str, Shape], family: str, a: Architecture) -> None:
    prefix = {"torchvision": "backbone.body.", "mmdet": "backbone.", "detectron2": "backbone.bottom_up."}[family]
    prefix = prefix if a.trunk == "FPN" else "backbone."
    d2 = family == "detectron2"

    def layer(block: str, k: int, shape: Shape) -> None:
        conv = f"{block}conv{k}"
        norm = f"{conv}.norm" if d2 else f"{block}{'gn' if a.group_norms else 'bn'}{k}"
        _conv(found, conv, shape, norm, a.group_norms)

    layer(f"{prefix}stem." if d2 else prefix, 1, (64, 3, 7, 7))
    inputs = 64
    for i, count in enumerate(a.blocks):
        planes = 64 * 2**i
        width = planes * a.group_width * a.groups // 64
        outputs = planes * (4 if a.bottleneck else 1)
        for j in range(count):
            on_rois = "roi_heads." if d2 else "roi_head.shared_head."
            block = on_rois if a.trunk == "C4" and i == 3 else prefix
            block += f"{f'res{i + 2}' if d2 else f'layer{i + 1}'}.{j}."
            if a.bottleneck:
                layer(block, 1, (width, inputs, 1, 1))
                layer(block, 2, (width, width // a.groups, 3, 3))
                layer(block, 3, (outputs, width, 1, 1))
            else:
                layer(block, 1, (outputs, inputs, 3, 3))
                layer(block, 2, (outputs, outputs, 3, 3))
            if j == 0 and (i > 0 or inputs != outputs):
                conv, norm = ("shortcut", "shortcut.norm") if d2 else ("downsample.0", "downsample.1")
                _conv(found, block + conv, (outputs, inputs, 1, 1), block + norm, a.group_norms)
            inputs = outputs


def shapes(family: str, a: Architecture) -> dict[str, Shape]:
    """Names and shapes of a checkpoint of ``family`` ("torchvision", "detectron2" or "mmdet")."""
    found: dict[str, Shape] = {}
    _trunk(found, family, a)
    first = family == "torchvision"  # which counts the background, first
    c = {"FPN": a.channels, "C4": a.depths[2], "DC5": a.depths[3]}[a.trunk]
    deltas = 4 * (1 if a.agnostic else a.classes + first)
    masks = 1 if a.agnostic else a.classes + first
    grouped = a.group_norms
    for i, depth in enumerate(a.depths if a.trunk == "FPN" else ()):
        lateral, output, after = {
            "torchvision": (f"backbone.fpn.inner_blocks.{i}.0", f"backbone.fpn.layer_blocks.{i}.0", "1"),
            "detectron2": (f"backbone.fpn_lateral{i + 2}", f"backbone.fpn_output{i + 2}", "norm"),
            "mmdet": (f"neck.lateral_convs.{i}.conv", f"neck.fpn_convs.{i}.conv", "gn" if grouped else "bn"),
        }[family]
        for name, shape in ((lateral, (c, depth, 1, 1)), (output, (c, c, 3, 3))):
            base = name if family == "detectron2" else name.rpartition(".")[0]
            _conv(found, name, shape, f"{base}.{after}" if a.modern or grouped else None, grouped)
    rpn, objectness, rpn_deltas = {
        "torchvision": ("rpn.head.conv.{}.0", "rpn.head.cls_logits", "rpn.head.bbox_pred"),
        "detectron2": (
            "proposal_generator.rpn_head.conv" + (".conv{}" if a.modern else ""),
            "proposal_generator.rpn_head.objectness_logits",
            "proposal_generator.rpn_head.anchor_deltas",
        ),
        "mmdet": ("rpn_head.rpn_conv" + (".{}.conv" if a.modern else ""), "rpn_head.rpn_cls", "rpn_head.rpn_reg"),
    }[family]
    for i in range(2 if a.modern else 1):
        _conv(found, rpn.format(i), (c, c, 3, 3), None)
    _conv(found, objectness, (a.anchors, c, 1, 1), None)
    _conv(found, rpn_deltas, (4 * a.anchors, c, 1, 1), None)
    box = "roi_head.bbox_head" if family == "mmdet" else "roi_heads.box_head"
    if a.modern or grouped:
        for i in range(4):
            conv, norm = {
                "torchvision": (f"{box}.{i}.0", f"{box}.{i}.1"),
                "detectron2": (f"{box}.conv{i + 1}", f"{box}.conv{i + 1}.norm"),
                "mmdet": (f"{box}.shared_convs.{i}.conv", f"{box}.shared_convs.{i}.{'gn' if grouped else 'bn'}"),
            }[family]
            _conv(found, conv, (c, c, 3, 3), norm, grouped)
    fcs = {
        "torchvision": [f"{box}.5"] if a.modern else [f"{box}.fc6", f"{box}.fc7"],
        "detectron2": [f"{box}.fc1", f"{box}.fc2"],
        "mmdet": [f"{box}.shared_fcs.0", f"{box}.shared_fcs.1"],
    }[family]
    width = a.depths[3] if a.trunk == "C4" else a.width  # of what the predictors take
    if a.trunk != "C4":
        _conv(found, fcs[0], (width, c * 49), None)
        if not (a.modern or grouped):
            _conv(found, fcs[1], (width, width), None)
    predictor = box if family == "mmdet" else "roi_heads.box_predictor"
    scores, boxes = ("fc_cls", "fc_reg") if family == "mmdet" else ("cls_score", "bbox_pred")
    _conv(found, f"{predictor}.{scores}", (a.classes + 1, width), None)
    _conv(found, f"{predictor}.{boxes}", (deltas, width), None)
    if a.mask:
        mask = "roi_head.mask_head" if family == "mmdet" else "roi_heads.mask_head"
        for i in range(4 if a.trunk != "C4" else 0):
            conv, norm = {
                "torchvision": (f"{mask}.{i}.0", f"{mask}.{i}.1"),
                "detectron2": (f"{mask}.mask_fcn{i + 1}", f"{mask}.mask_fcn{i + 1}.norm"),
                "mmdet": (f"{mask}.convs.{i}.conv", f"{mask}.convs.{i}.{'gn' if grouped else 'bn'}"),
            }[family]
            _conv(found, conv, (c, c, 3, 3), norm if a.modern or grouped else None, grouped)
        deconv, logits = {
            "torchvision": ("roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_predictor.mask_fcn_logits"),
            "detectron2": (f"{mask}.deconv", f"{mask}.predictor"),
            "mmdet": (f"{mask}.upsample", f"{mask}.conv_logits"),
        }[family]
        found[f"{deconv}.weight"] = (a.depths[3] if a.trunk == "C4" else c, a.channels, 2, 2)
        found[f"{deconv}.bias"] = (a.channels,)
        _conv(found, logits, (masks, a.channels, 1, 1), None)
    return found


def checkpoint(family: str, architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Those names with random values of a sensible size.

    A tensor of a residual block is one random number everywhere: they are many, and take part by name alone.
    """
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(family, architecture).items():
        block = re.search(r"\.(layer|res)\d\.", name)
        values = torch.randn(() if block else shape, generator=rng).expand(shape)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif len(shape) > 1:
            values = values * (2 / math.prod(shape[1:])) ** 0.5
        found[name] = values
    return found


def zeros(family: str, architecture: Architecture) -> dict[str, Tensor]:
    """The same without numbers, for tests of names and shapes; next to nothing in memory or in a file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes(family, architecture).items()}


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
