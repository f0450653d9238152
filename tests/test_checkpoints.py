"""Foreign checkpoints in, ours out: key maps both ways, what is inferred, what is refused, names and options."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_shapes import Architecture, assert_same_weights, checkpoint, shapes, zeros
from models import PEOPLE_OPTIONS
from tolerances import SAME_OPS, SUMMED_DIFFERENTLY
from trimask import MaskRCNN
from trimask.engine.model import checkpoints, presets
from trimask.engine.model.checkpoints import Report, convert, inspect, load_model
from trimask.engine.model.checkpoints.coco import COCO_CATEGORY_IDS, COCO_NAMES
from trimask.engine.model.checkpoints.detectron2 import DETECTRON2
from trimask.engine.model.checkpoints.family import export, load
from trimask.engine.model.checkpoints.mmdet import MMDET
from trimask.engine.model.checkpoints.options import Options
from trimask.engine.model.checkpoints.published import PUBLISHED
from trimask.engine.model.checkpoints.reading import Contents
from trimask.engine.model.checkpoints.torchvision import TORCHVISION
from trimask.engine.model.config import MobileNetV2Config, ResNetConfig

FAMILIES = {family.name: family for family in (TORCHVISION, DETECTRON2, MMDET)}
SMALL = Architecture()
RESNET50 = replace(SMALL, blocks=(3, 4, 6, 3), bottleneck=True)
R50 = Architecture((3, 4, 6, 3), bottleneck=True)
C4 = replace(SMALL, trunk="C4", anchors=15)
GROUP_NORMS = replace(SMALL, group_norms=True, channels=32)


def write(path: Path, family: str, state: dict[str, Any]) -> Path:
    """A checkpoint as the training loop of the family saves it."""
    key = {"torchvision": None, "detectron2": "model", "mmdet": "state_dict"}[family]
    torch.save({key: whole(state), "iteration": 7} if key else whole(state), path)
    return path


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """With storages as large as the tensors: others are refused in files."""
    return {name: value.contiguous() for name, value in state.items()}


def fit(family: str, state: dict[str, Tensor], **options: Any) -> MaskRCNN:
    """The model of a state dict, without a file."""
    return load(FAMILIES[family], Contents("test", state), Options.of(options))[0]


def torchvision_model(name: str, rng: torch.Generator) -> Any:
    """A model of torchvision whose biases and norms are not the trivial ones that it starts with."""
    detection = pytest.importorskip("torchvision").models.detection
    if "rcnn" in name:
        model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=7)
    else:
        model = detection.MaskRCNN(
            detection.backbone_utils.resnet_fpn_backbone(backbone_name=name, weights=None),
            box_head=detection.faster_rcnn.TwoMLPHead(256 * 49, 32),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 5),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(256, 32, 5),
        )
    for name, value in model.state_dict().items():
        if value.dim() == 1:
            noise = torch.rand(value.shape, generator=rng)
            small = ".bn3." in name or ".bn2." in name or "downsample" in name  # or the branches add up to infinity
            value.copy_(noise - 0.5 if name.endswith(("bias", "mean")) else (noise + 0.5) * (0.5 if small else 1))
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "maskrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "resnet18",
        "resnet34",
        "resnext50_32x4d",
        "wide_resnet50_2",
    ],
)
@torch.inference_mode()
def test_every_stage_equals_torchvision(name: str, rng: torch.Generator) -> None:
    """Every key is consumed, every layer gives what torchvision's gives, and the keys map back."""
    theirs = torchvision_model(name, rng)
    ours = fit("torchvision", theirs.state_dict())

    picture = torch.rand(1, 3, 64, 96, generator=rng)
    size = torch.tensor([[64, 96]])
    normalized = theirs.transform.normalize(picture[0])[None]
    torch.testing.assert_close(ours.normalize(picture * 255, size), normalized, **SUMMED_DIFFERENTLY)
    maps = list(theirs.backbone(normalized).values())
    pyramid = ours.fpn(ours.backbone(normalized))
    for level, expected in zip(pyramid, maps, strict=True):
        torch.testing.assert_close(level, expected, **SAME_OPS)

    logits, deltas = ours.rpn(maps)
    their_logits, their_deltas = theirs.rpn.head(maps)
    for found, expected in zip(logits, their_logits, strict=True):
        torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).flatten(1), **SAME_OPS)
    for found, expected in zip(deltas, their_deltas, strict=True):
        torch.testing.assert_close(found.flatten(1), expected.permute(0, 2, 3, 1).flatten(1), **SAME_OPS)

    rois = torch.randn(5, 256, 7, 7, generator=rng)
    scores, boxes = ours.box_head(rois)
    their_scores, their_boxes = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(rois))
    torch.testing.assert_close(scores, their_scores.roll(-1, 1), **SUMMED_DIFFERENTLY)
    torch.testing.assert_close(boxes, their_boxes.unflatten(1, (-1, 4))[:, 1:], **SUMMED_DIFFERENTLY)
    if theirs.roi_heads.mask_head is not None:
        rois = torch.randn(4, 256, 14, 14, generator=rng)
        labels = torch.tensor([3, 0, 1, 2])
        expected = theirs.roi_heads.mask_predictor(theirs.roi_heads.mask_head(rois))
        found = ours.mask_head(rois, labels)
        torch.testing.assert_close(found, expected[torch.arange(4), labels + 1], **SUMMED_DIFFERENTLY)

    back = export(TORCHVISION, ours)
    known = {key: value for key, value in theirs.state_dict().items() if "num_batches_tracked" not in key}
    assert back.keys() == known.keys()
    for key, value in known.items():
        start = {"bbox_pred": 4, "mask_fcn_logits": 1}.get(key.split(".")[-2], 0) if "predictor" in key else 0
        assert torch.equal(back[key][start:], value[start:]), key


