"""What network a checkpoint is for, read from the names and shapes of its tensors."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..backbone import MOBILENET_V2_BLOCKS
from ..config import DEPTHS, BoxHeadConfig, FPNConfig, MaskHeadConfig, MaskRCNNConfig, MobileNetV2Config, ResNetConfig

__all__ = ["Shapes", "count_classes", "infer", "infer_resnet"]

NORM_GROUPS = 32  # wherever group norms are published; shapes do not say


class Shapes:
    """Shapes of a checkpoint's tensors under our names.

    Args:
        shapes: by our names.
        foreign: the checkpoint's own name of a tensor, for errors.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], foreign: Callable[[str], str | None]) -> None:
        self.shapes = shapes
        self.foreign = foreign

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> torch.Size:
        if name not in self.shapes:
            raise ValueError(f"expected a tensor {self.foreign(name)!r}, and there is none")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        """One more than the largest number that ``{}`` takes in names of the pattern."""
        regex = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
        return 1 + max((int(match[1]) for match in map(regex.fullmatch, self.shapes) if match), default=-1)

    def norm_groups(self, part: str) -> int:
        """The groups of a part's group norms; 0 where its norms are batch norms, which have statistics."""
        leaves = {name.rpartition(".norm.")[2] for name in self.shapes if re.match(rf"{part}\..*\.norm\.", name)}
        return NORM_GROUPS if leaves and "running_var" not in leaves else 0


def count_classes(shapes: Shapes) -> int:
    """Foreground classes."""
    return shapes["box_head.classes.weight"][0] - 1


def infer(base: MaskRCNNConfig, shapes: Shapes) -> MaskRCNNConfig:
    """``base`` with every value that names and shapes decide.

    Raises:
        ValueError: for a tensor without which nothing can be said, or a trunk that is not among ours.
    """
    fpn = None if base.fpn is None else _fpn(base.fpn, shapes)
    channels = fpn.channels if fpn else shapes["rpn.objectness.weight"][1]
    return replace(
        base,
        backbone=_backbone(base, shapes),
        fpn=fpn,
        rpn=replace(base.rpn, convs=shapes.count("rpn.convs.{}.conv.weight")),
        box_head=_box_head(base.box_head, shapes, channels, base.num_classes),
        mask_head=_mask_head(base.mask_head or MaskHeadConfig(), shapes, base.num_classes),
    )


def _fpn(base: FPNConfig, shapes: Shapes) -> FPNConfig:
    channels = shapes["fpn.lateral.0.conv.weight"][0]
    laterals = shapes.count("fpn.lateral.{}.conv.weight")
    if laterals != 4:
        raise ValueError(f"expected a feature pyramid on four maps, got one on {laterals}")
    norm = "fpn.lateral.0.norm.weight" in shapes
    return replace(base, channels=channels, norm=norm, norm_groups=shapes.norm_groups("fpn"))


def _backbone(base: MaskRCNNConfig, shapes: Shapes) -> ResNetConfig | MobileNetV2Config:
    if "backbone.blocks.1.depthwise.conv.weight" in shapes:
        widths = [shapes[f"fpn.lateral.{i}.conv.weight"][1] for i in range(4)]
        return MobileNetV2Config(taps=tuple(_mobilenet_tap(width) for width in widths))
    assert isinstance(base.backbone, ResNetConfig)
    return infer_resnet(base.backbone, shapes)


def infer_resnet(base: ResNetConfig, shapes: Shapes) -> ResNetConfig:
    """``base`` with the depth and the widths of the trunk that there is."""
    bottleneck = "backbone.stages.0.0.conv3.conv.weight" in shapes
    found = tuple(shapes.count(f"backbone.stages.{i}.{{}}.conv1.conv.weight") for i in range(4))
    # The shallowest that has them all: where blocks are absent, the names that are missing come out later.
    fits = [blocks for blocks in DEPTHS[bottleneck].values() if all(f <= b for f, b in zip(found, blocks, strict=True))]
    if not any(found) or not fits:
        known = ", ".join(f"ResNet-{name} {blocks}" for depths in DEPTHS.values() for name, blocks in depths.items())
        raise ValueError(f"backbone: expected the blocks of one of {known}, got {found}")
    groups, group_width = 1, 64
    if bottleneck:
        width, group_width = shapes["backbone.stages.0.0.conv2.conv.weight"][:2]
        groups = width // group_width
    return replace(
        base,
        blocks=fits[0],
        bottleneck=bottleneck,
        groups=groups,
        group_width=group_width,
        norm_groups=shapes.norm_groups("backbone"),
    )


def _mobilenet_tap(width: int) -> int:
    """The last block of this many channels: that of the greatest depth at its stride."""
    outputs = [channels for _, channels, repeats, _ in MOBILENET_V2_BLOCKS for _ in range(repeats)]
    if width not in outputs:
        raise ValueError(f"backbone: expected MobileNetV2 maps of {sorted(set(outputs))} channels, got {width}")
    return len(outputs) - outputs[::-1].index(width)


def _box_head(base: BoxHeadConfig, shapes: Shapes, channels: int, classes: int) -> BoxHeadConfig:
    convs = shapes.count("box_head.convs.{}.conv.weight")
    width = shapes["box_head.convs.0.conv.weight"][0] if convs else channels
    fcs = tuple(shapes[f"box_head.fcs.{i}.weight"][0] for i in range(shapes.count("box_head.fcs.{}.weight")))
    resolution = base.resolution if base.average else math.isqrt(shapes["box_head.fcs.0.weight"][1] // width)
    return replace(
        base,
        resolution=resolution,
        convs=convs,
        conv_channels=width if convs else base.conv_channels,
        fcs=fcs,
        norm="box_head.convs.0.norm.weight" in shapes,
        norm_groups=shapes.norm_groups("box_head"),
        class_agnostic=classes > 1 and shapes["box_head.deltas.weight"][0] == 4,
    )


def _mask_head(base: MaskHeadConfig, shapes: Shapes, classes: int) -> MaskHeadConfig | None:
    if not any(name.startswith("mask_head.") for name in shapes.shapes):
        return None
    convs = shapes.count("mask_head.convs.{}.conv.weight")
    return replace(
        base,
        convs=tuple(shapes[f"mask_head.convs.{i}.conv.weight"][0] for i in range(convs)),
        deconv_channels=shapes["mask_head.deconv.weight"][1],
        norm="mask_head.convs.0.norm.weight" in shapes,
        norm_groups=shapes.norm_groups("mask_head"),
        class_agnostic=classes > 1 and shapes["mask_head.logits.weight"][0] == 1,
    )
