"""COCO's average precision and recall, of boxes and of masks.

The figures are those of pycocotools (or of faster-coco-eval, which gives the same), whose pitfalls this avoids:

- An annotation with id 0 counts as missed there, whatever finds it: annotations are numbered anew, from 1.
- Where a detection has a box, masks are sorted into small, medium and large by the box's area: for masks the box is
  taken away first, as Detectron2 does.
- ``summarize()`` knows a limit of 100 detections only: the figures are read from the arrays behind it.
- A run length of another size than its picture overlaps nothing, without a word: it is an error here.
- What has no ground truth is -1 there; here it is NaN, and takes part in no mean either.
"""

import contextlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .data import coco_content, read_json

__all__ = [
    "BACKENDS",
    "KINDS",
    "TITLES",
    "Curve",
    "Entry",
    "Evaluation",
    "Matches",
    "category_names",
    "check_truth",
    "evaluate",
    "ids_by_name",
    "kinds_in",
    "read_results",
    "read_truth",
    "tools",
]

Entry = dict[str, Any]  # an annotation, a detection or an image of a COCO file
Floats = NDArray[np.float64]

TITLES = {"bbox": "boxes", "segm": "masks"}  # of the kinds, for people
KINDS = tuple(TITLES)
BACKENDS = ("pycocotools", "faster")
AREAS = {"s": 1, "m": 2, "l": 3}  # COCO's ranges of area: small, medium, large; 0 is all
FIELDS = {"bbox": "bbox", "segm": "segmentation"}  # what a detection needs for each kind
MATCH_IOU = 0.5  # a detection of a picture's F1 has found an object it overlaps this much
MATCH_SCORE = 0.5  # and those below this score are no claims: detections go down to scores of .05 for the curve's sake


class Curve(NamedTuple):
    """Precision over recall: all areas, the largest number of detections."""

    iou: Floats  # [T] thresholds
    recall: Floats  # [R]
    precision: Floats  # [T, R, K], K categories by rising id; NaN for one without ground truth

    @property
    def mean(self) -> Floats:
        """Precision [T, R] of the categories that have ground truth; [0, R] where none has."""
        known = self.precision[:, :, ~np.isnan(self.precision).all((0, 1))]
        return known.mean(2) if known.size else np.empty((0, len(self.recall)))


@dataclass(frozen=True)
class Matches:
    """What was found in a picture at an IoU and a score of .5: COCO's greedy matching, crowds ignored.

    Attributes:
        image: the data set's entry of the picture.
        found: annotations with the detection of each.
        missed: annotations without one.
        false: detections of nothing.
    """

    image: Entry
    found: list[tuple[Entry, Entry]]
    missed: list[Entry]
    false: list[Entry]

    @property
    def f1(self) -> float:
        """``2 found / (2 found + missed + false)``; 1 where there is nothing and nothing is claimed."""
        total = 2 * len(self.found) + len(self.missed) + len(self.false)
        return 2 * len(self.found) / total if total else 1.0


@dataclass(frozen=True)
class Evaluation:
    """Figures in 0..1; NaN where there is no ground truth.

    Attributes:
        summary: ``bbox_AP``, ``bbox_AP50``, ``bbox_AP75``, ``bbox_APs``, ``bbox_APm``, ``bbox_APl``, ``bbox_AR1``,
            ``bbox_AR10``, ``bbox_AR100`` (as ``max_detections`` says), ``bbox_ARs``, ``bbox_ARm``, ``bbox_ARl``; the
            same with ``segm``.
        per_class: for each category ``id``, ``name``, ``objects`` (without crowds) and the figures of the summary.
        curves: by kind.
        worst: every picture, that of the lowest F1 first; among equals, that with the most mistakes.
        notes: what was filled in or numbered anew.
    """

    summary: dict[str, float]
    per_class: list[dict[str, Any]]
    curves: dict[str, Curve]
    worst: list[Matches]
    notes: list[str]

    def to_json(self, worst: int = 20) -> dict[str, Any]:
        """What fits into a JSON file: None for NaN, curves as means over the categories, the worst pictures."""

        def plain(figures: Mapping[str, Any]) -> dict[str, Any]:
            return {k: None if isinstance(x, float) and math.isnan(x) else x for k, x in figures.items()}

        return {
            "summary": plain(self.summary),
            "per_class": [plain(row) for row in self.per_class],
            "curves": {
                kind: {
                    "iou": curve.iou.round(2).tolist(),
                    "recall": curve.recall.round(2).tolist(),
                    "precision": curve.mean.tolist(),
                }
                for kind, curve in self.curves.items()
            },
            "worst": [
                {
                    "image_id": picture.image["id"],
                    "file_name": picture.image.get("file_name"),
                    "f1": picture.f1,
                    "found": len(picture.found),
                    "missed": len(picture.missed),
                    "false": len(picture.false),
                }
                for picture in self.worst[:worst]
                if picture.f1 < 1
            ],
            "notes": self.notes,
        }