def test_the_published_torchvision_models_are_the_presets(tmp_path: Path) -> None:
    detection = pytest.importorskip("torchvision").models.detection
    for name, preset in (("maskrcnn_resnet50_fpn", presets.torchvision_v1), ("_v2", presets.torchvision_v2)):
        with torch.device("meta"):
            model = getattr(detection, name if "mask" in name else f"maskrcnn_resnet50_fpn{name}")(
                weights=None, weights_backbone=None
            )
        # The published first version has frozen norms, which do not count batches.
        state = {k: torch.zeros(v.shape) for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
        torch.save(state, tmp_path / "model.pth")
        report = inspect(tmp_path / "model.pth")
        assert report.config == preset(report.classes, tuple(range(1, 91)))
        assert report.architecture == "Mask R-CNN, ResNet-50 FPN, 90 classes"
        assert (report.classes[0], report.classes[11], report.classes[89]) == ("person", "N/A 12", "toothbrush")
        assert len(set(report.classes)) == 90
        assert report.parameters == sum(value.numel() for value in state.values()) - _background(state)


def _background(state: dict[str, Tensor]) -> int:
    """Numbers in the rows for the background, which are dropped."""
    found = 0
    for name, rows in (("roi_heads.box_predictor.bbox_pred", 4), ("roi_heads.mask_predictor.mask_fcn_logits", 1)):
        found += sum(rows * state[f"{name}.{leaf}"][0].numel() for leaf in ("weight", "bias"))
    return found


def test_old_torchvision_names(seed: int) -> None:
    state = checkpoint("torchvision", SMALL, seed)
    old = {}
    for name, value in state.items():
        name = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", name).replace("head.conv.0.0.", "head.conv.")
        old[re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", name)] = value
    assert len(old.keys() - state.keys()) == 26  # 8 in the pyramid, 1 and 4 in the heads; weights and biases
    assert_same_weights(fit("torchvision", old), fit("torchvision", state))


@pytest.mark.parametrize(
    ("architecture", "counters", "eps"),
    [
        (RESNET50, False, 0.0),  # as published
        (RESNET50, True, 1e-5),
        (replace(RESNET50, modern=True), False, 1e-5),
        (replace(RESNET50, groups=32, group_width=4), False, 1e-5),
        (replace(RESNET50, blocks=(3, 4, 23, 3)), False, 1e-5),
        (SMALL, False, 1e-5),
    ],
)
def test_epsilon_of_torchvision_norms(architecture: Architecture, counters: bool, eps: float, tmp_path: Path) -> None:
    state = zeros("torchvision", architecture)
    if counters:
        state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(3)
    path = write(tmp_path / "model.pth", "torchvision", state)
    report = inspect(path)
    assert report.config.backbone.norm_eps == eps
    assert any("norm_eps" in text for text in report.notes) == (eps == 0)
    assert inspect(path, norm_eps=0.001).config.backbone.norm_eps == 0.001


def test_epsilon_of_torchvision_group_norms(tmp_path: Path) -> None:
    state = {name: x for name, x in zeros("torchvision", RESNET50).items() if ".running_" not in name}
    config = inspect(write(tmp_path / "model.pth", "torchvision", state)).config
    assert (config.backbone.norm_eps, config.backbone.norm_groups) == (1e-5, 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "architecture",
    [SMALL, replace(SMALL, modern=True), replace(SMALL, mask=False), replace(SMALL, classes=1)],
    ids=["two linear layers", "norms and convolutions", "boxes only", "one class"],
)
@torch.inference_mode()
def test_heads_and_stem_agree_with_plain_arithmetic(
    family: str, architecture: Architecture, seed: int, rng: torch.Generator
) -> None:
    """What the foreign weights mean, computed with them as they are, equals what our model computes."""
    state = checkpoint(family, architecture, seed)
    model = fit(family, state)
    if architecture.modern:
        assert model.config.fpn.norm
        assert model.config.rpn.convs == 2
        assert (model.config.box_head.convs, model.config.box_head.fcs) == (4, (24,))
    values = iter([(name, value) for name, value in state.items() if name.startswith("roi_head")])

    # The stem reads blue first where the family does.
    picture = torch.randn(1, 3, 32, 32, generator=rng)
    stem = next(value for name, value in state.items() if value.shape == (64, 3, 7, 7))
    theirs = picture.flip(1) if family == "detectron2" else picture
    expected = F.conv2d(theirs, stem, stride=2, padding=3)
    torch.testing.assert_close(model.backbone.stem.conv(picture), expected, **SUMMED_DIFFERENTLY)

    # Names and biases come in the order of the layers.
    x = rois = torch.randn(3, 16, 7, 7, generator=rng)
    for _ in range(4 if architecture.modern else 0):
        (_, w), (_, g), (_, b), (_, m), (_, v) = (next(values) for _ in range(5))
        x = F.relu(F.batch_norm(F.conv2d(x, w, padding=1), m, v, g, b))
    x = x.flatten(1)
    for _ in range(1 if architecture.modern else 2):
        x = F.relu(F.linear(x, next(values)[1], next(values)[1]))
    scores = F.linear(x, next(values)[1], next(values)[1])
    deltas = F.linear(x, next(values)[1], next(values)[1]).unflatten(1, (-1, 4))
    background = family == "torchvision"
    found_scores, found_deltas = model.box_head(rois)
    scores = torch.cat([scores[:, 1:], scores[:, :1]], 1) if background else scores
    torch.testing.assert_close(found_scores, scores, **SUMMED_DIFFERENTLY)
    torch.testing.assert_close(found_deltas, deltas[:, 1:] if background else deltas, **SUMMED_DIFFERENTLY)

    assert (model.mask_head is None) == (not architecture.mask)
    if model.mask_head is None:
        return
    x = rois = torch.randn(3, 16, 14, 14, generator=rng)
    for _ in range(4):
        if architecture.modern:
            (_, w), (_, g), (_, b), (_, m), (_, v) = (next(values) for _ in range(5))
            x = F.relu(F.batch_norm(F.conv2d(x, w, padding=1), m, v, g, b))
        else:
            x = F.relu(F.conv2d(x, next(values)[1], next(values)[1], padding=1))
    x = F.relu(F.conv_transpose2d(x, next(values)[1], next(values)[1], stride=2))
    x = F.conv2d(x, next(values)[1], next(values)[1])[:, int(background) :]
    labels = torch.arange(3) % architecture.classes
    torch.testing.assert_close(model.mask_head(rois, labels), x[torch.arange(3), labels], **SUMMED_DIFFERENTLY)
    assert next(values, None) is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "architecture",
    [SMALL, replace(SMALL, modern=True), C4, replace(C4, trunk="DC5"), GROUP_NORMS],
    ids=["plain", "modern", "C4", "DC5", "group norms"],
)
def test_the_keys_map_back(family: str, architecture: Architecture, seed: int) -> None:
    if family not in {"C4": ("detectron2", "mmdet"), "DC5": ("detectron2",)}.get(architecture.trunk, FAMILIES):
        pytest.skip("the family has no such model")
    if family == "torchvision" and architecture.group_norms:
        pytest.skip("the family has no such model")
    state = checkpoint(family, architecture, seed)
    model = fit(family, state)
    bgr = family == "detectron2" or architecture.trunk == "C4" or architecture.group_norms
    back = export(FAMILIES[family], model, bgr=bgr)
    assert {name: value.shape for name, value in back.items()} == {name: v.shape for name, v in state.items()}
    assert_same_weights(fit(family, back), model)
    if family != "torchvision":
        assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("family", "architecture", "preset", "text"),
    [
        ("detectron2", replace(C4, channels=256), presets.detectron2_c4, "ResNet-50 C4"),
        ("detectron2", replace(C4, channels=256, trunk="DC5", width=1024), presets.detectron2_dc5, "ResNet-50 DC5"),
        ("mmdet", replace(C4, channels=256), presets.mmdet_c4, "ResNet-50 C4"),
    ],
)
def test_models_without_a_pyramid(
    family: str, architecture: Architecture, preset: Any, text: str, tmp_path: Path
) -> None:
    state = zeros(family, replace(architecture, blocks=(3, 4, 6, 3), bottleneck=True))
    report = inspect(write(tmp_path / "m.pth", family, state))
    expected = preset(report.classes, report.config.category_ids)
    # The heads of these shapes have other widths than the published ones.
    assert report.config == replace(expected, mask_head=report.config.mask_head)
    assert report.architecture == f"Mask R-CNN, {text}, 3 classes"
    assert report.config.mask_side == (28 if "DC5" in text else 14)
    assert len(report.notes) == (family == "mmdet")
    sizes = [16.0, 32.0, 64.0, 128.0, 256.0]
    assert inspect(tmp_path / "m.pth", anchor_sizes=sizes).config.anchors.sizes == (tuple(sizes),)


