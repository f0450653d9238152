"""What an evaluation looks like: precision over recall, and the pictures that went worst."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...kernels.cpu.masks import box_of_runs, decode_runs
from ..inference.result import Result
from ..model.files import write_whole
from ..pictures.charts import new_figure
from ..pictures.fonts import font_for
from ..pictures.visualize import draw
from .data import read_upright
from .detection import Source
from .evaluate import TITLES, Entry, Evaluation, Matches

__all__ = ["draw_curves", "draw_worst", "dress"]

DARK, GREY, PAPER = (34, 34, 34), (102, 102, 102), (255, 255, 255)
PANEL = (480, 400)  # the most room for a picture of the sheet, width and height
MARGIN, CAPTION = 14, 56


def draw_curves(evaluation: Evaluation, path: Path) -> Path:
    """Draw precision over recall, the mean over the classes, a panel for each kind and a line for each IoU.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = len(evaluation.curves)
    figure = new_figure("the curves need", 0.6 + 5.6 * panels, 4.4)
    from matplotlib import colormaps

    grid = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axes, (kind, curve) in zip(grid, evaluation.curves.items(), strict=True):
        for t, mean in enumerate(curve.mean):
            colour = colormaps["viridis"](0.9 * t / max(len(curve.iou) - 1, 1))
            label = f"IoU {curve.iou[t]:.2f}   AP {100 * mean.mean():.1f}"
            axes.plot(curve.recall, mean, color=colour, linewidth=1.8, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall")
        ap = evaluation.summary[f"{kind}_AP"]
        dress(axes, f"{TITLES[kind]}: {'no ground truth' if np.isnan(ap) else f'AP {100 * ap:.1f}'}")
    grid[0].set_ylabel("precision, mean over the classes" if len(evaluation.per_class) > 1 else "precision")
    return write_whole(path, lambda file: figure.savefig(file, format="png"))


def dress(axes: Any, title: str) -> None:
    """Give a chart its title and a grid, and a legend where something is drawn."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def draw_worst(evaluation: Evaluation, pictures: Iterable[Source], path: Path, count: int = 6) -> Path | None:
    """Draw a sheet of the pictures with the lowest F1: ground truth beside detections, mistakes named.

    What belongs together has one colour.

    Args:
        evaluation: of the data set.
        pictures: of the data set, as :func:`.detection.sources` gives them.
        path: of the sheet; its suffix says the format.
        count: of pictures at most; those without a mistake are not drawn.

    Returns:
        The path; None where no picture has a mistake, and nothing is written.

    Raises:
        OSError, PictureError: a picture that cannot be read.
    """
    names = {row["id"]: row["name"] for row in evaluation.per_class}
    by_id = {picture.image_id: picture for picture in pictures}
    masks = "segm" in evaluation.curves
    worst = [matches for matches in evaluation.worst[:count] if matches.f1 < 1]
    rows = [_row(matches, by_id[matches.image["id"]], names, masks) for matches in worst]
    if not rows:
        return None
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    kind = Image.registered_extensions()[path.suffix.lower()]
    return write_whole(path, lambda file: sheet.save(file, format=kind, quality=92))


def _row(matches: Matches, picture: Source, names: Mapping[int, str], masks: bool) -> Image.Image:
    """Ground truth and detections of one picture, with a caption."""
    found, missed, false = len(matches.found), len(matches.missed), len(matches.false)
    objects = [truth for truth, _ in matches.found] + matches.missed
    claims = [claim for _, claim in matches.found] + matches.false
    texts = [names[entry["category_id"]] for entry in (*objects, *claims)]
    for n in (*range(found, found + missed), *range(len(objects) + found, len(texts))):
        texts[n] += " missed" if n < len(objects) else " false"
    colours = [*range(found + missed), *range(found), *range(found + missed, found + missed + false)]
    pixels = read_upright(picture.path, picture.size)
    panels = []
    for part, entries in ((slice(len(objects)), objects), (slice(len(objects), None), claims)):
        shown = _result(picture.size, entries, texts[part], colours[part], masks)
        panel = draw(pixels, shown, color_by="class", scores=entries is claims)
        panel.thumbnail(PANEL, Image.Resampling.LANCZOS)
        panels.append(panel)
    width, height = panels[0].size
    row = Image.new("RGB", (2 * PANEL[0] + 3 * MARGIN, CAPTION + height + MARGIN), PAPER)
    canvas = ImageDraw.Draw(row)
    title = f"{picture.path.name}: {found} found, {missed} missed, {false} false, F1 {matches.f1:.2f}"
    canvas.text((MARGIN, MARGIN), title, DARK, font_for(title, 16))
    for panel, left, what in zip(panels, (MARGIN, 2 * MARGIN + width), ("ground truth", "detections"), strict=True):
        canvas.text((left, MARGIN + 22), what, GREY, font_for(what, 13))
        row.paste(panel, (left, CAPTION))
    return row


def _result(
    size: tuple[int, int], entries: Sequence[Entry], names: Sequence[str], colours: Sequence[int], masks: bool
) -> Result:
    """Annotations or detections, each of them named and coloured."""
    runs = [decode_runs(entry["segmentation"]["counts"]) for entry in entries] if masks else None
    found = [entry["bbox"] for entry in entries] if runs is None else [box_of_runs(one, size[0]) for one in runs]
    boxes = np.array(found, np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # xywh to xyxy
    scores = np.array([entry.get("score", 1.0) for entry in entries], np.float32)
    return Result(boxes, scores, np.array(colours, np.int64), size, names=names, mask_runs=runs)