def evaluate(
    detections: Iterable[Mapping[str, Any]] | Path | str,
    ground_truth: Mapping[str, Any] | Path | str,
    *,
    image_ids: Iterable[Any] | None = None,
    category_ids: Iterable[int] | None = None,
    max_detections: int = 100,
    kinds: Sequence[str] = KINDS,
    backend: Literal["pycocotools", "faster"] = "pycocotools",
    keep_ids: bool = False,
) -> Evaluation:
    """Compare detections with annotations.

    Args:
        detections: COCO results: dicts with ``image_id``, ``category_id``, ``score`` and ``bbox`` or ``segmentation``
            or both; or the JSON file of a list of them, or of a data set (see :func:`read_results`).
        ground_truth: the content of a COCO annotation file, or its path. Nothing in it is changed.
        image_ids: the pictures that count, by default all.
        category_ids: the categories that count, by default all.
        max_detections: for each picture and category, those of the highest scores. Published AP has 100.
        kinds: ``"bbox"`` and ``"segm"``, or one of them.
        backend: ``"faster"`` takes faster-coco-eval instead of pycocotools: the same figures in less time.
        keep_ids: leave the ids of annotations as they are, so that one with id 0 counts as missed: for comparison with
            figures that were made so.

    Raises:
        ImportError: the backend is not installed.
        ValueError: an option out of range; a detection of an unknown picture or category, without a score or what the
            kind needs, or of another size than its picture; an annotation without mask or box.
    """
    kinds = tuple(kinds)
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds: expected bbox, segm or both, got {kinds}")
    if max_detections < 1:
        raise ValueError(f"max_detections: expected at least 1, got {max_detections}")
    coco, evaluator, masks = tools(backend)
    content = read_truth(ground_truth)
    found = read_results(detections, content) if isinstance(detections, (str, Path)) else list(detections)

    images = {image["id"]: image for image in content["images"]}
    by_id = {category["id"]: category for category in content["categories"]}
    categories = [by_id[number] for number in sorted(by_id)]
    chosen_images = _chosen("image_ids", image_ids, images)
    chosen_categories = _chosen("category_ids", category_ids, [category["id"] for category in categories])
    counting_images, counting_categories = set(chosen_images), set(chosen_categories)
    _check(found, images, {category["id"] for category in categories})
    notes: list[str] = []
    if keep_ids:
        _require(content["annotations"], "annotation", ("id",))
    truth = _Truth(coco, masks, content, images, keep_ids, notes)
    annotations = truth.annotations(kinds)
    summary: dict[str, float] = {}
    per_class: list[dict[str, Any]] = [
        {"id": category["id"], "name": str(category["name"])}
        for category in categories
        if category["id"] in counting_categories
    ]
    counts = Counter(a["category_id"] for a in annotations if not a["iscrowd"] and a["image_id"] in counting_images)
    for row in per_class:
        row["objects"] = counts[row["id"]]
    curves, results = {}, []
    limits = [*(m for m in (1, 10) if m < max_detections), max_detections]
    for kind in kinds:
        results = truth.results(found, kind)
        with contextlib.redirect_stdout(io.StringIO()):
            run = evaluator(truth.index(annotations), truth.index(results), kind)
            run.params.imgIds, run.params.catIds = chosen_images, chosen_categories
            run.params.maxDets = limits
            run.evaluate()
            run.accumulate()
        precision = np.asarray(run.eval["precision"]).reshape(
            len(run.params.iouThrs), -1, len(per_class), 4, len(limits)
        )
        recall = np.asarray(run.eval["recall"]).reshape(len(run.params.iouThrs), len(per_class), 4, len(limits))
        summary |= {f"{kind}_{name}": x for name, x in _figures(precision, recall, limits).items()}
        for k, row in enumerate(per_class):
            figures = _figures(precision[:, :, k : k + 1], recall[:, k : k + 1], limits)
            row.update({f"{kind}_{name}": x for name, x in figures.items()})
        last = precision[..., 0, -1]
        curves[kind] = Curve(run.params.iouThrs, run.params.recThrs, np.where(last < 0, np.nan, last))
    kind = kinds[-1]  # masks, where there are any
    worst = _matches(masks, kind, images, chosen_images, counting_categories, annotations, results, max_detections)
    return Evaluation(summary, per_class, curves, worst, notes)


