"""Exported files: standard operators, any size and batch, and the detections of the model that they were made of."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
from PIL import Image  # noqa: E402

import trimask  # noqa: E402
from exported import CONFIG, write  # noqa: E402
from models import VARIANTS, small_model  # noqa: E402
from trimask import cli  # noqa: E402
from trimask.engine.inference.graph import fold  # noqa: E402
from trimask.engine.inference.result import to_dataset  # noqa: E402
from trimask.engine.model.config import MaskRCNNConfig  # noqa: E402
from trimask.engine.model.presets import detectron2  # noqa: E402
from trimask.export import Exported, Metadata, Runtime, to_onnx  # noqa: E402
from trimask.export.metadata import KEY, contract_text  # noqa: E402
from trimask.export.onnx import OPSETS  # noqa: E402
from trimask.export.quantization import PREDICTORS  # noqa: E402
from trimask.export.triton_server import config_text  # noqa: E402
from trimask.export.verification import Tolerance, compare, verify  # noqa: E402
from trimask.kernels import PasteRule  # noqa: E402

# Random weights leave IoUs that rounding moves across a threshold, and amplify rounding by thousands.
RANDOM = Tolerance(share=0.95)
ROUNDED = Tolerance(score=0.05, iou=0.9, mask_iou=0.8, share=0.9)  # where the graph resizes, or OpenVINO runs

# Detectron2's conventions, one mask and box for all classes, and heads with convolutions and norms.
OTHER = replace(
    detectron2(CONFIG.class_names, CONFIG.category_ids),
    input=replace(CONFIG.input, resize=detectron2(("a",), (1,)).input.resize),
    backbone=CONFIG.backbone,
    fpn=CONFIG.fpn,
    anchors=replace(CONFIG.anchors, round=False, stride_from_size=False),
    rpn=replace(CONFIG.rpn, convs=2, min_size=0.0),
    detection=CONFIG.detection,
    box_head=replace(VARIANTS["norms and convolutions"].box_head, class_agnostic=True),
    mask_head=replace(VARIANTS["norms and convolutions"].mask_head, class_agnostic=True),
)
OTHER = replace(OTHER, input=replace(OTHER.input, resize=replace(OTHER.input.resize, min_size=128, max_size=192)))

Outputs = dict[str, np.ndarray]


def noise(rng: np.random.Generator, *size: int) -> np.ndarray:
    """A picture of coloured squares."""
    cells = rng.integers(0, 256, (-(-size[0] // 12), -(-size[1] // 12), 3)).astype(np.uint8)
    return np.ascontiguousarray(cells.repeat(12, 0).repeat(12, 1)[: size[0], : size[1]])


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Any) -> Outputs:
    opened = session(path)
    names = [value.name for value in opened.get_inputs()]
    arrays = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True)}
    return dict(zip([value.name for value in opened.get_outputs()], opened.run(None, arrays), strict=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("export") / "small.onnx")


# The file.


def test_the_file_passes_the_checker_and_uses_the_standard_domain_alone(small: Path) -> None:
    onnx.checker.check_model(small, full_check=True)
    model = onnx.load(small)
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not model.functions
    assert not [node for node in model.graph.node if node.op_type in ("Loop", "If", "SequenceAt")]


def test_inputs_and_outputs_are_those_of_the_contract(small: Path) -> None:
    opened = session(small)
    described = [(x.name, x.type, x.shape) for x in (*opened.get_inputs(), *opened.get_outputs())]
    assert described == [
        ("image", "tensor(float)", ["batch", 3, "height", "width"]),
        ("image_sizes", "tensor(int64)", ["batch", 2]),
        ("original_sizes", "tensor(int64)", ["batch", 2]),
        ("num_detections", "tensor(int64)", ["batch"]),
        ("boxes", "tensor(float)", ["batch", 100, 4]),
        ("scores", "tensor(float)", ["batch", 100]),
        ("labels", "tensor(int64)", ["batch", 100]),
        ("masks", "tensor(float)", ["batch", 100, 28, 28]),
    ]


def test_the_metadata_say_everything(small: Path) -> None:
    meta = session(small).get_modelmeta()
    about = Metadata.from_json(meta.custom_metadata_map[KEY])
    assert about == Metadata(CONFIG)
    assert "contract 1" in meta.description
    for name in ("image", "image_sizes", "original_sizes", "num_detections", "boxes", "scores", "labels", "masks"):
        assert f"{name}: " in meta.description


def test_nothing_of_this_machine_is_in_the_file(small: Path) -> None:
    data = small.read_bytes()
    for text in (str(Path(trimask.__file__).parent), "site-packages", "stack_trace"):
        assert text.encode() not in data


@pytest.mark.parametrize(
    "about",
    [
        Metadata(CONFIG, "none", precision="int8", version="1.2", source={"file": "a.pth", "sha256": "00"}),
        Metadata(CONFIG, "full", preprocess=True),
        Metadata(replace(CONFIG, mask_head=None), "none", static=(2, 64, 96), precision="float16"),
    ],
)
def test_metadata_go_to_json_and_back(about: Metadata) -> None:
    assert Metadata.from_json(about.to_json()) == about


# What comes out, beside the model.


@pytest.fixture(scope="module")
def plain() -> trimask.MaskRCNN:
    """The model of the file, folded as there."""
    return fold(small_model(CONFIG), torch.float32)


def assert_same(found: Outputs, model: trimask.MaskRCNN, image: torch.Tensor, sizes: Any, originals: Any) -> int:
    """Row by row, but for equal scores; how many were found."""
    with torch.inference_mode():
        expected = model(image, torch.as_tensor(sizes), torch.as_tensor(originals))
    assert found["num_detections"].tolist() == expected.count.tolist()
    for i, n in enumerate(expected.count.tolist()):
        ours, theirs = (
            sorted(zip(scores.round(3), boxes, labels, masks, strict=True), key=lambda x: (-x[0], x[2], *x[1].round()))
            for scores, boxes, labels, masks in (
                [found[name][i, :n] for name in ("scores", "boxes", "labels", "masks")],
                [
                    value[i, :n].numpy()
                    for value in (expected.scores, expected.boxes, expected.labels, expected.mask_logits.sigmoid())
                ],
            )
        )
        assert [one[2] for one in ours] == [other[2] for other in theirs]
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one[1], other[1], rtol=0, atol=0.5)
            assert abs(one[3] - other[3]).max() < 0.1
        assert not found["boxes"][i, n:].any()
        assert not found["scores"][i, n:].any()
        assert not found["masks"][i, n:].any()
        assert (found["labels"][i, n:] == -1).all()
        assert (found["labels"][i, :n] >= 0).all()
    return int(expected.count.sum())


@pytest.mark.parametrize("sizes", [[[96, 160]], [[128, 128]] * 2, [[180, 96], [96, 96], [17, 1]], [[32, 32]]])
def test_sizes_and_batches_that_the_export_has_not_seen(
    sizes: list[list[int]], small: Path, plain: trimask.MaskRCNN
) -> None:
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    image = torch.rand(len(sizes), 3, height, width, generator=torch.Generator().manual_seed(5)) * 255
    originals = [[3 * h, 2 * w] for h, w in sizes]
    assert assert_same(run(small, image, sizes, originals), plain, image, sizes, originals)


def test_no_detection_in_a_batch(small: Path, plain: trimask.MaskRCNN) -> None:
    image, sizes = torch.full((2, 3, 96, 64), torch.nan), [[96, 64], [50, 60]]
    assert assert_same(run(small, image, sizes, sizes), plain, image, sizes, sizes) == 0


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_gives_the_same(opset: int, small: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "other.onnx", opset=opset)
    file = onnx.load(path)
    assert file.opset_import[0].version == opset
    assert file.ir_version == {18: 8, 19: 9, 20: 9, 21: 10}[opset]  # the first to know it: older runtimes take no newer
    image, sizes = np.full((1, 3, 96, 128), 90, np.float32), [[90, 128]]
    for one, other in zip(
        run(path, image, sizes, sizes).values(), run(small, image, sizes, sizes).values(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_it_equals_the_predictor(small: Path) -> None:
    report = verify(small, small_model(CONFIG), threads=1, tolerance=RANDOM)
    assert report.good, report
    assert len(report.checks) > 4


@pytest.mark.parametrize("name", ["C4", "DC5", "group norms", "softmax masks"])
@pytest.mark.parametrize("static", [None, (2, 128, 160)])
def test_other_kinds_of_models_equal_the_predictor(
    name: str, static: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    model = small_model(VARIANTS[name])
    to_onnx(model, tmp_path / "x.onnx", static=static)
    report = verify(tmp_path / "x.onnx", model, threads=1, tolerance=RANDOM)
    assert report.good, report


def test_without_a_pyramid_any_size_will_do(tmp_path: Path) -> None:
    model, sizes = small_model(VARIANTS["C4"]), [[101, 147], [90, 113]]
    image = torch.rand(2, 3, 101, 147, generator=torch.Generator().manual_seed(5)) * 255
    for static in (None, (2, 101, 147)):
        about = to_onnx(model, tmp_path / "x.onnx", static=static).about
        assert ("H, W: any" in contract_text(about)) == (static is None)
        found = run(tmp_path / "x.onnx", image, sizes, sizes)
        assert assert_same(found, fold(model, torch.float32), image, sizes, sizes)
    with pytest.raises(ValueError, match="multiples of 32"):
        to_onnx(small_model(CONFIG), tmp_path / "y.onnx", static=(2, 101, 147))


def test_verification_sees_other_weights(small: Path) -> None:
    report = verify(small, small_model(CONFIG, seed=4), threads=1, tolerance=RANDOM)
    assert not report.good
    assert [check.good for check in report.checks[:2]] == [True, True]


def half_a_pixel_off(network: Any) -> Any:
    for node in network.graph:
        if node.op_type == "RoiAlign":
            there = node.attributes["coordinate_transformation_mode"].as_string()
            other = {"half_pixel": "output_half_pixel", "output_half_pixel": "half_pixel"}[there]
            node.attributes.add(ir.AttrString("coordinate_transformation_mode", other))
    return network


def test_verification_sees_half_a_pixel(tmp_path: Path) -> None:
    path = write(tmp_path / "off.onnx", change=half_a_pixel_off)
    report = verify(path, small_model(CONFIG), threads=1, tolerance=RANDOM)
    assert [check.good for check in report.checks[:2]] == [True, True]
    assert not report.good


@pytest.mark.parametrize(("seed", "good"), [(3, True), (4, False)])
def test_verification_of_average_precision(
    seed: int, good: bool, small: Path, tmp_path: Path, np_rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a data set that holds what the model finds."""
    pytest.importorskip("pycocotools")
    picture = tmp_path / "one.png"
    Image.fromarray(noise(np_rng, 120, 150)).save(picture)
    model = small_model(CONFIG, seed)
    found = trimask.Predictor(model, device="cpu").predict([picture])
    data = to_dataset(found, dict(zip(CONFIG.category_ids, CONFIG.class_names, strict=True)), tmp_path / "data.json")
    monkeypatch.setattr("trimask.export.verification._pictures", lambda given: iter([]))
    report = verify(small, model, data=(data, tmp_path), threads=1, tolerance=Tolerance(ap=0.05))
    assert [check.what for check in report.checks[-2:]] == ["bbox AP", "segm AP"]
    assert [check.good for check in report.checks[-2:]] == [good, good], report
    assert "1 pictures" in report.checks[-1].outcome


