"""``trimask info FILE_OR_NAME``: what a weight file is."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import SMALL, VARIANTS, small_model
from trimask.cli import main
from trimask.engine.model.checkpoints import save
from trimask.engine.model.checkpoints.detectron2 import DETECTRON2
from trimask.engine.model.checkpoints.family import export
from trimask.engine.model.checkpoints.torchvision import TORCHVISION
from trimask.engine.model.config import ResNetConfig
from trimask.export.metadata import KEY, Metadata, signature

CITYSCAPES = "detectron2/Cityscapes/mask_rcnn_R_50_FPN"
RESNET_18 = replace(SMALL, backbone=ResNetConfig((2, 2, 2, 2), bottleneck=False))  # foreign ones have published depths


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to fill it."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a download was begun")

    monkeypatch.setenv("TRIMASK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path / "home"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save(small_model(), tmp_path / "small.safetensors", {"source": "x.pth", "family": "torchvision"})
    return tmp_path / "small.safetensors"


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["info", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """What is printed, by the names before it."""
    assert main(["info", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    column = max(len(line.split("  ")[0]) for line in lines) + 2
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    return {line[:column].strip(): line[column:] for line in lines}


def test_a_checkpoint_of_ours(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    found = facts(capsys, small)
    count = sum(x.numel() for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked"))
    assert (found["format"], found["file"], found["bytes"]) == ("trimask", str(small), small.stat().st_size)
    assert (found["class_names"], found["category_ids"]) == (["cat", "dog", "bird"], [17, 18, 16])
    assert (found["parameters"], found["parameter_bytes"]) == (count, 4 * count)
    assert (found["min_size"], found["max_size"], found["mask_side"]) == (128, 192, 28)
    assert found["pyramid"] is True
    assert found["provenance"] == {"source": "x.pth", "family": "torchvision"}

    printed = rows(capsys, small)
    assert printed["format"] == "trimask checkpoint"
    assert printed["heads"] == "boxes for each class, masks of 28 x 28 for each class"
    assert printed["classes"] == "3: cat (17), dog (18), bird (16)"
    assert printed["resize"] == "short side to 128, long side to at most 192"
    assert printed["score"] == "above 0.05"
    assert printed["parameters"] == f"{count / 1e6:.1f} M, {4 * count / 1e6:.1f} MB in float32"
    assert "source x.pth" in printed["made from"]


@pytest.mark.parametrize(
    ("variant", "architecture", "heads"),
    [
        ("boxes only", "Faster R-CNN", "boxes for each class"),
        ("class-agnostic", "Mask R-CNN", "boxes for all classes alike, masks of 28 x 28 for all classes alike"),
        ("C4", "C4", "boxes for each class, masks of 14 x 14 for each class"),
    ],
)
def test_heads(variant: str, architecture: str, heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(small_model(VARIANTS[variant]), tmp_path / "m.safetensors")
    printed = rows(capsys, tmp_path / "m.safetensors")
    assert architecture in printed["architecture"]
    assert printed["heads"] == heads
    assert facts(capsys, tmp_path / "m.safetensors")["pyramid"] == (variant != "C4")


def test_many_classes_are_counted_and_the_first_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL, class_names=tuple("abcdefgh"), category_ids=tuple(range(10, 18)))
    save(small_model(config), tmp_path / "m.safetensors")
    assert (
        rows(capsys, tmp_path / "m.safetensors")["classes"] == "8: a (10), b (11), c (12), d (13), e (14), f (15), ..."
    )
    assert len(facts(capsys, tmp_path / "m.safetensors")["class_names"]) == 8


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    printed = rows(capsys, "people")
    assert printed["architecture"] == "Mask R-CNN, MobileNetV2 FPN, 1 class"
    assert (printed["heads"], printed["classes"]) == ("boxes, masks of 28 x 28", "1: person (1)")


def test_a_foreign_checkpoint_with_and_without_class_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.pth"
    torch.save(export(TORCHVISION, small_model(RESNET_18)), path)
    found = facts(capsys, path)
    assert (found["format"], found["architecture"]) == ("torchvision", "Mask R-CNN, ResNet-18 FPN, 3 classes")
    assert found["class_names"] == ["class_0", "class_1", "class_2"]
    assert found["min_size"] == 800
    found = facts(capsys, path, "--min-size", 640, "--classes", "a", "b", "c")
    assert (found["min_size"], found["class_names"]) == (640, ["a", "b", "c"])


def test_a_published_model_is_not_downloaded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, CITYSCAPES)
    assert (found["downloaded"], found["mask_ap"]) == (False, 36.5)
    assert found["options"]["min_size"] == 1024
    printed = rows(capsys, CITYSCAPES)
    assert printed["file"] == "not downloaded"
    assert printed["format"] == "detectron2 checkpoint"
    assert (printed["AP"], printed["licence"], printed["hash"]) == ("mask 36.5", "CC BY-SA 3.0", "md5:af9cf5")
    assert printed["URL"].endswith("/model_final_af9cf5.pkl")
    assert printed["classes"].startswith("person rider car")
    assert not home.exists()
    assert rows(capsys, "torchvision/keypointrcnn_resnet50_fpn")["not here"] == "keypoints are not here"


def test_a_published_model_that_is_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(RESNET_18, class_names=tuple("abcdefgh"), category_ids=tuple(range(8)))
    home.mkdir()
    torch.save(export(DETECTRON2, small_model(config), bgr=True), home / "model_final_af9cf5.pkl")
    found = facts(capsys, CITYSCAPES)
    assert found["downloaded"] is True
    assert (found["class_names"][:2], found["category_ids"][:2]) == (["person", "rider"], [24, 25])
    assert (found["min_size"], found["mask_ap"]) == (1024, 36.5)
    assert facts(capsys, CITYSCAPES, "--min-size", 512)["min_size"] == 512


def test_an_imagenet_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchvision = pytest.importorskip("torchvision")
    model, path = torchvision.models.resnet18(), tmp_path / "r18.pth"
    torch.save(model.state_dict(), path)
    found = facts(capsys, path)
    assert (found["format"], found["architecture"]) == ("ImageNet classifier", "ResNet-18")
    assert found["unused"] == ["fc.weight", "fc.bias"]
    trunk = [x for name, x in model.state_dict().items() if not name.startswith("fc.") and x.is_floating_point()]
    assert found["parameters"] == sum(x.numel() for x in trunk)
    assert rows(capsys, path)["left out"] == "fc.weight, fc.bias"
    assert main(["info", str(path), "--min-size", "640"]) == 1
    assert capsys.readouterr().err == f"trimask: {path}: expected no min_size, of which a classifier has none\n"


def exported(path: Path, opset: int = 20, **about: Any) -> Path:
    """A file with the metadata and the ends of an exported one, and nothing between them: those cost seconds."""
    onnx = pytest.importorskip("onnx")
    metadata = Metadata(SMALL, **about)
    ends = (
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in side.items()]
        for side in signature(metadata)
    )
    domains = [onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(onnx.helper.make_graph([], "ends", *ends), opset_imports=domains)
    onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
    onnx.save(model, path)
    return path


def test_an_exported_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"version": "9.9", "source": {"file": "x.safetensors"}, "static": (2, 128, 192), "precision": "float16"}
    path = exported(tmp_path / "m.onnx", opset=19, **about)
    found = facts(capsys, path)
    assert (found["format"], found["trimask"], found["opset"], found["precision"]) == ("onnx", "9.9", 19, "float16")
    assert found["inputs"]["image"] == {"dtype": "float32", "shape": [2, 3, 128, 192]}
    assert found["outputs"]["labels"] == {"dtype": "int64", "shape": [2, 100]}
    assert found["architecture"] == "Mask R-CNN, ResNet-? FPN, 3 classes"  # of a depth that is not published
    assert found["class_names"] == ["cat", "dog", "bird"]
    assert (found["bytes"], found["provenance"]) == (path.stat().st_size, {"file": "x.safetensors"})
    assert main(["info", str(path), "--min-size", "640"]) == 1
    assert "expected no min_size, which the export has fixed" in capsys.readouterr().err


def test_an_exported_file_that_resizes_and_has_no_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = rows(capsys, exported(tmp_path / "any.onnx", preprocess=True, masks="none"))
    assert printed["inputs"] == "picture: uint8 [?, ?, 3]"
    assert printed["outputs"] == "num_detections: int64 [1]"
    assert (printed["masks"], printed["heads"]) == ("none", "boxes for each class")
    assert (printed["opset"], printed["resizes"]) == ("20", "by itself")


def test_an_exported_file_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from trimask.cli import main; raise SystemExit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "info", str(exported(tmp_path / "m.onnx"))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "architecture  Mask R-CNN, ResNet-" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", "expected a checkpoint file, found nothing"),
        ("missing.onnx", "expected an exported file, found nothing"),
        ("folder", "expected a checkpoint file, found a folder"),
        ("page.pth", "got an HTML or XML page"),
        ("page.onnx", "expected an ONNX file, got a damaged one"),
        ("other.pth", "expected the weights of an R-CNN of torchvision"),
        ("gaps.pth", "the tensors do not fit a trunk"),
    ],
)
def test_what_it_cannot_read_is_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    for page in ("page.pth", "page.onnx"):
        (tmp_path / page).write_text("<html></html>")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "gaps.pth")
    assert main(["info", str(tmp_path / name)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"trimask: {tmp_path / name}: " in printed.err
    assert message in printed.err


def test_options_that_go_with_a_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--min-size", "640"]) == 1
    assert capsys.readouterr().err == "trimask: min_size: expected a checkpoint that this is about, got none\n"
    assert main(["info", "no such model"]) == 1
    assert "expected an existing file or a published name" in capsys.readouterr().err
