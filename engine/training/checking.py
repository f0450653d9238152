"""Faults of a COCO annotation file and its pictures, and a copy of the file without them."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu.masks import area_of_runs, box_of_runs
from ..model.files import write_json
from ..pictures.reading import PictureError, read
from .data import SizeError, clipped_box, corners, has_area, read_json, read_upright
from .progress import Progress, unseen
from .segmentation import polygons_of, runs_of

__all__ = ["FAULTS", "Fault", "Report", "check"]

# What is looked for, and what the clean copy does about it.
FAULTS = {
    "nothing to learn": "nothing can be done about it",
    "only crowds": "taken for objects, which some tools mark so (CVAT's brush masks)",
    "only boxes": "only they are looked at; with --no-masks they are all that is wanted",
    "missing field": "filled in, or the entry dropped",
    "id of text": "numbered",
    "missing file": "picture dropped",
    "file of another name": "the name of the file that is there",
    "unreadable file": "picture dropped",
    "size mismatch": "picture dropped",
    "duplicate file name": "later picture dropped",
    "duplicate image id": "later entry dropped; where it is of another file, both pictures, and what is said of either",
    "duplicate category id": "later category dropped",
    "duplicate category name": "its annotations given to the first category of that name",
    "duplicate annotation id": "later annotation renumbered",
    "annotation id 0": "renumbered: COCOeval takes 0 for no match",
    "unknown image": "annotation dropped",
    "unknown category": "annotation dropped",
    "bad polygon": "polygon dropped, or its annotation if it has no other",
    "polygon outside": "clipped to the picture",
    "bad run lengths": "annotation dropped",
    "empty mask": "annotation dropped",
    "degenerate box": "replaced by the mask's extent",
    "box outside": "replaced by the mask's extent",
    "box unlike mask": "replaced by the mask's extent",
}

SLACK = 1.0  # pixels that coordinates may lie outside: rounding, not faults
# A box is unlike its mask where a side is off by more than these pixels, and by more than this share of the mask's.
UNLIKE_PIXELS, UNLIKE_SHARE = 2.0, 0.1
SIDES = (8, 16, 32, 64, 128, 256, 512)  # of the histogram of sizes, in pixels


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: a key of :data:`FAULTS`.
        image: the picture's file name, where there is one.
        annotation: the annotation's id, where it is one's.
        detail: what was expected and what came.
    """

    kind: str
    image: str | None
    annotation: Any
    detail: str


