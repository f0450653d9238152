"""From the pictures of a data set to detections in COCO's form, and to the figures of the model that made them."""

import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..inference.predicting import Predicting
from .data import read_upright
from .evaluate import Evaluation, category_names, evaluate, ids_by_name, kinds_in, read_truth
from .progress import Progress, unseen

__all__ = ["Source", "chosen_ids", "data_set", "detect", "evaluate_model", "lacking", "matched", "sources"]

PARTS = ("val2017", "val2014", "val")  # of a data set's folder, the first that is there


def evaluate_model(
    model: Predicting,
    data: Path | str,
    images: Path | str | None = None,
    *,
    categories: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    max_detections: int = 100,
    batch_size: int = 1,
    workers: int = 0,
    backend: Literal["pycocotools", "faster"] = "pycocotools",
    progress: Progress = unseen,
) -> Evaluation:
    """COCO's average precision of a model on a data set.

    Load the model without a ``score``: published AP is of all detections down to the model's own threshold.

    Args:
        model: a :class:`~trimask.Predictor`, or the runtime of an exported file.
        data: a COCO annotation file, or a folder with ``annotations/instances_val2017.json`` (or ``val2014``, ``val``).
        images: the folder that file names start from; in a data set's folder it is found.
        categories: names of those that count, by default all. The model's classes are matched by id and name.
        kinds: ``"bbox"`` and ``"segm"``, or one of them; by default what the model finds.
        max_detections: for each picture and category.
        batch_size, workers: see :meth:`~trimask.Predictor.predict`.
        backend: see :func:`.evaluate.evaluate`.
        progress: wraps an iterable and its length, to show how far it got.

    Raises:
        ValueError: no folder of pictures; a class of the model, or a name in ``categories``, that the data set lacks;
            annotations that cannot be evaluated.
        PictureError, OSError: a picture that cannot be read: figures without it would be wrong.
        ImportError: the backend is not installed.
    """
    annotations, folder = data_set(Path(data), None if images is None else Path(images))
    if folder is None:
        raise ValueError("images: expected the folder of the pictures, got none")
    content = read_truth(annotations)
    names = category_names(content)
    counting = chosen_ids(names, categories)
    theirs, notes = matched(model.config.categories, names, categories)
    pictures = sources(content, folder)
    stream = progress(detect(model.predict, pictures, theirs, batch_size=batch_size, workers=workers), len(pictures))
    found = [entry for entries in stream for entry in entries if entry["category_id"] in counting]
    evaluation = evaluate(
        found,
        content,
        category_ids=counting,
        max_detections=max_detections,
        kinds=kinds or kinds_in(found),
        backend=backend,
    )
    evaluation.notes.extend([*notes, *lacking(evaluation.per_class, {*theirs.values()})])
    return evaluation


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
    results = _unwarned(predict(paths, stream=True, run_lengths=True, **options))
    for picture, result in zip(pictures, results, strict=True):
        if result.error is not None:
            raise result.error
        if result.size != tuple(picture.size):
            result = predict(read_upright(picture.path, picture.size))
        entries = result.to_coco(picture.image_id)
        if categories is not None:
            known = [entry for entry in entries if entry["category_id"] in categories]
            entries = [{**entry, "category_id": categories[entry["category_id"]]} for entry in known]
        yield entries


def _unwarned(results: Iterable[Any]) -> Iterator[Any]:
    """Without the warning of a picture that cannot be read, which is an error here."""
    iterator = iter(results)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = next(iterator)
            except StopIteration:
                return
        yield result


def data_set(data: Path, images: Path | None) -> tuple[Path, Path | None]:
    """The annotation file and the folder of its pictures, if it is known."""
    if not data.exists():
        raise FileNotFoundError(f"data: expected an annotation file or a data set's folder, found nothing at {data}")
    if not data.is_dir():
        return data, images
    for part in PARTS:
        annotations = data / "annotations" / f"instances_{part}.json"
        if annotations.is_file():
            folders = [folder for folder in (data / part, data / "images" / part, data / "images") if folder.is_dir()]
            return annotations, images or next(iter(folders), None)
    expected = ", ".join(f"instances_{part}.json" for part in PARTS)
    raise ValueError(f"data: expected one of {expected} in {data / 'annotations'}, found none")


def chosen_ids(categories: Mapping[int, str], chosen: Sequence[str] | None) -> set[int]:
    """The ids of the categories, whose names these are, that count: the chosen ones, or all."""
    unknown = [name for name in chosen or () if name not in categories.values()]
    if unknown:
        raise ValueError(f"categories: expected some of {', '.join(categories.values())}, got {', '.join(unknown)}")
    return {number for number, name in categories.items() if not chosen or name in chosen}


def lacking(per_class: Sequence[Mapping[str, Any]], known: set[int]) -> list[str]:
    """A note where classes that the model does not have lower the means: those without objects count in none."""
    if all(row["id"] in known or not row["objects"] for row in per_class):
        return []
    names = [shlex.quote(row["name"]) for row in per_class if row["id"] in known]
    note = f"the model has {len(names)} of the {len(per_class)} classes of the data that count; the others count as 0"
    chosen = " ".join(names) if len(names) <= 3 else "NAME ..."
    return [f"{note} (--categories {chosen} for those alone)" if names else note]


def matched(
    classes: Mapping[int, str], categories: Mapping[int, str], chosen: Sequence[str] | None = None
) -> tuple[dict[int, int], list[str]]:
    """The data set's id of each class of the model that counts there, and notes on what differs.

    By id, as published weights and data sets agree; where the name of a class stands at another id, all by name.

    Args:
        classes, categories: names by id, of the model and of the data set.
        chosen: names of the categories that are to be counted; None: all, and each class of the model must be there.

    Raises:
        ValueError: a class that the data set lacks, or has more than once.
    """
    # torchvision's models have classes for the gaps in COCO's ids, which no picture ever showed.
    known = {number: name for number, name in classes.items() if not name.startswith("N/A")}
    by_name = ids_by_name(categories)
    found = {}
    for number, name in known.items():
        theirs = by_name.get(name.casefold(), [number])
        if number not in theirs and len(theirs) > 1:
            raise ValueError(f"data: expected one category named {name!r}, got the ids {theirs}")
        found[number] = number if number in theirs else theirs[0]
    moved = any(ours != theirs for ours, theirs in found.items())
    named = [name for name in known.values() if not name.startswith("class_")]
    strangers = {*known} != {*categories} and named and not any(name.casefold() in by_name for name in named)
    if moved or strangers:
        found = {number: theirs for number, theirs in found.items() if known[number].casefold() in by_name}
    unknown = [f"{n} {name}" for n, name in known.items() if found.get(n) not in categories]
    if chosen is not None and not strangers:
        unknown = [name for name in chosen if moved and not {*by_name[name.casefold()]} & {*found.values()}]
    if unknown:
        there = ", ".join(f"{number} {name}" for number, name in categories.items())
        raise ValueError(
            f"weights: expected classes of the data set ({there}), got {', '.join(unknown)} besides; to count only "
            "some: --categories NAME ...; to name those of a foreign checkpoint: --classes, --category-ids"
        )
    notes: list[str] = []
    for ours, number in found.items():
        name, other = known[ours], categories.get(number, known[ours])
        if ours != number:
            notes.append(f"category {ours} of the model is {number} in the data, by its name {name!r}")
        elif name.casefold() != other.casefold() and not name.startswith("class_"):
            notes.append(f"category {ours} is {name!r} to the model and {other!r} in the data")
    return found, notes
