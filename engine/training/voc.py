"""PASCAL VOC's instance masks as a COCO annotation file, so that all else reads one format.

A split's pictures, ``JPEGImages/NAME.jpg``, have two palette PNGs each: ``SegmentationObject`` numbers the objects,
``SegmentationClass`` their classes; 0 is background in both and 255, void, is not to be judged. Void is drawn as a line
around every object, which no box should make a region of, and over whole objects that were too hard to annotate: what
is left of it without the lines becomes crowds, one for each class in the picture since COCO's crowds have a class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ...kernels.cpu.masks import area_of_runs, box_of_runs, encode_runs, runs_of_mask
from ..model.files import write_json
from ..pictures.outlines import outlines_of_runs

__all__ = ["VOC_CLASSES", "convert_voc"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOID = 255
LINE = 11  # void narrower than this, in pixels, is a line: VOC draws five, and they meet where objects touch


def convert_voc(root: Path | str, split: str, output: Path | str, class_names: Sequence[str] = VOC_CLASSES) -> Path:
    """Write a split of a VOC folder (``VOCdevkit/VOC2012``) as a COCO annotation file.

    Its pictures are then found in ``root/JPEGImages``; category n is the class that VOC numbers n.

    Args:
        split: a list in ``ImageSets/Segmentation``: "train", "val", "trainval".
        class_names: from class 1 on.

    Returns:
        ``output``.

    Raises:
        ValueError: masks that are no palette pictures of the same size, or a class without a name; names the file.
        OSError: a file that is missing.
    """
    root = Path(root)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, name in enumerate((root / "ImageSets/Segmentation" / f"{split}.txt").read_text().split(), 1):
        objects, classes = (
            _indices(root / kind / f"{name}.png") for kind in ("SegmentationObject", "SegmentationClass")
        )
        if objects.shape != classes.shape:
            raise ValueError(f"{root}: {name}: expected masks of one size, got {objects.shape} and {classes.shape}")
        height, width = objects.shape
        images.append({"id": image_id, "file_name": f"{name}.jpg", "height": height, "width": width})
        found: list[tuple[int, NDArray[np.bool_], int]] = []  # category, mask, crowd
        for number in np.setdiff1d(objects, (0, VOID)):
            mask = objects == number
            category = int(np.bincount(classes[mask]).argmax())
            if not 1 <= category <= len(class_names):
                raise ValueError(f"{root}: {name}: object {number}: expected a class of {class_names}, got {category}")
            found.append((category, mask, 0))
        present = sorted({category for category, _, _ in found})
        found += [(category, mask, 1) for mask in _blobs(objects == VOID) for category in present]
        for category, mask, crowd in found:
            runs = runs_of_mask(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "iscrowd": crowd,
                    "segmentation": {"size": [height, width], "counts": encode_runs(runs)},
                    "area": area_of_runs(runs),
                    "bbox": list(box_of_runs(runs, height)),
                }
            )
    categories = [{"id": n, "name": name} for n, name in enumerate(class_names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_json(Path(output), content)


def _indices(path: Path) -> NDArray[np.uint8]:
    with Image.open(path, formats=["PNG"]) as picture:
        if picture.mode not in ("P", "L"):
            raise ValueError(f"{path}: expected a palette picture, got mode {picture.mode}")
        return np.array(picture)


def _blobs(void: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The parts of a mask that are wider than a line, one by one."""
    picture = Image.fromarray(void.astype(np.uint8))
    opened = np.array(picture.filter(ImageFilter.MinFilter(LINE)).filter(ImageFilter.MaxFilter(LINE))) > 0
    blobs = []
    for ring in outlines_of_runs(runs_of_mask(opened), len(void)):
        (x1, y1), (x2, y2) = ring.min(0).astype(int), ring.max(0).astype(int)
        blob = np.zeros_like(void)
        blob[y1:y2, x1:x2] = opened[y1:y2, x1:x2]
        blobs.append(blob)
    return blobs
