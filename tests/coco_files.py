"""Small data sets in COCO's format, drawn from a seed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trimask.kernels.cpu.masks import area_of_runs, box_of_runs, encode_runs, runs_of_mask

CATEGORIES = [{"id": 90, "name": "ninety"}, {"id": 3, "name": "three"}, {"id": 7, "name": "seven"}]


def ellipse(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A mask [H, W] that touches no border."""
    height, width = size
    ry, rx = rng.uniform(4, height / 4), rng.uniform(4, width / 4)
    y, x = rng.uniform(ry + 1, height - ry - 1), rng.uniform(rx + 1, width - rx - 1)
    rows, columns = np.ogrid[:height, :width]
    return ((rows + 0.5 - y) / ry) ** 2 + ((columns + 0.5 - x) / rx) ** 2 < 1


def annotation(mask: np.ndarray, kind: str, **fields: Any) -> dict[str, Any]:
    """An annotation of a mask: "string" or "counts" of run lengths, or the "polygon" around its box."""
    runs = runs_of_mask(mask)
    x, y, w, h = box_of_runs(runs, len(mask))
    segmentation: Any = {"size": list(mask.shape), "counts": runs.tolist() if kind == "counts" else encode_runs(runs)}
    if kind == "polygon":
        segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"segmentation": segmentation, "bbox": [x, y, w, h], "area": area_of_runs(runs), "iscrowd": 0, **fields}


def content(
    folder: Path,
    rng: np.random.Generator,
    pictures: int = 6,
    kinds: tuple[str, ...] = ("polygon", "string", "counts"),
    crowd: bool = True,
) -> dict[str, Any]:
    """Write pictures of random sizes into a folder; their annotations. The last has none, the first a crowd."""
    images, annotations = [], []
    for n in range(pictures):
        size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{n}.png")
        images.append({"id": 10 * n + 5, "file_name": f"{n}.png", "height": size[0], "width": size[1]})
        for k in range(0 if n == pictures - 1 else 3):
            fields = {"id": 7 * len(annotations) + 1, "image_id": 10 * n + 5, "category_id": (3, 7, 90)[k]}
            kind = kinds[(n + k) % len(kinds)]
            found = annotation(ellipse(size, rng), kind, **fields)
            annotations.append({**found, "iscrowd": int(crowd and n == 0 and k == 0)})
    return {"images": images, "annotations": annotations, "categories": [dict(category) for category in CATEGORIES]}


def write(folder: Path, data: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    return path