def test_anchors_of_several_sizes_change_their_order() -> None:
    """Detectron2 has all ratios of a size side by side, the others all sizes of a ratio."""
    state = zeros("detectron2", C4)
    sizes, ratios = torch.arange(5.0), torch.arange(3.0)
    rows = (sizes[:, None] * 10 + ratios).flatten()  # of the anchors, in its order
    state["proposal_generator.rpn_head.objectness_logits.bias"] = rows
    state["proposal_generator.rpn_head.anchor_deltas.bias"] = (rows[:, None] * 10 + torch.arange(4.0)).flatten()
    rpn = fit("detectron2", state).rpn
    expected = (sizes * 10 + ratios[:, None]).flatten()
    assert torch.equal(rpn.objectness.bias, expected)
    assert torch.equal(rpn.deltas.bias, (expected[:, None] * 10 + torch.arange(4.0)).flatten())
    areas = (rpn.anchors.cells[0, :, 2:] - rpn.anchors.cells[0, :, :2]).prod(1).sqrt()
    assert areas[:5].tolist() == pytest.approx([32, 64, 128, 256, 512])


@pytest.mark.parametrize(
    ("family", "style", "std", "bgr"),
    [
        ("detectron2", None, (1.0, 1.0, 1.0), True),
        ("mmdet", None, (1.0, 1.0, 1.0), True),
        ("mmdet", "pytorch", (58.395, 57.12, 57.375), False),
        ("detectron2", "bgr", (58.395, 57.12, 57.375), True),
        ("mmdet", "bgr", (58.395, 57.12, 57.375), True),
    ],
)
def test_what_weights_with_group_norms_mean(family: str, style: Any, std: Any, bgr: bool, tmp_path: Path) -> None:
    state = zeros(family, replace(R50, group_norms=True, channels=32))
    (stem,) = (name for name in state if state[name].shape == (64, 3, 7, 7))
    state[stem] = torch.randn(64, 3, 7, 7)
    path = write(tmp_path / "m.pth", family, state)
    model, report = load_model(path, style=style), inspect(path, style=style)
    config = model.config
    assert isinstance(config.backbone, ResNetConfig)
    assert (config.input.std, config.backbone.stride_in_1x1) == (std, False)
    assert torch.equal(model.backbone.stem.conv.weight, state[stem].flip(1) if bgr else state[stem])
    parts = (config.backbone, config.fpn, config.box_head, config.mask_head)
    assert [part.norm_groups for part in parts if part] == [32] * 4
    assert isinstance(model.backbone.stem.norm, torch.nn.GroupNorm)
    assert "with group norms" in report.architecture
    assert any("group norms" in note for note in report.notes) == (style is None)
    fewer = load_model(path, norm_groups=8)
    assert fewer.backbone.stem.norm.num_groups == fewer.mask_head.convs[0].norm.num_groups == 8


