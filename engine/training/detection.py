"""From the pictures of a data set to detections in COCO's form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..pictures.reading import read

__all__ = ["Source", "detect", "read_fitting", "sources"]


class Source(NamedTuple):
    """A picture of a data set."""

    image_id: Any
    path: Path
    size: tuple[int, int]  # height and width


def sources(content: Mapping[str, Any], images: Path | str) -> list[Source]:
    """The pictures of a COCO annotation file's content, in its order; file names start from the folder ``images``."""
    return [Source(x["id"], Path(images) / x["file_name"], (x["height"], x["width"])) for x in content["images"]]


def detect(predict: Callable[..., Any], pictures: Sequence[Any], **options: Any) -> Iterator[list[dict[str, Any]]]:
    """The detections of each picture as COCO results, with the ids of the data set, one picture after the other.

    A photograph that lies on its side, with an EXIF tag that turns it upright, is taken as it lies where only that fits
    the size in the data set: its annotations were drawn so.

    Args:
        predict: as ``Predictor.predict``.
        pictures: as :func:`sources` gives them, or whatever else has an ``image_id``, a ``path`` and a ``size``.
        **options: of ``predict``, as ``batch_size`` and ``workers``.

    Raises:
        PictureError, OSError: a picture that cannot be read: figures without it would be wrong.
        ValueError: a picture of another size than the data set says.
    """
    paths = [picture.path for picture in pictures]
    for picture, result in zip(pictures, predict(paths, stream=True, run_lengths=True, **options), strict=True):
        if result.error is not None:
            raise result.error
        if result.size != tuple(picture.size):
            result = predict(read_fitting(picture.path, picture.size))
        yield result.to_coco(picture.image_id)


def read_fitting(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture as its annotations see it, RGB [H, W, 3]: upright, or as stored where only that is of that size.

    Raises:
        ValueError: it has another size either way.
        PictureError, OSError: it cannot be read.
    """
    upright = read(path).array
    if upright.shape[:2] == tuple(size):
        return upright
    with Image.open(path) as stored:
        if stored.size != (size[1], size[0]):
            got = f"{upright.shape[1]} x {upright.shape[0]}"
            raise ValueError(f"{path}: expected {size[1]} x {size[0]} pixels, as the data set says, got {got}")
        return np.array(stored.convert("RGB"))