def test_verification_of_another_model_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="classes"):
        verify(small, small_model(replace(CONFIG, class_names=("a", "b", "c"))))


def test_verification_compares_something(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimask.export.verification._pictures", lambda given: iter([np.zeros((4, 4, 3), np.uint8)]))
    config = replace(CONFIG, detection=replace(CONFIG.detection, score_threshold=1.0))
    report = verify(write(small.parent / "nothing.onnx", config), small_model(CONFIG))
    assert not report.good
    assert "nothing has been compared" in report.checks[-1].outcome


def test_a_comparison_pairs_rows_that_changed_places(small: Path, np_rng: np.random.Generator) -> None:
    theirs = Runtime(small, threads=1, cache=False).predict(noise(np_rng, 120, 150))
    assert len(theirs) > 5
    n = len(theirs)
    found = compare(theirs, theirs[list(range(n))[::-1]], Tolerance(), 0.05, 100)
    assert (found.matched, found.alone, found.box, found.pixels) == (n, 0, 0.0, 0)
    rising = compare(theirs[list(range(n))[::-1]], theirs, Tolerance(), 0.05, 100)
    assert (rising.matched, rising.alone) == (n, np.count_nonzero(np.diff(theirs.scores)))  # the best comes first
    fewer = compare(theirs[1:], theirs, Tolerance(), 0.05, 100)
    assert (fewer.matched, fewer.alone) == (n - 1, 1)
    moved = replace(theirs, boxes=theirs.boxes + np.float32(30))
    assert compare(moved, theirs, Tolerance(), 0.05, 100).alone >= n
    # A corner that moves to the next whole pixel takes the mask along.
    whole = replace(theirs, boxes=np.round(theirs.boxes), rule=PasteRule.TORCHVISION)
    near = replace(whole, boxes=whole.boxes - np.float32(1e-4))
    assert compare(near, whole, Tolerance(mask_iou=1, mask_pixels=0), 0.05, 100).alone == 0
    assert compare(theirs[1:], theirs, Tolerance(), 0.05, n).alone == (theirs.scores[0] - theirs.scores[-1] >= 1e-3)


# Before and behind the network.


@pytest.mark.parametrize("rule", [PasteRule.TORCHVISION, PasteRule.DETECTRON2, CONFIG.paste])
def test_full_masks_are_those_of_a_result_to_the_pixel(
    rule: PasteRule, tmp_path: Path, np_rng: np.random.Generator
) -> None:
    config = replace(CONFIG, paste=rule)
    roi, full = (
        Runtime(write(tmp_path / f"{masks}.onnx", config, masks=masks), threads=1, cache=False)
        for masks in ("roi", "full")
    )
    pictures = [noise(np_rng, 150, 110), noise(np_rng, 90, 160), noise(np_rng, 61, 33)]
    for one, other in zip(roi.predict(pictures, batch_size=3), full.predict(pictures, batch_size=3), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.masks, other.masks)
        assert one.masks.any()


@pytest.mark.parametrize("size", [[0, 0], [-5, 96]])
def test_a_size_of_nothing_has_no_detections(size: list[int], small: Path) -> None:
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(5)) * 255
    found = run(small, image, [size], [[96, 96]])
    assert found["num_detections"].tolist() == [0]
    assert not any(found[name].any() for name in ("boxes", "scores", "masks"))