def test_torchvision_has_no_model_without_a_pyramid() -> None:
    with pytest.raises(ValueError, match="expected a feature pyramid, without which torchvision has no Mask R-CNN"):
        export(TORCHVISION, fit("detectron2", zeros("detectron2", C4)))


@pytest.mark.parametrize("family", ["detectron2", "mmdet"])
def test_class_agnostic_heads(family: str) -> None:
    config = fit(family, zeros(family, replace(SMALL, agnostic=True))).config
    assert config.box_head.class_agnostic
    assert config.mask_head is not None
    assert config.mask_head.class_agnostic
    assert config.num_classes == 3
    config = fit(family, zeros(family, replace(SMALL, classes=1))).config  # one class: there is no difference
    assert config.mask_head is not None
    assert not config.box_head.class_agnostic
    assert not config.mask_head.class_agnostic


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        (replace(SMALL, blocks=(3, 4, 6, 3)), "ResNet-34"),
        (R50, "ResNet-50"),
        (replace(R50, blocks=(3, 4, 23, 3)), "ResNet-101"),
        (replace(R50, blocks=(3, 8, 36, 3)), "ResNet-152"),
        (replace(R50, groups=32, group_width=4), "ResNeXt-50-32x4d"),
        (replace(R50, blocks=(3, 4, 23, 3), groups=32, group_width=8), "ResNeXt-101-32x8d"),
    ],
)
def test_trunks(architecture: Architecture, text: str, tmp_path: Path) -> None:
    report = inspect(write(tmp_path / "m.pth", "mmdet", zeros("mmdet", architecture)), style="pytorch")
    assert report.architecture == f"Mask R-CNN, {text} FPN, 3 classes"
    assert report.config.backbone == ResNetConfig(
        architecture.blocks, architecture.bottleneck, architecture.groups, architecture.group_width
    )
    assert report.notes == ()


def test_the_detectron2_names_are_the_recorded_ones(golden: Path) -> None:
    recorded = json.loads((golden / "detectron2_r50_fpn_3x.json").read_text())["shapes"]
    mine = shapes("detectron2", replace(R50, channels=256, width=1024, classes=80))
    assert {name: list(shape) for name, shape in mine.items()} == recorded


@pytest.mark.parametrize(
    ("groups", "options", "std", "in_1x1", "bgr"),
    [
        (1, {}, (1.0, 1.0, 1.0), True, True),
        (32, {}, (58.395, 57.12, 57.375), False, True),
        (1, {"style": "pytorch"}, (58.395, 57.12, 57.375), False, False),
        (32, {"style": "caffe"}, (1.0, 1.0, 1.0), True, True),
    ],
)
def test_what_detectron2_weights_mean(groups: int, options: dict[str, Any], std: Any, in_1x1: bool, bgr: bool) -> None:
    architecture = replace(R50, groups=groups, group_width=64 if groups == 1 else 8)
    state = zeros("detectron2", architecture)
    stem = state["backbone.bottom_up.stem.conv1.weight"] = torch.randn(64, 3, 7, 7)
    model = fit("detectron2", state, **options)
    config = model.config
    assert config.input.mean == (123.675, 116.28, 103.53)
    assert config.input.std == std
    assert isinstance(config.backbone, ResNetConfig)
    assert config.backbone.stride_in_1x1 == in_1x1
    assert torch.equal(model.backbone.stem.conv.weight, stem.flip(1) if bgr else stem)
    if groups == 1 and not options:
        assert config == replace(
            presets.detectron2(config.class_names, config.category_ids),
            fpn=config.fpn,
            box_head=config.box_head,
            mask_head=config.mask_head,
        )


