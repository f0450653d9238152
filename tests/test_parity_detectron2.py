"""Every stage equals Detectron2's recorded one: proposals, pyramid statistics, detections, masks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimask
from matching import Found, differences, of_result
from models import golden_checkpoint
from record_peers import KINDS, assert_recorded, with_group_norms
from trimask.benchmarks.networks import drawn, random_detectron2
from trimask.benchmarks.peers import detectron2
from trimask.engine.model import presets
from trimask.engine.model.config import InputConfig
from trimask.engine.pictures.preprocess import make_batch
from trimask.engine.pictures.reading import read


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "detectron2_r50_fpn_3x.json").read_text())


@pytest.fixture(scope="module")
def predictor(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> trimask.Predictor:
    return trimask.load(golden_checkpoint(golden, tmp_path_factory.mktemp("weights")), device="cpu")


def pictures(recorded: dict[str, Any], shared_data: Path) -> list[tuple[Path, dict[str, Any]]]:
    assert len(recorded["images"]) == 3
    return [(shared_data / "coco_open" / "images" / name, found) for name, found in recorded["images"].items()]


def decode(found: dict[str, Any]) -> Found:
    mask = pytest.importorskip("pycocotools.mask")
    masks = [mask.decode({"size": m["size"], "counts": m["counts"].encode()}) for m in found["masks"]]
    return Found(np.array(found["boxes"]), np.array(found["scores"]), np.array(found["classes"]), np.array(masks, bool))


@pytest.mark.parametrize("kind", KINDS["detectron2"])
def test_every_detection_of_other_kinds(kind: str, tmp_path: Path) -> None:
    """Without a pyramid, or with group norms; recorded on other pictures."""
    assert_recorded("detectron2", kind, tmp_path)


@pytest.mark.parametrize("style", ["caffe", "pytorch", "ResNeXt", "C4", "DC5", "group norms"])
def test_the_installed_one_finds_the_same(style: str, shared_data: Path) -> None:
    """Of random weights, in all kinds of trunk, one by one and together."""
    pytest.importorskip("detectron2")
    source = random_detectron2()
    if style in ("C4", "DC5"):
        source = random_detectron2(preset=presets.detectron2_c4 if style == "C4" else presets.detectron2_dc5)
    elif style == "group norms":
        source = drawn(with_group_norms(source.config))
    elif style != "caffe":
        groups = {"groups": 32, "group_width": 4} if style == "ResNeXt" else {}
        config = replace(source.config, backbone=replace(source.config.backbone, stride_in_1x1=False, **groups))
        source = drawn(replace(config, input=replace(config.input, std=InputConfig().std)))
    paths = sorted((shared_data / "coco_open" / "images").glob("*.jpg"))[:40:10]
    arrays = [read(path).array for path in paths]
    twin = detectron2.twin(source)
    expected = [
        *(detectron2.detecting(twin, [array])()[0] for array in arrays[:2]),
        *detectron2.detecting(twin, arrays[2:])(),
    ]
    ours = trimask.Predictor(source, device="cpu")
    results = [*ours.predict(arrays[:2]), *ours.predict(arrays[2:], batch_size=2)]
    for theirs, result in zip(expected, results, strict=True):
        assert len(theirs.scores) == 100
        assert differences(of_result(result), Found(*theirs)) == []


def test_every_detection(predictor: trimask.Predictor, recorded: dict[str, Any], shared_data: Path) -> None:
    for path, found in pictures(recorded, shared_data):
        expected = decode(found["detections"])
        result = predictor.predict(path)
        assert len(expected.scores) > 20
        assert differences(of_result(result), expected) == []


@torch.inference_mode()
def test_the_stages_on_the_way(predictor: trimask.Predictor, recorded: dict[str, Any], shared_data: Path) -> None:
    graph = predictor.graph
    for path, found in pictures(recorded, shared_data):
        image, sizes, _ = make_batch([read(path).array], predictor.config.input, torch.device("cpu"))
        assert sizes.tolist() == [found["resized"]]
        pyramid = graph.fpn(graph.backbone(graph.normalize(image, sizes)))
        for level, x in zip(("p2", "p3", "p4", "p5", "p6"), pyramid, strict=True):
            mean, std = found["feature_mean_std"][level]
            assert x.mean().item() == pytest.approx(mean, abs=1e-4)
            assert x.std().item() == pytest.approx(std, abs=1e-4)
        feature_sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
        boxes, count = graph.rpn.select(*graph.rpn(pyramid), feature_sizes, image.shape[-2:], sizes)
        expected = np.array(found["proposals"]["boxes"])
        assert int(count) == found["proposals"].get("count", int(count))
        nearest = np.abs(expected[:, None] - boxes[0].numpy()[None, : len(expected) + 20]).max(-1).min(1)
        assert nearest.max() < 0.05  # pixels; the first hundred, as a set
