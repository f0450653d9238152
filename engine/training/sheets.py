"""A contact sheet: pictures with their annotations drawn over them, to look at before a training run."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..pictures.fonts import font_for
from ..pictures.outlines import crop_of_runs
from ..pictures.reading import read
from ..pictures.visualize import draw
from .checking import Fault
from .data import read_json, read_upright
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
    """
    content = read_json(Path(annotations))
    entries = {x["file_name"]: x for x in content["images"] if isinstance(x, dict) and x.get("file_name")}
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
    chosen = [*sorted(rank, key=lambda name: rank[name]), *np.random.default_rng(seed).permutation(others).tolist()]
    chosen = chosen[:count]
    names = {x.get("id"): str(x.get("name")) for x in content["categories"] if isinstance(x, dict)}
    objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int):
            objects[annotation["image_id"]].append(annotation)
    columns = min(columns, max(len(chosen), 1))
    rows = -(-max(len(chosen), 1) // columns)
    step = TILE[0] + GAP, TILE[1] + CAPTION + GAP
    sheet = Image.new("RGB", (GAP + columns * step[0], GAP + rows * step[1]), PAPER)
    write = ImageDraw.Draw(sheet)
    font = font_for("".join(chosen), 13)
    for n, name in enumerate(chosen):
        x, y = GAP + n % columns * step[0], GAP + n // columns * step[1]
        tile = _tile(Path(images) / name, entries[name], objects[entries[name].get("id")], names)
        sheet.paste(tile, (x + (TILE[0] - tile.width) // 2, y + (TILE[1] - tile.height) // 2))
        for line, (text, color) in enumerate(((name, INK), (", ".join(kinds.get(name, ())), ALARM))):
            write.text((x, y + TILE[1] + 3 + 17 * line), _fitting(text, font), color, font)
    return sheet


def _fitting(text: str, font: Any) -> str:
    """The end of a text, as much as a tile's width holds."""
    if font.getlength(text) <= TILE[0]:
        return text
    return next(cut for n in range(1, len(text) + 1) if font.getlength(cut := "…" + text[n:]) <= TILE[0])


class _Name(NamedTuple):
    name: str
    score: float = 1.0


@dataclass
class _Annotated:
    """A picture's annotations as :func:`draw` takes them; an object without a mask has an empty crop."""

    size: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: list[str]
    crops: list[tuple[NDArray[np.bool_], int, int]]
    has_masks: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[_Name]:
        return map(_Name, self.names)

    def crop(self, index: int) -> tuple[NDArray[np.bool_], int, int]:
        return self.crops[index]


def _tile(path: Path, entry: dict[str, Any], annotations: list[dict[str, Any]], names: dict[Any, str]) -> Image.Image:
    try:
        try:
            picture = read_upright(path, (entry["height"], entry["width"]))
        except (ValueError, KeyError):  # drawn as it is, where it can be read at all
            picture = read(path).array
    except (ValueError, OSError):
        return Image.new("RGB", TILE, (60, 30, 30))
    size: tuple[int, int] = picture.shape[:2]
    boxes, crops = np.zeros((len(annotations), 4), np.float32), []
    for n, annotation in enumerate(annotations):
        try:
            crops.append(crop_of_runs(runs_of(annotation.get("segmentation"), size), size[0]))
        except ValueError:
            crops.append((np.zeros((0, 0), np.bool_), 0, 0))
        try:
            x, y, width, height = map(float, annotation["bbox"])
            boxes[n] = x, y, x + width, y + height
        except (ValueError, TypeError, KeyError):
            continue
    found = [names.get(x.get("category_id"), "?") + (" (crowd)" if x.get("iscrowd") else "") for x in annotations]
    shrink = max(size[1] / TILE[0], size[0] / TILE[1])
    drawing = draw(
        picture,
        _Annotated(size, boxes, np.zeros(len(found), np.int64), found, crops),
        boxes=True,
        scores=False,
        line=1.3 * shrink,
        font_size=9 * shrink,
    )
    return drawing.resize((max(1, round(size[1] / shrink)), max(1, round(size[0] / shrink))), Image.Resampling.LANCZOS)