@pytest.mark.parametrize(("mean", "flipped"), [([103.5, 116.3, 123.7], True), ([123.7, 116.3, 103.5], False)])
def test_a_detectron2_training_checkpoint_says_its_normalisation_and_anchors(
    mean: list[float], flipped: bool, tmp_path: Path
) -> None:
    state = zeros("detectron2", SMALL)
    stem = state["backbone.bottom_up.stem.conv1.weight"] = torch.randn(64, 3, 7, 7)
    state["pixel_mean"] = torch.tensor(mean).view(3, 1, 1)
    state["pixel_std"] = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    for i in range(5):  # height over width .5, 1, 3; areas (24 * 2^i)^2
        size, ratios = 24 * 2**i, torch.tensor([0.5, 1.0, 3.0])
        half = torch.stack([size / ratios.sqrt(), size * ratios.sqrt()], 1) / 2
        state[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = torch.cat([-half, half], 1)
    path = tmp_path / "model_final.pth"
    torch.save({"model": whole(state), "optimizer": {"state": {}}, "iteration": 99}, path)
    model = load_model(path)
    assert model.config.input.mean == (123.7, 116.3, 103.5)
    assert model.config.input.std == ((4.0, 2.0, 1.0) if flipped else (1.0, 2.0, 4.0))
    assert torch.equal(model.backbone.stem.conv.weight, stem.flip(1) if flipped else stem)
    assert model.config.anchors.sizes == ((24.0,), (48.0,), (96.0,), (192.0,), (384.0,))
    assert model.config.anchors.aspect_ratios == (0.5, 1.0, 3.0)
    state["proposal_generator.anchor_generator.cell_anchors.0"][1] *= 2
    torch.save({"model": whole(state)}, path)
    with pytest.raises(ValueError, match="sizes with the same aspect ratios each"):
        load_model(path)
    assert load_model(path, aspect_ratios=[1, 2, 3]).config.anchors.aspect_ratios == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(("style", "flipped"), [(None, False), ("pytorch", False), ("caffe", True)])
def test_style_of_mmdet(style: Any, flipped: bool, tmp_path: Path) -> None:
    state = zeros("mmdet", replace(R50, channels=256, width=1024))
    stem = state["backbone.conv1.weight"] = torch.randn(64, 3, 7, 7)
    path = write(tmp_path / "m.pth", "mmdet", state)
    model, report = load_model(path, style=style), inspect(path, style=style)
    assert torch.equal(model.backbone.stem.conv.weight, stem.flip(1) if flipped else stem)
    expected = presets.mmdet(report.classes, (1, 2, 3))
    if flipped:
        expected = replace(
            expected,
            input=replace(expected.input, std=(1.0, 1.0, 1.0)),
            backbone=ResNetConfig(stride_in_1x1=True),
        )
    assert model.config == expected
    assert any("style" in text for text in report.notes) == (style is None)


@pytest.mark.parametrize(("width", "style", "flipped"), [(8, None, True), (8, "pytorch", False), (4, None, False)])
def test_resnext_of_mmdet(width: int, style: Any, flipped: bool, tmp_path: Path) -> None:
    """Of Detectron2's trunk MMDetection kept the order of channels; its own 32x4d are of pytorch style."""
    state = zeros("mmdet", replace(R50, channels=256, width=1024, groups=32, group_width=width))
    stem = state["backbone.conv1.weight"] = torch.randn(64, 3, 7, 7)
    path = write(tmp_path / "m.pth", "mmdet", state)
    model, report = load_model(path, style=style), inspect(path, style=style)
    assert torch.equal(model.backbone.stem.conv.weight, stem.flip(1) if flipped else stem)
    trunk = ResNetConfig(groups=32, group_width=width)
    assert model.config == replace(presets.mmdet(report.classes, (1, 2, 3)), backbone=trunk)
    assert any("BGR" in text for text in report.notes) == flipped


def test_classes_come_from_options_then_the_file_then_coco_then_numbers(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    state = whole(zeros("mmdet", SMALL))
    torch.save({"state_dict": state, "meta": {"CLASSES": ("owl", "eel", "ant")}}, path)
    assert inspect(path).classes == ("owl", "eel", "ant")
    assert inspect(path).config.category_ids == (1, 2, 3)
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ["owl", "eel", "bat"]}}}, path)
    assert inspect(path).classes == ("owl", "eel", "bat")
    named = inspect(path, classes=["a", "b", "c"], category_ids=[7, 5, 9])
    assert (named.classes, named.config.category_ids) == (("a", "b", "c"), (7, 5, 9))
    torch.save({"state_dict": state, "meta": {"CLASSES": ["of", "another", "model", "entirely"]}}, path)
    assert inspect(path).classes == ("class_0", "class_1", "class_2")
    assert any("names 4 classes and its weights have 3" in text for text in inspect(path).notes)
    assert not any("names 4" in text for text in inspect(path, classes=["a", "b", "c"]).notes)
    torch.save(whole(zeros("mmdet", replace(SMALL, classes=80))), path)
    assert (inspect(path).classes, inspect(path).config.category_ids) == (COCO_NAMES, COCO_CATEGORY_IDS)
    assert any("COCO" in text for text in inspect(path).notes)
    torch.save(whole(zeros("mmdet", replace(SMALL, classes=1))), path)
    assert inspect(path).classes == ("class_0",)


