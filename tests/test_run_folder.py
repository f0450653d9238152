"""The folder of a run after a crash at any place."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trimask.engine.training.run_folder import RunFolder

CONFIG: dict[str, Any] = {"source": "x", "decisive": {"train": {"steps": (0.5, 0.7), "seed": 1}, "model": {"a": {}}}}


def filled(path: Path, iteration: int, lines: int) -> None:
    folder = RunFolder(path, CONFIG, resume=False)
    with folder.open():
        for n in range(1, lines + 1):
            folder.log({"iteration": n, "loss": 0.5 / n, "gradient_norm": None})
        folder.save_state({"iteration": iteration, "weights": torch.arange(3)})


@pytest.mark.parametrize("tail", ["", '{"iteration": 5, "lo', "\0\0\0\0", '{"iteration": 4}'], ids=repr)
def test_lines_that_the_state_does_not_know_are_cut(tmp_path: Path, tail: str) -> None:
    filled(tmp_path, 2, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    (tmp_path / ".state.pt.0123.part").write_bytes(b"half")
    folder = RunFolder(tmp_path, CONFIG, resume=True)
    assert folder.state is not None
    assert folder.state["weights"].tolist() == [0, 1, 2]
    with folder.open():
        folder.log({"iteration": 3, "loss": 0.25})
    found = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == folder.lines
    assert [(line["iteration"], line["loss"]) for line in found] == [(1, 0.5), (2, 0.25), (3, 0.25)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "config.json", "metrics.jsonl", "state.pt"]


def test_a_start_that_failed_blocks_nobody(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG, resume=False).open():
        pass
    assert RunFolder(tmp_path, CONFIG, resume=False).lines == []


def test_a_run_without_a_state_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path, 2, 3)
    (tmp_path / "state.pt").unlink()
    with pytest.raises(FileExistsError, match="expected a folder without a run"):
        RunFolder(tmp_path, CONFIG, resume=False)
    folder = RunFolder(tmp_path, CONFIG, resume=True)
    assert (folder.state, folder.lines) == (None, [])
    with folder.open():
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_missing_folder_is_made_when_the_run_begins(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", CONFIG, resume=True)
    assert not (tmp_path / "a").exists()
    with folder.open():
        pass
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["decisive"]["train"]["steps"] == [0.5, 0.7]


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 2, 3)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.pt: expected the state of a run, got a broken file"):
        RunFolder(tmp_path, CONFIG, resume=True)


def test_everything_that_changed_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 2, 3)
    other = {"source": "y", "decisive": {"train": {"steps": (0.5,), "seed": 1}, "model": {"a": None}, "loss": 3}}
    with pytest.raises(ValueError) as caught:
        RunFolder(tmp_path, other, resume=True)
    assert str(caught.value).endswith(
        "got other loss: None before, 3 now; model.a: {} before, None now; train.steps: [0.5, 0.7] before, [0.5] now"
    )


def test_no_line_holds_what_is_no_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG, resume=False)
    with folder.open(), pytest.raises(ValueError, match="Out of range float"):
        folder.log({"iteration": 1, "loss": float("nan")})


def other_process_opens(path: Path) -> str:
    """What another process is told that wants the folder."""
    code = """
import sys
from pathlib import Path
from trimask.engine.training.run_folder import RunFolder
try:
    with RunFolder(Path(sys.argv[1]), {"decisive": {}, "source": ""}, resume=True).open():
        print("opened")
except FileExistsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(os.name == "nt", reason="needs fcntl")
def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG, resume=False).open():
        part = tmp_path / ".state.pt.0123.part"
        part.write_bytes(b"being written")
        assert other_process_opens(tmp_path).endswith("expected a folder in which no other run is at work")
        assert part.exists()
    assert other_process_opens(tmp_path) == "opened"
    assert not part.exists()


def test_a_folder_is_one_runs_within_a_process_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG, resume=False).open():
        other = RunFolder(tmp_path, CONFIG, resume=False)
        with pytest.raises(FileExistsError, match="no other run is at work"), other.open():
            pass
        if os.name != "nt":
            assert other_process_opens(tmp_path).endswith("no other run is at work")


def test_what_another_run_has_written_since_is_not_overwritten(tmp_path: Path) -> None:
    late = RunFolder(tmp_path, CONFIG, resume=True)
    filled(tmp_path, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="another run has written since"), late.open():
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == before
    with RunFolder(tmp_path, CONFIG, resume=True).open():
        pass
