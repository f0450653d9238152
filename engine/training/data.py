"""Pictures and their objects from a COCO annotation file: indexed once, decoded when asked for.

Classes are contiguous labels: the file's categories by rising id, as in Detectron2, or in the order that a model's
config gives. Pictures without objects are kept. An object whose box or mask has no area is left out. One whose
annotation cannot be read is told of, and its box, where there is one, is a region to ignore: there is something.

Boxes are the annotations' own, clipped to the picture, as in torchvision and Detectron2; where one has none, it is the
extent of its mask.

Orientation: a photograph may be stored lying down, with an EXIF tag that turns it upright. Which of the two its
annotations were drawn on, its ``width`` and ``height`` in the file tell: pixels are turned where those of the upright
picture fit, and left as stored where those of the stored one do. Where both fit (a square picture, a half turn, a
mirrored one), they are turned, as in Detectron2.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pictures.outlines import crop_of_runs
from ..pictures.reading import PictureError, open_picture, orientation, read
from .segmentation import polygons_of, runs_of

__all__ = [
    "CocoDataset",
    "Example",
    "Record",
    "SizeError",
    "clipped_box",
    "coco_content",
    "corners",
    "has_area",
    "read_json",
    "read_upright",
]

# Back from the upright picture to the pixels as stored, for the tags that turn it by a quarter.
STORED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}

Polygons = list[NDArray[np.float64]]  # the parts of one object, [P, 2] each


class SizeError(PictureError):
    """A picture of another size than its annotations say."""


@dataclass
class Example:
    """A decoded picture and its objects.

    Attributes:
        picture: RGB [H, W, 3], uint8, or float32 in 0..255 once it is resized.
        boxes: float32 [N, 4] xyxy in pixels, continuous coordinates.
        labels: int64 [N], 0 is the first class.
        masks: bool [N, H, W].
        crowd: bool [N]: a region to ignore, not an object.
        polygons: of each object, none for crowds; None where an object has none, or they were not asked for.
        faults: of annotations that could not be read; each names the picture and the annotation.
    """

    picture: NDArray[Any]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    image_id: int
    path: Path
    polygons: list[Polygons] | None = None
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> "Example":
        """Only some of the objects, by index."""
        indices = rows.tolist()
        return replace(
            self,
            boxes=self.boxes[indices],
            labels=self.labels[indices],
            masks=self.masks if indices == list(range(len(self))) else self.masks[indices],
            crowd=self.crowd[indices],
            polygons=None if self.polygons is None else [self.polygons[i] for i in indices],
        )


@dataclass
class Record:
    """What the annotation file says of a picture.

    Attributes:
        size: height and width.
        annotations: its annotations as they are in the file, those of other categories left out.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    annotations: list[dict[str, Any]]