def test_coco() -> None:
    assert len(COCO_NAMES) == len(COCO_CATEGORY_IDS) == len(set(COCO_NAMES)) == 80
    known = dict(zip(COCO_CATEGORY_IDS, COCO_NAMES, strict=True))
    assert [known[i] for i in (1, 11, 13, 44, 67, 84, 90)] == [
        "person",
        "fire hydrant",
        "stop sign",
        "bottle",
        "dining table",
        "book",
        "toothbrush",
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": ["a", "b"]}, "classes: expected 3 names"),
        ({"classes": "abc"}, "classes: expected a list"),
        ({"category_ids": [1]}, "category_ids: expected 3 ids"),
        ({"min_size": 0}, "min_size: expected a positive whole number, got 0"),
        ({"max_size": 3.5}, "max_size: expected a positive whole number"),
        ({"anchor_sizes": [1, 2, 3]}, "anchor_sizes: expected positive sizes for each of 5 level"),
        ({"anchor_sizes": [[8, 16], 32, 64, 128, 256]}, "anchor_sizes: expected positive sizes"),
        ({"aspect_ratios": [[0.5, 1]] * 5}, "aspect_ratios: expected positive numbers, the same for all levels"),
        ({"sampling_ratio": -1}, "sampling_ratio: expected a whole number"),
        ({"pre_nms": 0}, "pre_nms: expected a positive whole number"),
        ({"rpn_nms_threshold": 1.5}, r"rpn_nms_threshold: expected a number in 0\.\.1"),
        ({"taps": [2, 4, 11, 17]}, "taps: expected four blocks, of a MobileNetV2"),
        ({"aspect_ratios": [1, -1]}, "aspect_ratios: expected positive numbers"),
        ({"aspect_ratios": [0.5, 1, 2, 3]}, "3 anchors per cell, but 1 size.* x 4 aspect ratios make 4; give the"),
        ({"activation": "relu6"}, "activation: expected 'relu' for a ResNet"),
        ({"activation": "gelu"}, "activation: expected 'relu' or 'relu6'"),
        ({"norm_eps": -1}, "norm_eps: expected"),
        ({"style": "caffe"}, "style: expected none for a torchvision"),
        ({"score_threshold": 2}, "score_threshold: expected a number in 0..1"),
        ({"pixel_mean": [1, 2]}, "pixel_mean: expected three numbers"),
        ({"pixel_std": [1, 0, 1]}, "pixel_std: expected three numbers above 0"),
        ({"category_ids": [1, 1, 2]}, "category_ids: expected distinct integers"),
        ({"min_sise": 3}, r"unknown options \['min_sise'\]"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], text: str, small_file: Path) -> None:
    with pytest.raises(ValueError, match=text):
        load_model(small_file, **options)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small") / "small.pth", "torchvision", checkpoint("torchvision", SMALL, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, small_file: Path, tmp_path: Path) -> None:
    state = torch.load(small_file, weights_only=True)
    state["backbone.body.layer1.0.conv2.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth: expected finite weights, got .* in 1 tensors, as backbone"):
        load_model(tmp_path / "bad.pth")


def test_options_reach_the_config(small_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "min_size": 300,
        "max_size": 500,
        "anchor_sizes": [[8.0], [16], [32], [64], [128]],
        "aspect_ratios": (1, 2, 4),
        "score_threshold": 0.3,
        "nms_threshold": 0.6,
        "max_detections": 7,
        "proposals": 50,
        "pre_nms": 70,
        "rpn_nms_threshold": 0.8,
        "sampling_ratio": 0,
        "norm_eps": 1e-3,
        "classes": ["x", "y", "z"],
        "category_ids": [0, 5, 9],
        "pixel_mean": [1, 2, 3.5],
        "pixel_std": [4, 5, 6],
    }
    convert(small_file, tmp_path / "plain.safetensors")
    for path in (small_file, tmp_path / "plain.safetensors"):  # they apply to files of ours too
        config = load_model(path, **options).config
        assert (config.input.resize.min_size, config.input.resize.max_size) == (300, 500)
        assert config.anchors.sizes == ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
        assert config.anchors.aspect_ratios == (1.0, 2.0, 4.0)
        assert (config.detection.score_threshold, config.detection.nms_threshold) == (0.3, 0.6)
        assert config.detection.max_detections == 7
        assert (config.rpn.pre_nms, config.rpn.nms_threshold, config.rpn.post_nms) == (70, 0.8, 50)
        assert config.pool.sampling_ratio == 0
        assert config.backbone.norm_eps == config.box_head.norm_eps == 1e-3
        assert dict(zip(config.category_ids, config.class_names, strict=True)) == {0: "x", 5: "y", 9: "z"}
        assert (config.input.mean, config.input.std) == ((1, 2, 3.5), (4, 5, 6))
    two = load_model(small_file, anchor_sizes=[[8, 12, 16]] * 5, aspect_ratios=np.ones(1, np.float32))
    assert two.config.anchors.per_cell == 3