@pytest.mark.parametrize("name", ["RoIAlign by the largest sample", "RoIPool"])
@pytest.mark.parametrize("static", [None, (1, 64, 64)])
def test_other_pooling_is_refused(name: str, static: tuple[int, int, int] | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pool: expected RoIAlign by the average"):
        to_onnx(small_model(VARIANTS[name]), tmp_path / "x.onnx", static=static)


def test_full_masks_of_a_batch_without_detections(tmp_path: Path) -> None:
    path = write(tmp_path / "full.onnx", masks="full")
    found = run(path, np.full((2, 3, 64, 64), np.nan, np.float32), [[64, 64]] * 2, [[50, 60], [70, 40]])
    assert found["masks"].shape == (2, 100, 70, 60)
    assert found["masks"].dtype == np.bool_
    assert not found["masks"].any()


def rounded(resize: Any, **values: Any) -> MaskRCNNConfig:
    return replace(CONFIG, input=replace(CONFIG.input, resize=replace(resize, **values)))


def only_resizing(path: Path) -> Path:
    """The part of a file that resizes and pads the picture."""
    model = onnx.load(path)
    resized = next(node.output[0] for node in model.graph.node if node.op_type == "Pad")
    onnx.save(onnx.utils.Extractor(model).extract_model(["picture"], [resized]), path)
    return path


def resized_apart(path: Path, config: MaskRCNNConfig, picture: np.ndarray) -> np.ndarray:
    """How far each value is from the host's."""
    from trimask.engine.pictures.host import make_batch

    (found,) = run(path, picture).values()
    expected, _, _ = make_batch([picture], config.input)
    assert found.shape == expected.shape
    return np.abs(found - np.asarray(expected))


@pytest.mark.parametrize("size", [(100, 150), (300, 97), (13, 400), (128, 128), (161, 161)])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        OTHER,
        rounded(CONFIG.input.resize, quantize=True, round_half_up=True),
        rounded(CONFIG.input.resize, antialias=True),
    ],
    ids=["torchvision", "Detectron2", "MMDetection", "antialias"],
)
def test_the_graph_resizes_as_the_host_does(
    config: MaskRCNNConfig, size: tuple[int, int], tmp_path: Path, np_rng: np.random.Generator
) -> None:
    path = only_resizing(write(tmp_path / "any.onnx", config, preprocess=True))
    away = resized_apart(path, config, np_rng.integers(0, 256, (*size, 3)).astype(np.uint8))
    if config.input.resize.quantize and not config.input.resize.antialias:
        assert away.max() == 0
    elif config.input.resize.quantize:
        assert away.max() <= 1
        assert (away > 0).mean() < 0.01
    else:
        assert away.max() < 0.1