class CocoDataset:
    """A map-style dataset of :class:`Example`.

    Args:
        annotations: the COCO JSON file.
        images: the folder that its file names start from.
        category_ids: the category of each label, in the order of a model's config; annotations of other categories
            are left out. By default all categories, by rising id.
        like: the data set that a model learns from, which this one is to evaluate: labels are its own, categories are
            matched by their names, whatever their ids, and one that is missing here has no objects.
        boxes_only: for models without masks: segmentations are not looked at, an object's mask is its box.
        polygons: examples have them too; they cost time.

    Attributes:
        class_names: of the labels, in their order.
        category_ids: of the labels that there are in the file.
        labels: the label of each of those.
        records: a :class:`Record` for each picture, in the file's order.

    Raises:
        ValueError: a file that is not COCO's JSON; a missing field; a category or picture that an annotation names and
            the file lacks. The text names the file and the entry.
    """

    def __init__(
        self,
        annotations: Path | str,
        images: Path | str,
        *,
        category_ids: Sequence[int] | None = None,
        like: "CocoDataset | None" = None,
        boxes_only: bool = False,
        polygons: bool = False,
    ) -> None:
        self.annotations = Path(annotations)
        self.boxes_only = boxes_only
        self.polygons = polygons
        content = read_json(self.annotations)
        names: dict[int, str] = dict(self._fields(content["categories"], "category", ("id", "name")))
        if like is None:
            self.category_ids = tuple(sorted(names) if category_ids is None else category_ids)
            missing = [x for x in self.category_ids if x not in names]
            if missing:
                raise ValueError(f"{self.annotations}: expected the categories {missing}, got {sorted(names)}")
            self.class_names = tuple(names[x] for x in self.category_ids)
            self.labels = {x: label for label, x in enumerate(self.category_ids)}
        else:
            self.class_names = like.class_names
            self.labels = self._labels_like(like, names)
            self.category_ids = tuple(self.labels)
            if not self.labels:
                there, wanted = ", ".join(names.values()), ", ".join(self.class_names)
                raise ValueError(
                    f"{self.annotations}: expected categories of {like.annotations}, {wanted}, got {there}"
                )

        records: dict[Any, Record] = {}
        for x, name, height, width in self._fields(content["images"], "image", ("id", "file_name", "height", "width")):
            if x in records:
                raise ValueError(f"{self.annotations}: expected one image with id {x!r}, got two")
            records[x] = Record(x, Path(images) / name, (height, width), [])
        entries = content["annotations"]
        for entry, (x, category) in zip(
            entries, self._fields(entries, "annotation", ("image_id", "category_id")), strict=True
        ):
            if x not in records or category not in names:
                what = f"image {x!r}" if x not in records else f"category {category!r}"
                raise ValueError(f"{self.annotations}: annotation {entry.get('id')!r}: {what} is not in the file")
            if category in self.labels:
                records[x].annotations.append(entry)
        self.records = list(records.values())

    def _labels_like(self, like: "CocoDataset", names: Mapping[int, str]) -> dict[int, int]:
        """The label of each category that has a name of the other data set's; of several of one name in their order."""
        labels: dict[int, int] = {}
        for name in dict.fromkeys(map(str.casefold, like.class_names)):
            known = [label for label, other in enumerate(like.class_names) if other.casefold() == name]
            ids = sorted(x for x, other in names.items() if other.casefold() == name)
            if ids and len(ids) != len(known):
                raise ValueError(
                    f"{self.annotations}: expected as many categories named {like.class_names[known[0]]!r} as in "
                    f"{like.annotations}, {len(known)}, got the ids {ids}"
                )
            labels |= zip(ids, known, strict=False)
        return labels

    def _fields(self, entries: list[Any], kind: str, names: tuple[str, ...]) -> Iterator[Any]:
        for n, entry in enumerate(entries):
            values = tuple(entry.get(name) if isinstance(entry, dict) else None for name in names)
            for name, value in zip(names, values, strict=True):
                wanted = str if "name" in name else int
                if not isinstance(value, wanted):
                    where = f"{kind} {entry['id']!r}" if isinstance(entry, dict) and "id" in entry else f"{kind} {n}"
                    raise ValueError(
                        f"{self.annotations}: {where}: expected {name} as {wanted.__name__}, got {value!r:.60} "
                        "(trimask check-data --fix repairs most faults)"
                    )
            yield values

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """One picture and its objects.

        Raises:
            PictureError: a picture that is damaged or not of the size in the file.
            OSError: a missing file.
        """
        record = self.records[index]
        picture = read_upright(record.path, record.size)
        count = len(record.annotations)
        boxes, masks = np.zeros((count, 4), np.float32), np.zeros((count, *record.size), np.bool_)
        crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in record.annotations], np.bool_)
        polygons: list[Polygons] | None = [[] for _ in range(count)] if self.polygons else None
        faults = []
        for n, annotation in enumerate(record.annotations):
            try:
                boxes[n] = self._object(annotation, record.size, masks[n])
                segmentation = annotation.get("segmentation")
                if polygons is not None and not crowd[n]:
                    if isinstance(segmentation, list) and segmentation:
                        polygons[n] = polygons_of(segmentation, record.size)
                    else:
                        polygons = None
            except ValueError as error:
                crowd[n] = True
                with suppress(ValueError):
                    boxes[n] = _boxed(annotation.get("bbox"), record.size, masks[n])
                faults.append(f"{record.path}: annotation {annotation.get('id')!r}: {error}")
        example = Example(
            picture,
            boxes,
            np.array([self.labels[annotation["category_id"]] for annotation in record.annotations], np.int64),
            masks,
            crowd,
            record.image_id,
            record.path,
            polygons,
            tuple(faults),
        )
        return example.take(np.flatnonzero(has_area(boxes)))

    def _object(self, annotation: dict[str, Any], size: tuple[int, int], mask: NDArray[np.bool_]) -> NDArray[Any]:
        """The box of an object, zeros if there is nothing of it; its pixels are set in ``mask``."""
        bbox = annotation.get("bbox")
        if self.boxes_only:
            return _boxed(bbox, size, mask)
        box = None if bbox is None else clipped_box(bbox, size)
        crop, y, x = crop_of_runs(runs_of(annotation.get("segmentation"), size), size[0])
        height, width = crop.shape
        mask[y : y + height, x : x + width] = crop
        if not crop.size:
            return np.zeros(4)
        return np.array([x, y, x + width, y + height], np.float64) if box is None else box


