"""Configs are values that survive JSON and complain by name."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from models import SMALL, VARIANTS
from trimask import MaskRCNNConfig
from trimask.engine.model import presets
from trimask.engine.model.config import AnchorConfig

PRESETS = (
    *(presets.torchvision_v1, presets.torchvision_v2),
    *(presets.detectron2, presets.detectron2_c4, presets.detectron2_dc5),
    *(presets.mmdet, presets.mmdet_c4),
)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_survive_json(config: MaskRCNNConfig) -> None:
    assert MaskRCNNConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json_and_differ(preset) -> None:
    config = preset(("cat",), (17,))
    assert MaskRCNNConfig.from_json(config.to_json()) == config
    assert sum(other(("cat",), (17,)) == config for other in PRESETS) == 1


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SMALL.class_names = ("fish",)


def changed(**fields) -> str:
    return json.dumps({**json.loads(SMALL.to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "expected JSON"),
        (changed(colour=3), r"config: unknown fields \['colour'\]"),
        (changed(rpn={"convs": "two"}), r"config\.rpn\.convs: expected int, got 'two'"),
        (changed(rpn={"convs": True}), r"config\.rpn\.convs: expected int, got True"),
        (changed(detection={"nms_threshold": 10**400}), r"config\.detection\.nms_threshold: expected float, got 1000"),
        ("[" * 100_000, "expected JSON"),
        (changed(rpn=7), r"config\.rpn: expected an object, got 7"),
        (changed(backbone={"type": "VGG"}), r"config\.backbone: expected one of .*ResNetConfig.*, got 'VGG'"),
        (changed(input={"mean": [1.0, 2.0]}), r"config\.input\.mean: expected a list of 3 values"),
        (changed(class_names=[]), "class_names and category_ids"),
        ('{"class_names": ["cat"]}', "category_ids"),
    ],
)
def test_bad_json_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MaskRCNNConfig.from_json(text)


def test_bad_anchors_are_named() -> None:
    with pytest.raises(ValueError, match=r"anchors\.sizes: expected 5 level"):
        replace(SMALL, anchors=AnchorConfig(sizes=((8.0,), (16.0,))))