@pytest.mark.parametrize(
    ("family", "names", "text"),
    [
        ("torchvision", ["roi_heads.keypoint_head.0.weight"], "Keypoint R-CNN is not supported"),
        ("torchvision", ["head.classification_head.conv.0.0.weight"], "one-stage detector"),
        ("torchvision", ["backbone.body.4.block.0.0.weight"], "MobileNetV3"),
        ("detectron2", ["roi_heads.keypoint_head.conv_fcn1.weight"], "Keypoint R-CNN is not supported"),
        ("detectron2", ["roi_heads.box_head.0.fc1.weight"], "Cascade R-CNN"),
        ("detectron2", ["sem_seg_head.p2.0.weight"], "Panoptic FPN"),
        ("detectron2", ["backbone.bottom_up.blocks.0.norm1.weight"], "a trunk other than a ResNet"),
        ("mmdet", ["roi_head.bbox_head.0.fc_cls.weight"], "Cascade R-CNN"),
        ("mmdet", ["bbox_head.fc_cls.weight"], "MMDetection 1"),
        ("mmdet", ["roi_head.mask_iou_head.fcs.0.weight"], "further heads"),
    ],
)
def test_architectures_that_are_not_here(family: str, names: list[str], text: str, tmp_path: Path) -> None:
    marks = {"torchvision": "rpn.head.x", "detectron2": "proposal_generator.x", "mmdet": "rpn_head.x"}
    path = write(tmp_path / "m.pth", family, dict.fromkeys([marks[family], *names], torch.zeros(1)))
    with pytest.raises(ValueError, match=text) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert names[0] in str(caught.value)


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = zeros("torchvision", SMALL)
    for i in range(12):
        state[f"backbone.extra{i:02}.weight"] = torch.zeros(1)
    del state["roi_heads.box_head.fc7.bias"]
    del state["backbone.body.layer3.1.conv1.weight"], state["backbone.body.layer3.1.bn1.running_var"]
    state["rpn.head.bbox_pred.weight"] = torch.zeros(12, 5, 1, 1)
    with pytest.raises(ValueError, match="do not fit a torchvision model") as caught:
        load_model(write(tmp_path / "m.pth", "torchvision", state))
    text = str(caught.value)
    assert "missing (3): backbone.body.layer3.1.bn1.running_var; backbone.body.layer3.1.conv1.weight; roi_h" in text
    assert "unused (12): backbone.extra00.weight" in text
    assert "backbone.extra07.weight; and 4 more" in text
    assert "of another shape (1): rpn.head.bbox_pred.weight [12, 5, 1, 1], expected [12, 16, 1, 1]" in text
    assert len(text) < 1500


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda n: "fpn.inner_blocks.0" not in n, "expected a tensor 'backbone.fpn.inner_blocks.0.0.weight'"),
        (lambda n: "blocks.3" not in n, "feature pyramid on four maps, got one on 3"),
        (lambda n: "cls_score" not in n, "expected a tensor 'roi_heads.box_predictor.cls_score.weight'"),
        (lambda n: "layer2" not in n and "layer3" not in n, r"missing \(50\): backbone.body.layer2.0"),
    ],
)
def test_gaps(change: Callable[[str], bool], text: str, tmp_path: Path) -> None:
    state = {name: value for name, value in zeros("torchvision", SMALL).items() if change(name)}
    with pytest.raises(ValueError, match=text):
        load_model(write(tmp_path / "m.pth", "torchvision", state))