def _boxed(bbox: Any, size: tuple[int, int], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The box of an object that has nothing else; its pixels are set in ``mask``."""
    if bbox is None:
        raise ValueError("expected a bbox, got none")
    box = clipped_box(bbox, size)
    x1, y1, x2, y2 = np.rint(box).astype(int)
    x1, y1 = min(x1, size[1] - 1), min(y1, size[0] - 1)  # a pixel for the thinnest box, at the far edges too
    mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
    return box


def corners(bbox: Any) -> NDArray[np.float64]:
    """COCO's ``[x, y, width, height]`` as xyxy, [4]; NaN for anything else."""
    try:
        x, y, width, height = (float(value) if isinstance(value, (int, float)) else np.nan for value in bbox)
    except (TypeError, ValueError, OverflowError):  # not four, or an integer beyond all floats
        return np.full(4, np.nan)
    return np.array([x, y, x + width, y + height])


def clipped_box(bbox: Any, size: tuple[int, int]) -> NDArray[np.float64]:
    """COCO's ``[x, y, width, height]`` as xyxy within the picture; a :class:`ValueError` for anything else."""
    box = corners(bbox)
    if not np.isfinite(box).all():
        raise ValueError(f"bbox: expected [x, y, width, height], got {bbox!r:.60}")
    return box.clip(0, [size[1], size[0], size[1], size[0]])


def has_area(boxes: NDArray[Any]) -> NDArray[np.bool_]:
    """Which boxes [..., 4], xyxy, are objects: those with an area in float32, as examples have them."""
    boxes = boxes.astype(np.float32, copy=False)
    return np.asarray((boxes[..., 2:] > boxes[..., :2]).all(-1))


def read_json(path: Path) -> dict[str, Any]:
    """A COCO annotation file, with its three lists; a :class:`ValueError` names what is wrong."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{path}: expected a COCO annotation file, got something that is not JSON ({error})") from None
    return coco_content(content, path)


def coco_content(content: Any, path: Path | str) -> dict[str, Any]:
    """What a JSON file holds, if it has the three lists of a COCO annotation file; a :class:`ValueError` if not."""
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: expected a COCO annotation file, got no list of {name} in it")
    return content


def read_upright(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture as its annotations see it, uint8 RGB [H, W, 3]: of that size, upright or as stored.

    Raises:
        SizeError: a picture of another size, upright and as stored.
        PictureError: a damaged one.
        OSError: a missing file.
    """
    upright = read(path).array
    if upright.shape[:2] == size:
        return upright
    if upright.shape[1::-1] == size:
        with open_picture(path) as picture:
            turn = STORED.get(orientation(picture))
        if turn:
            return np.ascontiguousarray(turn(upright))
    expected, got = f"{size[1]} x {size[0]}", f"{upright.shape[1]} x {upright.shape[0]}"
    raise SizeError(f"{path}: expected the annotations' {expected} pixels, got {got}")
