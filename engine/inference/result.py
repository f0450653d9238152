"""What the model found in one picture, on the host.

A `Result` keeps what came out of the network: boxes, scores, labels and the small m x m masks. Everything else is
derived when it is asked for, and from the run lengths of the masks wherever that will do, so that a hundred masks on a
large photograph cost kilobytes. Only `masks` is dense.

Needs numpy and Pillow; no torch is imported here.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...kernels.cpu.masks import (
    area_of_runs,
    box_of_runs,
    decode_runs,
    encode_runs,
    fills_picture,
    mask_of_runs,
    paste_masks,
    paste_to_runs,
)
from ...kernels.paste_rule import PasteRule
from ..model.files import write_json, write_whole
from ..pictures.outlines import Bools, Ints, Polygon, crop_of_runs, outlines_of_runs, simplify
from ..pictures.visualize import draw

__all__ = ["OVERLAY", "Detection", "Result", "to_dataset"]

Floats = NDArray[np.float32]
OVERLAY = b"an overlay by trimask"  # the comment in a JPEG of one


@dataclass(frozen=True)
class Detection:
    """One detection of a `Result`."""

    index: int
    name: str
    label: int
    category_id: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The detections in one picture.

    Attributes:
        boxes: float32 `[N, 4]`, xyxy in pixels of the original picture, continuous coordinates.
        scores: float32 `[N]`, falling.
        labels: int64 `[N]`, contiguous; 0 is the first class.
        size: height and width of the original picture.
        names: the class name of each detection; its label as text where none are given.
        category_ids: int64 `[N]`, the ids of the data set; the labels where none are given.
        mask_probabilities: float32 `[N, m, m]` of the boxes' contents, or None without masks.
        rule: how a mask of m x m becomes pixels.
        mask_runs: instead of probabilities, the COCO run lengths of every mask.
        picture: uint8 RGB `[H, W, 3]` to draw on, kept by reference, or None.
        path: the file of the picture, or None.
        timings: milliseconds by stage.
        error: why there are no detections, where the picture could not be read.

    Raises:
        ValueError: arrays that do not fit each other or the picture.
    """

    boxes: Floats
    scores: Floats
    labels: Ints
    size: tuple[int, int]
    names: Sequence[str] = None  # type: ignore[assignment]
    category_ids: Ints = None  # type: ignore[assignment]
    mask_probabilities: Floats | None = None
    rule: PasteRule = PasteRule.TORCHVISION
    mask_runs: Sequence[Ints] | None = None
    picture: NDArray[np.uint8] | None = None
    path: Path | None = None
    timings: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("boxes", np.asarray(self.boxes, np.float32).reshape(-1, 4))
        put("scores", np.asarray(self.scores, np.float32))
        put("labels", np.asarray(self.labels, np.int64))
        put("size", (int(self.size[0]), int(self.size[1])))
        put("names", [str(label) for label in self.labels] if self.names is None else list(self.names))
        put("category_ids", np.asarray(self.labels if self.category_ids is None else self.category_ids, np.int64))
        if self.mask_probabilities is not None:
            put("mask_probabilities", np.asarray(self.mask_probabilities, np.float32))
        if self.mask_runs is not None:
            put("mask_runs", [np.asarray(runs, np.int64) for runs in self.mask_runs])
        for name in ("scores", "labels", "names", "category_ids", "mask_probabilities", "mask_runs"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.boxes):
                raise ValueError(f"{name}: expected {len(self.boxes)}, one for each box, got {len(value)}")
        if self.picture is not None and self.picture.shape != (*self.size, 3):
            raise ValueError(f"picture: expected a shape {(*self.size, 3)}, got {self.picture.shape}")
        pixels = self.size[0] * self.size[1]
        for runs in self.mask_runs or ():
            if not fills_picture(runs, pixels):
                raise ValueError(f"mask_runs: expected run lengths of {pixels} pixels, got {runs.sum()}")

    @classmethod
    def from_coco(
        cls,
        entries: Iterable[Mapping[str, Any]],
        size: tuple[int, int] | None = None,
        categories: Mapping[int, str] | None = None,
        **fields: Any,
    ) -> "Result":
        """A result from COCO entries of one picture: detections, or annotations, which count as certain.

        Args:
            entries: dicts with `category_id`, `bbox` or `segmentation` (run lengths, as text or as counts) or both,
                and maybe `score`.
            size: height and width; without it, what the first segmentation says.
            categories: the name of each category id, in the order of the labels; without it the ids found, rising.
            **fields: `picture`, `path` or `timings`.

        Raises:
            ValueError: a segmentation by polygons, masks for some entries only, neither mask nor box, a category that
                `categories` lacks, or no way to know the size.
        """
        entries = sorted(entries, key=lambda entry: -entry.get("score", 1.0))
        ids = list(categories or sorted({entry["category_id"] for entry in entries if "category_id" in entry}))
        segmentations = [entry["segmentation"] for entry in entries if "segmentation" in entry]
        if any(not isinstance(segmentation, Mapping) for segmentation in segmentations):
            raise ValueError('segmentation: expected run lengths {"size", "counts"}, got polygons')
        if segmentations and len(segmentations) != len(entries):
            raise ValueError(f"segmentation: expected one in each of {len(entries)} entries, got {len(segmentations)}")
        if size is None:
            if not segmentations:
                raise ValueError("size: expected height and width, as no segmentation tells them, got None")
            size = tuple(segmentations[0]["size"])
        for entry in entries:
            if entry.get("category_id") not in ids:
                raise ValueError(f"category_id: expected one of {ids!s:.80}, got {entry.get('category_id')!r}")
            if not segmentations and not entry.get("bbox"):
                raise ValueError(f"bbox: expected one in each entry without a segmentation, got {entry!r:.80}")
        runs = []
        for segmentation in segmentations:
            if tuple(segmentation["size"]) != tuple(size):
                raise ValueError(f"segmentation: expected a size of {tuple(size)}, got {segmentation['size']}")
            counts = segmentation["counts"]
            runs.append(decode_runs(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts, np.int64))
        boxes = [entry.get("bbox") or box_of_runs(runs[n], size[0]) for n, entry in enumerate(entries)]
        corners = np.asarray(boxes, np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        return cls(
            boxes=corners.astype(np.float32),
            scores=np.asarray([entry.get("score", 1.0) for entry in entries], np.float32),
            labels=np.asarray([ids.index(entry["category_id"]) for entry in entries], np.int64),
            size=size,
            names=[(categories or {}).get(e["category_id"], str(e["category_id"])) for e in entries],
            category_ids=np.asarray([entry["category_id"] for entry in entries], np.int64),
            mask_runs=runs if segmentations or not entries else None,
            **fields,
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        return (self[n] for n in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """A `Detection` for an integer; for a slice, a list of indices or a bool array, a `Result` of those."""
        if isinstance(index, (int, np.integer)):
            n = range(len(self))[index]
            return Detection(
                n,
                self.names[n],
                int(self.labels[n]),
                int(self.category_ids[n]),
                float(self.scores[n]),
                tuple(self.boxes[n].tolist()),
            )
        picked = np.arange(len(self))[index if isinstance(index, slice) or len(index) else slice(0)]
        known = self.__dict__.get("runs", self.mask_runs)  # what has been computed is not computed again
        return replace(
            self,
            boxes=self.boxes[picked],
            scores=self.scores[picked],
            labels=self.labels[picked],
            names=[self.names[n] for n in picked],
            category_ids=self.category_ids[picked],
            mask_probabilities=None if self.mask_probabilities is None else self.mask_probabilities[picked],
            mask_runs=None if known is None else [known[n] for n in picked],
        )

    def filter(self, score: float = 0.0, labels: int | str | Iterable[int | str] | None = None) -> "Result":
        """Those with at least this score and, where labels are given, this or one of these labels or class names."""
        kept = self.scores >= score
        if labels is not None:
            wanted = {labels} if isinstance(labels, (str, int, np.integer)) else set(labels)
            kept &= [name in wanted or label in wanted for name, label in zip(self.names, self.labels, strict=True)]
        return self[kept]

    def without_picture(self) -> "Result":
        """The same detections to keep in numbers: no picture, and run lengths in the place of probabilities."""
        return replace(self, picture=None, mask_probabilities=None, mask_runs=self.runs if self.has_masks else None)

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common()) or "no detections"
        height, width = self.size
        where = f"{self.path.name!r}, " if self.path else ""
        if self.error is not None:
            return f"Result({where}{self.error!r})"
        return f"Result({where}{width} x {height}, {found}{'' if self.has_masks else ', boxes only'})"

    @property
    def has_masks(self) -> bool:
        """Whether the model gave masks."""
        return self.mask_probabilities is not None or self.mask_runs is not None

    @cached_property
    def runs(self) -> list[Ints]:
        """The COCO run lengths of each mask."""
        if self.mask_runs is not None:
            return list(self.mask_runs)
        if self.mask_probabilities is None:
            raise ValueError("masks: expected a result with masks, got one of a model that gives boxes only")
        return paste_to_runs(self.mask_probabilities, self.boxes, self.size, rule=self.rule)

    @cached_property
    def masks(self) -> Bools:
        """Dense masks, bool `[N, H, W]`: a byte for each pixel of the picture and detection, made when asked for."""
        if self.mask_probabilities is not None:
            return paste_masks(self.mask_probabilities, self.boxes, self.size, rule=self.rule).astype(bool, copy=False)
        out = np.zeros((len(self.runs), *self.size), np.bool_)
        for mask, runs in zip(out, self.runs, strict=True):
            mask[:] = mask_of_runs(runs, self.size)
        return out

    @cached_property
    def areas(self) -> Ints:
        """The number of pixels of each mask, int64 `[N]`."""
        return np.array([area_of_runs(runs) for runs in self.runs], np.int64)

    def crop(self, index: int) -> tuple[Bools, int, int]:
        """The pixels under the smallest box around one mask, bool `[h, w]`, and that box's first row and column."""
        return crop_of_runs(self.runs[index], self.size[0])

    def rle(self) -> list[dict[str, Any]]:
        """COCO's compressed run lengths of each mask: `{"size": [H, W], "counts": text}`."""
        return [{"size": list(self.size), "counts": encode_runs(runs)} for runs in self.runs]

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """The detections as COCO results: what `pycocotools.coco.COCO.loadRes` takes, ready for JSON.

        `bbox` is x, y, width, height; `area` is that of the mask, without masks that of the box.
        """
        sides = self.boxes.astype(np.float64)
        sides[:, 2:] -= sides[:, :2]
        entries: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": int(self.category_ids[n]),
                "bbox": sides[n].tolist(),
                "score": float(self.scores[n]),
                "area": float(sides[n, 2] * sides[n, 3]),
            }
            for n in range(len(self))
        ]
        if self.has_masks:
            for entry, segmentation, area in zip(entries, self.rle(), self.areas.tolist(), strict=True):
                entry |= {"segmentation": segmentation, "area": area}
        return entries

    def polygons(self, tolerance: float = 0.0) -> list[list[Polygon]]:
        """The outlines of each mask, along the edges of its pixels: pixel (x, y) covers x..x+1, y..y+1.

        Args:
            tolerance: how far, in pixels, a simplified outline may stray (Douglas and Peucker, 1973). At 0 it is exact:
                filled again, it gives the mask, save for its holes, which polygons leave out.

        Returns:
            For each detection its pieces, each `[K, 2]` of x and y, clockwise on the screen, not closed. Pixels that
            touch at a corner only belong to different pieces.
        """
        if tolerance < 0:
            raise ValueError(f"tolerance: expected a distance of at least 0, got {tolerance}")
        return [[simplify(ring, tolerance) for ring in outlines_of_runs(runs, self.size[0])] for runs in self.runs]

    def to_labelme(self, tolerance: float = 1.0) -> dict[str, Any]:
        """The detections as a LabelMe file's content, to correct by hand; the picture stays outside.

        The pieces of one mask share a `group_id`; without masks, and for an empty one, the box is the shape.
        """
        outlines = self.polygons(tolerance) if self.has_masks else [[]] * len(self)
        shapes = [
            {
                "label": self.names[n],
                "points": ring.tolist(),
                "group_id": n,
                "description": f"{self.scores[n]:.3f}",
                "shape_type": "polygon" if outlines[n] else "rectangle",
                "flags": {},
                "mask": None,
            }
            for n in range(len(self))
            for ring in (outlines[n] or [self.boxes[n].reshape(2, 2)])
        ]
        return {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": self.path.name if self.path else "",
            "imageData": None,
            "imageHeight": self.size[0],
            "imageWidth": self.size[1],
        }

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`.

        Raises:
            ImportError: the package `supervision` is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError("to_supervision needs the package supervision: pip install supervision") from error
        return Detections(
            xyxy=self.boxes,
            mask=self.masks if self.has_masks else None,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=np.str_)},
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for each detection: label, score, box (xyxy) and mask_area, the latter None without masks."""
        areas = self.areas.tolist() if self.has_masks else [None] * len(self)
        return [
            {"label": one.name, "score": one.score, "box": list(one.box), "mask_area": area}
            for one, area in zip(self, areas, strict=True)
        ]

    def plot(self, picture: NDArray[np.uint8] | None = None, **style: Any) -> Image.Image:
        """The detections drawn over the picture.

        Args:
            picture: another uint8 `[H, W, 3]` or `[H, W]` to draw on; without it, the one that was read.
            **style: what `visualize.draw` takes.

        Raises:
            ValueError: there is no picture to draw on.
        """
        picture = self.picture if picture is None else picture
        if picture is None:
            why = f": {self.error}" if self.error else ""
            raise ValueError(f"picture: expected one to draw on, as this result keeps none{why}, got None")
        return draw(picture, self, **style)

    def save(self, path: str | os.PathLike[str], **style: Any) -> Path:
        """Writes a file that is there as a whole or not at all.

        Args:
            path: `.json` gives a COCO data set of this one picture, whose annotations have scores; the suffix of
                a picture format gives the overlay. A file of that name is replaced.
            **style: for the overlay, what `visualize.draw` takes.

        Raises:
            ValueError: a suffix of neither kind.
            PictureError, OSError: the picture could not be read, and this is why.
        """
        if self.error is not None:
            raise self.error
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".json":
            return to_dataset([self], dict(zip(self.category_ids.tolist(), self.names, strict=True)), path)
        kind = Image.registered_extensions().get(suffix)
        if kind not in Image.SAVE:
            raise ValueError(f"path: expected .json or the suffix of a picture (.png, .jpg, .webp), got {path.name!r}")
        overlay = self.plot(**style)
        options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
        if kind == "JPEG":
            options["comment"] = OVERLAY
        return write_whole(path, lambda file: overlay.save(file, format=kind, **options))


def to_dataset(results: Iterable[Result], categories: Mapping[int, str], path: str | os.PathLike[str]) -> Path:
    """Writes results as one COCO data set, whose annotations have scores; it is there as a whole or not at all.

    Args:
        results: of one picture each, read one at a time; those of pictures that could not be read are left out.
        categories: the name of each category id, with those that were not found.
        path: the JSON file; one of that name is replaced.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, result in enumerate((result for result in results if result.error is None), 1):
        height, width = result.size
        name = result.path.as_posix() if result.path else ""
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for entry in result.to_coco(image_id=number):  # ids start at 1: COCO's evaluation takes 0 for "unmatched"
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **entry})
    document = {
        "images": images,
        "categories": [{"id": number, "name": name} for number, name in sorted(categories.items())],
        "annotations": annotations,
    }
    return write_json(Path(path), document, allow_nan=False)
