"""From the pictures of a data set to detections in COCO's form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .data import read_upright

__all__ = ["Source", "detect", "sources"]


class Source(NamedTuple):
    """A picture of a data set."""

    image_id: Any
    path: Path
    size: tuple[int, int]  # height and width


def sources(content: Mapping[str, Any], images: Path | str) -> list[Source]:
    """The pictures of a COCO annotation file's content, in its order; file names start from the folder ``images``.

    Raises:
        ValueError: one without what is needed.
    """
    found = []
    for n, entry in enumerate(content["images"]):
        fields = [
            entry.get(name) if isinstance(entry, dict) else None for name in ("file_name", "height", "width", "id")
        ]
        name, height, width, number = fields
        if (
            not (isinstance(name, str) and isinstance(height, (int, float)) and isinstance(width, (int, float)))
            or number is None
        ):
            raise ValueError(f"image {n}: expected id, file_name, height and width, got {entry!r:.80}")
        found.append(Source(number, Path(images) / name, (int(height), int(width))))
    return found


def detect(predict: Callable[..., Any], pictures: Sequence[Any], **options: Any) -> Iterator[list[dict[str, Any]]]:
    """The detections of each picture as COCO results, with the ids of the data set, one picture after the other.

    Pictures are upright, or as stored where only that is of the size in the data set, as in training.

    Args:
        predict: as ``Predictor.predict``.
        pictures: as :func:`sources` gives them, or whatever else has an ``image_id``, a ``path`` and a ``size``.
        **options: of ``predict``, as ``batch_size`` and ``workers``.

    Raises:
        PictureError, OSError: a picture that cannot be read, or is of another size than the data set says: figures
            without it would be wrong.
    """
    paths = [picture.path for picture in pictures]
    for picture, result in zip(pictures, predict(paths, stream=True, run_lengths=True, **options), strict=True):
        if result.error is not None:
            raise result.error
        if result.size != tuple(picture.size):
            result = predict(read_upright(picture.path, picture.size))
        yield result.to_coco(picture.image_id)