@dataclass
class Report:
    """What was found.

    Attributes:
        faults: in the order of the file.
        clean: the content of the file without them.
        pictures, objects, crowds: in the file, objects and crowds those that are usable.
        empty: pictures without an object, which are legal.
        classes: usable objects by class name.
        sizes: usable objects by the square root of their area.
    """

    faults: list[Fault] = field(default_factory=list)
    clean: dict[str, Any] = field(default_factory=dict)
    pictures: int = 0
    objects: int = 0
    crowds: int = 0
    empty: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Faults by kind, in the order of :data:`FAULTS`."""
        found = Counter(fault.kind for fault in self.faults)
        return {kind: found[kind] for kind in FAULTS if found[kind]}

    def to_json(self) -> dict[str, Any]:
        """Everything but the clean copy."""
        facts = {name: getattr(self, name) for name in ("pictures", "objects", "crowds", "empty", "classes", "sizes")}
        return {**facts, "counts": self.counts, "faults": [vars(fault) for fault in self.faults]}

    def write_clean(self, path: Path) -> Path:
        """Write the clean copy; what was there before stays until it is whole."""
        return write_json(path, self.clean)


def check(
    annotations: Path | str,
    images: Path | str,
    *,
    boxes_only: bool = False,
    workers: int = 4,
    progress: Progress = unseen,
) -> Report:
    """Look for faults in a COCO annotation file and in every picture that it names.

    Args:
        images: the folder that its file names start from.
        boxes_only: for models without masks: segmentations are not looked at.
        workers: threads that decode pictures.
        progress: wraps an iterable and its length, to show how far it got.

    Raises:
        ValueError: a file that is not JSON, or lacks one of COCO's three lists.
    """
    return _Check(read_json(Path(annotations)), Path(images), boxes_only).run(workers, progress)


class _Check:
    def __init__(self, content: dict[str, Any], folder: Path, boxes_only: bool) -> None:
        self.folder = folder
        self.boxes_only = boxes_only
        self.report = Report(pictures=len(content["images"]))
        self.sizes: Counter[int] = Counter()
        self.same: dict[int, int] = {}  # ids of categories, and of the first one of the same name
        self.content = self._numbered(content)

    def run(self, workers: int, progress: Progress) -> Report:
        entries = [entry for entry in self.content["annotations"] if isinstance(entry, dict)]
        if entries and not self.boxes_only and not any(entry.get("segmentation") for entry in entries):
            self.boxes_only = True
            self._fault("only boxes", f"expected segmentations, got none in {len(entries)} annotations")
        categories = list(self._categories())
        names = {entry["id"]: entry["name"] for entry in categories}
        images = list(self._images(workers, progress))
        annotations = list(self._annotations({entry["id"]: entry for entry in images}, names))
        if annotations and all(entry["iscrowd"] for entry in annotations):
            self._fault("only crowds", f"expected objects, got {len(annotations)} annotations with iscrowd 1")
            for entry in annotations:
                entry["iscrowd"] = 0
                self._count(entry["area"])
        elif not annotations:
            self._fault("nothing to learn", "expected annotations that can be used, got none")
        found = Counter(names[entry["category_id"]] for entry in annotations if not entry["iscrowd"])
        report = self.report
        report.objects = found.total()
        report.crowds = len(annotations) - report.objects
        report.empty = len({entry["id"] for entry in images} - {entry["image_id"] for entry in annotations})
        report.classes = {name: found[name] for name in names.values()}
        bounds = [f"{low}-{high}" for low, high in zip((0, *SIDES), SIDES, strict=False)] + [f"{SIDES[-1]}-"]
        report.sizes = {bound: self.sizes[n] for n, bound in enumerate(bounds)}
        report.clean = {**self.content, "images": images, "annotations": annotations, "categories": categories}
        return report

    def _fault(self, kind: str, detail: str, image: Any = None, annotation: Any = None) -> None:
        assert kind in FAULTS
        self.report.faults.append(Fault(kind, image if isinstance(image, str) else None, annotation, detail))

    def _numbered(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content with numbers for ids of pictures that are text, wherever they stand."""
        entries = [entry for entry in content["images"] if isinstance(entry, dict)]
        free = 1 + max((_get(entry, "id") or 0 for entry in entries), default=0)
        numbers: dict[str, int] = {}
        for entry in entries:
            if isinstance(entry.get("id"), str) and entry["id"] not in numbers:
                numbers[entry["id"]] = free + len(numbers)
                self._fault("id of text", f"image: expected an integer id, got {entry['id']!r}", entry.get("file_name"))
        if not numbers:
            return content

        def numbered(entries: list[Any], name: str) -> list[Any]:
            return [
                {**x, name: numbers[x[name]]}
                if isinstance(x, dict) and isinstance(x.get(name), str) and x[name] in numbers
                else x
                for x in entries
            ]

        images, annotations = numbered(content["images"], "id"), numbered(content["annotations"], "image_id")
        return {**content, "images": images, "annotations": annotations}

    def _categories(self) -> Iterator[dict[str, Any]]:
        first: dict[str, int] = {}
        for entry in self.content["categories"]:
            if _get(entry, "id") is None or not isinstance(entry.get("name"), str):
                self._fault("missing field", f"category: expected an integer id and a name, got {entry!r:.80}")
            elif entry["id"] in self.same:
                self._fault("duplicate category id", f"category {entry['id']}: expected it once, got {entry!r:.80}")
            else:
                name = entry["name"].casefold()  # as the classes of two files are matched
                self.same[entry["id"]] = first.setdefault(name, entry["id"])
                if first[name] == entry["id"]:
                    yield entry
                else:
                    said = f"expected {entry['name']!r} once, got it as {first[name]} and {entry['id']}"
                    self._fault("duplicate category name", said)

    def _images(self, workers: int, progress: Progress) -> Iterator[dict[str, Any]]:
        """The pictures that are all right, their sizes filled in."""
        entries: list[dict[str, Any]] = []
        seen, files = set(), set()
        for entry in self.content["images"]:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if _get(entry, "id") is None or not isinstance(name, str):
                self._fault("missing field", f"image: expected an integer id and a file_name, got {entry!r:.80}", name)
            elif entry["id"] in seen:
                self._fault("duplicate image id", f"expected one image with id {entry['id']}, got another", name)
                if name not in files:  # whose annotations are whose?
                    entries = [other for other in entries if other["id"] != entry["id"]]
            elif name in files:
                self._fault("duplicate file name", f"expected it once, got it again as image {entry['id']}", name)
            else:
                entries.append(entry)
                seen.add(entry["id"])
                files.add(name)
        with ThreadPoolExecutor(workers) as pool:
            results = progress(pool.map(self._picture, entries), len(entries))
            for entry, (name, size, kind, detail) in zip(entries, results, strict=True):
                if name != entry["file_name"]:
                    said = f"expected a file of that name, found {name}"
                    self._fault("file of another name", said, entry["file_name"])
                if kind:
                    self._fault(kind, detail, entry["file_name"])
                if size:
                    yield {**entry, "file_name": name, "height": size[0], "width": size[1]}

    def _picture(self, entry: dict[str, Any]) -> tuple[str, tuple[int, int] | None, str, str]:
        """The name of a picture's file and its size, None if it is of no use; a fault and its detail."""
        name, size = _found(self.folder, entry["file_name"]), (_get(entry, "height"), _get(entry, "width"))
        path = self.folder / name
        try:
            if size[0] is None or size[1] is None:
                return name, read(path).size, "missing field", f"expected height and width, got {size}"
            return name, read_upright(path, (size[0], size[1])).shape[:2], "", ""
        except SizeError as error:
            return name, None, "size mismatch", str(error)
        except FileNotFoundError:
            return name, None, "missing file", f"{path}: expected a picture, found no file"
        except (PictureError, OSError) as error:
            return name, None, "unreadable file", str(error)

    def _annotations(self, images: dict[int, dict[str, Any]], names: dict[int, str]) -> Iterator[dict[str, Any]]:
        """The annotations that are of use, put right."""
        entries = self.content["annotations"]
        dropped = {_get(entry, "id") for entry in self.content["images"]} - {None, *images}
        free = 1 + max((_get(entry, "id") or 0 for entry in entries), default=0)
        seen: set[int] = set()
        for entry in entries:
            needed = {name: _get(entry, name) for name in ("image_id", "category_id")}
            number, image_id, category = _get(entry, "id"), *needed.values()
            if category in self.same:
                category = self.same[category]
            if image_id in dropped:
                continue  # with its picture, whose fault is told
            image = images.get(image_id) if image_id is not None else None
            file = None if image is None else image["file_name"]
            absent = [name for name, value in needed.items() if value is None]
            if absent:
                self._fault("missing field", f"expected {', '.join(absent)}, got {entry!r:.80}", file, number)
            elif image is None:
                self._fault("unknown image", f"expected an image of the file, got {image_id}", None, number)
            elif category not in names:
                self._fault("unknown category", f"expected a category of the file, got {category}", file, number)
            else:
                fixed = self._annotation(entry, image)
                fixed["category_id"] = category
                again = number in seen
                if number is None or number == 0 or again:
                    if number is not None:
                        kind = "duplicate annotation id" if again else "annotation id 0"
                        self._fault(kind, f"expected an id of its own above 0, got {number}", file, number)
                    fixed["id"], free = free, free + 1
                seen.add(fixed["id"])
                if "area" in fixed:
                    yield fixed

    def _annotation(self, entry: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
        """An annotation put right, without an area where there is nothing of it."""
        fixed, size = copy.copy(entry), (image["height"], image["width"])

        def fault(kind: str, detail: str) -> None:
            self._fault(kind, detail, image["file_name"], _get(entry, "id"))

        absent = [name for name in ("id", "bbox", "segmentation", "area", "iscrowd") if entry.get(name) is None]
        if self.boxes_only:
            absent = [name for name in absent if name != "segmentation"]
        if absent:
            fault("missing field", f"expected {', '.join(absent)}, got none")
        fixed["iscrowd"] = int(bool(entry.get("iscrowd", 0)))
        segmentation = entry.get("segmentation")
        fixed.pop("area", None)
        if self.boxes_only:
            self._boxed(fixed, size, fault)
            return fixed
        if segmentation is None:
            return fixed
        if isinstance(segmentation, list):
            fixed["segmentation"] = list(_usable_polygons(segmentation, size, fault))
            if not fixed["segmentation"]:
                return fixed
        try:
            runs = runs_of(fixed["segmentation"], size)
        except ValueError as error:
            fault("bad run lengths", str(error))
            return fixed
        area = area_of_runs(runs)
        if not area:
            fault("empty mask", "expected pixels in the mask, got none")
            return fixed
        if isinstance(segmentation, list):  # thin ends of polygons leave no pixels
            points = np.concatenate(polygons_of(fixed["segmentation"], size))
            extent = np.concatenate([points.min(0), points.max(0)]).clip(0, [size[1], size[0]] * 2)
        else:
            x, y, width, height = box_of_runs(runs, size[0])
            extent = np.array([x, y, x + width, y + height], np.float64)
        repaired = fixed["segmentation"] != segmentation
        if repaired or entry.get("bbox") is None or _is_bad_box(entry["bbox"], extent, size, fault):
            fixed["bbox"] = [*extent[:2].tolist(), *(extent[2:] - extent[:2]).tolist()]
        stated = entry.get("area")
        fixed["area"] = stated if isinstance(stated, (int, float)) and stated > 0 and not repaired else area
        if not fixed["iscrowd"]:
            self._count(area)
        return fixed

    def _count(self, area: float) -> None:
        self.sizes[int(np.searchsorted(SIDES, area**0.5, side="right"))] += 1

    def _boxed(self, fixed: dict[str, Any], size: tuple[int, int], fault: Callable[[str, str], None]) -> None:
        """An area for a box that has some; one that leaves the picture is cut."""
        bbox = fixed.get("bbox")
        bad = bbox is None or _is_bad_box(bbox, None, size, fault)
        try:
            box = clipped_box(bbox, size)
        except ValueError:
            return
        if has_area(box):
            if bad:
                fixed["bbox"] = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            fixed["area"] = fixed["bbox"][2] * fixed["bbox"][3]
            if not fixed["iscrowd"]:
                self._count(fixed["area"])


def _found(folder: Path, name: str) -> str:
    """The name of a file as it is in the folder: tools write backslashes, percent signs, or paths of their own."""
    plain = unquote(name.replace("\\", "/"))
    for candidate in (name, plain, plain.rpartition("/")[2], plain.rpartition("=")[2]):
        with suppress(OSError, ValueError):  # too long to be a name, or a folder that must not be read
            if candidate and (folder / candidate).is_file():
                return candidate
    return name


def _get(entry: Any, name: str) -> int | None:
    """An integer of an entry."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _usable_polygons(
    segmentation: list[Any], size: tuple[int, int], fault: Callable[[str, str], None]
) -> Iterator[list[float]]:
    if not segmentation:
        fault("bad polygon", "expected at least one polygon, got none")
    limits = np.array([size[1], size[0]])
    for flat in segmentation:
        try:
            (points,) = polygons_of([flat], size)
        except ValueError as error:
            fault("bad polygon", str(error))
            continue
        inside = points.clip(0, limits)
        if (abs(points - inside) > SLACK).any():
            fault("polygon outside", f"expected points in {size[1]} x {size[0]}, got {flat!r:.60}")
            flat = inside.ravel().tolist()
            if not _area(inside):
                continue
        elif not _area(points):
            fault("bad polygon", f"expected an area above 0, got {flat!r:.60}")
            continue
        yield flat


def _area(points: NDArray[np.float64]) -> float:
    """The area of a polygon [P, 2], which is 0 for a line."""
    x, y = (points - points[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _is_bad_box(
    bbox: Any, extent: NDArray[np.float64] | None, size: tuple[int, int], fault: Callable[[str, str], None]
) -> bool:
    """Whether a box needs to be replaced by the extent of its mask, if there is one."""
    box = corners(bbox)
    limits = np.array([size[1], size[0], size[1], size[0]])
    if not (np.isfinite(box).all() and (box[2:] > box[:2]).all()):
        fault("degenerate box", f"expected [x, y, width, height] with an area, got {bbox!r:.60}")
    elif ((box < -SLACK) | (box > limits + SLACK)).any():
        fault("box outside", f"expected a box in {size[1]} x {size[0]}, got {bbox!r:.60}")
    elif not has_area(box.clip(0, limits)):
        fault("degenerate box", f"expected an area in {size[1]} x {size[0]}, got {bbox!r:.60}")
    elif extent is not None and (abs(box - extent) > _allowed(extent)).any():
        fault("box unlike mask", f"expected x1 y1 x2 y2 near {extent.tolist()}, got {box.round(1).tolist()}")
    else:
        return False
    return True


def _allowed(extent: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each side of a box may be from its mask's."""
    return np.maximum(UNLIKE_PIXELS, UNLIKE_SHARE * np.tile(extent[2:] - extent[:2], 2))
