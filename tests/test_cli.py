"""The command line as people and programs use it: output, exit status, stderr."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import small_model
from trimask import Predictor
from trimask.cli import _parser, main
from trimask.cli.predict import _unique_names
from trimask.engine.model.checkpoints import save
from trimask.engine.model.config import MaskRCNNConfig


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


def test_workers_change_nothing_that_is_printed(
    weights: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    printed = []
    for workers in (0, 2):
        arguments = ("--weights", weights, "--score", 0.05, "--device", "cpu", "--json", "--workers", workers)
        assert run("predict", folder, *arguments) == 1
        out, err = capsys.readouterr()
        assert "1.png" in err
        printed.append([{**json.loads(line), "timings_ms": None} for line in out.splitlines()])
    assert printed[0] == printed[1]
    assert len(printed[0]) == 2


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


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_name_that_is_no_text_stops_nobody(weights: Path, folder: Path, tmp_path: Path) -> None:
    os.rename(os.fsencode(folder / "1.png"), os.fsencode(folder) + b"/\xff.png")
    command = [sys.executable, "-m", "trimask", "predict", str(folder), "--weights", str(weights), "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"2 of 2 pictures" in done.stdout
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2


def test_a_run_that_finds_no_picture_leaves_earlier_results(weights: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rest = ("--weights", weights, "--device", "cpu", "--output", out)
    assert run("predict", folder, *rest) == 0
    before = (out / "detections.json").read_bytes()
    assert run("predict", folder / "typo.png", *rest) == 1
    assert (out / "detections.json").read_bytes() == before


def test_an_overlay_that_cannot_be_written_stops_nobody(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").rename(folder / f"{'1' * 246}.png")  # an overlay's name is longer
    out = tmp_path / "out"
    assert run("predict", folder, "--weights", weights, "--device", "cpu", "--output", out) == 1
    assert {path.name for path in out.iterdir()} == {"2-overlay.jpg", "detections.json"}
    assert len(json.loads((out / "detections.json").read_text())["images"]) == 2
    assert "no overlay: " in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_the_place_of_the_output_folder_is_named_before_the_work(
    folder: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "1.png"
    assert run("predict", folder, "--weights", "nothing", "--output", file / below) == 1
    assert capsys.readouterr().err == f"trimask: output: expected a folder, got the file {file}\n"


@pytest.mark.parametrize("first", ["1.png", "other.onnx"])
def test_a_model_among_the_pictures_is_named_before_the_work(
    folder: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", folder / first, folder / "2.png", "model.onnx", "--weights", "nothing") == 1
    expected = f"expected a model before the pictures and once, got model.onnx after {folder / first}"
    assert capsys.readouterr().err == f"trimask: {expected}\n"


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


def test_a_picture_named_like_an_overlay_is_not_overwritten(weights: Path, folder: Path) -> None:
    Image.new("RGB", (30, 40)).save(folder / "1-overlay.jpg")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("predict", folder, "--weights", weights, "--device", "cpu", "--output", folder) == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    made = {"1-overlay-2.jpg", "2-overlay.jpg", "1-overlay-overlay.jpg", "detections.json"}
    assert {path.name for path in folder.iterdir()} == {*before, *made}


def test_overlays_of_an_earlier_call_are_no_pictures(
    weights: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 40)).save(folder / "1-overlay.jpg")
    given = ["predict", "--weights", weights, "--device", "cpu", "--output", folder]
    for _ in range(2):
        assert run(*given, folder) == 0
        found = json.loads((folder / "detections.json").read_text())["images"]
        assert {Path(image["file_name"]).name for image in found} == {"1.png", "1-overlay.jpg", "2.png"}
    assert run(*given, f"{folder}/./2-overlay.jpg") == 0  # asked for by name
    (image,) = json.loads((folder / "detections.json").read_text())["images"]
    assert Path(image["file_name"]).name == "2-overlay.jpg"
    for name in ("1.png", "2.png", "1-overlay.jpg"):
        (folder / name).unlink()
    assert run(*given, folder) == 1
    assert "nothing in" in capsys.readouterr().err


def test_overlays_of_many_pictures_of_one_name() -> None:
    names = _unique_names(["a/rgb.png", "b/RGB.png", "c/rgb-overlay.jpg", "d/rgb.png", "e/rgb-overlay-2.jpg"])
    assert names == [
        "rgb-overlay-3.jpg",
        "RGB-overlay-4.jpg",
        "rgb-overlay-overlay.jpg",
        "rgb-overlay-5.jpg",
        "rgb-overlay-2-overlay.jpg",
    ]


@pytest.mark.skipif(os.name == "nt", reason="has no SIGTERM to catch")
def test_sigterm_ends_prediction_with_what_is_done(weights: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sources = [str(folder / "1.png")] * 10_000
    code = "import sys; from trimask.cli import main; sys.exit(main())"
    given = ["predict", *sources, "--weights", str(weights), "--device", "cpu", "-o", str(out), "--json"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *given, "--no-overlays"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert b"detections" in child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    assert b"trimask: interrupted" in child.communicate(timeout=60)[1]
    assert child.returncode == 130
    assert 1 <= len(json.loads((out / "detections.json").read_text())["images"]) < 10_000


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


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run("info", "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    if not torch.cuda.is_available():
        assert found["kernels"] == "plain torch"
    assert {model["name"] for model in found["models"]} >= {"detectron2/mask_rcnn_R_50_FPN_3x"}
    assert run("info", "--models") == 0
    printed = capsys.readouterr().out
    assert "torchvision/maskrcnn_resnet50_fpn_v2" in printed
    assert "C4" in printed


@pytest.mark.parametrize(
    ("variable", "cuda", "triton", "kernels", "why"),
    [
        ("", False, "3.7.1", "plain torch", "no CUDA device"),
        ("torch", False, "3.7.1", "plain torch", "TRIMASK_KERNELS=torch"),
        ("torch", True, "3.7.1", "plain torch", "TRIMASK_KERNELS=torch"),
        ("triton", False, "3.7.1", "Triton 3.7.1", "TRIMASK_KERNELS=triton"),
        ("auto", True, "3.7.1", "Triton 3.7.1", "a GPU and triton"),
        ("", True, None, "plain torch", "triton is not installed"),
        ("", True, "old", "plain torch", "the GPU is older than compute capability 7.5"),
    ],
)
def test_info_says_which_kernels_run_and_why(
    variable: str,
    cuda: bool,
    triton: str | None,
    kernels: str,
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMASK_KERNELS", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("trimask.kernels.dispatch._has_triton", lambda _: triton not in (None, "old"))
    monkeypatch.setattr("trimask.cli.info._version", lambda name: triton if name == "triton" else "1.0")
    found = facts(capsys)
    assert (found["kernels"], found["kernels because"]) == (kernels, why)
    assert run("info") == 0
    assert f"{kernels} ({why})" in capsys.readouterr().out


def test_info_finds_the_compiler_that_triton_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRIMASK_KERNELS", "triton")
    monkeypatch.delenv("CC", raising=False)
    assert facts(capsys)["C compiler"] is None
    run("info")
    assert "install gcc or clang, or set CC" in capsys.readouterr().out
    for name in ("clang", "gcc", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("CC", "mine" if name == "mine" else "")
        assert facts(capsys)["C compiler"] == str(tmp_path / name)
    monkeypatch.setenv("CC", "missing")
    assert facts(capsys)["C compiler"] is None


def test_info_measures_the_kernel_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    cache = tmp_path / ".triton" / "cache"
    assert (facts(capsys)["kernel cache"], facts(capsys)["kernel cache bytes"]) == (str(cache), 0)
    (cache / "hash").mkdir(parents=True)
    (cache / "hash" / "kernel.cubin").write_bytes(b"12345")
    assert facts(capsys)["kernel cache bytes"] == 5
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert facts(capsys)["kernel cache"] == str(tmp_path / "other")


def test_warmup_runs_the_model_in_every_size(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    monkeypatch.setattr(Predictor, "warmup", lambda self, size, batch: shapes.append((size, batch)) or 1.0)
    arguments = ["--device", "cpu", "--size", 60, 80, "--size", 90, 70, "--batch", 1, 3]
    assert run("warmup", weights, *arguments) == 0
    assert shapes == [((60, 80), 1), ((60, 80), 3), ((90, 70), 1), ((90, 70), 3)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "2/4  3 pictures of 60 x 80  1.0 s"
    assert "nothing to compile" in printed[-1]


def test_warmup_reports_what_was_compiled(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(self: Predictor, size: tuple[int, int], batch: int) -> float:
        assert (size, batch) == ((480, 640), 1)
        (tmp_path / "kernel.cubin").write_bytes(bytes(2_000_000))
        return 3.0

    monkeypatch.setattr(Predictor, "warmup", compiles)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRIMASK_KERNELS", "triton")
    (tmp_path / "old").write_bytes(bytes(5_000_000))
    assert run("warmup", weights, "--device", "cpu") == 0
    assert f"ready in 3.0 s; {tmp_path} grew by 2.0 MB" in capsys.readouterr().out


def test_warmup_of_a_broken_model_fails(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("trimask.engine.inference.execution.make_batch", broken)
    assert run("warmup", weights, "--device", "cpu", "--size", 20, 30) == 1
    assert capsys.readouterr().err == "trimask: no kernel image\n"
    assert run("warmup", weights, "--device", "cpu", "--size", 20, 0) == 1
    assert "size, batch_size: expected at least 1" in capsys.readouterr().err


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


LOADED = {  # options of predict and eval alike, and what `trimask.load` gets of them
    "--weights mine.pth": {"weights": "mine.pth"},
    "--device cuda:1": {"device": "cuda:1"},
    "--dtype bfloat16": {"dtype": torch.bfloat16},
    "--score 0.25": {"score": 0.25},
    "--max-detections 7": {"max_detections": 7},
    "--resize 320": {"resize": 320},
    "--min-size 400": {"min_size": 400},
    "--max-size 900": {"max_size": 900},
    "--pixel-mean 1 2 3": {"pixel_mean": [1.0, 2.0, 3.0]},
    "--pixel-std 4 5 6": {"pixel_std": [4.0, 5.0, 6.0]},
    "--anchor-sizes 8 16": {"anchor_sizes": [8.0, 16.0]},
    "--aspect-ratios 0.5 3": {"aspect_ratios": [0.5, 3.0]},
    "--activation relu6": {"activation": "relu6"},
    "--norm-eps 0.01": {"norm_eps": 0.01},
    "--norm-groups 16": {"norm_groups": 16},
    "--taps 2 4 11 17": {"taps": [2, 4, 11, 17]},
    "--pre-nms 300": {"pre_nms": 300},
    "--rpn-nms-threshold 0.6": {"rpn_nms_threshold": 0.6},
    "--sampling-ratio 0": {"sampling_ratio": 0},
    "--proposals 50": {"proposals": 50},
    "--classes cat dog": {"classes": ["cat", "dog"]},
    "--category-ids 4 2": {"category_ids": [4, 2]},
    "--style caffe": {"style": "caffe"},
}
EXPORTED = {  # and what `Runtime` gets
    "--weights mine.onnx": {"path": "mine.onnx"},
    "--device cuda:1": {"device": "cuda:1"},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--runtime openvino": {"backend": "openvino"},
    "--threads 3": {"threads": 3},
    **{option: LOADED[option] for option in ("--score 0.25", "--max-detections 7", "--resize 320")},
}
STREAMED = {"--batch-size 3": {"batch_size": 3}, "--workers 2": {"workers": 2}}  # what `predict` or `detect` gets


@pytest.fixture
def reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs a verb up to its first picture: what has reached `load`, `Runtime`, and `predict` or `detect`."""
    seen: dict[str, dict[str, Any]] = {}
    data = folder / "data.json"
    images = [{"id": 1, "file_name": "1.png", "height": 60, "width": 80}]
    categories = [{"id": 17, "name": "cat"}]
    data.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))

    def stop(*_: object, **options: Any) -> None:
        seen["stream"] = options
        raise ValueError("far enough")

    def load(weights: str, **options: Any) -> SimpleNamespace:
        seen["load"] = {"weights": weights, **options}
        return SimpleNamespace(config=MaskRCNNConfig(("cat",), (17,)), predict=stop)

    def runtime(path: str, **options: Any) -> SimpleNamespace:
        model = load("", **options)
        seen["runtime"] = {"path": path, **options}
        return SimpleNamespace(**vars(model), provider="nothing")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("trimask.engine.inference.predictor.load", load)
    monkeypatch.setattr("trimask.export.runtime.Runtime", runtime)
    monkeypatch.setattr("trimask.engine.training.detection.detect", stop)

    def up_to_there(verb: str, *options: str) -> dict[str, dict[str, Any]]:
        sources = [folder / "1.png"] if verb == "predict" else ["--data", data, "--images", folder]
        assert run(verb, *sources, *options) == 1
        return seen

    return up_to_there


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_every_option_reaches_what_it_is_for(verb: str, reached: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """Each alone: it is there, and all the rest is as without it."""
    without = {
        extra: {name: dict(got) for name, got in reached(verb, *extra).items()}
        for extra in ((), ("--weights", "mine.onnx"))
    }
    for where, extra, options in (
        ("load", (), LOADED),
        ("stream", (), STREAMED),
        ("runtime", ("--weights", "mine.onnx"), EXPORTED),
    ):
        for option, expected in options.items():
            got = reached(verb, *extra, *option.split())[where]
            assert got == {**without[extra][where], **expected}, option


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_no_option_of_a_verb_is_left_out_above(verb: str) -> None:
    verbs = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    known = {option for action in verbs.choices[verb]._actions for option in action.option_strings if option[1] == "-"}
    tested = {option.split()[0] for option in (*LOADED, *EXPORTED, *STREAMED)}
    of_eval = {"--detections", "--data", "--images", "--categories", "--kinds", "--processes", "--backend"}
    elsewhere = {"--help", "--output", "--json", *({"--no-overlays"} if verb == "predict" else of_eval)}
    assert known == tested | elsewhere


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--max-detections 7", {"max_detections": 7}),
        ("--kinds segm", {"kinds": ["segm"]}),
        ("--backend faster", {"backend": "faster"}),
        ("--categories dog", {"category_ids": {18}}),
    ],
)
def test_options_of_eval_reach_the_evaluation(
    option: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def evaluate(*_: object, **options: Any) -> None:
        seen.append(options)
        raise ValueError("far enough")

    monkeypatch.setattr("trimask.engine.training.evaluate.evaluate", evaluate)
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    truth = {"images": [], "annotations": [], "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text("[]")
    arguments = ("eval", "--detections", tmp_path / "found.json", "--data", tmp_path / "truth.json")
    for more in ((), option.split()):
        assert run(*arguments, *more) == 1
    assert seen[1] == {**seen[0], **expected} != seen[0]
