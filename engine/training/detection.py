"""From the pictures of a data set to detections in COCO's form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

__all__ = ["Source", "detect", "sources"]


class Source(Protocol):
    """A picture of a data set: what the records of a training set are too."""

    image_id: Any
    path: Path
    size: tuple[int, int]  # height and width


class _Source(NamedTuple):
    image_id: Any
    path: Path
    size: tuple[int, int]


def sources(content: Mapping[str, Any], images: Path | str) -> list[_Source]:
    """The pictures of a COCO annotation file's content, in its order; file names start from the folder ``images``."""
    return [_Source(x["id"], Path(images) / x["file_name"], (x["height"], x["width"])) for x in content["images"]]


def detect(predict: Callable[..., Any], pictures: Sequence[Source], **options: Any) -> Iterator[list[dict[str, Any]]]:
    """The detections of each picture as COCO results, with the ids of the data set, one picture after the other.

    A photograph that lies on its side, with an EXIF tag that turns it upright, is taken as it lies where only that fits
    the size in the data set: its annotations were drawn so.

    Args:
        predict: as ``Predictor.predict``.
        pictures: :func:`sources`, or the records of a training set.
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
            result = predict(_as_stored(picture))
        yield result.to_coco(picture.image_id)


def _as_stored(picture: Source) -> np.ndarray:
    """The pixels without the turn that their EXIF tag asks for."""
    with Image.open(picture.path) as stored:
        if stored.size[::-1] != tuple(picture.size):
            height, width = picture.size
            found = " x ".join(map(str, stored.size))
            raise ValueError(f"{picture.path}: expected {width} x {height} pixels as in the data set, got {found}")
        return np.array(stored.convert("RGB"))
