"""A contact sheet: pictures with their annotations drawn over them, to look at before a training run."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..inference.result import Result
from ..pictures.fonts import font_for
from ..pictures.reading import read
from ..pictures.visualize import draw
from .checking import Fault
from .data import corners, read_json, read_upright
from .segmentation import runs_of

__all__ = ["contact_sheet"]

TILE, CAPTION, GAP = (400, 300), 38, 10  # width and height of a picture, height of the text below it, in pixels
PAPER, INK, ALARM = (24, 24, 28), (230, 230, 235), (255, 120, 100)


def contact_sheet(
    annotations: Path | str,
    images: Path | str,
    faults: Sequence[Fault] = (),
    *,
    count: int = 16,
    columns: int = 4,
    seed: int = 0,
) -> Image.Image:
    """Some pictures of an annotation file with all masks and boxes that can be drawn.

    Pictures with faults come first, one of each kind before a second of any; then others at random. The text below a
    picture names its file and its faults.

    Raises:
        ValueError: a file that is not COCO's JSON; no room for a picture.
    """
    if min(count, columns) < 1:
        raise ValueError(f"count, columns: expected at least 1 each, got {count}, {columns}")
    content = read_json(Path(annotations))
    entries = {
        x["file_name"]: x for x in content["images"] if isinstance(x, dict) and isinstance(x.get("file_name"), str)
    }
    kinds: dict[str, list[str]] = defaultdict(list)
    for fault in faults:
        if fault.image is not None and fault.image in entries and fault.kind not in kinds[fault.image]:
            kinds[fault.image].append(fault.kind)
    turn: dict[str, int] = defaultdict(int)
    rank = {}
    for name, found in kinds.items():
        rank[name] = turn[found[0]]
        turn[found[0]] += 1
    others = [name for name in entries if name not in kinds]
    shuffled = [others[n] for n in np.random.default_rng(seed).permutation(len(others))]
    chosen = [*sorted(rank, key=lambda name: rank[name]), *shuffled][:count]
    # By the ids' text, as anything may be an id in a faulty file.
    names = {str(x.get("id")): str(x.get("name")) for x in content["categories"] if isinstance(x, dict)}
    objects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and annotation.get("image_id") is not None:
            objects[str(annotation["image_id"])].append(annotation)
    columns = min(columns, max(len(chosen), 1))
    rows = -(-max(len(chosen), 1) // columns)
    step = TILE[0] + GAP, TILE[1] + CAPTION + GAP
    sheet = Image.new("RGB", (GAP + columns * step[0], GAP + rows * step[1]), PAPER)
    write = ImageDraw.Draw(sheet)
    font = font_for("".join(chosen), 13)
    for n, name in enumerate(chosen):
        x, y = GAP + n % columns * step[0], GAP + n // columns * step[1]
        tile = _tile(Path(images) / name, entries[name], objects[str(entries[name].get("id"))], names)
        sheet.paste(tile, (x + (TILE[0] - tile.width) // 2, y + (TILE[1] - tile.height) // 2))
        for line, (text, color) in enumerate(((name, INK), (", ".join(kinds.get(name, ())), ALARM))):
            write.text((x, y + TILE[1] + 3 + 17 * line), _fitting(text, font), color, font)
    return sheet


def _fitting(text: str, font: Any) -> str:
    """The end of a text, as much as a tile's width holds."""
    if font.getlength(text) <= TILE[0]:
        return text
    return next(cut for n in range(1, len(text) + 1) if font.getlength(cut := "…" + text[n:]) <= TILE[0])


def _tile(path: Path, entry: dict[str, Any], annotations: list[dict[str, Any]], names: dict[str, str]) -> Image.Image:
    try:
        try:
            picture = read_upright(path, (entry["height"], entry["width"]))
        except (ValueError, KeyError):  # drawn as it is, where it can be read at all
            picture = read(path).array
    except (ValueError, OSError):
        return Image.new("RGB", TILE, (60, 30, 30))
    size: tuple[int, int] = picture.shape[:2]
    boxes = np.array([corners(annotation.get("bbox")) for annotation in annotations]).reshape(-1, 4).clip(-1e6, 1e6)
    runs = []
    for annotation in annotations:
        try:
            runs.append(runs_of(annotation.get("segmentation"), size))
        except ValueError:
            runs.append(np.array([size[0] * size[1]]))  # no pixel
    found = [names.get(str(x.get("category_id")), "?") + (" (crowd)" if x.get("iscrowd") else "") for x in annotations]
    shrink = max(size[1] / TILE[0], size[0] / TILE[1])
    drawing = draw(
        picture,
        Result(
            boxes, np.ones(len(found), np.float32), np.zeros(len(found), np.int64), size, names=found, mask_runs=runs
        ),
        boxes=True,
        scores=False,
        line=1.3 * shrink,
        font_size=9 * shrink,
    )
    return drawing.resize((max(1, round(size[1] / shrink)), max(1, round(size[0] / shrink))), Image.Resampling.LANCZOS)
