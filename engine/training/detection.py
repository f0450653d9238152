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
        fields = ("id", "file_name", "height", "width")
        values: list[Any] = [entry.get(field) if isinstance(entry, dict) else None for field in fields]
        number, name, *sides = values
        if number is None or not isinstance(name, str) or not all(isinstance(side, (int, float)) for side in sides):
            raise ValueError(f"image {n}: expected {', '.join(fields)}, got {entry!r:.80}")
        found.append(Source(number, Path(images) / name, (int(sides[0]), int(sides[1]))))
    return found


def detect(
    predict: Callable[..., Any], pictures: Sequence[Any], categories: Mapping[int, int] | None = None, **options: Any
) -> Iterator[list[dict[str, Any]]]:
    """The detections of each picture as COCO results, with the ids of the data set, one picture after the other.

    Pictures are upright, or as stored where only that is of the size in the data set, as in training.

    Args:
        predict: as ``Predictor.predict``.
        pictures: as :func:`sources` gives them, or whatever else has an ``image_id``, a ``path`` and a ``size``.
        categories: the data set's id of each category of the model; detections of others are left out. None: ids are
            the same in both.
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
        entries = result.to_coco(picture.image_id)
        if categories is not None:
            known = [entry for entry in entries if entry["category_id"] in categories]
            entries = [{**entry, "category_id": categories[entry["category_id"]]} for entry in known]
        yield entries
