"""What `trimask profile` measures and writes. No timing is asserted."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import SMALL, VARIANTS, small_model
from trimask import Predictor
from trimask.cli import main
from trimask.engine.inference import profiling
from trimask.engine.inference.profiling import Profile, Spread, draw_chart, profile, write_trace
from trimask.engine.inference.timing import EventStopwatch
from trimask.engine.model.checkpoints import save

STAGES = ["decode", "preprocess", "backbone", "proposals", "boxes", "masks", "run lengths", "copy"]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small_model(), device="cpu")


@pytest.fixture
def picture(np_rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np_rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def some_profile(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "predictor": "Predictor(...)",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "rounds": 3,
        "pictures": [(60, 80)] * 2,
        "network": (96, 128),
        "detections": [1, 2],
        "first_ms": 9.0,
        "stages": {"decode": Spread(1, 2, 3), "backbone": Spread(5, 6, 7)},
        "call": Spread(7, 8, 9),
        "predict": Spread(4, 5, 6),
        "memory_bytes": None,
        "memory_of": "nobody",
        "notes": [],
    }
    return Profile(**values | changes)


def test_every_stage_is_measured(predictor: Predictor, picture: bytes) -> None:
    found = profile(predictor, [picture, picture], rounds=3)
    assert list(found.stages) == STAGES
    for spread in [*found.stages.values(), found.call, found.predict]:
        assert 0 < spread.p20 <= spread.p50 <= spread.p80
    assert (found.device, found.dtype, found.rounds) == ("cpu", "float32", 3)
    assert (found.pictures, found.network) == ([(60, 80), (60, 80)], (128, 192))
    expected = predictor.predict([picture] * 2, batch_size=2)
    assert found.detections == [len(result) for result in expected]
    assert sum(found.detections) > 0
    assert found.first_ms > 0
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.memory_bytes is None or found.memory_bytes > 10e6
    assert found.notes == []


def test_without_masks_there_are_two_stages_less(picture: bytes) -> None:
    predictor = Predictor(small_model(VARIANTS["boxes only"]), device="cpu")
    found = profile(predictor, [picture], rounds=1)
    assert list(found.stages) == [name for name in STAGES if name not in ("masks", "run lengths")]
    for spread in found.stages.values():
        assert spread.p20 == spread.p50 == spread.p80  # of a single round


def test_what_a_reader_should_know_is_noted(
    predictor: Predictor, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "FEWEST_RUNS", 1)
    monkeypatch.setattr(profiling, "RUNS_A_COLUMN", 0)
    (note,) = profile(predictor, [picture], rounds=1).notes
    assert "more runs than there was room for" in note
    nothing = Predictor(small_model(), device="cpu", score=1.0)
    (note,) = profile(nothing, [picture], rounds=1).notes
    assert note.startswith("nothing was found")


def test_wrong_numbers_are_refused(predictor: Predictor, picture: bytes) -> None:
    with pytest.raises(ValueError, match="sources: expected at least one picture, got none"):
        profile(predictor, [])
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        profile(predictor, [picture], rounds=0)


def test_shares_and_pictures_per_second() -> None:
    found = some_profile()
    assert found.shares == {"decode": 0.25, "backbone": 0.75}
    assert found.pictures_per_second == 400
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Spread(2, 3.5, 5)


def test_stages_on_a_device_lie_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.now += 2
            self.at = Event.now

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = EventStopwatch()
    watch.mark("a")
    Event.now += 5
    watch.mark("b")
    assert waited == []
    watch.wait()
    assert watch.milliseconds() == {"a": 2, "b": 7}
    assert waited == [11]  # once, for the last


def test_the_trace_has_the_stages_as_ranges(predictor: Predictor, picture: bytes, tmp_path: Path) -> None:
    path = write_trace(predictor, [picture], STAGES, tmp_path / "trace.json")
    assert [path] == [*tmp_path.iterdir()]
    events = json.loads(path.read_text())["traceEvents"]
    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    assert list(ranges) == STAGES
    convolutions = [event for event in events if "convolution" in event["name"]]
    start, length = ranges["backbone"]["ts"], ranges["backbone"]["dur"]
    assert any(start <= event["ts"] <= start + length for event in convolutions)


def test_the_chart_is_a_picture_and_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    path = draw_chart(some_profile(stages={name: Spread(0.0, 0.0001, 120) for name in STAGES}), tmp_path / "stages.png")
    assert [path] == [*tmp_path.iterdir()]
    assert Image.open(path).width > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_chart(some_profile(), tmp_path / "other.png")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="is about Linux")
def test_memory_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    code = "import torch; from trimask.engine.inference.memory import resident_bytes; print(resident_bytes())"
    large = b"x" * (2 << 30)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < len(large)


def test_short_times_have_few_digits() -> None:
    assert [profiling._rounded(x) for x in (0.0, 0.00012, 0.0686, 1.739, 42.71, 1234.5)] == [
        *("0.000", "0.000", "0.069", "1.74", "42.7", "1234"),
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(small_model(SMALL), path)
    return path


@pytest.mark.parametrize("chart", [True, False])
def test_the_command_prints_a_table_and_writes_three_files(
    chart: bool,
    weights: Path,
    picture: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chart:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "photo.png").write_bytes(picture)
    out = tmp_path / "new" / "out"
    arguments = ["profile", tmp_path / "photo.png", "--weights", weights, "--device", "cpu", "--output", out]
    arguments += ["--score", 0.05, "--batch", 2, "--size", 90, 120, "--rounds", 2]
    assert main([str(argument) for argument in arguments]) == 0
    assert {path.name for path in out.iterdir()} == {"profile.json", "trace.json", *["stages.png"] * chart}
    written = json.loads((out / "profile.json").read_text())
    assert list(written["stages"]) == STAGES
    assert set(written["stages"]["copy"]) == {"p20", "p50", "p80"}
    assert (written["pictures"], written["network"]) == ([[90, 120]] * 2, [128, 192])
    assert written["weights"] == str(weights)
    assert written["environment"]["cores"] > 0
    printed = capsys.readouterr()
    for name in [*STAGES, "whole call", "Predictor.predict", "first call", "pictures a second", "peak memory"]:
        assert name in printed.out
    assert "2 x 90 x 120 at 128 x 192" in printed.out
    assert ("no chart" in printed.err) != chart


def test_the_command_refuses_nonsense_before_it_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--batch", "0"]) == 1
    assert "batch, rounds, size: expected at least 1 each" in capsys.readouterr().err
    assert main(["profile", "nowhere.jpg"]) == 1
    assert "expected a picture, found no file at 'nowhere.jpg'" in capsys.readouterr().err
