"""Every detection equals that of MMDetection's own code: recorded, and live where it is installed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trimask
from matching import Found, differences, of_result
from record_peers import KINDS, PICTURES, assert_recorded, photograph, with_group_norms
from trimask.benchmarks.networks import drawn, random_mmdetection
from trimask.benchmarks.peers import mmdetection
from trimask.engine.model import presets


@pytest.mark.parametrize("kind", KINDS["mmdetection"])
def test_every_detection(kind: str, tmp_path: Path) -> None:
    assert_recorded("mmdetection", kind, tmp_path)


@pytest.mark.parametrize("kind", ["pytorch", "caffe", "ResNeXt", "C4", "group norms"])
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
    elif kind == "C4":
        source = random_mmdetection(preset=presets.mmdet_c4)
        with torch.no_grad():  # MMDetection lets no box shrink to less than 16 thousandths
            source.rpn.deltas.weight *= 0.3
    elif kind == "group norms":
        source = drawn(with_group_norms(source.config))
    pictures = [photograph(name) for name in PICTURES]
    twin, ours = mmdetection.twin(source), trimask.Predictor(source, device="cpu")
    expected = [*mmdetection.detecting(twin, pictures[:1])(), *mmdetection.detecting(twin, pictures)()]
    results = [ours.predict(pictures[0]), *ours.predict(pictures, batch_size=2)]
    for theirs, result in zip(expected, results, strict=True):
        assert len(theirs.scores) == 100
        assert differences(of_result(result), Found(*theirs)) == []
