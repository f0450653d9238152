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


# As the makers' configs have them; Detectron2's and MMDetection's caffe style say BGR.
ONE_SIZE = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
ONE_MAP = ((32.0, 64.0, 128.0, 256.0, 512.0),)
IMAGENET, UNDIVIDED = (58.395, 57.12, 57.375), (1.0, 1.0, 1.0)
PUBLISHED = [
    # anchors, pre_nms, sampling_ratio, aligned, std, size_divisible, stride_in_1x1, fcs, mask convolutions
    (presets.torchvision_v1, ONE_SIZE, 1000, 2, False, IMAGENET, 32, False, (1024, 1024), 4),
    (presets.torchvision_v2, ONE_SIZE, 1000, 2, False, IMAGENET, 32, False, (1024,), 4),
    (presets.detectron2, ONE_SIZE, 1000, 0, True, UNDIVIDED, 32, True, (1024, 1024), 4),
    (presets.detectron2_c4, ONE_MAP, 6000, 0, True, UNDIVIDED, 1, True, (), 0),
    (presets.detectron2_dc5, ONE_MAP, 6000, 0, True, UNDIVIDED, 1, True, (1024, 1024), 4),
    (presets.mmdet, ONE_SIZE, 1000, 0, True, IMAGENET, 32, False, (1024, 1024), 4),
    (presets.mmdet_c4, ONE_MAP, 6000, 0, True, UNDIVIDED, 32, True, (), 0),
]


@pytest.mark.parametrize(
    ("preset", *(["anchors", "pre_nms", "ratio", "aligned", "std", "divisible", "in_1x1", "fcs", "convs"])), PUBLISHED
)
def test_presets_have_the_published_values(
    preset, anchors, pre_nms, ratio, aligned, std, divisible, in_1x1, fcs, convs
) -> None:
    config = preset(("cat",), (17,))
    assert (config.anchors.sizes, config.anchors.aspect_ratios) == (anchors, (0.5, 1.0, 2.0))
    rpn, detection = config.rpn, config.detection
    assert (rpn.pre_nms, rpn.post_nms, rpn.nms_threshold) == (pre_nms, 1000, 0.7)
    assert (detection.score_threshold, detection.nms_threshold, detection.max_detections) == (0.05, 0.5, 100)
    assert (config.pool.sampling_ratio, config.pool.aligned) == (ratio, aligned)
    assert (config.input.resize.min_size, config.input.resize.max_size) == (800, 1333)
    assert (config.input.mean, config.input.std) == ((123.675, 116.28, 103.53), std)
    assert config.input.size_divisible == divisible
    assert config.backbone.stride_in_1x1 == in_1x1
    assert (config.backbone.blocks, config.backbone.bottleneck) == ((3, 4, 6, 3), True)
    assert config.box_head.resolution == (14 if config.backbone.last_on_rois else 7)
    assert (config.mask_head.resolution, config.mask_head.convs) == (14, (256,) * convs)
    assert config.box_head.fcs == fcs


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
