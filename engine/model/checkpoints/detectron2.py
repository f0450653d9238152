"""Detectron2's R-CNNs with a feature pyramid: the model zoo's ``.pkl`` files and the ``.pth`` files of training.

The classes end with the background. The published ResNets take BGR input that is not divided by a deviation and have
the stride of a bottleneck in its first convolution (MSRA's models); ResNeXt divides, and has it in the 3x3.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from .. import presets
from ..config import AnchorConfig, InputConfig, MaskRCNNConfig, ResNetConfig
from .family import COUNTERS, Conventions, Family
from .mapping import Layout, Rule, conv_norm
from .options import Options

__all__ = ["DETECTRON2"]

TRUNK = "backbone.bottom_up"
HEAD = "proposal_generator.rpn_head"
MASK = "roi_heads.mask_head"
CELLS = "proposal_generator.anchor_generator.cell_anchors"


def _layout(names: Iterable[str]) -> Layout:
    return Layout(rpn_convs=1 if f"{HEAD}.conv.weight" in names else 2)


def _rules(layout: Layout) -> list[Rule]:
    block = f"{TRUNK}.res{{i+2}}.{{j}}"
    return [
        *conv_norm("backbone.stem", f"{TRUNK}.stem.conv1", f"{TRUNK}.stem.conv1.norm"),
        *conv_norm("backbone.stages.{i}.{j}.conv{k}", f"{block}.conv{{k}}", f"{block}.conv{{k}}.norm"),
        *conv_norm("backbone.stages.{i}.{j}.shortcut", f"{block}.shortcut", f"{block}.shortcut.norm"),
        *conv_norm("fpn.lateral.{i}", "backbone.fpn_lateral{i+2}", "backbone.fpn_lateral{i+2}.norm"),
        *conv_norm("fpn.output.{i}", "backbone.fpn_output{i+2}", "backbone.fpn_output{i+2}.norm"),
        Rule("rpn.convs.0.conv", f"{HEAD}.conv")
        if layout.rpn_convs == 1
        else Rule("rpn.convs.{i}.conv", f"{HEAD}.conv.conv{{i}}"),
        Rule("rpn.objectness", f"{HEAD}.objectness_logits"),
        Rule("rpn.deltas", f"{HEAD}.anchor_deltas"),
        *conv_norm("box_head.convs.{i}", "roi_heads.box_head.conv{i+1}", "roi_heads.box_head.conv{i+1}.norm"),
        Rule("box_head.fcs.{i}", "roi_heads.box_head.fc{i+1}"),
        Rule("box_head.classes", "roi_heads.box_predictor.cls_score"),
        Rule("box_head.deltas", "roi_heads.box_predictor.bbox_pred"),
        *conv_norm("mask_head.convs.{i}", f"{MASK}.mask_fcn{{i+1}}", f"{MASK}.mask_fcn{{i+1}}.norm"),
        Rule("mask_head.deconv", f"{MASK}.deconv"),
        Rule("mask_head.logits", f"{MASK}.predictor"),
    ]


def _conventions(
    names: tuple[str, ...], ids: tuple[int, ...], state: Mapping[str, Tensor], options: Options
) -> Conventions:
    config = presets.detectron2(names, ids)
    grouped = state.get(f"{TRUNK}.res2.0.conv2.weight")
    resnext = grouped is not None and grouped.shape[1] < 64
    imagenet = InputConfig()
    if options.style == "pytorch" or (options.style is None and resnext):
        config = with_style(config, imagenet.mean, imagenet.std, stride_in_1x1=False)
    bgr = options.style != "pytorch"
    notes: tuple[str, ...] = ()
    if "pixel_mean" in state and "pixel_std" in state:
        # In the order of the file's channels. Blue has the smallest mean in photographs: that tells the order.
        mean, std = (tuple(round(x, 4) for x in state[f"pixel_{name}"].flatten().tolist()) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"pixel_mean, pixel_std: expected three channels, got {mean} and {std}")
        if options.style is None and mean[0] != mean[2]:
            bgr = mean[0] < mean[2]
        mean, std = (mean[::-1], std[::-1]) if bgr else (mean, std)
        config = replace(config, input=replace(config.input, mean=mean, std=std))
        if options.style is None and not resnext and std != (1.0, 1.0, 1.0):
            # In the model zoo, every trunk whose input is divided by a deviation is one that strides in its 3x3.
            config = with_style(config, mean, std, stride_in_1x1=False)
            notes = ("the stride of a bottleneck is taken to be in the 3x3, as pixel_std is not 1; else give a style",)
    return Conventions(replace(config, anchors=_anchors(config.anchors, state, options)), bgr, notes)


def with_style(
    config: MaskRCNNConfig, mean: tuple[float, float, float], std: tuple[float, float, float], *, stride_in_1x1: bool
) -> MaskRCNNConfig:
    """A config with these statistics and this place of a bottleneck's stride."""
    assert isinstance(config.backbone, ResNetConfig)
    return replace(
        config,
        input=replace(config.input, mean=mean, std=std),
        backbone=replace(config.backbone, stride_in_1x1=stride_in_1x1),
    )


def _anchors(anchors: AnchorConfig, state: Mapping[str, Tensor], options: Options) -> AnchorConfig:
    """The anchors that a training checkpoint stores, as sizes and ratios; several sizes on a level are not ours."""
    sizes = options.anchor_sizes or ()
    if any(not isinstance(size, (int, float)) and len(size) > 1 for size in sizes):
        raise ValueError(f"anchor_sizes: expected one size on each level of a Detectron2 model, got {sizes}")
    levels = [state[f"{CELLS}.{i}"].double() for i in range(5) if f"{CELLS}.{i}" in state]
    if len(levels) != 5 or options.anchor_sizes is not None or options.aspect_ratios is not None:
        return anchors
    found = []
    for cells in levels:
        width, height = (cells[:, 2:] - cells[:, :2]).unbind(1)
        size, ratios = (width * height).sqrt(), height / width
        if not (size - size[0]).abs().max() < 0.01 * size[0]:
            raise ValueError(f"{CELLS}: expected one size on each level, got {size.tolist()}")
        found.append((round(float(size.mean()), 3), tuple(round(ratio, 4) for ratio in ratios.tolist())))
    if len({ratios for _, ratios in found}) != 1 or not all(math.isfinite(size) for size, _ in found):
        raise ValueError(f"{CELLS}: expected the same aspect ratios on every level, got {[r for _, r in found]}")
    return replace(anchors, sizes=tuple((size,) for size, _ in found), aspect_ratios=found[0][1])


DETECTRON2 = Family(
    name="detectron2",
    marks=r"backbone\.bottom_up\.|proposal_generator\.",
    unsupported=(
        (r"roi_heads\.keypoint", "Keypoint R-CNN"),
        (r"roi_heads\.res5\.|backbone\.(stem|res\d)\.", "an R-CNN without a feature pyramid (C4, DC5)"),
        (r"roi_heads\.(box_head|box_predictor)\.\d+\.", "Cascade R-CNN"),
        (r"sem_seg_head\.", "Panoptic FPN"),
        (r"head\.", "a one-stage detector (RetinaNet, FCOS)"),
        (r"backbone\.bottom_up\.(?!stem\.|res\d\.)", "a trunk other than a ResNet"),
    ),
    background_first=False,
    layout=_layout,
    rules=_rules,
    conventions=_conventions,
    ignored=rf"{COUNTERS}|pixel_mean|pixel_std|proposal_generator\.anchor_generator\..*",
)
