"""Photographs for whole models to look at. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..engine.pictures.reading import read
from .installed import optional

__all__ = ["photographs"]

_SAMPLES = ("astronaut", "coffee", "chelsea", "rocket", "retina")  # in colour, of scikit-image
_DEMO = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.jpg"


def photographs(size: tuple[int, int], count: int, files: Sequence[str | Path] = ()) -> list[NDArray[np.uint8]]:
    """Real pictures, uint8 RGB [H, W, 3], scaled to (height, width); beyond those that are there, mirrored.

    Args:
        size: of each.
        count: how many.
        files: that are there; by default scikit-image's samples, or matplotlib's, or the one in the documentation,
            whichever is installed.
    """
    there = [Image.fromarray(read(Path(file)).array) for file in files] if files else _samples()
    found = [np.array(picture.resize(size[::-1])) for picture in there[:count]]
    while len(found) < count:
        again = found[len(found) - len(there)]
        found.append(np.ascontiguousarray(again[:, ::-1] if len(found) % 2 else again[::-1]))
    return found


def _samples() -> Sequence[Image.Image]:
    if data := optional("skimage.data"):
        folder = Path(data.data_dir)
        files = [next(folder.glob(f"{name}.*"), None) for name in _SAMPLES]
        if there := [file for file in files if file]:
            return [Image.open(file).convert("RGB") for file in there]
    if cbook := optional("matplotlib.cbook"):
        with cbook.get_sample_data("grace_hopper.jpg") as file:
            return [Image.open(file).convert("RGB")]
    return [Image.open(_DEMO).convert("RGB")]
