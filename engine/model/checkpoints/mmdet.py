"""MMDetection 2 and 3: Mask R-CNN and Faster R-CNN, FPN and C4.

Checkpoints are ``{"state_dict", "meta"}``, with the names of the classes in ``meta``. The classes end with the
background. Tensors do not say whether the trunk is of "pytorch" style (RGB, stride in the 3x3) or "caffe" style (BGR,
no deviation, stride in the 1x1): the option ``style`` does. ResNeXt-101-32x8d, which comes from Detectron2, is of
neither: BGR, with the deviation, stride in the 3x3; the trunk with group norms is as that, without the deviation.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from .. import presets
from ..config import InputConfig, MaskRCNNConfig
from .detectron2 import GROUP_NORMS, with_style
from .family import Conventions, Family
from .mapping import Layout, Rule, conv_norm, resnet_rules, stage_rules
from .options import Options

__all__ = ["MMDET", "preset_of"]


def _layout(names: Iterable[str]) -> Layout:
    names = set(names)
    last_on_rois = any(name.startswith("roi_head.shared_head.") for name in names)
    return Layout(
        pyramid=not last_on_rois,
        last_on_rois=last_on_rois,
        group_norms="backbone.gn1.weight" in names,
        rpn_convs=1 if "rpn_head.rpn_conv.weight" in names else 2,
    )


def _rules(layout: Layout) -> list[Rule]:
    box, mask, norm = "roi_head.bbox_head", "roi_head.mask_head", "gn" if layout.group_norms else "bn"
    return [
        *(stage_rules("3", "roi_head.shared_head.layer4", norm) if layout.last_on_rois else ()),
        *resnet_rules("backbone.", norm),
        *conv_norm("fpn.lateral.{i}", "neck.lateral_convs.{i}.conv", f"neck.lateral_convs.{{i}}.{norm}"),
        *conv_norm("fpn.output.{i}", "neck.fpn_convs.{i}.conv", f"neck.fpn_convs.{{i}}.{norm}"),
        Rule("rpn.convs.0.conv", "rpn_head.rpn_conv")
        if layout.rpn_convs == 1
        else Rule("rpn.convs.{i}.conv", "rpn_head.rpn_conv.{i}.conv"),
        Rule("rpn.objectness", "rpn_head.rpn_cls"),
        Rule("rpn.deltas", "rpn_head.rpn_reg"),
        *conv_norm("box_head.convs.{i}", f"{box}.shared_convs.{{i}}.conv", f"{box}.shared_convs.{{i}}.{norm}"),
        Rule("box_head.fcs.{i}", f"{box}.shared_fcs.{{i}}"),
        Rule("box_head.classes", f"{box}.fc_cls"),
        Rule("box_head.deltas", f"{box}.fc_reg"),
        *conv_norm("mask_head.convs.{i}", f"{mask}.convs.{{i}}.conv", f"{mask}.convs.{{i}}.{norm}"),
        Rule("mask_head.deconv", f"{mask}.upsample"),
        Rule("mask_head.logits", f"{mask}.conv_logits"),
    ]


def preset_of(layout: Layout) -> Callable[..., MaskRCNNConfig]:
    """What models of a layout mean by default."""
    return presets.mmdet_c4 if layout.last_on_rois else presets.mmdet


def _conventions(
    names: tuple[str, ...], ids: tuple[int, ...], state: Mapping[str, Tensor], options: Options
) -> Conventions:
    layout = _layout(state)
    config = preset_of(layout)(names, ids)
    if options.style == "caffe":
        return Conventions(with_style(config, config.input.mean, (1.0, 1.0, 1.0), stride_in_1x1=True), bgr=True)
    if options.style is not None:
        config = with_style(config, config.input.mean, InputConfig().std, stride_in_1x1=False)
        return Conventions(config, bgr=options.style == "bgr")
    if layout.last_on_rois:
        note = "the trunk is taken to be of caffe style, as MMDetection's C4 models are; else give style='pytorch'"
        return Conventions(config, bgr=True, notes=(note,))
    if layout.group_norms:
        config = with_style(config, config.input.mean, (1.0, 1.0, 1.0), stride_in_1x1=False)
        return Conventions(config, bgr=True, notes=(GROUP_NORMS,))
    grouped = state.get("backbone.layer1.0.conv2.weight")
    if grouped is not None and grouped.shape[:2] == (256, 8):
        note = "input is taken to be BGR, as of MMDetection's ResNeXt-101-32x8d; else give style='pytorch'"
        return Conventions(config, bgr=True, notes=(note,))
    return Conventions(config, notes=("the trunk is taken to be of pytorch style; else give style='caffe'",))


MMDET = Family(
    name="mmdet",
    marks=r"(neck|rpn_head|roi_head)\.",
    unsupported=(
        (r"roi_head\.keypoint", "Keypoint R-CNN"),
        (r"roi_head\.(bbox_head|mask_head)\.\d+\.", "Cascade R-CNN"),
        (r"roi_head\.(mask_iou_head|semantic_head|glbctx_head)\.", "a variant of Mask R-CNN with further heads"),
        (r"(bbox_head|mask_head)\.", "a one-stage detector, or a checkpoint of MMDetection 1,"),
        (r"backbone\.(?!conv1\.|bn1\.|gn1\.|layer\d\.)", "a trunk other than a ResNet"),
    ),
    background_first=False,
    layout=_layout,
    rules=_rules,
    conventions=_conventions,
)
