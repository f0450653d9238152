"""How a run goes, to look at: curves, predictions on a few pictures, and TensorBoard's events where it is installed."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..model.files import write_whole
from ..model.loss_config import TERMS
from ..pictures.charts import new_figure
from ..pictures.visualize import draw
from .data import Record, read_upright
from .plots import dress
from .run_folder import Line, RunFolder

__all__ = ["Reporter", "draw_training"]

PANEL = (420, 320)  # the most room for a picture of the sheet, width and height
GAP = 8
SHOWN_SCORE = 0.5
FIGURES = {"bbox_AP": "boxes", "segm_AP": "masks"}
COLOURS = {"loss": "#222222", "rpn_cls": "#4477aa", "rpn_box": "#66ccee", "cls": "#ee6677", "box": "#ccbb44"}
COLOURS |= {"mask": "#228833", "bbox_AP": "#4477aa", "segm_AP": "#228833"}


class Reporter:
    """Writes what is to be looked at into the folder of a run.

    Args:
        folder: of the run.
        active: whether this process is the one that writes.
    """

    def __init__(self, folder: RunFolder, active: bool) -> None:
        self.folder = folder
        self._events = _events(folder) if active else None

    def log(self, line: Line) -> None:
        """Add a line to the metrics and to TensorBoard's events."""
        self.folder.log(line)
        if self._events is not None:
            for name, value in line.items():
                if name != "iteration" and value is not None:
                    self._events.add_scalar(name, value, line["iteration"])

    def draw(self, predict: Callable[..., Any], records: Sequence[Record], iteration: int) -> None:
        """Draw the curves so far, and predictions on some pictures."""
        self._draw_curves()
        if records:
            samples = self.folder.path / "samples"
            samples.mkdir(exist_ok=True)
            sheet = _sheet(predict, records)
            write_whole(samples / f"{iteration:06d}.jpg", lambda file: sheet.save(file, format="JPEG", quality=88))

    def close(self) -> None:
        """Draw the curves once more, with the last line."""
        self._draw_curves()
        if self._events is not None:
            self._events.close()

    def _draw_curves(self) -> None:
        with contextlib.suppress(ImportError):  # of matplotlib, which training can do without
            draw_training(self.folder.lines, self.folder.path / "curves.png")


def _events(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    done = folder.state["iteration"] if folder.state else 0
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1)


def _sheet(predict: Callable[..., Any], records: Sequence[Record]) -> Image.Image:
    """Predictions on pictures, side by side."""
    panels = []
    for record in records:
        pixels = read_upright(record.path, record.size)
        panel = draw(pixels, predict(pixels, score=SHOWN_SCORE))
        panel.thumbnail(PANEL, Image.Resampling.LANCZOS)
        panels.append(panel)
    size = sum(panel.width + GAP for panel in panels) + GAP, max(panel.height for panel in panels) + 2 * GAP
    sheet = Image.new("RGB", size, (255, 255, 255))
    left = GAP
    for panel in panels:
        sheet.paste(panel, (left, GAP))
        left += panel.width + GAP
    return sheet


def draw_training(lines: Sequence[Line], path: Path) -> Path:
    """Draw losses, and average precision where it was measured, over the iterations.

    Args:
        lines: of ``metrics.jsonl``.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    losses = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(name in line for name in FIGURES)]
    panels = bool(losses) + bool(evaluations)
    figure = new_figure("the curves need", 0.4 + 5.4 * max(panels, 1), 3.8)
    grid = iter(figure.subplots(1, max(panels, 1), squeeze=False)[0])
    if losses:
        axes = next(grid)
        at = [line["iteration"] for line in losses]
        for name in ("loss", *TERMS):
            if name in losses[0]:
                width = 2.0 if name == "loss" else 1.2
                axes.plot(at, [line[name] for line in losses], color=COLOURS[name], linewidth=width, label=name)
        axes.set(xlabel="iteration", yscale="log")
        dress(axes, "losses")
    if evaluations:
        axes = next(grid)
        at = [line["iteration"] for line in evaluations]
        for name, label in FIGURES.items():
            values = [100 * line.get(name, np.nan) for line in evaluations]
            if not np.isnan(values).all():
                axes.plot(at, values, color=COLOURS[name], marker="o", markersize=4, label=f"{label} {values[-1]:.1f}")
        axes.set(xlabel="iteration", ylim=(0, None))
        dress(axes, "average precision")
    return write_whole(path, lambda file: figure.savefig(file, format="png"))
