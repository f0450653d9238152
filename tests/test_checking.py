"""check-data: every planted fault is found once and by name, and the clean copy has none."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trimask.cli import main
from trimask.engine.training.checking import FAULTS, Fault, check
from trimask.engine.training.data import CocoDataset
from trimask.engine.training.sheets import CAPTION, GAP, TILE, contact_sheet

from .coco_files import content, write

Data = dict[str, Any]


@pytest.fixture
def data(tmp_path: Path, np_rng: np.random.Generator) -> Data:
    """Five pictures and twelve objects, one of them a crowd; annotation 8 is of the first picture, and so on."""
    return content(tmp_path, np_rng, pictures=5)


def first(data: Data, polygon: bool) -> Data:
    """The first annotation that is a polygon, or that is not, and no crowd."""
    return next(x for x in data["annotations"] if isinstance(x["segmentation"], list) == polygon and not x["iscrowd"])


def cut(folder: Path) -> None:
    path = folder / "2.png"
    path.write_bytes(path.read_bytes()[:300])


def polygon(change: Callable[[list[float]], Any]) -> Callable[[Data, Path], Any]:
    return lambda data, _: change(first(data, True)["segmentation"][0])


def entry(polygons: bool = False, **values: Any) -> Callable[[Data, Path], Any]:
    return lambda data, _: first(data, polygons).update(values)


def zero_area(points: list[float]) -> None:
    points[1::2] = [points[1]] * (len(points) // 2)


def empty(data: Data, _: Path) -> None:
    one = first(data, False)
    height, width = one["segmentation"]["size"]
    one["segmentation"]["counts"] = [height * width]


def shift(data: Data, _: Path) -> None:
    one = first(data, False)
    one["bbox"] = [one["bbox"][0], one["bbox"][1], one["bbox"][2] / 2, one["bbox"][3]]


def named(data: Data) -> None:
    """A picture whose id is text, as some tools write them."""
    before = data["images"][2]["id"]
    data["images"][2]["id"] = "0f3a"
    for one in data["annotations"]:
        if one["image_id"] == before:
            one["image_id"] = "0f3a"


def named_twice(data: Data) -> None:
    """A category that is there under two ids, as where two data sets were joined."""
    data["categories"].insert(1, {"id": 91, "name": "Ninety"})
    next(one for one in data["annotations"] if one["category_id"] == 90)["category_id"] = 91


# Name: the fault's kind, how it is planted, and how many annotations and pictures the clean copy lacks.
PLANTED: dict[str, tuple[str, Callable[[Data, Path], Any], int, int]] = {
    "file": ("missing file", lambda data, folder: (folder / "2.png").unlink(), 3, 1),
    "truncated": ("unreadable file", lambda data, folder: cut(folder), 3, 1),
    "text": ("unreadable file", lambda data, folder: (folder / "2.png").write_text("no picture"), 3, 1),
    "long name": (
        "unreadable file",
        lambda data, folder: data["images"][2].update(file_name=f"{'2' * 300}.png"),
        3,
        1,
    ),
    "size": ("size mismatch", lambda data, folder: data["images"][2].update(width=500), 3, 1),
    "no height": ("missing field", lambda data, folder: data["images"][2].pop("height"), 0, 0),
    "no file name": ("missing field", lambda data, folder: data["images"][2].pop("file_name"), 3, 1),
    "numeric file name": ("missing field", lambda data, folder: data["images"][2].update(file_name=2), 3, 1),
    "listed file name": ("missing field", lambda data, folder: data["images"][2].update(file_name=["2.png"]), 3, 1),
    "image id twice": (
        "duplicate image id",
        lambda data, folder: data["images"].append({**data["images"][0], "file_name": "9.png"}),
        3,
        1,
    ),
    "image entry twice": ("duplicate image id", lambda data, _: data["images"].append({**data["images"][0]}), 0, 0),
    "id of text": ("id of text", lambda data, _: named(data), 0, 0),
    "backslashes": (
        "file of another name",
        lambda data, _: data["images"][2].update(file_name="C:\\photos\\2.png"),
        0,
        0,
    ),
    "only boxes": ("only boxes", lambda data, _: [x.update(segmentation=[]) for x in data["annotations"]], 0, 0),
    "only crowds": ("only crowds", lambda data, _: [x.update(iscrowd=1) for x in data["annotations"]], 0, 0),
    "file twice": (
        "duplicate file name",
        lambda data, folder: data["images"].append({**data["images"][0], "id": 999}),
        0,
        0,
    ),
    "category twice": (
        "duplicate category id",
        lambda data, folder: data["categories"].append({"id": 3, "name": "again"}),
        0,
        0,
    ),
    "category name twice": (
        "duplicate category name",
        lambda data, folder: named_twice(data),
        0,
        0,
    ),
    "listed category id": ("missing field", lambda data, _: data["categories"].append({"id": [4], "name": "x"}), 0, 0),
    "nameless category": ("missing field", lambda data, folder: data["categories"].append({"id": 4}), 0, 0),
    "annotation id twice": ("duplicate annotation id", lambda data, _: data["annotations"][4].update(id=1), 0, 0),
    "annotation id 0": ("annotation id 0", entry(id=0), 0, 0),
    "no annotation id": ("missing field", entry(id=None), 0, 0),
    "no area": ("missing field", entry(area=None, iscrowd=None), 0, 0),
    "no box": ("missing field", entry(bbox=None), 0, 0),
    "no segmentation": ("missing field", entry(segmentation=None), 1, 0),
    "no category": ("missing field", entry(category_id=None), 1, 0),
    "listed category": ("missing field", entry(category_id=[3]), 1, 0),
    "not an annotation": ("missing field", lambda data, _: data["annotations"].append("junk"), 0, 0),
    "unknown category": ("unknown category", entry(category_id=4), 1, 0),
    "unknown image": ("unknown image", entry(image_id=4), 1, 0),
    "odd polygon": ("bad polygon", polygon(lambda points: points.pop()), 1, 0),
    "two points": ("bad polygon", polygon(lambda points: points.__delitem__(slice(4, None))), 1, 0),
    "digits of text": ("bad polygon", polygon(lambda points: points.__setitem__(0, "5")), 1, 0),
    "huge number": ("bad polygon", polygon(lambda points: points.__setitem__(0, 10**400)), 1, 0),
    "nan": ("bad polygon", polygon(lambda points: points.__setitem__(0, float("nan"))), 1, 0),
    "flat polygon": ("bad polygon", polygon(zero_area), 1, 0),
    "one bad polygon of two": (
        "bad polygon",
        lambda data, _: first(data, True)["segmentation"].append([1, 2, 3, 4]),
        0,
        0,
    ),
    "no polygons": ("bad polygon", entry(segmentation=[]), 1, 0),
    "polygon outside": ("polygon outside", polygon(lambda points: points.__setitem__(0, -30)), 0, 0),
    "junk run lengths": (
        "bad run lengths",
        lambda data, _: first(data, False)["segmentation"].update(counts="~"),
        1,
        0,
    ),
    "short run lengths": (
        "bad run lengths",
        lambda data, _: first(data, False)["segmentation"].update(counts=[5]),
        1,
        0,
    ),
    "size of run lengths": (
        "bad run lengths",
        lambda data, _: first(data, False)["segmentation"].update(size=[5, 5]),
        1,
        0,
    ),
    "number for a size of run lengths": (
        "bad run lengths",
        lambda data, _: first(data, False)["segmentation"].update(size=5),
        1,
        0,
    ),
    "empty mask": ("empty mask", empty, 1, 0),
    "flat box": ("degenerate box", entry(bbox=[3, 4, 0, 5]), 0, 0),
    "negative box": ("degenerate box", entry(bbox=[3, 4, 5, -5]), 0, 0),
    "huge box": ("degenerate box", entry(bbox=[3, 4, 10**400, 5]), 0, 0),
    "text box": ("degenerate box", entry(bbox=["3", "4", "5", "5"]), 0, 0),
    "short box": ("degenerate box", entry(bbox=[3, 4, 5]), 0, 0),
    "box outside": ("box outside", entry(bbox=[3, 4, 500, 5]), 0, 0),
    "half a box": ("box unlike mask", shift, 0, 0),
}


def test_every_kind_of_fault_is_planted() -> None:
    assert {kind for kind, _, _, _ in PLANTED.values()} == set(FAULTS) - {"nothing to learn"}


def test_nothing_to_learn_is_a_fault_and_no_file(
    tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {**data, "annotations": []})
    assert check(path, tmp_path).counts == {"nothing to learn": 1}
    clean = tmp_path / "clean.json"
    assert main(["check-data", "--annotations", str(path), "--images", str(tmp_path), "--fix", str(clean)]) == 1
    assert "nothing to learn" in capsys.readouterr().out
    assert not clean.exists()


@pytest.mark.parametrize("name", ["a/2.png", "/data/local-files/?d=a/2.png", "a%2F2.png", "..\\a\\2.png"])
def test_files_of_other_names_are_found(tmp_path: Path, data: Data, name: str) -> None:
    data["images"][2]["file_name"] = name
    report = check(write(tmp_path, data), tmp_path)
    assert report.counts == {"file of another name": 1}
    assert report.clean["images"][2]["file_name"] == "2.png"


def test_boxes_alone_are_enough_where_masks_are_not_wanted(tmp_path: Path, data: Data) -> None:
    for one in data["annotations"]:
        one["segmentation"] = []
    path = write(tmp_path, data)
    report = check(path, tmp_path)
    assert report.counts == {"only boxes": 1}
    assert report.objects == 11
    report = check(path, tmp_path, boxes_only=True)
    assert (report.faults, report.objects) == ([], 11)
    data["annotations"][0]["bbox"] = [-5, -5, 20, 20]
    data["annotations"][1]["bbox"] = [1, 1, 0, 4]
    data["annotations"][2]["bbox"] = ["5", "5", "20", "20"]
    data["annotations"][3]["bbox"] = [20, 20, -10, -5]  # sides whose product is an area
    report = check(write(tmp_path, data), tmp_path, boxes_only=True)
    assert report.counts == {"degenerate box": 3, "box outside": 1}
    assert report.clean["annotations"][0]["bbox"] == [0, 0, 15, 15]
    assert len(report.clean["annotations"]) == 9
    assert check(report.write_clean(tmp_path / "clean.json"), tmp_path, boxes_only=True).faults == []


SQUARE = [[39, 5, 40, 5, 40, 15, 39, 15]]  # at the right edge of a picture 40 pixels wide


def one_box(folder: Path, bbox: list[float]) -> Path:
    """A picture of 40 x 30 pixels with one object."""
    Image.new("RGB", (40, 30)).save(folder / "0.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": bbox, "segmentation": SQUARE}
    image = {"id": 1, "file_name": "0.png", "height": 30, "width": 40}
    annotations = [{**annotation, "area": 10, "iscrowd": 0}]
    return write(folder, {"images": [image], "annotations": annotations, "categories": [{"id": 3, "name": "three"}]})


def test_a_box_beside_the_picture_is_a_fault_however_near(tmp_path: Path) -> None:
    for bbox in ([40.2, 5, 0.5, 10], [39, -0.6, 1, 0.5], [39, 5, 1e-7, 10]):
        path = one_box(tmp_path, bbox)
        alone = check(path, tmp_path, boxes_only=True)
        assert (alone.counts, alone.objects) == ({"degenerate box": 1, "nothing to learn": 1}, 0)
        report = check(path, tmp_path)
        assert (report.counts, report.objects) == ({"degenerate box": 1}, 1)
        assert report.clean["annotations"][0]["bbox"] == [39, 5, 1, 10]
    assert check(one_box(tmp_path, [39.2, 5, 1.5, 10]), tmp_path).faults == []


# Coordinates about the edges, where rounding decides.
NEAR = st.sampled_from([0.0, 29.0, 30.0, 39.0, 40.0]).flatmap(lambda edge: st.floats(edge - 1.5, edge + 1.5))


@given(x=NEAR, y=NEAR, width=st.floats(-1, 2), height=st.floats(-1, 2), boxes_only=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_counts_as_an_object_is_one_to_the_data_set(
    tmp_path: Path, x: float, y: float, width: float, height: float, boxes_only: bool
) -> None:
    report = check(one_box(tmp_path, [x, y, width, height]), tmp_path, boxes_only=boxes_only)
    example = CocoDataset(report.write_clean(tmp_path / "clean.json"), tmp_path, boxes_only=boxes_only)[0]
    assert report.objects == len(example) == example.masks.any((1, 2)).sum()


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_once_and_mended(tmp_path: Path, data: Data, name: str) -> None:
    kind, plant, annotations_gone, pictures_gone = PLANTED[name]
    whole = copy.deepcopy(data)
    plant(data, tmp_path)
    report = check(write(tmp_path, data), tmp_path)
    assert [fault.kind for fault in report.faults] == [kind], report.faults
    assert report.counts == {kind: 1}
    contact_sheet(tmp_path / "annotations.json", tmp_path, report.faults)
    clean = report.write_clean(tmp_path / "clean.json")
    assert len(report.clean["annotations"]) == 12 - annotations_gone
    assert len(report.clean["images"]) == 5 - pictures_gone
    assert report.clean["categories"] == whole["categories"]
    again = check(clean, tmp_path, boxes_only=kind == "only boxes")
    assert again.faults == []
    assert (again.objects, again.crowds) == (report.objects, report.crowds)
    dataset = CocoDataset(clean, tmp_path, boxes_only=kind == "only boxes")
    assert sum(len(example) for example in dataset) == 12 - annotations_gone
    kept = {one["id"]: one["category_id"] for one in whole["annotations"]}
    assert all(one["category_id"] == kept.get(one["id"], one["category_id"]) for one in report.clean["annotations"])


def test_all_at_once(tmp_path: Path, data: Data) -> None:
    first(data, False)["id"] = 0
    data["annotations"][5]["bbox"] = [0, 0, 0, 0]
    data["annotations"][6]["category_id"] = 77
    (tmp_path / "3.png").unlink()
    report = check(write(tmp_path, data), tmp_path)
    assert report.counts == {"missing file": 1, "annotation id 0": 1, "unknown category": 1, "degenerate box": 1}
    box = next(fault for fault in report.faults if fault.kind == "degenerate box")
    assert (box.image, box.annotation) == ("1.png", 36)
    assert check(report.write_clean(tmp_path / "clean.json"), tmp_path).faults == []


def test_entries_without_ids_hide_each_other_not(tmp_path: Path, data: Data) -> None:
    del data["images"][4]["id"]
    del first(data, False)["image_id"]
    assert check(write(tmp_path, data), tmp_path).counts == {"missing field": 2}


def test_what_is_right_is_left_and_counted(tmp_path: Path, data: Data) -> None:
    path = write(tmp_path, {**data, "info": {"year": 2026}})
    report = check(path, tmp_path)
    assert report.faults == []
    assert report.clean == json.loads(path.read_text())
    assert (report.pictures, report.objects, report.crowds, report.empty) == (5, 11, 1, 1)
    assert report.classes == {"ninety": 4, "three": 3, "seven": 4}
    assert sum(report.sizes.values()) == 11
    assert list(report.sizes)[:2] == ["0-8", "8-16"]


@given(
    where=st.sampled_from(["images", "annotations", "categories"]),
    junk=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["id", "image_id", "bbox"]), x),
        max_leaves=4,
    ),
    key=st.sampled_from(
        [
            *("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "area", "height", "width"),
            *("file_name", "name"),
        ]
    ),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_junk_is_never_more_than_faults(tmp_path: Path, data: Data, where: str, junk: Any, key: str) -> None:
    data = copy.deepcopy(data)
    data[where][1][key] = junk
    data[where].append(junk)
    report = check(write(tmp_path, data), tmp_path)
    assert report.faults
    contact_sheet(tmp_path / "annotations.json", tmp_path, report.faults, count=2)
    assert check(report.write_clean(tmp_path / "clean.json"), tmp_path).faults == []


def test_real_data_sets_are_clean(shared_data: Path) -> None:
    folder = shared_data / "coco_open"
    report = check(folder / "annotations/instances_val.json", folder / "images")
    assert report.faults == []
    assert (report.pictures, report.objects + report.crowds, report.empty) == (82, 672, 2)


def run(folder: Path, *options: str) -> int:
    return main(["check-data", "--annotations", str(folder / "annotations.json"), "--images", str(folder), *options])


def test_the_verb_tells_and_writes(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, data)
    assert run(tmp_path) == 0
    assert "no faults" in capsys.readouterr().out
    data["annotations"][5]["bbox"] = [0, 0, 0, 0]
    write(tmp_path, data)
    assert run(tmp_path, "--fix", str(tmp_path / "clean.json"), "--output", str(tmp_path / "out")) == 1
    told = capsys.readouterr().out
    assert "1 x degenerate box (replaced by the mask's extent)" in told
    assert "1.png: annotation 36: expected" in told
    assert json.loads((tmp_path / "out/report.json").read_text())["counts"] == {"degenerate box": 1}
    with Image.open(tmp_path / "out/contact_sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
    (tmp_path / "annotations.json").write_bytes((tmp_path / "clean.json").read_bytes())
    assert run(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []


def test_a_file_that_is_not_coco_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "annotations.json").write_text("{}")
    assert run(tmp_path) == 1
    assert "no list of images" in capsys.readouterr().err


def tile(sheet: Image.Image, n: int, columns: int) -> np.ndarray:
    x, y = GAP + n % columns * (TILE[0] + GAP), GAP + n // columns * (TILE[1] + CAPTION + GAP)
    return np.asarray(sheet.crop((x, y, x + TILE[0], y + TILE[1])))


def test_the_contact_sheet_shows_faulty_pictures_first(tmp_path: Path, data: Data) -> None:
    data["annotations"] = []
    for n, color in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{n}.png")
        data["images"][n].update(height=30, width=40)
    (tmp_path / "1.png").unlink()
    faults = [
        *(Fault("box outside", f"{n}.png", 1, "") for n in (4, 3)),
        Fault("missing file", "1.png", None, ""),
        Fault("unknown image", None, 5, ""),
    ]
    sheet = contact_sheet(write(tmp_path, data), tmp_path, faults, count=4, columns=2)
    assert sheet.size == (GAP + 2 * (TILE[0] + GAP), GAP + 2 * (TILE[1] + CAPTION + GAP))
    colors = [tuple(tile(sheet, n, 2)[150, 200].tolist()) for n in range(4)]
    assert colors[0] == (0, 255, 255)  # one of each kind before a second
    assert colors[1] == (60, 30, 30)  # no picture
    assert colors[2] == (255, 255, 0)
    assert colors[3] in ((255, 0, 0), (0, 0, 255))


def test_a_contact_sheet_has_room_for_a_picture(tmp_path: Path, data: Data) -> None:
    for options in ({"columns": 0}, {"count": 0}):
        with pytest.raises(ValueError, match="count, columns: expected at least 1 each"):
            contact_sheet(write(tmp_path, data), tmp_path, **options)


def test_masks_and_boxes_are_drawn(tmp_path: Path, data: Data) -> None:
    plain = contact_sheet(write(tmp_path, {**data, "annotations": []}), tmp_path, count=5, seed=1)
    data["annotations"][1]["segmentation"] = "junk"
    data["annotations"][2]["bbox"] = None
    drawn = contact_sheet(write(tmp_path, data), tmp_path, count=5, seed=1)
    changed = [bool((tile(plain, n, 4) != tile(drawn, n, 4)).any()) for n in range(5)]
    assert sum(changed) == 4  # all but the picture without objects
