"""The command line as people and programs use it: output, exit status, stderr."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import small_model
from trimask.cli import main
from trimask.engine.model.checkpoints import save


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(small_model(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path, np_rng: np.random.Generator) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in (1, 2):
        Image.fromarray(np_rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_predict_writes_overlays_and_one_data_set(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("predict", folder, "--weights", weights, "--score", 0.05, "--device", "cpu", "--output", out) == 0
    assert {path.name for path in out.iterdir()} == {"1-overlay.jpg", "2-overlay.jpg", "detections.json"}
    assert Image.open(out / "1-overlay.jpg").size == (80, 60)
    found = json.loads((out / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in found["images"]] == ["1.png", "2.png"]
    assert {entry["id"]: entry["name"] for entry in found["categories"]} == {17: "cat", 18: "dog", 16: "bird"}
    assert {entry["image_id"] for entry in found["annotations"]} <= {image["id"] for image in found["images"]}
    assert len(found["annotations"]) > 0
    printed = capsys.readouterr().out
    assert "label" in printed
    assert "ms per stage" in printed
    assert "detections.json" in printed


def test_json_lines_for_programs(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("predict", folder, "--weights", weights, "--score", 0.05, "--device", "cpu", "--json") == 0
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(record["path"]).name for record in records] == ["1.png", "2.png"]
    assert (records[0]["width"], records[0]["height"]) == (80, 60)
    assert set(records[0]["detections"][0]) >= {"label", "category_id", "bbox", "score", "segmentation"}
    assert printed.err == ""
    assert not (tmp_path / "trimask-output").exists()


def test_a_bad_picture_is_reported_and_the_rest_goes_on(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "out"
    sources = (folder, folder / "missing.jpg")
    assert run("predict", *sources, "--weights", weights, "--device", "cpu", "--output", out) == 1
    assert {path.name for path in out.iterdir()} == {"2-overlay.jpg", "detections.json"}
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 2
    assert "1.png" in complaints[0]
    assert "missing.jpg" in complaints[1]


def test_pictures_of_one_name_do_not_overwrite_each_other(weights: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    other.mkdir()
    Image.new("RGB", (30, 40)).save(other / "1.png")
    out = tmp_path / "out"
    assert run("predict", folder, other, "--weights", weights, "--device", "cpu", "--output", out) == 0
    assert {path.name for path in out.iterdir()} == {
        "1-overlay.jpg",
        "2-overlay.jpg",
        "1-overlay-2.jpg",
        "detections.json",
    }


def test_a_picture_in_the_output_folder_is_not_overwritten(weights: Path, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("predict", folder, "--weights", weights, "--device", "cpu", "--output", folder) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_names_with_brackets_are_printed_as_they_are(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "x[final][bold].png"
    (folder / "1.png").rename(odd)
    assert run("predict", odd, "--weights", weights, "--device", "cpu", "--output", tmp_path / "[red]") == 0
    printed = capsys.readouterr().out
    assert "x[final][bold].png" in printed
    assert "[red]" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["predict", "nowhere.jpg", "--weights", "nothing"], "nothing"),
        (["predict", "x.jpg", "--score", "2"], "score: expected a number in 0..1, got 2.0"),
        (["convert", "nowhere.pth", "x.safetensors"], "nowhere.pth"),
        (["convert", "nowhere.pth", "x.pth"], "target: expected a .safetensors file, got x.pth"),
        (["predict", "x.jpg", "--device", "abacus"], "device: expected one that torch finds here, got 'abacus'"),
        (["demo", "nowhere.jpg"], "nowhere.jpg"),
    ],
)
def test_failures_are_one_line_on_stderr(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert complaint in printed.err
    assert printed.err.startswith("trimask: ")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["predict"], ["predict", "x.jpg", "--dtype", "int8"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: trimask" in capsys.readouterr().err


def test_convert_reports_and_its_output_needs_no_options(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "half.safetensors"
    assert run("convert", weights, target, "--half", "--classes", "a", "b", "c", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["class_names"] == ["a", "b", "c"]
    assert target.stat().st_size < 0.6 * weights.stat().st_size
    assert run("convert", target, tmp_path / "again.safetensors") == 0
    assert "again.safetensors" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kernels"] == "plain torch"
    assert {model["name"] for model in facts["models"]} >= {"detectron2/mask_rcnn_R_50_FPN_3x"}
    assert run("info", "--models") == 0
    printed = capsys.readouterr().out
    assert "torchvision/maskrcnn_resnet50_fpn_v2" in printed
    assert "C4" in printed


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    assert run("demo", "--output", tmp_path, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    for name in ("astronaut-overlay.png", "astronaut.json"):
        assert (tmp_path / name).is_file()
        assert str(tmp_path / name) in printed
    found = json.loads((tmp_path / "astronaut.json").read_text())
    assert [entry["score"] > 0.9 for entry in found["annotations"]] == [True]


def test_help_needs_no_torch_and_a_closed_pipe_is_no_traceback() -> None:
    for arguments in (["--help"], ["predict", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-m", "trimask", *arguments], capture_output=True, text=True, check=True)
        assert "trimask" in done.stdout
    done = subprocess.run(
        f"{sys.executable} -m trimask info --models | head -c 1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
