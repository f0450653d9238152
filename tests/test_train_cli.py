"""``trimask train``: its options, its exit status, several processes, and what survives a kill."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import trimask
from runs import TINY, assert_same, begin, drawn, lines
from trimask.cli import _parser, main
from trimask.cli.fields import read_fields
from trimask.engine.model.checkpoints import load_model, save
from trimask.engine.model.loss_config import LossConfig
from trimask.engine.training.config import AUGMENT, AugmentConfig, TrainConfig
from trimask.engine.training.data import CocoDataset

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("TRIMASK_TEST_KILLS", "5"))
OPTIONS = (
    *("--device", "cpu", "--batch", "2", "--workers", "0", "--iterations", "4", "--warmup", "2", "--log-every", "1"),
    *(
        "--samples",
        "1",
        "--optimizer",
        "sgd",
        "--learning-rate",
        "0.02",
        "--reference-batch",
        "2",
        "--loss-rpn-samples",
        "32",
    ),
    *("--loss-roi-samples", "16", "--loss-pre-nms", "50", "--loss-post-nms", "20"),
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All but the folder of the run."""
    folder = tmp_path_factory.mktemp("data")
    data = drawn(folder)
    save(begin().model, folder / "tiny.safetensors")
    given = ["--train", str(data.annotations), "--images", str(folder), "--weights", str(folder / "tiny.safetensors")]
    return [*given, *OPTIONS]


def parsed(*options: str) -> argparse.Namespace:
    return _parser().parse_args(["train", "--train", "a", "--images", "b", "--out", "c", *options])


CONFIGS = [(TrainConfig(), ""), (AUGMENT, "augment"), (LossConfig(), "loss")]
FIELDS = [(config, prefix, field.name) for config, prefix in CONFIGS for field in dataclasses.fields(config)]
SPECIAL = {
    "accumulate": "2",
    "rpn_background": "0.25",
    "best": "bbox_AP50",
    "crop_range": "0.2 0.4",
    "learning_rate": "0.004",
    "momentum": "0.3",
    "flip": "0.25",
}


@pytest.mark.parametrize(("config", "prefix", "name"), FIELDS, ids=[f"{prefix}.{name}" for _, prefix, name in FIELDS])
def test_every_field_has_an_option(config: Any, prefix: str, name: str) -> None:
    hint = str(typing.get_type_hints(type(config))[name])
    option = "--" + (f"{prefix}-" if prefix else "") + name.replace("_", "-")
    before = getattr(config, name)
    if isinstance(before, bool):
        given, expected = [option.replace("--", "--no-" if before else "--")], not before
    elif "Literal" in hint:
        expected = next(x for x in typing.get_args(typing.get_type_hints(type(config))[name]) if x != before)
        given = [option, expected]
    else:
        kind = str if "str" in hint else float if "float" in hint else int
        usual = {int: "7", float: "0.75"}.get(kind, "")
        usual = {"tuple[int": "7 9", "tuple[float": "0.2 0.4"}.get(hint.partition(",")[0], usual)
        text = SPECIAL.get(name, usual)
        values = tuple(kind(part) for part in text.split())
        given, expected = [option, *text.split()], values if "tuple" in hint else values[0]
    assert expected != before
    if name == "patience":  # which is counted in evaluations
        config = dataclasses.replace(config, evaluate_every=1)
        given += ["--evaluate-every", "1"]
    found = read_fields(parsed(*given), config, prefix)
    assert getattr(found, name) == expected
    assert type(getattr(found, name)) is type(expected)
    assert dataclasses.replace(found, **{name: before}) == config


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    verbs = next(x for x in _parser()._actions if isinstance(x, argparse._SubParsersAction))
    for action in verbs.choices["train"]._actions:
        assert action.option_strings[0] in text
        assert len(action.help or "") > 8, action.dest
    assert "--batch N" in text
    assert "pictures per update, over all processes (2)" in " ".join(text.split())


def test_nothing_given_is_the_default() -> None:
    options = parsed()
    assert read_fields(options, TrainConfig()) == TrainConfig()
    assert read_fields(options, AUGMENT, "augment") == AugmentConfig(flip=0.5)
    assert read_fields(options, LossConfig.DETECTRON2, "loss") == LossConfig.DETECTRON2
    assert read_fields(parsed("--steps"), TrainConfig()).steps == ()


@pytest.mark.parametrize(
    "given",
    [
        ["--momentum", "1"],
        ["--batch", "3", "--accumulate", "2"],
        ["--best", "AP"],
        ["--patience", "2"],
        ["--frozen-stages", "6"],
        ["--loss-rpn-samples", "0"],
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), *given]) == 1
    complaint = capsys.readouterr().err
    option = given[0][2:].removeprefix("loss-").replace("-", "_")
    assert complaint.splitlines()[-1].startswith(f"trimask: {option}: expected ")
    assert not (tmp_path / "run").exists()


