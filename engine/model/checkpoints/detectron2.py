"""Detectron2's R-CNNs, FPN, C4 and DC5: the model zoo's ``.pkl`` files and the ``.pth`` files of training.

The classes end with the background. The published ResNets take BGR input that is not divided by a deviation and have
the stride of a bottleneck in its first convolution (MSRA's models); those with group norms have it in the 3x3, and
ResNeXt, which also divides.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from .. import presets
from ..config import AnchorConfig, InputConfig, MaskRCNNConfig, ResNetConfig
from .family import COUNTERS, Conventions, Family
from .mapping import Layout, Rule, conv_norm
from .options import Options

__all__ = ["DETECTRON2", "GROUP_NORMS", "preset_of", "with_style"]

HEAD = "proposal_generator.rpn_head"
MASK = "roi_heads.mask_head"
CELLS = "proposal_generator.anchor_generator.cell_anchors"

# What Facebook's trunk with group norms expects, from which both Detectron2 and MMDetection start.
GROUP_NORMS = "input is taken to be BGR without a deviation, as of the trunk with group norms; else give a style"


def _trunk(pyramid: bool) -> str:
    return "backbone.bottom_up" if pyramid else "backbone"


def _layout(names: Iterable[str]) -> Layout:
    names = set(names)
    pyramid = not any(name.startswith("backbone.stem.") for name in names)
    norm = f"{_trunk(pyramid)}.stem.conv1.norm"
    return Layout(
        pyramid=pyramid,
        last_on_rois=any(name.startswith("roi_heads.res5.") for name in names),
        group_norms=f"{norm}.weight" in names and f"{norm}.running_var" not in names,
        rpn_convs=1 if f"{HEAD}.conv.weight" in names else 2,
    )


def _stage_rules(number: str, prefix: str) -> tuple[Rule, ...]:
    ours, theirs = f"backbone.stages.{number}.{{j}}", f"{prefix}.{{j}}"
    return (
        *conv_norm(f"{ours}.conv{{k}}", f"{theirs}.conv{{k}}", f"{theirs}.conv{{k}}.norm"),
        *conv_norm(f"{ours}.shortcut", f"{theirs}.shortcut", f"{theirs}.shortcut.norm"),
    )


def _rules(layout: Layout) -> list[Rule]:
    trunk = _trunk(layout.pyramid)
    return [
        *conv_norm("backbone.stem", f"{trunk}.stem.conv1", f"{trunk}.stem.conv1.norm"),
        *(_stage_rules("3", "roi_heads.res5") if layout.last_on_rois else ()),
        *_stage_rules("{i}", f"{trunk}.res{{i+2}}"),
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


def preset_of(layout: Layout) -> Callable[..., MaskRCNNConfig]:
    """What models of a layout mean by default."""
    if layout.pyramid:
        return presets.detectron2
    return presets.detectron2_c4 if layout.last_on_rois else presets.detectron2_dc5


def _conventions(
    names: tuple[str, ...], ids: tuple[int, ...], state: Mapping[str, Tensor], options: Options
) -> Conventions:
    layout = _layout(state)
    config, imagenet = preset_of(layout)(names, ids), InputConfig()
    grouped = state.get(f"{_trunk(layout.pyramid)}.res2.0.conv2.weight")
    resnext = grouped is not None and grouped.shape[1] < 64
    notes: tuple[str, ...] = ()
    if options.style in ("pytorch", "bgr") or (options.style is None and resnext):
        config = with_style(config, imagenet.mean, imagenet.std, stride_in_1x1=False)
    elif options.style is None and layout.group_norms:
        config, notes = with_style(config, imagenet.mean, (1.0, 1.0, 1.0), stride_in_1x1=False), (GROUP_NORMS,)
    bgr = options.style != "pytorch"
    if "pixel_mean" in state and "pixel_std" in state:
        # In the order of the file's channels. Blue has the smallest mean in photographs: that tells the order.
        mean, std = (tuple(round(x, 4) for x in state[f"pixel_{name}"].flatten().tolist()) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"pixel_mean, pixel_std: expected three channels, got {mean} and {std}")
        if options.style is None and mean[0] != mean[2]:
            bgr = mean[0] < mean[2]
        mean, std = (mean[::-1], std[::-1]) if bgr else (mean, std)
        config = replace(config, input=replace(config.input, mean=mean, std=std))
        if options.style is None and not resnext and not layout.group_norms and std != (1.0, 1.0, 1.0):
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
    """The anchors that a training checkpoint stores, as sizes and ratios."""
    levels = [state[f"{CELLS}.{i}"].double() for i in range(len(anchors.sizes)) if f"{CELLS}.{i}" in state]
    if len(levels) != len(anchors.sizes) or options.anchor_sizes is not None or options.aspect_ratios is not None:
        return anchors
    found: list[tuple[float, ...]] = []
    shapes: set[tuple[float, ...]] = set()  # the aspect ratios that go with a size
    for cells in levels:
        width, height = (cells[:, 2:] - cells[:, :2]).unbind(1)
        sizes = [round(size, 2) for size in (width * height).sqrt().tolist()]
        ratios = [round(ratio, 4) for ratio in (height / width).tolist()]
        found.append(tuple(dict.fromkeys(sizes)))
        shapes |= {tuple(r for s, r in zip(sizes, ratios, strict=True) if s == size) for size in found[-1]}
    if len(shapes) != 1 or not all(0 < size < math.inf for sizes in found for size in sizes):
        raise ValueError(f"{CELLS}: expected sizes with the same aspect ratios each, got {sorted(shapes)} at {found}")
    return replace(anchors, sizes=tuple(found), aspect_ratios=shapes.pop())


DETECTRON2 = Family(
    name="detectron2",
    marks=r"backbone\.(bottom_up|res\d)\.|proposal_generator\.",
    unsupported=(
        (r"roi_heads\.keypoint", "Keypoint R-CNN"),
        (r"roi_heads\.(box_head|box_predictor)\.\d+\.", "Cascade R-CNN"),
        (r"sem_seg_head\.", "Panoptic FPN"),
        (r"head\.", "a one-stage detector (RetinaNet, FCOS)"),
        (
            r"backbone\.bottom_up\.(?!stem\.|res\d\.)|backbone\.(?!bottom_up|fpn_|stem|res\d)",
            "a trunk other than a ResNet",
        ),
    ),
    background_first=False,
    sizes_first=True,
    layout=_layout,
    rules=_rules,
    conventions=_conventions,
    ignored=rf"{COUNTERS}|pixel_mean|pixel_std|proposal_generator\.anchor_generator\..*",
)
