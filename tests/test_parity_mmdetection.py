"""Every detection equals that of MMDetection's own code: recorded, and live where it is installed."""

import gzip
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import trimask
from matching import Found, differences, of_result
from record_mmdetection import OPTIONS, PICTURES, RECORDED, STYLES, checkpoint, photograph
from trimask.benchmarks.networks import drawn, random_mmdetection
from trimask.benchmarks.peers import mmdetection


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(gzip.decompress(RECORDED.read_bytes()))["detections"]


@pytest.fixture(scope="module", params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def predictor(style: str, tmp_path_factory: pytest.TempPathFactory) -> trimask.Predictor:
    return trimask.load(checkpoint(style, tmp_path_factory.mktemp("weights")), device="cpu", style=style, **OPTIONS)


@pytest.mark.parametrize("name", PICTURES)
def test_every_detection(name: str, style: str, predictor: trimask.Predictor, recorded: dict[str, Any]) -> None:
    pytest.importorskip("skimage")
    mask = pytest.importorskip("pycocotools.mask")
    picture, found = photograph(name), recorded[f"{style} {name}"]
    masks = [mask.decode({"size": picture.shape[:2], "counts": runs.encode()}) for runs in found["masks"]]
    expected = Found(
        np.array(found["boxes"]), np.array(found["scores"]), np.array(found["labels"]), np.array(masks, bool)
    )
    assert len(expected.scores) == OPTIONS["max_detections"]
    assert expected.masks.any()
    ours = of_result(predictor.predict(picture))
    assert differences(ours, expected, capacity=OPTIONS["max_detections"]) == []


@pytest.mark.parametrize("kind", ["pytorch", "caffe", "ResNeXt"])
def test_the_installed_one_finds_the_same(kind: str) -> None:
    """Of random weights, in all styles of trunk, one by one and together."""
    pytest.importorskip("mmdet")
    pytest.importorskip("skimage")
    source = random_mmdetection()
    if kind == "ResNeXt":
        source = drawn(replace(source.config, backbone=replace(source.config.backbone, groups=32, group_width=4)))
    elif kind == "caffe":
        backbone = replace(source.config.backbone, stride_in_1x1=True)
        source = drawn(replace(source.config, backbone=backbone, input=replace(source.config.input, std=(58.0,) * 3)))
    pictures = [photograph(name) for name in PICTURES]
    twin, ours = mmdetection.twin(source), trimask.Predictor(source, device="cpu")
    expected = [*mmdetection.detecting(twin, pictures[:1])(), *mmdetection.detecting(twin, pictures[1:])()]
    results = [ours.predict(pictures[0]), *ours.predict(pictures[1:], batch_size=2)]
    for theirs, result in zip(expected, results, strict=True):
        assert len(theirs.scores) == 100
        assert differences(of_result(result), Found(*theirs)) == []