def train(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has to end."""
    command = [sys.executable, "-m", "trimask", "train", *arguments, "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def test_a_run_with_workers_ends(arguments: list[str], tmp_path: Path) -> None:
    """Also where its evaluation leaves frames behind, as matplotlib's first start does."""
    known = arguments[arguments.index("--train") + 1]
    done = train(tmp_path, *arguments, "--workers", "2", "--val", known)
    assert done.returncode == 0, done.stderr
    assert "finished after 4 iterations" in done.stdout


def test_what_goes_wrong_in_a_worker_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = train(tmp_path, *arguments, "--workers", "2", "--polygons")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("trimask: ")
    assert "expected polygons to keep, got run lengths" in last
    assert "Traceback" not in done.stderr


def test_training_from_nothing(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture that is taken by default, at a size that a test can bear."""
    start = arguments.index("--weights")
    given = [*arguments[:start], *arguments[start + 2 :], "--min-size", "48", "--max-size", "64"]
    assert main(["train", *given, "--out", str(tmp_path), "--iterations", "1", "--set", "fpn.channels=16"]) == 0
    assert load_model(tmp_path / "last.safetensors").config.backbone.norm_eps == 1e-5


def test_a_signal_interrupts_and_the_run_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert main(["train", *arguments, "--out", str(straight)]) == 0
    assert f"finished after 4 iterations: {straight}" in capsys.readouterr().out

    def interrupt() -> None:
        while not (parts / "metrics.jsonl").exists() or not (parts / "metrics.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = main(["train", *arguments, "--out", str(parts)])
    thread.join()
    printed = capsys.readouterr()
    assert (status, printed.out.split()[0]) == (130, "SIGTERM")
    assert "starting from" in printed.err
    assert main(["train", *arguments, "--out", str(parts)]) == 1
    assert "resume it or name another" in capsys.readouterr().err
    assert main(["train", *arguments, "--out", str(parts), "--resume"]) == 0
    assert lines(straight) == lines(parts)
    assert_same(*(load_model(folder / "last.safetensors").state_dict() for folder in (straight, parts)))


def test_what_goes_wrong_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = ["--learning-rate", "1e30", "--warmup", "0"]
    assert main(["train", *arguments, "--out", str(tmp_path / "huge"), *huge]) == 1
    assert "expected finite losses, got " in capsys.readouterr().err.splitlines()[-1]
    state = torch.load(tmp_path / "huge" / "state.pt", weights_only=True)
    assert all(bool(x.isfinite().all()) for x in state["model"].values())
    if multiprocessing.get_start_method() == "fork":  # or the patch would not reach the worker
        monkeypatch.setattr(CocoDataset, "__getitem__", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
        assert main(["train", *arguments, "--out", str(tmp_path / "dead"), "--workers", "1"]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("trimask: a worker process of the loader died before iteration 0")
        assert "fewer workers" in last


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def pair_of(given: list[str]) -> list["subprocess.Popen[str]"]:
    """``trimask train`` in two processes that share the work, as torchrun starts them."""
    command = [sys.executable, "-m", "trimask", "train", *given]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **group), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]


def test_two_processes_learn_what_one_does(arguments: list[str], tmp_path: Path) -> None:
    given = [*arguments, "--val", arguments[1], "--batch", "4", "--iterations", "3", "--clip-norm", "1"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    children = pair_of([*given, "--out", str(shared)])
    assert main(["train", *given, "--out", str(alone)]) == 0
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert ("starting from" in errors[0], "starting from" in errors[1]) == (True, False)  # the first speaks for all
    pair = [lines(folder) for folder in (alone, shared)]
    assert len(pair[0]) == len(pair[1]) == 4
    for one, two in zip(*pair, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    assert "segm_AP" in pair[0][-1]
    states = [torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (alone, shared)]
    for name, x in states[0].items():
        torch.testing.assert_close(
            states[1][name], x, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(arguments: list[str], tmp_path: Path) -> None:
    given = [*arguments, "--batch", "4", "--iterations", "12", "--norms", "live", "--learning-rate", "1e-4"]
    given += ["--out", str(tmp_path)]
    children = pair_of(given)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and children[1].poll() is None:
        time.sleep(0.01)
    children[1].send_signal(signal.SIGTERM)
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [130, 130], errors
    done = torch.load(tmp_path / "state.pt", weights_only=True)["iteration"]
    assert 0 < done < 12
    children = pair_of([*given, "--resume"])
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    found = [line["iteration"] for line in lines(tmp_path)]
    assert found == sorted(set(found))
    assert found[-1] == 12


def test_a_loss_that_is_no_number_stops_what_torchrun_started_and_names_all_pictures(
    arguments: list[str], tmp_path: Path
) -> None:
    huge = ["--batch", "4", "--learning-rate", "1e30", "--warmup", "0", "--out", str(tmp_path)]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "--module"]
    command = [sys.executable, "-m", *launcher, "trimask", "train", *arguments, *huge]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    (line, *_) = [line for line in done.stderr.splitlines() if "expected finite losses" in line]
    assert line.count(".png") == 4
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(bool(x.isfinite().all()) for x in state["model"].values())


def test_a_killed_run_goes_on_as_if_nothing_had_happened(arguments: list[str], tmp_path: Path, seed: int) -> None:
    given = [*arguments, "--save-every", "1", "--iterations", "6", "--workers", "1", "--ema", "0.5"]
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(tmp_path), str(KILLS), str(seed), *given]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60 * (KILLS + 5))
    assert done.returncode == 0, done.stderr[-3000:]
    straight, broken = (tmp_path / name for name in ("straight", "broken"))
    assert lines(straight) == lines(broken)
    assert len(lines(straight)) == 6
    first, second = (torch.load(folder / "state.pt", weights_only=True) for folder in (straight, broken))
    assert_same(first["model"], second["model"])
    assert_same(first["average"], second["average"])
    assert not list(broken.glob(".*.part"))
    assert load_model(broken / "last.safetensors").config == TINY


def test_missing_pictures_are_counted_and_warnings_are_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = drawn(tmp_path / "data", pictures=6)
    save(begin().model, tmp_path / "tiny.safetensors")
    for record in data.records[1:4]:
        record.path.unlink()
    given = ["--train", str(data.annotations), "--images", str(tmp_path / "data"), *OPTIONS]
    assert main(["train", *given, "--weights", str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().err
    assert f"3 pictures are missing, such as {data.records[1].path}; others take their places" in told
    assert "3 pictures to learn from" in told
    assert "UserWarning" not in told
    assert any(line.startswith("trimask: ") and "nothing at" in line for line in told.splitlines())


def test_a_file_in_the_place_of_the_run_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", *arguments, "--out", str(tmp_path / "file" / "run")]) == 1
    assert f"expected a folder, got the file {tmp_path / 'file'}" in capsys.readouterr().err


def test_float16_is_refused_on_a_cpu(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments, "--out", str(tmp_path / "half"), "--precision", "float16"]) == 1
    assert "precision: expected bfloat16 or float32 on a CPU" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def test_python_trains_as_the_command_does(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Path(arguments[arguments.index("--train") + 1])
    weights = Path(arguments[arguments.index("--weights") + 1])
    assert (
        main(["train", *arguments, "--val", str(known), "--out", str(tmp_path / "a"), "--set", "fpn.channels=8"]) == 0
    )
    capsys.readouterr()
    options = parsed(*OPTIONS)
    said: list[str] = []
    seen: list[int] = []
    outcome = trimask.train(
        known,
        known.parent,
        tmp_path / "b",
        validation=known,
        weights=weights,
        changes={"fpn.channels": 8},
        device="cpu",
        loss=read_fields(options, LossConfig(), "loss"),
        say=said.append,
        watch=lambda iteration, line: seen.append(iteration),
        **vars(read_fields(options, TrainConfig())),
    )
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert outcome.weights == tmp_path / "b" / "best.safetensors"
    assert_same(*(load_model(tmp_path / run / "best.safetensors").state_dict() for run in "ab"))
    assert outcome.summary["segm_AP"] == lines(tmp_path / "b")[-1]["segm_AP"]
    assert said[0].startswith("starting from")
    assert sum("loss" in line for line in said) == 4
    assert "5 of the pictures to evaluate on are among those to learn from: figures will be too good" in said
    assert seen[-1] == 4
    assert capsys.readouterr() == ("", "")
    boxes = trimask.train(
        known, known.parent, tmp_path / "c", weights=weights, masks=False, device="cpu", iterations=1, workers=0
    )
    assert boxes.weights == tmp_path / "c" / "last.safetensors"
    assert load_model(boxes.weights).mask_head is None
    printed = capsys.readouterr().err
    assert "starting from" in printed
    assert "too good" not in printed
    with pytest.raises(TypeError, match="iteration"):
        trimask.train(known, known.parent, tmp_path / "d", iteration=3)
    with pytest.raises(ValueError, match=r"preset: expected one of .*, got 'resnet'"):
        trimask.train(known, known.parent, tmp_path / "d", preset="resnet")


def test_classes_without_objects_are_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--train") + 1
    content = json.loads(Path(arguments[at]).read_text())
    content["categories"].append({"id": 8, "name": "eight"})
    (tmp_path / "more.json").write_text(json.dumps(content))
    given = [*arguments[:at], str(tmp_path / "more.json"), *arguments[at + 1 :], "--iterations", "1"]
    assert main(["train", *given, "--out", str(tmp_path / "run")]) == 0
    assert "classes without objects to learn: eight" in capsys.readouterr().err