def test_the_graph_rounds_a_few_values_otherwise_than_pillow(tmp_path: Path, np_rng: np.random.Generator) -> None:
    """The figures of docs/export.md; ratios of small numbers leave many values half way between levels."""
    config = replace(OTHER, input=detectron2(("a",), (1,)).input)
    path = only_resizing(write(tmp_path / "any.onnx", config, preprocess=True))
    for size, share in (((480, 640), 0.002), ((720, 1280), 0.03), ((640, 640), 0.09)):
        away = resized_apart(path, config, np_rng.integers(0, 256, (*size, 3)).astype(np.uint8))
        assert share / 4 < (away > 0).mean() < share
        assert away.max() <= 2
        assert (away > 1).mean() < 1e-4


def test_one_picture_of_any_size(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = write(tmp_path / "any.onnx", preprocess=True, masks="full")
    assert [x.name for x in session(path).get_inputs()] == ["picture"]
    report = verify(path, small_model(CONFIG), [noise(np_rng, 97, 211)], threads=1, tolerance=ROUNDED)
    assert report.good, report


# Other networks.


def test_a_fixed_size_and_the_conventions_of_detectron2(tmp_path: Path) -> None:
    """No shape depends on the data but those inside of suppression."""
    model = small_model(OTHER)
    exported = to_onnx(model, tmp_path / "static.onnx", static=(2, 128, 192), max_detections=20, score=0.2, nms=0.4)
    assert not {"NonZero", "Compress", "Unique", "Loop", "If"} & set(exported.operators)
    assert exported.operators["NonMaxSuppression"] == 2
    nodes = onnx.load(exported.path).graph.node
    assert exported.nodes == len(nodes)
    assert {a.i for node in nodes for a in node.attribute if a.name == "sampling_ratio"} == {0}
    shapes = [x.shape for x in (*session(exported.path).get_inputs(), *session(exported.path).get_outputs())]
    assert shapes == [[2, 3, 128, 192], [2, 2], [2, 2], [2], [2, 20, 4], [2, 20], [2, 20], [2, 20, 28, 28]]
    assert exported.about.config.detection.nms_threshold == 0.4
    report = verify(exported.path, model, threads=1, tolerance=RANDOM)
    assert report.good, report


def test_boxes_only(tmp_path: Path) -> None:
    model = small_model(VARIANTS["boxes only"])
    exported = to_onnx(model, tmp_path / "boxes.onnx", static=(1, 64, 96))
    assert exported.about.masks == "none"
    outputs = [x.name for x in session(exported.path).get_outputs()]
    assert outputs == ["num_detections", "boxes", "scores", "labels"]
    report = verify(exported.path, model, threads=1, tolerance=RANDOM)
    assert report.good, report
    assert not Runtime(exported.path, cache=False).predict(np.zeros((50, 50, 3), np.uint8)).has_masks


def test_half_precision_of_the_bundled_model(tmp_path: Path) -> None:
    """Small weights would be chaos: rounding must be judged on trained ones."""
    pytest.importorskip("skimage")
    exported = to_onnx("people", tmp_path / "half.onnx", half=True, static=(1, 320, 320))
    assert exported.megabytes < 14
    assert exported.about.source["file"] == "people.safetensors"
    assert len(exported.about.source["sha256"]) == 64
    model = onnx.load(exported.path)
    large = {x.data_type for x in model.graph.initializer if np.prod(x.dims) > 9000}  # others are grids
    assert large == {onnx.TensorProto.FLOAT16}
    report = verify(exported.path, "people", threads=1)
    assert report.good, report


def test_eight_bits(tmp_path: Path, np_rng: np.random.Generator) -> None:
    from trimask.export.quantization import quantize

    pictures = [noise(np_rng, 100, 150), noise(np_rng, 150, 100)]
    path = write(tmp_path / "int8.onnx", change=lambda core: quantize(core, CONFIG.input, pictures), precision="int8")
    model = onnx.load(path)
    makers = {output: node for node in model.graph.node for output in node.output}
    whole = {x.name for x in model.graph.initializer if x.data_type == onnx.TensorProto.FLOAT and len(x.dims) > 1}
    scales = [onnx.numpy_helper.to_array(x) for x in model.graph.initializer if x.name.endswith("_scale")]
    assert scales
    assert all(np.isfinite(scale).all() for scale in scales)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 20
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            exact = any(part in node.input[1] for part in PREDICTORS)
            assert exact == (node.input[1] in whole), node.input[1]
            assert exact or makers[node.input[1]].op_type == "DequantizeLinear"
    assert len(Runtime(path, threads=1, cache=False).predict(pictures[0])) > 0


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 22}, "opset"),
        ({"opset": 17}, "opset"),
        ({"masks": "some"}, "masks"),
        ({"static": (1, 100, 128)}, "multiples of 32"),
        ({"static": (0, 64, 64)}, "static"),
        ({"static": (1, 64)}, "static"),
        ({"static": (1, 64, 64), "preprocess": True}, "static"),
        ({"static": (1, 64, 64), "masks": "full"}, "static"),
        ({"half": True, "int8": []}, "half"),
        ({"score": 1.5}, "score"),
        ({"nms": -1}, "nms"),
        ({"max_detections": 0}, "max_detections"),
        ({"min_size": 100}, "beside a model"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        to_onnx(small_model(CONFIG), tmp_path / "x.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.onnx file"):
        to_onnx("people", tmp_path / "x.pt")


def test_the_verb(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its options reach the exporter, its status is the verification's."""
    given: dict[str, Any] = {}

    def export(weights: str, path: Path, **options: Any) -> Exported:
        given.update(options, weights=weights, path=path)
        return Exported(small, Metadata(CONFIG), options["opset"], {"Conv": 3, "Add": 2}, 1.5, 2.0)

    monkeypatch.setattr("trimask.export.onnx.to_onnx", export)
    seeds = iter([3, 4])
    monkeypatch.setattr(
        "trimask.export.verification.load_model", lambda weights, **options: small_model(CONFIG, next(seeds))
    )
    monkeypatch.setattr("trimask.export.verification.TOLERANCES", {"float32": RANDOM})
    arguments = ["export", "w.pth", str(tmp_path / "o.onnx"), "--static", "1", "64", "96", "--half", "--opset", "19"]
    assert cli.main(arguments) == 0
    assert given["static"] == [1, 64, 96]
    assert given["half"] is True
    assert given["opset"] == 19
    assert given["weights"] == "w.pth"
    text = capsys.readouterr().out
    assert "5 nodes, opset 19" in text
    assert "equal to the checkpoint, run by CPUExecutionProvider" in text
    assert cli.main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["metadata"]["contract"] == 1
    assert not all(check["good"] for check in report["verification"])


def test_a_repository_of_triton_server(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(weights: str, path: Path, **options: Any) -> Exported:
        assert path == tmp_path / "cats" / "1" / "model.onnx"
        return Exported(path, Metadata(CONFIG), 20, {}, 1.5, 2.0)

    monkeypatch.setattr("trimask.export.onnx.to_onnx", export)
    assert cli.main(["export", "a/cats.pth", str(tmp_path), "--target", "triton-server", "--no-verify"]) == 0
    assert "model.onnx" in capsys.readouterr().out
    assert (tmp_path / "cats" / "labels.txt").read_text() == "cat\ndog\nbird\n"
    assert (tmp_path / "cats" / "config.pbtxt").read_text() == (
        'name: "cats"\nbackend: "onnxruntime"\ndefault_model_filename: "model.onnx"\nmax_batch_size: 8\n'
        'input { name: "image", data_type: TYPE_FP32, dims: [3, -1, -1] }\n'
        'input { name: "image_sizes", data_type: TYPE_INT64, dims: [2] }\n'
        'input { name: "original_sizes", data_type: TYPE_INT64, dims: [2] }\n'
        'output { name: "num_detections", data_type: TYPE_INT64, dims: [1], reshape: { shape: [] } }\n'
        'output { name: "boxes", data_type: TYPE_FP32, dims: [100, 4] }\n'
        'output { name: "scores", data_type: TYPE_FP32, dims: [100] }\n'
        'output { name: "labels", data_type: TYPE_INT64, dims: [100] }\n'
        'output { name: "masks", data_type: TYPE_FP32, dims: [100, 28, 28] }\n'
        "dynamic_batching { max_queue_delay_microseconds: 2000 }\n"
    )


@pytest.mark.parametrize(
    ("about", "dims"),
    [
        (Metadata(CONFIG, "full", preprocess=True), ["[-1, -1, 3]", "[1]", "[1, 100, 4]"]),
        (Metadata(CONFIG, "full"), ["[-1, 3, -1, -1]", "[-1, 2]", "[-1, 2]", "[-1]", "[-1, 100, 4]"]),
        (Metadata(CONFIG, "none", static=(2, 64, 96)), ["[2, 3, 64, 96]", "[2, 2]", "[2, 2]", "[2]", "[2, 100, 4]"]),
    ],
)
def test_what_a_server_cannot_batch(about: Metadata, dims: list[str]) -> None:
    text = config_text("x", about)
    assert "max_batch_size: 0\n" in text
    assert "dynamic_batching" not in text
    assert re.findall(r"dims: (.*?\])", text)[: len(dims)] == dims


# Without torch.


def test_a_runtime_predicts_as_the_predictor(small: Path, tmp_path: Path, np_rng: np.random.Generator) -> None:
    """Its sources and options: batches, a bad picture among others, limits, a stream."""
    runtime = Runtime(small, threads=1, cache=False)
    assert "CPUExecutionProvider" in repr(runtime)
    pictures = [noise(np_rng, 100, 150), noise(np_rng, 150, 100), noise(np_rng, 60, 60)]
    one_by_one = runtime.predict(pictures)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.fromarray(pictures[0]).save(tmp_path / "good.png")
    with pytest.warns(UserWarning, match=r"bad\.png"):
        bad, good = runtime.predict(tmp_path)
    assert bad.error is not None
    assert good.path == tmp_path / "good.png"
    for result, expected in zip([good, *runtime.predict(pictures, stream=True, workers=1)], [0, 0, 1, 2], strict=True):
        np.testing.assert_array_equal(result.boxes, one_by_one[expected].boxes)
        np.testing.assert_array_equal(result.masks, one_by_one[expected].masks)
    scores = one_by_one[0].scores
    assert scores[-1] < scores[0]
    assert len(runtime.predict(pictures[0], score=float(scores[-1]))) == (scores > scores[-1]).sum()
    assert len(runtime.predict(pictures[0], max_detections=3)) == 3
    assert Runtime(small, threads=1, cache=False, max_detections=3).predict(pictures[0]).scores.tolist() == (
        scores[:3].tolist()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": 0.01}, "score: expected at least the file's 0.05"),
        ({"max_detections": 101}, "at most the file's 100"),
        ({"device": "abacus"}, "device"),
        ({"threads": 0}, "threads"),
        ({"backend": "tensorrt"}, "backend"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"dtype": torch.float16}, "dtype: .*got 'float16' with onnxruntime"),
        ({"resize": 0}, "resize"),
        ({"providers": ["CPUExecutionProvider"], "device": "cpu"}, "device: expected none beside providers"),
        ({"session_options": object(), "threads": 1}, "threads: expected none beside session_options"),
        ({"providers": [], "backend": "openvino"}, "providers, session_options: expected with onnxruntime"),
        ({"resize": (480, 640)}, "resize: expected a short side in whole pixels"),
    ],
)
def test_a_runtime_with_options_out_of_range(options: dict[str, Any], message: str, small: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Runtime(small, cache=False, **options)


def test_a_runtime_takes_the_dtypes_of_torch(small: Path) -> None:
    runtime = Runtime(small, cache=False, dtype=torch.float32)
    assert b"torch" not in pickle.dumps(runtime)  # another process need not have it


def test_cuda_that_is_not_there_is_said(small: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.warns(UserWarning, match="expected 'cuda', but CPUExecutionProvider runs"):
        assert Runtime(small, device="cuda", cache=False).provider == "CPUExecutionProvider"


def test_the_optimised_model_is_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, np_rng: np.random.Generator
) -> None:
    monkeypatch.setenv("TRIMASK_HOME", str(tmp_path))
    picture = noise(np_rng, 100, 150)
    first = Runtime(small, threads=1).predict(picture)
    (kept,) = (tmp_path / "onnxruntime").iterdir()
    again = Runtime(small, threads=1).predict(picture)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(Runtime(small, threads=1).predict(picture).boxes, first.boxes)
    assert kept.stat().st_size > 1000


def test_it_runs_where_there_is_no_room_to_keep_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, np_rng: np.random.Generator
) -> None:
    monkeypatch.setenv("TRIMASK_HOME", str(tmp_path))
    real, written = onnxruntime.InferenceSession, []

    def full(data: Any, options: Any, **more: Any) -> Any:
        if options.optimized_model_filepath:
            written.append(Path(options.optimized_model_filepath))
            written[-1].write_bytes(b"half of it")
            raise RuntimeError("Protobuf serialization failed.")
        return real(data, options, **more)

    picture = noise(np_rng, 100, 150)
    expected = Runtime(small, threads=1, cache=False).predict(picture).boxes
    monkeypatch.setattr(onnxruntime, "InferenceSession", full)
    np.testing.assert_array_equal(Runtime(small, threads=1).predict(picture).boxes, expected)
    assert len(written) == 1
    assert list((tmp_path / "onnxruntime").iterdir()) == []


def test_the_providers_and_options_of_onnx_runtime(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, np_rng: np.random.Generator
) -> None:
    monkeypatch.setenv("TRIMASK_HOME", str(tmp_path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    runtime = Runtime(small, providers=["CPUExecutionProvider"], session_options=options)
    picture = noise(np_rng, 100, 150)
    expected = Runtime(small, threads=1, cache=False).predict(picture)
    np.testing.assert_array_equal(runtime.predict(picture).scores, expected.scores)
    assert Path(runtime._backend._session.end_profiling()).parent == tmp_path
    assert not (tmp_path / "onnxruntime").exists()


@pytest.mark.parametrize("where", ["file/x.onnx", "folder.onnx"])
def test_where_nothing_can_be_written_is_known_before_the_work(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr("trimask.export.onnx.network", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / where}: expected a f")):
        to_onnx(small_model(CONFIG), tmp_path / where)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.onnx"}


def test_openvino_gives_the_same(small: Path, np_rng: np.random.Generator) -> None:
    pytest.importorskip("openvino")
    report = verify(small, small_model(CONFIG), [noise(np_rng, 97, 211)], backend="openvino", tolerance=ROUNDED)
    assert report.good, report
    assert report.provider == "OpenVINO CPU"


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from trimask import cli
from trimask.export import Runtime

print(Runtime(sys.argv[1], threads=1, cache=False).predict(sys.argv[2]).boxes.tolist())
status = cli.main(["predict", *sys.argv[1:3], "--score", "0.05", "--json"])
assert "torch" not in sys.modules
raise SystemExit(status)
"""


def test_it_runs_without_torch(small: Path, tmp_path: Path, np_rng: np.random.Generator) -> None:
    picture = tmp_path / "one.png"
    Image.fromarray(noise(np_rng, 100, 150)).save(picture)
    expected = Runtime(small, threads=1, cache=False).predict(picture)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(small), str(picture)],
        env={**os.environ, "TRIMASK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    boxes, record = map(json.loads, done.stdout.splitlines())
    np.testing.assert_array_equal(boxes, expected.boxes.tolist())
    assert len(record["detections"]) == len(expected) > 0
    assert "runs on CPUExecutionProvider" in done.stderr


EVALUATED = (
    WITHOUT_TORCH.partition("from trimask.export")[0]
    + """
status = cli.main(["eval", "--weights", sys.argv[1], "--data", sys.argv[2], "--images", sys.argv[3], "--json"])
assert "torch" not in sys.modules
raise SystemExit(status)
"""
)


def test_it_is_evaluated_without_torch(small: Path, tmp_path: Path, np_rng: np.random.Generator) -> None:
    """On a data set that holds what it finds."""
    pytest.importorskip("pycocotools")
    Image.fromarray(noise(np_rng, 100, 150)).save(tmp_path / "one.png")
    found = Runtime(small, threads=1, cache=False).predict([tmp_path / "one.png"])
    data = to_dataset(found, dict(zip(CONFIG.category_ids, CONFIG.class_names, strict=True)), tmp_path / "data.json")
    done = subprocess.run(
        [sys.executable, "-c", EVALUATED, str(small), str(data), str(tmp_path)],
        env={**os.environ, "TRIMASK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["bbox_AP50"] > 0.9


def test_what_needs_torch_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["info"]) == 1
    assert "pip install torch, which all needs but `trimask predict`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{small}"], "expected pictures after"),
        (["predict", "{small}", "x.jpg", "--dtype", "float16"], "dtype: expected"),
        (["predict", "{small}", "x.jpg", "--min-size", "100"], "expected no min_size"),
        (["predict", "{small}", "x.jpg", "--weights", "other.safetensors"], "expected one model"),
        (["predict", "x.jpg", "--runtime", "openvino"], "runtime: expected an exported"),
        (["predict", "{small}", "x.jpg", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["predict", "{SMALL}", "x.jpg", "--min-size", "100"], "expected no min_size"),
    ],
)
def test_verbs_with_an_exported_file(
    arguments: list[str], message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "x.jpg")
    shutil.copy(small, tmp_path / "SMALL.ONNX")
    names = {"{small}": str(small), "{SMALL}": str(tmp_path / "SMALL.ONNX"), "x.jpg": str(tmp_path / "x.jpg")}
    assert cli.main([names.get(argument, argument) for argument in arguments]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--no-verify", "--data", "x", "--pictures", "y"], "pictures, data: expected with --verify alone"),
        (["--images", "x"], "images: expected beside --data, got no data set"),
        (["--pictures", "/nowhere.jpg"], "there is nothing at '/nowhere.jpg'"),
        (["--data", "/nowhere"], "expected an annotation file or a data set's folder, found nothing at /nowhere"),
        (["--int8", "/nowhere.jpg"], "there is nothing at '/nowhere.jpg'"),
    ],
)
def test_what_does_not_fit_is_told_before_the_work(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("it was begun")

    monkeypatch.setattr("trimask.export.onnx.network", work)
    assert cli.main(["export", "people", str(tmp_path / "x.onnx"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_onnx_runtime_is_looked_for_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", "people", str(tmp_path / "x.onnx")]) == 1
    assert "Runtime needs ONNX Runtime" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    predictor = trimask.Predictor(small_model(CONFIG), device="cpu")
    with pytest.raises(ValueError, match="weights: expected a MaskRCNN, a file or a name, got Predictor"):
        to_onnx(predictor, tmp_path / "x.onnx")
    with pytest.raises(TypeError, match="float"):
        to_onnx(small_model(CONFIG), tmp_path / "x.onnx", static=(1, 64.5, 64))


def test_there_is_no_more_room_than_can_be_filled(tmp_path: Path) -> None:
    exported = to_onnx(small_model(CONFIG), tmp_path / "x.onnx", max_detections=10**9, masks="none")
    most = CONFIG.rpn.post_nms * len(CONFIG.class_names)
    assert exported.about.config.detection.max_detections == most
