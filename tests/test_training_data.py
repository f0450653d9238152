"""Data sets: COCO's annotation files and PASCAL VOC's masks, what they hold, and what is said of bad ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from trimask.engine.model.config import InputConfig
from trimask.engine.pictures.reading import PictureError
from trimask.engine.training.augment import Augment, AugmentConfig, extent
from trimask.engine.training.data import CocoDataset, SizeError, read_upright
from trimask.engine.training.segmentation import runs_of
from trimask.engine.training.voc import convert_voc
from trimask.kernels.cpu.masks import mask_of_runs

from .coco_files import annotation, content, ellipse, write
from .test_pictures import stored


def test_every_mask_equals_pycocotools(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = write(tmp_path, content(tmp_path, np_rng))
    dataset, peer = CocoDataset(path, tmp_path), COCO(str(path))
    assert len(dataset) == 6
    for example in dataset:
        entries = peer.loadAnns(peer.getAnnIds(example.image_id))
        assert example.picture.shape[:2] == example.masks.shape[1:]
        assert len(example) == len(entries)
        for n, entry in enumerate(entries):
            assert np.array_equal(example.masks[n], peer.annToMask(entry))
            x, y, w, h = entry["bbox"]
            assert example.boxes[n].tolist() == [x, y, x + w, y + h]
            assert dataset.category_ids[example.labels[n]] == entry["category_id"]
            assert example.crowd[n] == entry["iscrowd"]
    assert len(dataset[5]) == 0
    assert dataset[5].boxes.shape == (0, 4)
    assert dataset[0].crowd.sum() == 1


@given(st.lists(st.lists(st.floats(-20, 60, width=32), min_size=6, max_size=16), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_polygons_are_rasterised_as_pycocotools_does(parts: list[list[float]]) -> None:
    parts = [part[: len(part) // 2 * 2] for part in parts]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, 37, 41)))
    assert np.array_equal(mask_of_runs(runs_of(parts, (37, 41)), (37, 41)), expected)


def test_classes_are_in_the_order_of_ids_or_of_the_model(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = write(tmp_path, content(tmp_path, np_rng))
    dataset = CocoDataset(path, tmp_path)
    assert dataset.category_ids == (3, 7, 90)
    assert dataset.class_names == ("three", "seven", "ninety")
    assert dataset.annotations == path
    fewer = CocoDataset(path, tmp_path, category_ids=[90, 3])
    assert fewer.class_names == ("ninety", "three")
    assert fewer[1].labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"annotations.json.*categories \[4\]"):
        CocoDataset(path, tmp_path, category_ids=[3, 4])


def test_a_data_set_to_evaluate_has_the_labels_of_the_other(tmp_path: Path, np_rng: np.random.Generator) -> None:
    """By name, whatever its ids; what it has not has no objects, and what the other has not is left out."""
    data = CocoDataset(write(tmp_path, content(tmp_path, np_rng)), tmp_path)
    other = json.loads(data.annotations.read_text())
    numbers = {3: 90, 7: 1, 90: 2}
    other["categories"] = [{"id": 1, "name": "Seven"}, {"id": 90, "name": "three"}, {"id": 2, "name": "more"}]
    for entry in other["annotations"]:
        entry["category_id"] = numbers[entry["category_id"]]
    (path := tmp_path / "other.json").write_text(json.dumps(other))
    found = CocoDataset(path, tmp_path, like=data)
    assert found.class_names == data.class_names
    assert found.labels == {90: 0, 1: 1}
    for ours, theirs in zip(found, data, strict=True):
        assert ours.labels.tolist() == [label for label in theirs.labels.tolist() if label < 2]
    other["categories"] = [{"id": n, "name": str(n)} for n in (1, 2, 90)]
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"other\.json: expected categories of .*three, seven, ninety, got 1, 2, 90"):
        CocoDataset(path, tmp_path, like=data)


def test_categories_of_one_name_are_told_apart_by_their_order_or_refused(
    tmp_path: Path, np_rng: np.random.Generator
) -> None:
    first = content(tmp_path, np_rng)
    first["categories"] = [{"id": 3, "name": "cat"}, {"id": 90, "name": "Cat"}, {"id": 7, "name": "dog"}]
    data = CocoDataset(write(tmp_path, first), tmp_path)
    assert CocoDataset(data.annotations, tmp_path, like=data).labels == data.labels
    first["categories"][2]["name"] = "cat"
    (path := tmp_path / "other.json").write_text(json.dumps(first))
    with pytest.raises(
        ValueError, match=r"other\.json: .* named 'cat' as in .*annotations\.json, 2, got.*\[3, 7, 90\]"
    ):
        CocoDataset(path, tmp_path, like=data)


def test_a_greyscale_file_becomes_rgb(tmp_path: Path, np_rng: np.random.Generator) -> None:
    data = content(tmp_path, np_rng, pictures=2)
    size = data["images"][0]["height"], data["images"][0]["width"]
    grey = np_rng.integers(0, 256, size, np.uint8)
    Image.fromarray(grey).save(tmp_path / "0.png")
    assert np.array_equal(CocoDataset(write(tmp_path, data), tmp_path)[0].picture, np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_the_size_in_the_file_says_whether_to_turn(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :16] = 255
    lying = stored(upright, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(lying)).save(path, exif=exif, quality=95)
    assert np.array_equal(read_upright(path, (24, 40)) > 127, upright > 127)
    if orientation >= 5:
        assert np.array_equal(read_upright(path, (40, 24)) > 127, lying > 127)
    else:
        with pytest.raises(SizeError, match="expected the annotations' 24 x 40 pixels, got 40 x 24"):
            read_upright(path, (40, 24))


def test_a_square_picture_is_turned(tmp_path: Path, np_rng: np.random.Generator) -> None:
    upright = np_rng.integers(0, 256, (20, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(stored(upright, 6))).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_upright(tmp_path / "a.png", (20, 20)), upright)


def test_boxes_are_clipped_made_from_masks_and_dropped_without_area(
    tmp_path: Path, np_rng: np.random.Generator
) -> None:
    data = content(tmp_path, np_rng, pictures=2, kinds=("string",), crowd=False)
    first, second, third = data["annotations"]
    first["bbox"] = [-10, -10, 20, 500]
    del second["bbox"]
    third["bbox"][2] = 0
    example = CocoDataset(write(tmp_path, data), tmp_path)[0]
    assert len(example) == 2
    assert example.boxes[0].tolist() == [0, 0, 10, example.picture.shape[0]]
    assert example.boxes[1].tolist() == list(extent(example.masks[1]))


def test_boxes_alone_will_do_for_models_without_masks(tmp_path: Path, np_rng: np.random.Generator) -> None:
    data = content(tmp_path, np_rng, pictures=2)
    for entry in data["annotations"]:
        entry["segmentation"] = [[1, 2, 3, 4]]
    example = CocoDataset(write(tmp_path, data), tmp_path, boxes_only=True)[0]
    assert [list(extent(mask)) for mask in example.masks] == example.boxes.tolist()
    assert example.faults == ()


def test_the_thinnest_box_alone_has_a_pixel_wherever_it_is(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    boxes = [[20.6, 5, 0.4, 10], [39.6, 5, 0.4, 10], [5, 29.6, 10, 0.4], [39.6, 29.6, 0.4, 0.4], [0, 0, 0.4, 0.4]]
    data = {
        "images": [{"id": 1, "file_name": "0.png", "height": 30, "width": 40}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 3, "bbox": box} for n, box in enumerate(boxes, 1)],
        "categories": [{"id": 3, "name": "three"}],
    }
    example = CocoDataset(write(tmp_path, data), tmp_path, boxes_only=True)[0]
    assert [list(extent(mask)) for mask in example.masks] == [
        [21, 5, 22, 15],
        [39, 5, 40, 15],
        [5, 29, 15, 30],
        [39, 29, 40, 30],
        [0, 0, 1, 1],
    ]
    augment = Augment(AugmentConfig(flip=0), InputConfig())
    assert len(augment(example, np.random.default_rng(0))) == len(boxes)


def test_polygons_are_read_where_asked(tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = write(tmp_path, content(tmp_path, np_rng, 2, ("polygon",), crowd=False))
    assert CocoDataset(path, tmp_path)[0].polygons is None
    example = CocoDataset(path, tmp_path, polygons=True)[0]
    assert example.polygons is not None
    for (corners,), box in zip(example.polygons, example.boxes, strict=True):
        assert np.array_equal(np.concatenate([corners.min(0), corners.max(0)]), box)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not a list": (lambda data: data.update(images=None), "no list of images"),
    "image without height": (lambda data: data["images"][0].pop("height"), "image 5: expected height as int, got None"),
    "image id twice": (lambda data: data["images"].append(data["images"][0]), "one image with id 5, got two"),
    "no category id": (lambda data: data["categories"].append({"name": "x"}), "category 3: expected id as int"),
    "annotation without category": (
        lambda data: data["annotations"][1].pop("category_id"),
        "annotation 8: expected category_id",
    ),
    "id of text": (lambda data: data["images"][0].update(id="a"), "image 'a': expected id as int, got 'a' .*--fix"),
    "unknown category": (lambda data: data["annotations"][1].update(category_id=4), "annotation 8: category 4"),
    "unknown image": (lambda data: data["annotations"][1].update(image_id=6), "annotation 8: image 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_wrong_is_refused_at_once(tmp_path: Path, np_rng: np.random.Generator, name: str) -> None:
    data = json.loads(json.dumps(content(tmp_path, np_rng)))
    spoil, text = BAD[name]
    spoil(data)
    with pytest.raises(ValueError, match=rf"annotations\.json: .*{text}"):
        CocoDataset(write(tmp_path, data), tmp_path)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    for junk in (b"{", b"\xff\xfe\x00", b"[1]"):
        (tmp_path / "a.json").write_bytes(junk)
        with pytest.raises(ValueError, match=r"a\.json: expected a COCO annotation file"):
            CocoDataset(tmp_path / "a.json", tmp_path)


SIZE = {"size": [40, 50]}


@pytest.mark.parametrize(
    "segmentation",
    [
        *(
            [[1, 2, 3, 4]],
            [[1, 2, 3, 4, 5, 6, 7]],
            [],
            [[]],
            [["a"] * 6],
            [[1, 2, 3, float("nan"), 5, 6]],
            "abc",
            3,
            None,
        ),
        *([[[1, 2], [3, 4], [5, 6]]], [[0, 0, 1e9, 0, 1e9, 1e9]], [3, 4, 5, 6, 7, 8]),
        *([list("123456")], [[10**400] * 6], [[-(2**63)] * 6]),
        *(
            {},
            {"counts": [2000]},
            {**SIZE},
            {**SIZE, "counts": "~~"},
            {**SIZE, "counts": ""},
            {**SIZE, "counts": [1999]},
        ),
        *({**SIZE, "counts": [-1, 2001]}, {**SIZE, "counts": [2**63, 2000]}, {**SIZE, "counts": [1.5, 1998.5]}),
        *({"size": [50, 40], "counts": [2000]}, {"size": 5, "counts": "abc"}, {**SIZE, "counts": [-(10**400)]}),
    ],
    ids=lambda segmentation: f"{segmentation!r:.40}",
)
def test_bad_segmentations_name_picture_and_annotation(
    tmp_path: Path, np_rng: np.random.Generator, segmentation: Any
) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "0.png")
    entry = {**annotation(ellipse((40, 50), np_rng), "string", id=77, image_id=1, category_id=3)}
    entry["segmentation"] = segmentation
    data = {
        "images": [{"id": 1, "file_name": "0.png", "height": 40, "width": 50}],
        "annotations": [entry],
        "categories": [{"id": 3, "name": "three"}],
    }
    example = CocoDataset(write(tmp_path, data), tmp_path)[0]
    assert len(example.faults) == 1
    assert re.search(r"0\.png: annotation 77: ", example.faults[0])
    x, y, w, h = entry["bbox"]
    assert example.boxes.tolist() == [[x, y, x + w, y + h]]
    assert example.crowd.tolist() == [True]  # there is something, but nothing to learn
    assert list(extent(example.masks[0])) == [x, y, x + w, y + h]


@given(st.recursive(st.none() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
@settings(max_examples=80, deadline=None)
def test_junk_for_a_segmentation_is_a_value_error(junk: Any) -> None:
    with pytest.raises(ValueError):
        runs_of(junk, (8, 9))


@pytest.mark.parametrize(
    "bbox", [[1, 2, 3], "abcd", [1, 2, float("nan"), 4], [1, 2, None, 4], 5, [*"1234"], [10**400] * 4]
)
def test_bad_boxes_name_picture_and_annotation(tmp_path: Path, np_rng: np.random.Generator, bbox: Any) -> None:
    data = content(tmp_path, np_rng, pictures=2)
    whole = CocoDataset(write(tmp_path, data), tmp_path)[0]
    data["annotations"][1]["bbox"] = bbox
    example = CocoDataset(write(tmp_path, data), tmp_path)[0]
    assert len(example.faults) == 1
    assert re.search(r"0\.png: annotation 8: bbox", example.faults[0])
    assert np.array_equal(example.boxes, whole.boxes[[0, 2]])
    assert np.array_equal(example.masks, whole.masks[[0, 2]])
    assert np.array_equal(example.crowd, whole.crowd[[0, 2]])


def test_bad_pictures_are_named(tmp_path: Path, np_rng: np.random.Generator) -> None:
    dataset = CocoDataset(write(tmp_path, content(tmp_path, np_rng, pictures=3)), tmp_path)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.png").unlink()
    with pytest.raises(PictureError, match=r"0\.png"):
        dataset[0]
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        dataset[1]


# Pictures, annotations, crowds: as counted in SOURCE.md, or from the files where it gives no number.
@pytest.mark.parametrize(
    ("name", "part", "pictures", "objects"),
    [
        ("coco_open", "train", 73, 705),
        ("coco_open", "train_orig", 47, 524),
        ("coco_open", "val", 82, 672),
        ("coco_open", "val_orig", 57, 517),
        ("fruits_nuts", "train", 14, 127),
        ("fruits_nuts", "val", 4, 38),
        ("pennfudan", "train", 136, 352),
        ("pennfudan", "val", 34, 71),
        ("pennfudan", "train_poly", 136, 352),
        ("pennfudan", "val_poly", 34, 71),
    ],
)
def test_real_data_sets_load(shared_data: Path, name: str, part: str, pictures: int, objects: int) -> None:
    folder = shared_data / name
    dataset = CocoDataset(folder / f"annotations/instances_{part}.json", folder / "images", polygons=True)
    assert len(dataset) == pictures
    assert sum(len(record.annotations) for record in dataset.records) == objects
    example = dataset[pictures // 2]
    assert len(example) == len(dataset.records[pictures // 2].annotations)
    if (name, part) not in (("coco_open", "train"), ("coco_open", "val")):  # which mix polygons and run lengths
        assert (example.polygons is not None) == (name == "fruits_nuts" or part.endswith(("poly", "orig")))


def test_coco_open_holds_what_its_source_says(shared_data: Path) -> None:
    folder = shared_data / "coco_open"
    sets = [CocoDataset(folder / f"annotations/instances_{part}.json", folder / "images") for part in ("train", "val")]
    entries = [entry for dataset in sets for record in dataset.records for entry in record.annotations]
    assert sum(entry["iscrowd"] for entry in entries) == 15
    assert sum(not record.annotations for dataset in sets for record in dataset.records) == 3
    assert sets[0].category_ids[-1] == 90
    assert len(sets[0].class_names) == 80


def voc_folder(root: Path, objects: np.ndarray, classes: np.ndarray) -> Path:
    for kind in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", objects.shape[::-1]).save(root / "JPEGImages/a.jpg")
    for kind, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
        picture = Image.fromarray(values.astype(np.uint8), "L").convert("L")
        picture.putpalette([n // 3 for n in range(768)])
        picture.save(root / kind / "a.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\n")
    return root


def test_voc_masks_become_objects_and_wide_void_a_crowd(tmp_path: Path) -> None:
    objects, classes = np.zeros((80, 100), int), np.zeros((80, 100), int)
    for number, category, rows, columns in ((1, 15, slice(5, 40), slice(5, 30)), (2, 12, slice(10, 60), slice(40, 70))):
        objects[rows, columns], classes[rows, columns] = number, category
    line = np.zeros_like(objects, dtype=bool)
    line[5:40, 28:32] = True  # the border of an object
    hard = np.zeros_like(line)
    hard[20:50, 75:98] = True
    for picture in (objects, classes):
        picture[line | hard] = 255
    root = voc_folder(tmp_path, objects, classes)
    path = convert_voc(root, "val", tmp_path / "val.json")
    dataset = CocoDataset(path, root / "JPEGImages")
    example = dataset[0]
    names = [dataset.class_names[label] for label in example.labels]
    assert len(dataset.class_names) == 20
    assert names == ["person", "dog", "dog", "person"]
    assert example.crowd.tolist() == [False, False, True, True]
    assert np.array_equal(example.masks[0], objects == 1)
    assert np.array_equal(example.masks[1], objects == 2)
    assert np.array_equal(example.masks[2], hard)
    assert [list(extent(mask)) for mask in example.masks] == example.boxes.tolist()


def test_voc_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    objects = np.zeros((20, 20), int)
    objects[2:9, 2:9] = 1
    with pytest.raises(ValueError, match="a: object 1: expected a class"):
        convert_voc(voc_folder(tmp_path, objects, 0 * objects), "val", tmp_path / "val.json")
    with pytest.raises(ValueError, match="expected masks of one size"):
        convert_voc(voc_folder(tmp_path, objects, objects[:10]), "val", tmp_path / "val.json")
    assert not (tmp_path / "val.json").exists()
