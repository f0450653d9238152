"""What a model starts with: other weights by class names, an ImageNet trunk under either's names, or nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from models import SMALL
from runs import TINY, assert_same, begin
from trimask.engine.model import presets
from trimask.engine.model.checkpoints import Options, reading, save
from trimask.engine.model.config import InputConfig, MobileNetV2Config, ResNetConfig
from trimask.engine.training.starting import Start, start

NAMES, IDS = ("seven", "new", "three"), (70, 4, 30)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save(begin(seed=4).model, path)
    return path


def tensors(found: Start) -> dict[str, Tensor]:
    return found.model.state_dict()


def test_rows_are_copied_by_class_name(file: Path) -> None:
    old, found = begin(seed=4).model.state_dict(), start(file, NAMES, IDS, seed=1)
    new = tensors(found)
    about_classes = {
        f"{part}.{kind}"
        for part in ("box_head.classes", "box_head.deltas", "mask_head.logits")
        for kind in ("weight", "bias")
    }
    assert set(found.partial) == about_classes
    assert set(found.reused) == set(new) - about_classes
    assert (found.fresh, found.unused) == ((), ())
    assert_same({name: old[name] for name in found.reused}, {name: new[name] for name in found.reused})
    for name in about_classes:
        rows = 4 if "deltas" in name else 1
        before, after = (x[name][: 3 * rows].unflatten(0, (3, rows)) for x in (old, new))
        assert torch.equal(after[0], before[1])
        assert torch.equal(after[2], before[0])
        assert not any(torch.equal(after[1], before[n]) for n in range(3)) or "bias" in name
    assert torch.equal(new["box_head.classes.weight"][-1], old["box_head.classes.weight"][-1])
    assert (found.model.config.class_names, found.model.config.category_ids) == (NAMES, IDS)
    assert replace(found.model.config, class_names=TINY.class_names, category_ids=TINY.category_ids) == TINY
    assert found.model.training
    assert found.notes[0] == f"starting from {file}"
    assert found.notes[1] == "classes kept: seven, three; new: new"
    assert found.notes[2] == f"{len(found.reused)} tensors reused, 6 by rows"


def test_the_same_classes_are_kept_whole(file: Path) -> None:
    found = start(file, TINY.class_names, TINY.category_ids)
    assert_same(tensors(found), begin(seed=4).model.state_dict())
    assert (found.partial, found.fresh) == ((), ())
    assert found.notes[1:] == (f"{len(found.reused)} tensors reused",)


def test_no_class_in_common(file: Path) -> None:
    found = start(file, ("x",), (1,))
    assert set(found.partial) == {"box_head.classes.weight", "box_head.classes.bias"}  # the background
    assert {name.rpartition(".")[0] for name in found.fresh} == {"box_head.deltas", "mask_head.logits"}
    assert found.notes[1] == "classes kept: none; new: x"
    assert found.notes[2].endswith("2 by rows, 4 begin at random: box_head, mask_head")


def test_names_of_the_checkpoints_classes_are_given(file: Path) -> None:
    found = start(file, ("cat",), (1,), options=Options(classes=("dog", "cat", "bird"), min_size=80, max_size=100))
    assert found.notes[1] == "classes kept: cat; new: none"
    assert torch.equal(tensors(found)["box_head.deltas.weight"], begin(seed=4).model.box_head.deltas.weight[4:8])
    assert found.model.config.input.resize.min_size == 80


@pytest.mark.parametrize("classes", [NAMES, TINY.class_names], ids=["other classes", "the same"])
@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"box_head": replace(TINY.box_head, class_agnostic=True)}, {}),
        ({}, {"box_head": replace(TINY.box_head, class_agnostic=True)}),
        ({}, {"mask_head": replace(TINY.mask_head, softmax=True)}),  # type: ignore[type-var]
        ({"mask_head": replace(TINY.mask_head, softmax=True)}, {}),  # type: ignore[type-var]
        ({}, {"box_head": replace(TINY.box_head, fcs=(16,))}),
        ({}, {"mask_head": None}),
        ({"mask_head": None}, {}),
    ],
    ids=[
        "agnostic there",
        "agnostic here",
        "softmax here",
        "softmax there",
        "narrower here",
        "no masks here",
        "no masks there",
    ],
)
def test_heads_of_another_kind_begin_at_random(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], classes: tuple[str, ...]
) -> None:
    source = begin(replace(TINY, **there)).model
    save(source, tmp_path / "there.safetensors")
    found = start(tmp_path / "there.safetensors", classes, (1, 2, 3), config=replace(TINY, **here), seed=1)
    old, new = source.state_dict(), tensors(found)
    assert sorted([*found.reused, *found.partial, *found.fresh]) == sorted(new)
    assert found.fresh or found.unused
    for name in found.fresh:
        assert name not in old or old[name].shape != new[name].shape, name
        assert name.split(".")[0] in ("box_head", "mask_head")
    for name in found.unused:
        assert name.startswith("mask_head") and name not in new  # noqa: PT018
    assert "backbone.stem.conv.weight" in found.reused


def test_softmax_masks_keep_the_background(tmp_path: Path) -> None:
    config = replace(TINY, mask_head=replace(TINY.mask_head, softmax=True))  # type: ignore[type-var]
    source = begin(config).model
    save(source, tmp_path / "there.safetensors")
    logits = tensors(start(tmp_path / "there.safetensors", NAMES, IDS))["mask_head.logits.weight"]
    assert source.mask_head is not None
    assert torch.equal(logits[[0, 2, 3]], source.mask_head.logits.weight[[1, 0, 3]])


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's MobileNetV2 by the names of timm's ``mobilenetv2_100``."""
    places = [(stage, index) for stage, repeats in enumerate((1, 2, 3, 4, 3, 3, 1)) for index in range(repeats)]
    heads = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2"}
    names = heads | {"classifier.1": "classifier"}
    for number, (stage, index) in enumerate(places, start=1):
        layers = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
        if number == 1:
            layers = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
        names |= {f"features.{number}.conv.{ours}": f"blocks.{stage}.{index}.{x}" for ours, x in layers.items()}
    return {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": x for name, x in state.items()}


def test_mobilenets_of_torchvision_and_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = torchvision.models.mobilenet_v2().eval()
    state = classifier.state_dict()
    found = []
    for name, renamed in (("torchvision.pth", state), ("timm.pth", timm_names(state))):
        torch.save(renamed, tmp_path / name)
        begun = start(tmp_path / name, ("a",), (1,))
        assert begun.source == f"the trunk of {name}"
        assert {x.split(".")[0] for x in begun.reused} == {"backbone"}
        assert {x.split(".")[0] for x in begun.fresh} == {"fpn", "rpn", "box_head", "mask_head"}
        assert begun.notes[-1].endswith("begin at random: box_head, fpn, mask_head, rpn")
        assert len(begun.unused) == 8 and begun.partial == ()  # noqa: PT018 - the last convolution, classifier
        found.append(begun)
    assert_same(tensors(found[0]), tensors(found[1]))
    backbone = found[0].model.eval().backbone
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.features[:18](x)
        torch.testing.assert_close(list(backbone(x))[-1], expected, atol=1e-4, rtol=1e-4)


def test_a_resnet_keeps_the_architecture_that_is_asked_for(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    found = start(tmp_path / "resnet18.pth", ("a",), (1,), config=replace(SMALL, class_names=("a",), category_ids=(1,)))
    assert found.model.config.backbone == ResNetConfig((2, 2, 2, 2), bottleneck=False)
    assert found.model.config.fpn == SMALL.fpn
    assert found.unused == ("fc.weight", "fc.bias")
    assert len(found.reused) == 120


@pytest.mark.parametrize("preset", presets.__all__)
def test_a_trunk_in_every_kind_of_model(tmp_path: Path, preset: str) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    planned = getattr(presets, preset)(("a",), (1,))
    config = start(tmp_path / "resnet18.pth", ("a",), (1,), config=planned).model.config
    trunk = planned.backbone
    special = {"dilated": trunk.dilated, "last_on_rois": trunk.last_on_rois} if isinstance(trunk, ResNetConfig) else {}
    assert config.backbone == ResNetConfig((2, 2, 2, 2), bottleneck=False, **special)
    assert (config.input.mean, config.input.std) == (InputConfig().mean, InputConfig().std)  # what ImageNet's saw
    assert replace(config, backbone=planned.backbone, input=planned.input) == planned
    assert config.strides == planned.strides


def test_a_mobilenet_needs_a_pyramid(tmp_path: Path) -> None:
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "mobile.pth")
    with pytest.raises(ValueError, match=r"weights: expected a ResNet for a model without a feature pyramid"):
        start(tmp_path / "mobile.pth", ("a",), (1,), config=presets.detectron2_c4(("a",), (1,)))


def test_a_trunk_with_gaps_is_named(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match=r"gap\.pth: "):
        start(tmp_path / "gap.pth", ("a",), (1,))


def test_the_imagenet_trunk_in_the_pictures_folder(shared_data: Path) -> None:
    path = shared_data / "weights" / "mobilenet_v2_imagenet_dequantized.pth"
    if not path.is_file():
        pytest.skip(f"needs the optional {path}")
    found = start(path, ("person",), (1,), options=Options(activation="relu"))
    assert found.model.config.backbone == MobileNetV2Config(relu6=False)
    assert {x.split(".")[0] for x in found.fresh if "num_batches" not in x} == {"fpn", "rpn", "box_head", "mask_head"}
    assert found.notes[-1].endswith("begin at random: box_head, fpn, mask_head, rpn")


def test_from_nothing(tmp_path: Path) -> None:
    config = replace(TINY, class_names=("a",), category_ids=(1,))
    found, again, other = (start(None, ("a",), (1,), config=config, seed=seed) for seed in (1, 1, 2))
    assert found.reused == ()
    assert len(found.fresh) == len(tensors(found))
    assert found.notes == (
        "starting from nothing: all begins at random",
        f"0 tensors reused, {len(found.fresh)} begin at random: backbone, box_head, fpn, mask_head, rpn",
    )
    assert_same(tensors(found), tensors(again))
    assert not torch.equal(tensors(found)["rpn.objectness.weight"], tensors(other)["rpn.objectness.weight"])
    assert all(bool(x.isfinite().all()) for x in tensors(found).values())
    # Nothing is known of a mask: each cell costs log 2.
    assert 0 < tensors(found)["mask_head.logits.weight"].abs().max() < 0.01


def test_single_values_change(file: Path) -> None:
    changes = [("mask_head.class_agnostic", True), ("input.resize.min_size", 32)]
    found = start(file, TINY.class_names, TINY.category_ids, changes=changes)
    assert found.model.config.mask_head.class_agnostic  # type: ignore[union-attr]
    assert found.model.config.input.resize.min_size == 32
    assert {name.rpartition(".")[0] for name in found.fresh} == {"mask_head.logits"}
    expected = "of another shape there than here, so random, mask_head.logits.weight: [3, 16, 1, 1] and [1, 16, 1, 1]"
    assert f"mask_head: {expected}, and 1 more" in found.notes


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr("trimask.engine.model.checkpoints.read", lambda path: reads.append(path) or reading.read(path))
    start(file, TINY.class_names, TINY.category_ids)
    assert reads == [file]