def test_other_state_dicts(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m\.pth: expected the weights of an R-CNN.*got tensors named conv1.weight"):
        load_model(tmp_path / "m.pth")


# ---------------------------------------------------------------------------------------------------------- containers


def test_convert(small_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    report = convert(small_file, target, classes=["a", "b", "c"])
    assert isinstance(report, Report)
    assert (report.family, report.source, report.classes) == ("torchvision", small_file, ("a", "b", "c"))
    assert report.architecture == "Mask R-CNN, ResNet-18 FPN, 3 classes"
    assert_same_weights(load_model(target), load_model(small_file))
    again = inspect(target)
    assert again.family == "trimask"
    assert again.provenance == report.provenance
    assert again.provenance["source"] == "small.pth"
    assert len(again.provenance["sha256"]) == 64
    with pytest.raises(ValueError, match="target: expected another file than the source"):
        convert(target, target)
    convert(target, tmp_path / "half.safetensors", dtype=torch.float16, max_detections=3)
    assert load_model(tmp_path / "half.safetensors").config.detection.max_detections == 3


def test_safetensors_of_any_origin(tmp_path: Path, small_file: Path) -> None:
    state = {name: value.contiguous() for name, value in torch.load(small_file, weights_only=True).items()}
    save_file(state, tmp_path / "small.safetensors")
    assert_same_weights(load_model(tmp_path / "small.safetensors"), load_model(small_file))


def test_the_people_checkpoint(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "weights" / "people_mobilenetv2_fpn128_torchvision.pth"
    report = convert(source, tmp_path / "people.safetensors", **PEOPLE_OPTIONS)
    config = report.config
    assert config.backbone == MobileNetV2Config(taps=(3, 6, 13, 17), relu6=False)
    assert config.fpn.channels == 128
    assert config.box_head.fcs == (512, 512)
    assert (config.class_names, config.category_ids) == (("person",), (1,))
    assert config.anchors.per_cell == 4
    assert report.notes == ()
    model = load_model(tmp_path / "people.safetensors")
    state = torch.load(source, weights_only=True)
    back = export(TORCHVISION, model)
    assert back.keys() == state.keys()
    changed = [name for name in state if not torch.equal(back[name], state[name])]
    assert all("predictor" in name for name in changed)  # rows of the background
    with pytest.raises(ValueError, match="has 4 anchors per cell"):
        load_model(source)
    other = load_model(source, aspect_ratios=[0.5, 1, 2, 3], taps=[2, 5, 11, 17])  # as wide, of other blocks
    assert other.config.backbone.taps == (2, 5, 11, 17)
    with pytest.raises(ValueError, match="of another shape"):
        load_model(source, aspect_ratios=[0.5, 1, 2, 3], taps=[1, 6, 13, 17])
    bare = inspect(source, aspect_ratios=[0.5, 1, 2, 3]).config.backbone
    assert bare == MobileNetV2Config(taps=(3, 6, 13, 17), relu6=True, norm_eps=1e-5)


def test_published_names(monkeypatch: pytest.MonkeyPatch, small_file: Path) -> None:
    for name, entry in PUBLISHED.items():
        family, _, config = name.partition("/")
        assert entry.name == name
        assert family in FAMILIES
        assert all(part in entry.url for part in config.split("/"))
        assert Options.of(dict(entry.options))
        algorithm, _, digest = entry.digest.partition(":")
        assert re.fullmatch(rf".*[-_]{digest}\.(pth|pkl)", entry.url)
        assert re.fullmatch(r"[0-9a-f]+", digest)
        assert (algorithm, len(digest)) == (("md5", 6) if family == "detectron2" else ("sha256", 8))
    asked = []

    def download(url: str, digest: str, progress: object) -> Path:
        asked.append((url, digest))
        return small_file

    monkeypatch.setattr(checkpoints, "download", download)
    load_model("detectron2/mask_rcnn_R_50_FPN_3x")
    base = "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
    assert asked == [(f"{base}/137849600/model_final_f10217.pkl", "md5:f10217")]


def test_published_names_bring_what_their_keys_cannot_say(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.pth", "detectron2", zeros("detectron2", replace(SMALL, classes=8)))
    monkeypatch.setattr(checkpoints, "download", lambda url, digest, progress: path)
    config = load_model("detectron2/Cityscapes/mask_rcnn_R_50_FPN").config
    assert (config.class_names[0], config.category_ids[-1]) == ("person", 33)
    assert (config.input.resize.min_size, config.input.resize.max_size) == (1024, 2048)
    config = load_model("detectron2/Cityscapes/mask_rcnn_R_50_FPN", min_size=800).config
    assert (config.input.resize.min_size, config.input.resize.max_size) == (800, 2048)
    assert inspect("detectron2/LVISv0.5/mask_rcnn_R_50_FPN_1x").config.detection.max_detections == 300


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("detectron2/mask_rcnn_R50_FPN_3x", "such as detectron2/mask_rcnn_R_50_FPN_3x"),
        ("peple", "such as people"),
        ("zzz", "such as torchvision/maskrcnn_resnet50_fpn, "),
        ("torchvision/keypointrcnn_resnet50_fpn", "cannot be loaded: keypoints are not here"),
    ],
)
def test_names_that_cannot_be_loaded(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_model(name)


def test_a_path_wins_over_a_name(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people").write_bytes(small_file.read_bytes())
    assert load_model("people").config.num_classes == 3


@pytest.mark.parametrize("name", ["people", "detectron2/mask_rcnn_R_50_FPN_3x"])
def test_a_folder_hides_no_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "download", lambda *_, **__: Path("downloaded"))
    expected = checkpoints.BUNDLED[name] if name == "people" else Path("downloaded")
    assert checkpoints.locate(name) == expected


@pytest.mark.parametrize(("std", "in_1x1"), [(1.0, True), (57.0, False)])
def test_the_stride_of_a_detectron2_trunk_goes_with_its_deviation(std: float, in_1x1: bool) -> None:
    state = zeros("detectron2", R50)
    state |= {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]), "pixel_std": torch.full((3,), std)}
    for style in (None, "caffe"):
        model, notes = load(DETECTRON2, Contents("test", state), Options.of({"style": style}))
        assert isinstance(model.config.backbone, ResNetConfig)
        assert model.config.backbone.stride_in_1x1 == (in_1x1 or style == "caffe")
        assert model.config.input.std == (std, std, std)
        assert any("pixel_std" in text for text in notes) == (style is None and not in_1x1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", {"a", "b", "c"}),
        ("classes", {"a": 1, "b": 2, "c": 3}),
        ("classes", 5),
        ("classes", "abc"),
        ("classes", ["a", "b", 3]),
        ("category_ids", {1, 2, 3}),
        ("category_ids", [1, 2, 2]),
        ("category_ids", [1, 2, "3"]),
        ("category_ids", 3),
    ],
)
def test_names_and_ids_are_lists(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Options.of({name: value})


def test_new_names_keep_the_stored_ids() -> None:
    config = presets.mmdet(("x", "y"), (7, 3))
    renamed = Options(classes=["a", "b"]).apply(config)
    assert (renamed.class_names, renamed.category_ids) == (("a", "b"), (7, 3))


def test_one_tensor_under_two_names() -> None:
    state = zeros("torchvision", SMALL)
    state["rpn.head.conv.weight"] = state["rpn.head.conv.0.0.weight"]
    with pytest.raises(ValueError, match="under its old and its new name"):
        fit("torchvision", state)


def test_weights_are_floating_point() -> None:
    state = zeros("mmdet", SMALL)
    state["rpn_head.rpn_cls.bias"] = state["rpn_head.rpn_cls.bias"].int()
    with pytest.raises(ValueError, match=r"floating-point weights, got torch\.int32 in rpn_head\.rpn_cls\.bias"):
        fit("mmdet", state)


def test_a_name_cannot_ask_for_any_number_of_layers() -> None:
    state = zeros("torchvision", SMALL)
    state["rpn.head.conv.999999999.0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="expected the tensors of 10000000"):
        fit("torchvision", state)


@pytest.mark.parametrize("error", [RuntimeError("overflow"), IndexError(), RecursionError("deep")])
def test_whatever_goes_wrong_names_the_file(
    error: Exception, small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoints.family, "infer", broken)
    with pytest.raises(ValueError, match=re.escape(f"{small_file}: expected the checkpoint of a model")):
        load_model(small_file)
    error = MemoryError()
    with pytest.raises(MemoryError):
        load_model(small_file)
