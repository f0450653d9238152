"""The folder of a training run: what it was told, how it went, its weights, and the state to go on from.

``config.json`` says what the run does, ``metrics.jsonl`` has a line for every few updates and for every evaluation,
``state.pt`` is what a run resumes from, ``last.safetensors`` and ``best.safetensors`` are models to predict with.
"""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..model.checkpoints import native
from ..model.files import write_json, write_whole
from ..model.mask_rcnn import MaskRCNN

__all__ = ["RunFolder"]

Line = dict[str, Any]
_at_work: set[Path] = set()  # folders of this process's runs


class RunFolder:
    """The files of a run.

    Args:
        path: is made where it is missing.
        config: what the run does, as JSON has it; the parts that decide what is learned under ``"decisive"``.
        resume: go on with the run that is there, or begin one where there is none; otherwise the folder must hold none.

    Attributes:
        state: what the run goes on from; None for a new run.
        lines: of ``metrics.jsonl``, up to that state.

    Raises:
        FileExistsError: there is a run already.
        ValueError: the run that is there does something else, or its state cannot be read.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.state: dict[str, Any] | None = None
        self.lines: list[Line] = []
        self._config = json.loads(json.dumps(config))
        self._seen = self._written()
        if resume and self.has_state:
            self._resume()
        elif not resume and (self.has_state or (self._metrics.exists() and self._metrics.stat().st_size)):
            raise FileExistsError(f"{path}: expected a folder without a run, found one; resume it or name another")

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, or tidy it after a crash: only what the state knows stays in the metrics. Hold it.

        Raises:
            FileExistsError: another run is at work in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with _held(self.path.resolve()):
            if self._written() != self._seen:
                raise FileExistsError(
                    f"{self.path}: expected what was read there, another run has written since: again"
                )
            self._tidy()
            yield

    def _written(self) -> list[tuple[int, int] | None]:
        """When, and how much."""
        files = [path.stat() if path.exists() else None for path in (self._state, self._metrics)]
        return [file and (file.st_mtime_ns, file.st_size) for file in files]

    def _tidy(self) -> None:
        for part in self.path.glob(".*.part"):  # of files that were being written
            part.unlink()
        write_json(self.path / "config.json", self._config, indent=1)
        metrics = "".join(map(_text, self.lines)).encode()
        write_whole(self._metrics, lambda file: file.write(metrics))

    def log(self, line: Line) -> None:
        """Add a line to the metrics."""
        self.lines.append(line)
        with self._metrics.open("a") as file:
            file.write(_text(line))

    @property
    def has_state(self) -> bool:
        """Whether there is something to go on from."""
        return self._state.exists()

    def save_state(self, state: dict[str, Any]) -> None:
        """
        Raises:
            OSError: it cannot be written; what was saved before is still there.
        """
        try:
            write_whole(self._state, lambda file: torch.save(state, file))
        except RuntimeError as error:  # torch's writer of zip files, for whatever the system said
            raise OSError(f"{self._state}: could not be written; is the disk full? ({error!s:.200})") from error

    def save_model(self, model: MaskRCNN, name: str, iteration: int) -> None:
        provenance = {"source": self._config["source"], "iterations": str(iteration)}
        native.save(model, self.path / f"{name}.safetensors", provenance)

    @property
    def _state(self) -> Path:
        return self.path / "state.pt"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _resume(self) -> None:
        before = json.loads((self.path / "config.json").read_text())["decisive"]
        changed = sorted(_differences(before, self._config["decisive"]))
        if changed:
            raise ValueError(f"{self.path}: expected to go on with what the run does, got other {'; '.join(changed)}")
        try:
            self.state = torch.load(self._state, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self._state}: expected the state of a run, got a broken file ({error})") from error
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # a last line that was being written
            for text in self._metrics.read_text().splitlines():
                line = json.loads(text)
                if line["iteration"] <= self.state["iteration"]:
                    self.lines.append(line)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep a folder from other runs of this process, and on POSIX of all; its child processes hold nothing."""
    refusal = FileExistsError(f"{folder}: expected a folder in which no other run is at work")
    if folder in _at_work:  # before the file is opened, as its closing ends what this process holds of it
        raise refusal
    with (folder / ".lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system that has no locks
                    raise refusal from error
        _at_work.add(folder)
        try:
            yield
        finally:
            _at_work.discard(folder)


def _text(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The values of nested JSON objects that differ, by dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        pairs = ((before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [line for pair in pairs for line in _differences(*pair)]
    return [] if before == now else [f"{name}: {before!r:.60} before, {now!r:.60} now"]
