"""What an evaluation looks like: precision over recall, and the pictures that went worst."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...kernels.cpu.masks import decode_runs
from ..model.files import write_whole
from ..pictures.outlines import crop_of_runs
from ..pictures.visualize import draw
from .evaluate import Entry, Evaluation, Matches

__all__ = ["draw_curves", "draw_worst"]

TITLES = {"bbox": "boxes", "segm": "masks"}
DARK, GREY, PAPER = (34, 34, 34), (102, 102, 102), (255, 255, 255)
PANEL = (480, 400)  # the most room for a picture of the sheet, width and height
MARGIN, CAPTION, HEADER = 14, 44, 30


def draw_curves(evaluation: Evaluation, path: Path) -> Path:
    """Draw precision over recall, the mean over the classes, a panel for each kind and a line for each IoU.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the curves need the package matplotlib: pip install 'trimask[viz]'") from error
    panels = len(evaluation.curves)
    figure = Figure(figsize=(0.6 + 5 * panels, 4.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axes, (kind, (thresholds, recall, precision)) in zip(grid, evaluation.curves.items(), strict=True):
        known = precision[:, :, ~np.isnan(precision).all((0, 1))]
        for t, iou in enumerate(thresholds if known.size else ()):
            mean = known[t].mean(1)  # [R]
            colour = colormaps["viridis"](0.9 * t / max(len(thresholds) - 1, 1))
            axes.plot(recall, mean, color=colour, linewidth=1.8, label=f"IoU {iou:.2f}   AP {100 * mean.mean():.1f}")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        ap = evaluation.summary[f"{kind}_AP"]
        figure_of = "no ground truth" if np.isnan(ap) else f"AP {100 * ap:.1f}"
        axes.set_title(f"{TITLES[kind]}: {figure_of}", loc="left", fontsize=12, fontweight="bold")
        if known.size:
            axes.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    grid[0].set_ylabel("precision, mean over the classes" if len(evaluation.per_class) > 1 else "precision")
    return write_whole(path, lambda file: figure.savefig(file, format="png"))


def draw_worst(evaluation: Evaluation, files: Mapping[Any, Path], path: Path, count: int = 8) -> Path | None:
    """Draw a sheet of the pictures with the lowest F1: ground truth beside detections, mistakes named.

    Args:
        evaluation: of the data set.
        files: the picture file of each image id.
        path: of the sheet; its suffix says the format.
        count: of pictures at most; those without a mistake are not drawn.

    Returns:
        The path; None where no picture has a mistake, and nothing is written.

    Raises:
        OSError, PictureError: a picture that cannot be read.
    """
    names = {row["id"]: row["name"] for row in evaluation.per_class}
    worst = [matches for matches in evaluation.worst[:count] if matches.f1 < 1]
    if not worst:
        return None
    rows = [_row(matches, files[matches.image["id"]], names) for matches in worst]
    columns = 2 if len(rows) > 2 else 1
    lines = [rows[n : n + columns] for n in range(0, len(rows), columns)]
    heights = [max(row.height for row in line) for line in lines]
    width = columns * (rows[0].width + 2 * MARGIN)
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), PAPER)
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for n, row in enumerate(line):
            sheet.paste(row, (n * (row.width + 2 * MARGIN) + MARGIN, top))
        top += height
    kind = Image.registered_extensions()[path.suffix.lower()]
    return write_whole(path, lambda file: sheet.save(file, format=kind, quality=92))


def _row(matches: Matches, file: Path, names: Mapping[int, str]) -> Image.Image:
    """Ground truth and detections of one picture, with a caption."""
    objects = [(truth, names[truth["category_id"]], None) for truth, _ in matches.found]
    objects += [(truth, f"{names[truth['category_id']]}: missed", None) for truth in matches.missed]
    claims = [(claim, names[claim["category_id"]], claim["score"]) for _, claim in matches.found]
    claims += [(claim, f"{names[claim['category_id']]}: false", claim["score"]) for claim in matches.false]
    row = Image.new("RGB", (2 * PANEL[0] + MARGIN, CAPTION + HEADER + PANEL[1]), PAPER)
    canvas = ImageDraw.Draw(row)
    facts = f"{len(matches.found)} found, {len(matches.missed)} missed, {len(matches.false)} false"
    canvas.text((0, MARGIN), f"{file.name}   F1 {matches.f1:.2f}: {facts}", DARK, ImageFont.load_default(17))
    return row
