"""ImageNet classifiers as trunks: ResNet, ResNeXt and MobileNetV2 under torchvision's and timm's names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..backbone import build_backbone
from ..config import MobileNetV2Config, ResNetConfig
from .architecture import Shapes, infer_resnet
from .family import COUNTERS
from .mapping import KeyMap, Rule, conv_norm, differences, mobilenet_rules, resnet_rules
from .native import naming, without_init
from .reading import read

__all__ = ["Trunk", "load_trunk"]

# timm counts MobileNetV2's blocks within stages; the paper, torchvision and we count them through.
TIMM_STAGES = (1, 2, 3, 4, 3, 3, 1)


@dataclass(frozen=True)
class Trunk:
    """A trunk's weights by the names that :class:`~trimask.engine.model.mask_rcnn.MaskRCNN` gives them.

    Attributes:
        config: of the trunk; a MobileNetV2 is taken to want ReLU6.
        state: tensors by our names, ``backbone.`` before each.
        unused: names of the file that a trunk has no place for: the classifier.
    """

    config: ResNetConfig | MobileNetV2Config
    state: dict[str, Tensor]
    unused: tuple[str, ...]


def load_trunk(path: str | Path) -> Trunk | None:
    """The trunk in an ImageNet classifier's state dict; None where the file holds something else.

    Raises:
        ValueError: a file that cannot be read, or a classifier with tensors missing or of another shape.
    """
    path = Path(path)
    tensors = read(path).tensors
    family = next((rules for mark, rules in FAMILIES if mark in tensors), None)
    if family is None:
        return None
    with naming(path):
        keys = KeyMap(family())
        state = {keys.to_native(name): tensor for name, tensor in tensors.items()}
        shapes = Shapes({name: tensor.shape for name, tensor in state.items() if name}, keys.to_foreign)
        mobilenet = "backbone.blocks.1.depthwise.conv.weight" in shapes
        config = MobileNetV2Config() if mobilenet else infer_resnet(ResNetConfig(), shapes)
        with without_init():
            expected = {f"backbone.{name}": x for name, x in build_backbone(config).state_dict().items()}
        known = {name: tensor for name, tensor in state.items() if name in expected}
        problems = differences(  # old files lack the counters
            {name: x.shape for name, x in expected.items() if not re.fullmatch(COUNTERS, name)},
            {name: x.shape for name, x in known.items() if not re.fullmatch(COUNTERS, name)},
        )
        if problems:
            raise ValueError("the tensors do not fit a trunk: " + "; ".join(problems))
    unused = tuple(name for name in tensors if keys.to_native(name) not in expected)
    return Trunk(config, known, unused)


def _timm_mobilenet_rules() -> list[Rule]:
    rules = [*conv_norm("backbone.stem", "conv_stem", "bn1")]
    number = 0
    for stage, repeats in enumerate(TIMM_STAGES):
        for index in range(repeats):
            number += 1
            ours, theirs = f"backbone.blocks.{number}", f"blocks.{stage}.{index}"
            layers = ("depthwise", "project") if stage == 0 else ("expand", "depthwise", "project")
            convs = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
            for i, (layer, conv) in enumerate(zip(layers, convs, strict=True), start=1):
                rules += conv_norm(f"{ours}.{layer}", f"{theirs}.{conv}", f"{theirs}.bn{i}")
    return rules


# A tensor that only this kind of classifier has, and the names of its layers.
FAMILIES: tuple[tuple[str, Callable[[], list[Rule]]], ...] = (
    ("features.1.conv.0.0.weight", lambda: list(mobilenet_rules("features."))),
    ("blocks.0.0.conv_dw.weight", _timm_mobilenet_rules),
    ("layer1.0.conv1.weight", lambda: list(resnet_rules(""))),
)