def kinds_in(detections: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The kinds that all of the detections can be evaluated by; both where there is none."""
    kinds = tuple(kind for kind, field in FIELDS.items() if all(field in entry for entry in detections))
    return kinds or KINDS


def check_truth(
    ground_truth: Path | str, kinds: Sequence[str] = KINDS, category_ids: Iterable[int] | None = None
) -> dict[str, float]:
    """See whether :func:`evaluate` can read annotations, ahead of the detections.

    Returns:
        The figures of no detections: NaN where there is nothing to find.

    Raises:
        ImportError, ValueError: as there.
    """
    content = read_truth(ground_truth)
    try:
        return evaluate([], content, category_ids=category_ids, kinds=kinds).summary
    except ValueError as error:
        raise ValueError(f"{ground_truth}: {error}") from error


def read_truth(ground_truth: Mapping[str, Any] | Path | str, where: str = "") -> Mapping[str, Any]:
    """The content of a COCO annotation file, in which every entry has the ids and names that evaluation goes by.

    Args:
        ground_truth: its path, or what was read from it.
        where: what begins an error's text; a path says it itself.

    Raises:
        ValueError: one is missing; the text names the entry and, where it is known, the file.
    """
    content = ground_truth
    if isinstance(content, (str, Path)):
        content, where = read_json(Path(content)), f"{content}: "
    _require(content["images"], f"{where}image", ("id",))
    _require(content["categories"], f"{where}category", ("id", "name"))
    _require(content["annotations"], f"{where}annotation", ("image_id", "category_id"))
    for name in ("images", "categories"):
        if len({isinstance(entry["id"], str) for entry in content[name]}) > 1:
            raise ValueError(f"{where}{name}: expected ids that are all numbers or all text, got both")
    return content


def category_names(content: Mapping[str, Any]) -> dict[Any, str]:
    """The name of each category id in an annotation file's content."""
    return {category["id"]: str(category["name"]) for category in content["categories"]}


def ids_by_name(names: Mapping[Any, str]) -> dict[str, list[Any]]:
    """The ids that have a name, however it is capitalised."""
    ids: dict[str, list[Any]] = defaultdict(list)
    for number, name in names.items():
        ids[name.casefold()].append(number)
    return ids


def _require(entries: Iterable[Any], kind: str, fields: Sequence[str]) -> None:
    for n, entry in enumerate(entries):
        for field in fields:
            value = entry.get(field) if isinstance(entry, Mapping) else None
            if value is None or not isinstance(value, Hashable):
                raise ValueError(f"{kind} {n}: expected {field} as a number or text, got {entry!r:.80}")


def read_results(path: Path | str, truth: Mapping[str, Any]) -> list[Entry]:
    """The detections in a COCO results file, or in a data set whose annotations have scores.

    A data set, such as ``trimask predict`` writes, has ids of its own. Its pictures are matched with the truth's by the
    ends of their paths, and those that the truth lacks left out; categories by name.

    Args:
        truth: as :func:`read_truth` gives it.

    Raises:
        ValueError: it holds no list of them, or one lacks an id; a picture of the truth is not in the data set. The
            text names the file.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected COCO results, got something that is not JSON ({error})") from None
    if isinstance(found, dict) and "annotations" in found:
        return _in_terms_of(truth, read_truth(coco_content(found, path), f"{path}: "), str(path))
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: expected COCO results, a list of detections, got a {type(found).__name__}")
    _require(found, f"{path}: detection", ("image_id", "category_id"))
    return found


def _in_terms_of(truth: Mapping[str, Any], found: Mapping[str, Any], path: str) -> list[Entry]:
    """The annotations of one data set with the ids of another."""
    _require(found["annotations"], f"{path}: annotation", ("score",))
    files = {str(image.get("file_name")).replace("\\", "/"): image["id"] for image in truth["images"]}
    images: dict[Any, Any] = {}
    lost = {image["id"]: image.get("file_name") for image in truth["images"]}
    for image in found["images"]:
        parts = str(image.get("file_name")).replace("\\", "/").split("/")
        ends = ["/".join(parts[n:]) for n in range(len(parts))]  # the whole path, then without its first folder ...
        known = next((files[end] for end in ends if end in files), None)
        if known is not None:
            if known not in lost:
                raise ValueError(f"{path}: expected one picture that ends in {ends[-1]}, got another, {ends[0]}")
            images[image["id"]] = known
            del lost[known]
    if lost:
        raise ValueError(f"{path}: expected every picture of the data set, lacks {_few(lost.values())}")
    numbers, names = ids_by_name(category_names(truth)), category_names(found)
    entries = []
    for entry in found["annotations"]:
        if entry["image_id"] not in images:
            continue
        number = entry["category_id"]
        name = names.get(number, "")
        ids = numbers.get(name.casefold(), [name])  # one that the truth lacks is known by its name
        number = number if number in ids else ids[0]
        entries.append({**entry, "image_id": images[entry["image_id"]], "category_id": number})
    return entries


def tools(backend: str = "pycocotools") -> tuple[Any, Any, Any]:
    """The classes COCO and COCOeval and the module of mask functions; an ImportError says what to install."""
    try:
        if backend == "pycocotools":
            from pycocotools import mask
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            return COCO, COCOeval, mask
        if backend == "faster":
            from faster_coco_eval import COCO, COCOeval_faster
            from faster_coco_eval.core import mask

            return COCO, COCOeval_faster, mask
    except ImportError as error:
        wanted = "pycocotools" if backend == "pycocotools" else "faster-coco-eval"
        raise ImportError(f"evaluation needs the package {error.name}: pip install {wanted}") from error
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _chosen(name: str, wanted: Iterable[Any] | None, known: Iterable[Any]) -> list[Any]:
    """The wanted ids, rising, or all that are known."""
    ids = sorted(set(known if wanted is None else wanted))
    unknown = set(ids) - set(known)
    if unknown:
        raise ValueError(f"{name}: expected ids of the data set, got {_few(unknown)}")
    return ids


def _few(items: Iterable[Any]) -> str:
    """The first of many, for a message."""
    ordered = sorted(items, key=str)
    return ", ".join(map(repr, ordered[:5])) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _check(found: Sequence[Mapping[str, Any]], images: Mapping[Any, Entry], categories: set[int]) -> None:
    _require(found, "detection", ("image_id", "category_id", "score"))
    for n, entry in enumerate(found):
        score = entry["score"]
        if not _is_finite(score):
            raise ValueError(f"detection {n}: expected a finite score, got {score!r:.60}")
        _check_box(entry.get("bbox") or (0, 0, 0, 0), f"detection {n}")
    unknown = {entry["image_id"] for entry in found} - set(images)
    if unknown:
        raise ValueError(f"detections: expected images of the data set, got the unknown ids {_few(unknown)}")
    unknown = {entry["category_id"] for entry in found} - categories
    if unknown:
        raise ValueError(f"detections: expected categories of {_few(categories)}, got the unknown ids {_few(unknown)}")


def _check_box(box: Any, name: str) -> None:
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_is_finite, box)):
        raise ValueError(f"{name}: expected a bbox of x, y, width and height, got {box!r:.60}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that pycocotools can compute with: what is NaN would match every object."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


class _Truth:
    """A data set in the form that COCOeval takes: copies with every field, masks as compressed run lengths."""

    def __init__(
        self,
        coco: Any,
        masks: Any,
        content: Mapping[str, Any],
        images: Mapping[Any, Entry],
        keep_ids: bool,
        notes: list,
    ) -> None:
        self.coco = coco
        self.masks = masks
        self.content = content
        self.images = images
        self.keep_ids = keep_ids
        self.notes = notes
        # Whole numbers that were written as floats are no sizes to pycocotools.
        sizes = ("height", "width")
        self._images = [
            {k: int(v) if k in sizes and isinstance(v, float) else v for k, v in image.items()}
            for image in images.values()
        ]
        self.converter = self.index([])

    def index(self, entries: list[Entry]) -> Any:
        """Annotations as a COCO object."""
        with contextlib.redirect_stdout(io.StringIO()):
            index = self.coco()
            index.dataset = {"images": self._images, "categories": self.content["categories"], "annotations": entries}
            index.createIndex()
        return index

    def annotations(self, kinds: Sequence[str]) -> list[Entry]:
        filled: Counter[str] = Counter()
        entries = []
        for number, annotation in enumerate(self.content["annotations"], 1):
            if annotation["image_id"] not in self.images:
                continue  # as COCOeval does: annotations of part of a data set's pictures
            name = f"annotation {annotation.get('id', number)!r}"
            entry = {field: value for field, value in annotation.items() if value is not None}
            if not self.keep_ids:
                entry["id"] = number
            filled.update({"iscrowd", "bbox", "area"} - set(entry))
            if "segm" in kinds and not entry.get("segmentation"):
                raise ValueError(f"{name}: expected a segmentation, got none; for boxes alone: kinds=['bbox']")
            if entry.get("segmentation") and not ("segm" not in kinds and {"bbox", "area"} <= set(entry)):
                entry["segmentation"] = self._runs(entry, name)
            entry["iscrowd"] = int(bool(entry.get("iscrowd")))
            if "bbox" not in entry:
                entry["bbox"] = self._box(entry, name)
            _check_box(entry["bbox"], name)
            if "area" not in entry:
                runs = entry.get("segmentation")
                entry["area"] = float(self.masks.area(runs) if runs else entry["bbox"][2] * entry["bbox"][3])
            if not _is_finite(entry["area"]):
                raise ValueError(f"{name}: expected an area in pixels, got {entry['area']!r:.60}")
            entries.append(entry)
        meaning = {"iscrowd": "taken as 0", "bbox": "taken from the mask", "area": "taken from the mask or the box"}
        self.notes += [f"{filled[x]} annotations without {x!r}: {text}" for x, text in meaning.items() if filled[x]]
        if not self.keep_ids:
            self._note_ids()
        return entries

    def _note_ids(self) -> None:
        """Which ids of annotations pycocotools would stumble over. Nobody has said that they are numbers or texts."""
        ids = [annotation["id"] for annotation in self.content["annotations"] if annotation.get("id") is not None]
        if 0 in ids:
            self.notes.append("annotation id 0, which pycocotools and Detectron2 count as missed: numbered anew")
        if len({*map(repr, ids)}) < len(ids):
            self.notes.append("annotations that share an id, which pycocotools takes for one: numbered anew")

    def results(self, found: Sequence[Mapping[str, Any]], kind: str) -> list[Entry]:
        """Detections of one kind, with nothing of the other to take areas from."""
        entries = []
        for number, detection in enumerate(found, 1):
            name = f"detection {number - 1}"
            entry = {key: detection[key] for key in ("image_id", "category_id", "score")} | {"id": number, "iscrowd": 0}
            if kind == "segm":
                if not detection.get("segmentation"):
                    raise ValueError(f"{name}: expected a segmentation, got none; for boxes alone: kinds=['bbox']")
                entry["segmentation"] = self._runs(detection, name)
                entry["area"] = float(self.masks.area(entry["segmentation"]))
            else:
                entry["bbox"] = list(detection.get("bbox") or self._box(detection, name))
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            entries.append(entry)
        return entries

    def _runs(self, entry: Mapping[str, Any], name: str) -> Entry:
        image = self.images[entry["image_id"]]
        if not all(isinstance(image.get(side), (int, float)) for side in ("height", "width")):
            raise ValueError(f"image {image['id']!r}: expected height and width, got {image!r:.80}")
        size = [int(image["height"]), int(image["width"])]
        try:
            runs = self.converter.annToRLE(entry)
        except Exception as error:  # whatever pycocotools stumbles over
            raise ValueError(
                f"{name}: expected polygons or run lengths, got {entry['segmentation']!r:.60} ({error})"
            ) from error
        if list(runs["size"]) != size:
            raise ValueError(
                f"{name}: expected a mask of the size of image {image['id']!r}, {size}, got {runs['size']}"
            )
        return runs

    def _box(self, entry: Mapping[str, Any], name: str) -> list[float]:
        if not entry.get("segmentation"):
            raise ValueError(f"{name}: expected a bbox or a segmentation, got neither")
        return self.masks.toBbox(self._runs(entry, name)).tolist()


def _figures(precision: Floats, recall: Floats, limits: Sequence[int]) -> dict[str, float]:
    """COCO's twelve of precision [T, R, K, 4, M] and recall [T, K, 4, M], whose -1 mean no ground truth."""

    def mean(values: Floats) -> float:
        known = values[values > -1]
        return float(known.mean()) if known.size else math.nan

    figures = {"AP": mean(precision[..., 0, -1])}
    figures |= {"AP50": mean(precision[0, ..., 0, -1]), "AP75": mean(precision[5, ..., 0, -1])}
    figures |= {f"AP{name}": mean(precision[..., area, -1]) for name, area in AREAS.items()}
    figures |= {f"AR{limit}": mean(recall[..., 0, m]) for m, limit in enumerate(limits)}
    return figures | {f"AR{name}": mean(recall[..., area, -1]) for name, area in AREAS.items()}


def _matches(
    masks: Any,
    kind: str,
    images: Mapping[Any, Entry],
    image_ids: Sequence[Any],
    category_ids: set[int],
    annotations: Sequence[Entry],
    results: Sequence[Entry],
    max_detections: int,
) -> list[Matches]:
    """The matches of every picture, the worst first."""
    field = "segmentation" if kind == "segm" else "bbox"
    truths: dict[Any, list[Entry]] = defaultdict(list)
    claims: dict[Any, list[Entry]] = defaultdict(list)
    for entry in annotations:
        truths[entry["image_id"], entry["category_id"]].append(entry)
    for entry in sorted(results, key=lambda result: -result["score"]):
        if entry["score"] >= MATCH_SCORE:
            claims[entry["image_id"], entry["category_id"]].append(entry)
    pictures = {image: Matches(images[image], [], [], []) for image in image_ids}
    pairs = [(image, category) for image, category in {*truths, *claims} if image in pictures]
    for image, category in sorted(pair for pair in pairs if pair[1] in category_ids):
        objects, claimed, matches = truths[image, category], claims[image, category][:max_detections], pictures[image]
        crowd = [int(x["iscrowd"]) for x in objects]
        overlaps = np.asarray(masks.iou([x[field] for x in claimed], [x[field] for x in objects], crowd))
        overlaps = overlaps.reshape(len(claimed), len(objects))
        free = [not x for x in crowd]
        for claim, row in zip(claimed, overlaps, strict=True):
            overlap = np.where(free, row, -1)
            best = len(row) - 1 - int(np.argmax(overlap[::-1])) if any(free) else -1  # of equals the last, as COCOeval
            if best >= 0 and row[best] >= MATCH_IOU:
                free[best] = False
                matches.found.append((objects[best], claim))
            elif not np.any(row[np.array(crowd, bool)] >= MATCH_IOU):
                matches.false.append(claim)
        matches.missed.extend(x for x, unmatched in zip(objects, free, strict=True) if unmatched)
    return sorted(pictures.values(), key=lambda m: (m.f1, -len(m.missed) - len(m.false)))
