"""The result of one picture: what is derived from its masks, what is written, and what other programs read."""

import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from trimask.engine.inference.result import Detection, Result, to_dataset
from trimask.engine.pictures.outlines import crop_of_runs, outlines_of_runs, simplify
from trimask.kernels.cpu.masks import paste_masks, runs_of_mask
from trimask.kernels.paste_rule import PasteRule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

SIZE = (53, 71)


def make(rng: np.random.Generator, count: int = 5, masks: bool = True, **fields: Any) -> Result:
    """Blobs of a few cells in boxes that also cross the picture's border."""
    cells = rng.random((count, 7, 7), np.float32).repeat(2, 1).repeat(2, 2)
    corners = rng.uniform(-10, 45, (count, 2))
    labels = rng.integers(0, 3, count)
    return Result(
        boxes=np.concatenate([corners, corners + rng.uniform(5, 40, (count, 2))], 1),
        scores=np.sort(rng.random(count))[::-1],
        labels=labels,
        size=SIZE,
        names=[("person", "dog", "cup")[label] for label in labels],
        category_ids=np.array([1, 18, 47])[labels],
        mask_probabilities=cells if masks else None,
        **fields,
    )


@pytest.fixture(params=[PasteRule.TORCHVISION, PasteRule.DETECTRON2], ids=["torchvision", "detectron2"])
def result(request: pytest.FixtureRequest, np_rng: np.random.Generator) -> Result:
    return make(np_rng, rule=request.param)


def test_fields_are_made_uniform() -> None:
    result = Result([[1, 2, 3, 4]], [0.5], [7], (10, 20))
    assert (result.boxes.dtype, result.scores.dtype, result.labels.dtype) == (np.float32, np.float32, np.int64)
    assert (result.names, result.category_ids.tolist(), result.timings) == (["7"], [7], {})
    assert not result.has_masks
    with pytest.raises(AttributeError):
        result.scores = [1.0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"scores": [0.5]}, "scores: expected 2, one for each box, got 1"),
        ({"names": ["a", "b", "c"]}, "names: expected 2, .* got 3"),
        ({"category_ids": []}, "category_ids: expected 2"),
        ({"mask_probabilities": np.zeros((1, 28, 28))}, "mask_probabilities: expected 2"),
        ({"mask_runs": [[200]]}, "mask_runs: expected 2"),
        ({"mask_runs": [[200], [10, 20]]}, "mask_runs: expected run lengths of 200 pixels, got 30"),
        ({"picture": np.zeros((20, 10, 3), np.uint8)}, r"picture: expected a shape \(10, 20, 3\), got \(20, 10, 3\)"),
    ],
)
def test_fields_must_fit(fields: dict[str, Any], told: str) -> None:
    given_fields = {"boxes": np.zeros((2, 4)), "scores": [0.9, 0.8], "labels": [0, 1], "size": (10, 20)} | fields
    with pytest.raises(ValueError, match=told):
        Result(**given_fields)


def test_masks_and_what_is_derived_from_them(result: Result) -> None:
    masks = result.masks
    assert masks.dtype == np.bool_
    assert np.array_equal(masks, paste_masks(result.mask_probabilities, result.boxes, SIZE, rule=result.rule))
    assert masks is result.masks
    assert result.areas.tolist() == masks.sum((1, 2)).tolist()
    for n, mask in enumerate(masks):
        assert np.array_equal(result.runs[n], runs_of_mask(mask))
        crop, y, x = result.crop(n)
        whole = np.zeros(SIZE, np.bool_)
        whole[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        assert np.array_equal(whole, mask)
        assert not mask.any() or (crop[[0, -1]].any(1).all() and crop[:, [0, -1]].any(0).all())


def test_coco_results_are_what_pycocotools_reads(result: Result) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    codec = pytest.importorskip("pycocotools.mask")
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": 42, "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": number} for number in (1, 18, 47)],
        "annotations": [],
    }
    truth.createIndex()
    entries = json.loads(json.dumps(result.to_coco(image_id=42)))
    loaded = truth.loadRes(result.to_coco(image_id=42))  # which writes the boxes' areas into what it is given
    for n, annotation in enumerate(loaded.loadAnns(loaded.getAnnIds())):
        assert np.array_equal(loaded.annToMask(annotation), result.masks[n])
        encoded = codec.encode(np.asfortranarray(result.masks[n].view(np.uint8)))
        assert entries[n]["segmentation"] == {"size": list(SIZE), "counts": encoded["counts"].decode()}
        x1, y1, x2, y2 = result.boxes[n].astype(float)
        assert entries[n]["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        assert annotation["score"] == result.scores[n]
        assert annotation["category_id"] == result.category_ids[n]
        assert annotation["image_id"] == 42
    assert [entry["area"] for entry in entries] == codec.area(result.rle()).tolist()

    boxes_only = make(np.random.default_rng(0), masks=False).to_coco(42)
    assert all("segmentation" not in entry for entry in boxes_only)
    assert [entry["area"] for entry in boxes_only] == [entry["bbox"][2] * entry["bbox"][3] for entry in boxes_only]
    assert len(truth.loadRes(boxes_only).getAnnIds()) == 5


def test_a_data_set_is_what_pycocotools_reads(np_rng: np.random.Generator, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    results = [make(np_rng, count, path=Path(f"shots/{count}.jpg")) for count in (3, 0, 2)]
    categories = {18: "dog", 1: "person", 47: "cup", 90: "never seen"}
    nothing = np.zeros((0, 4), np.float32)
    bad = Result(nothing, nothing[:, 0], nothing[:, 0], (0, 0), path=Path("bad.jpg"), error=OSError("bad.jpg is bad"))
    written = to_dataset(iter([results[0], bad, *results[1:]]), categories, tmp_path / "found.json")
    for name in ("bad.json", "bad.png"):
        with pytest.raises(OSError, match=r"bad\.jpg is bad"):
            bad.save(tmp_path / name)
        assert not (tmp_path / name).exists()
    loaded = coco.COCO(str(written))
    assert {number: category["name"] for number, category in loaded.cats.items()} == categories
    assert sorted(loaded.getAnnIds()) == [1, 2, 3, 4, 5]
    for number, result in zip(loaded.getImgIds(), results, strict=True):
        image = loaded.imgs[number]
        assert (image["file_name"], image["height"], image["width"]) == (result.path.as_posix(), *SIZE)
        for mask, annotation in zip(result.masks, loaded.loadAnns(loaded.getAnnIds(number)), strict=True):
            assert np.array_equal(loaded.annToMask(annotation), mask)

    alone = json.loads(results[0].save(tmp_path / "one.json").read_text())
    assert {category["name"] for category in alone["categories"]} == set(results[0].names)
    assert [entry["id"] for entry in alone["annotations"]] == [1, 2, 3]


def test_back_from_coco(result: Result) -> None:
    names = {1: "person", 18: "dog", 47: "cup"}
    entries = result.to_coco()
    for segmentation, runs in zip((entry["segmentation"] for entry in entries), result.runs, strict=True):
        segmentation["counts"] = runs.tolist()  # the uncompressed form
        break
    entries[1]["segmentation"]["counts"] = entries[1]["segmentation"]["counts"].encode()
    back = Result.from_coco(reversed(entries), categories=names, path=Path("a.jpg"))
    assert back.size == SIZE
    for name in ("boxes", "scores", "labels", "category_ids", "masks", "areas"):
        assert np.array_equal(getattr(back, name), getattr(result, name)), name
    assert back.names == result.names
    assert back.to_coco() == result.to_coco()
    assert back.path == Path("a.jpg")


def test_annotations_count_as_certain() -> None:
    mask = np.zeros((6, 9), np.bool_)
    mask[2:4, 3:8] = True
    entries = [
        {"category_id": 5, "segmentation": {"size": [6, 9], "counts": runs_of_mask(mask).tolist()}},
        {"category_id": 2, "segmentation": {"size": [6, 9], "counts": [54]}, "bbox": [1, 2, 3, 4]},
    ]
    result = Result.from_coco(entries)
    assert result.scores.tolist() == [1, 1]
    assert result.labels.tolist() == [1, 0]
    assert result.names == ["5", "2"]
    assert result.boxes.tolist() == [[3, 2, 8, 4], [1, 2, 4, 6]]
    assert np.array_equal(result.masks, [mask, np.zeros_like(mask)])
    assert not Result.from_coco([{"category_id": 1, "bbox": [0, 0, 1, 1]}], size=(4, 4)).has_masks
    assert len(Result.from_coco([], size=(4, 4)).masks) == 0


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([{"category_id": 1, "bbox": [0, 0, 1, 1]}], "size: expected height and width"),
        ([{"category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]}], "got polygons"),
        (
            [{"category_id": 1, "segmentation": {"size": [2, 2], "counts": [4]}}, {"category_id": 1}],
            "each of 2 .*got 1",
        ),
        ([{"category_id": 1, "segmentation": {"size": s, "counts": [4]}} for s in ([2, 2], [1, 4])], r"got \[1, 4\]"),
    ],
)
def test_coco_entries_that_do_not_make_a_result(entries: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Result.from_coco(entries)


def test_coco_entries_without_what_they_need_are_named() -> None:
    entry = {"category_id": 5, "bbox": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match=r"category_id: expected one of \[1, 2\], got 5"):
        Result.from_coco([entry], (4, 4), {1: "cat", 2: "dog"})
    with pytest.raises(ValueError, match=r"category_id: expected one of \[5\], got None"):
        Result.from_coco([entry, {"bbox": [0, 0, 1, 1]}], (4, 4))
    with pytest.raises(
        ValueError, match=r"bbox: expected one in each entry without a segmentation, got \{'category_id'"
    ):
        Result.from_coco([entry, {"category_id": 5}], (4, 4))


def filled(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre has an odd number of a ring's vertical sides on its left."""
    out = np.zeros(size, np.bool_)
    for ring in rings:
        crossings = np.zeros((size[0], size[1] + 1), int)
        for (x, y), (x2, y2) in zip(ring.astype(int), np.roll(ring, -1, 0).astype(int), strict=True):
            assert (x == x2) != (y == y2)  # along the edges of pixels, and never on the spot
            if x == x2:
                crossings[min(y, y2) : max(y, y2), x] += 1
        out |= crossings.cumsum(1)[:, :-1] % 2 == 1
    return out


def check_outlines(mask: np.ndarray) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    rings = outlines_of_runs(runs_of_mask(mask), mask.shape[0])
    pieces, count = ndimage.label(mask)
    assert len(rings) == count
    solid = [ndimage.binary_fill_holes(np.pad(pieces == n + 1, 1), np.ones((3, 3)))[1:-1, 1:-1] for n in range(count)]
    assert np.array_equal(filled(rings, mask.shape), np.any(solid, 0) if solid else mask)
    x_y = [(ring[:, 0], ring[:, 1]) for ring in rings]
    areas = [0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) for x, y in x_y]
    assert sorted(areas) == sorted(piece.sum() for piece in solid)  # positive: clockwise where y points down


@settings(max_examples=200, deadline=None)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_outlines_of_any_mask(mask: np.ndarray) -> None:
    check_outlines(mask)


def test_outlines_of_random_masks(np_rng: np.random.Generator) -> None:
    for density in (0.0, 0.2, 0.5, 0.8, 1.0):
        check_outlines(np_rng.random((31, 23)) < density)
        check_outlines(np.repeat(np.repeat(np_rng.random((8, 6)) < density, 4, 0), 5, 1))


def test_pycocotools_fills_an_outline_to_the_mask(result: Result) -> None:
    """Except for holes: these masks have none, as those of whole boxes and of ellipses."""
    codec = pytest.importorskip("pycocotools.mask")
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    ellipse = 1 / (1 + np.exp(20 * (np.hypot(x, y) - 0.8)))
    solid = Result(result.boxes, result.scores, result.labels, SIZE, mask_probabilities=[ellipse] * 5, rule=result.rule)
    for mask, rings in zip(solid.masks, solid.polygons(), strict=True):
        rles = codec.frPyObjects([ring.ravel().tolist() for ring in rings], *SIZE) if rings else []
        assert np.array_equal(codec.decode(codec.merge(rles)) if rings else np.zeros(SIZE), mask)


def test_counts_of_nothing_change_nothing() -> None:
    mask = np.zeros((4, 5), np.bool_)
    mask[1:3, 1:4] = True
    canonical, odd = runs_of_mask(mask), [2, 0, 3, 1, 0, 1, 2, 2, 2, 2, 5, 0, 0]
    assert sum(odd) == 20
    assert np.array_equal(outlines_of_runs(np.array(odd), 4), outlines_of_runs(canonical, 4))
    for counts in (canonical, np.array(odd)):
        crop, y, x = crop_of_runs(counts, 4)
        assert (crop.tolist(), y, x) == ([[True] * 3] * 2, 1, 1)


def strays(ring: np.ndarray, simple: np.ndarray) -> float:
    """How far the corners that were left out lie from the sides that replace them."""
    where = {tuple(point): n for n, point in enumerate(ring.tolist())}
    kept = [where[tuple(point)] for point in simple.tolist()]
    assert kept == sorted(kept)
    worst = 0.0
    for a, b in zip(kept, [*kept[1:], kept[0] + len(ring)], strict=True):
        start, end = ring[a], ring[b % len(ring)]
        for n in range(a + 1, b):
            point = ring[n % len(ring)]
            share = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
            worst = max(worst, float(np.hypot(*(start + share * (end - start) - point))))
    return worst


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 3.0])
def test_simplified_outlines_stay_within_the_tolerance(tolerance: float, np_rng: np.random.Generator) -> None:
    result = make(np_rng)
    pairs = [
        (exact, simple)
        for ones, others in zip(result.polygons(), result.polygons(tolerance), strict=True)
        for exact, simple in zip(ones, others, strict=True)
        if len(np.unique(exact, axis=0)) == len(exact)  # comes by no corner twice
    ]
    assert any(len(simple) < len(exact) for exact, simple in pairs)
    for exact, simple in pairs:
        assert len(simple) >= 3
        assert strays(exact, simple) <= tolerance * (1 + 1e-12)


def test_rings_of_any_shape_are_simplified_within_the_tolerance(np_rng: np.random.Generator) -> None:
    for _ in range(50):
        ring = np.unique(np_rng.integers(0, 30, (25, 2)).astype(float), axis=0)
        np_rng.shuffle(ring)
        simple = simplify(ring, 8.0)
        assert 3 <= len(simple) <= len(ring)
        assert strays(ring, simple) <= 8 * (1 + 1e-12)


def test_a_negative_tolerance_is_refused(result: Result) -> None:
    with pytest.raises(ValueError, match="tolerance: expected a distance of at least 0, got -1"):
        result.polygons(-1)


def test_labelme(np_rng: np.random.Generator) -> None:
    result = make(np_rng, path=Path("folder/a.jpg"))
    document = json.loads(json.dumps(result.to_labelme(tolerance=0)))
    assert document["imageData"] is None
    assert (document["imagePath"], document["imageHeight"], document["imageWidth"]) == ("a.jpg", *SIZE)
    shapes = document["shapes"]
    assert {shape["group_id"] for shape in shapes} == set(range(5))
    for n, rings in enumerate(result.polygons()):
        mine = [shape for shape in shapes if shape["group_id"] == n]
        assert {shape["label"] for shape in mine} == {result.names[n]}
        if rings:
            assert [shape["points"] for shape in mine] == [ring.tolist() for ring in rings]
            assert {shape["shape_type"] for shape in mine} == {"polygon"}
    (box,) = Result([[1, 2, 3, 4]], [0.5], [0], (9, 9)).to_labelme()["shapes"]
    assert (box["shape_type"], box["points"]) == ("rectangle", [[1, 2], [3, 4]])
    (empty,) = Result([[1, 2, 3, 4]], [0.5], [0], (9, 9), mask_runs=[[81]]).to_labelme()["shapes"]
    assert empty["shape_type"] == "rectangle"


def test_supervision(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("supervision")
    module.Detections = SimpleNamespace  # takes any keywords
    monkeypatch.setitem(sys.modules, "supervision", module)
    detections = result.to_supervision()
    assert np.array_equal(detections.xyxy, result.boxes)
    assert np.array_equal(detections.mask, result.masks)
    assert np.array_equal(detections.class_id, result.labels)
    assert np.array_equal(detections.confidence, result.scores)
    assert detections.data["class_name"].tolist() == result.names
    assert make(np.random.default_rng(0), masks=False).to_supervision().mask is None
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        result.to_supervision()


def test_indexing(result: Result) -> None:
    assert len(result) == 5
    found = list(result)
    assert found[-1] == result[-1] == result[np.int64(4)]
    box = tuple(float(side) for side in result.boxes[4])
    expected = (4, result.names[4], result.labels[4], result.category_ids[4], result.scores[4], box)
    assert found[4] == Detection(*expected)
    with pytest.raises(IndexError):
        result[5]
    for index in (slice(1, 4), [3, 0], np.array([4]), result.scores > result.scores[2], [], slice(0)):
        for source in (result, result.without_picture()):
            part = source[index]
            picked = np.arange(5)[np.asarray(index, int) if isinstance(index, list) else index]
            assert np.array_equal(part.boxes, result.boxes[picked])
            assert part.names == [result.names[n] for n in picked]
            assert np.array_equal(part.masks, result.masks[picked])
            assert [r.tolist() for r in part.runs] == [result.runs[n].tolist() for n in picked]


def test_filter(result: Result) -> None:
    cut = float(result.scores[2])
    assert len(result.filter(cut)) == 3
    assert len(result.filter()) == 5
    assert result.filter(labels=["dog", 0]).names == [name for name in result.names if name != "cup"]
    assert result.filter(labels="cup").names == [name for name in result.names if name == "cup"]
    first = result.labels[0]
    for label in (int(first), first):
        assert result.filter(0.0, label).boxes.tolist() == result.filter(labels=[first]).boxes.tolist() != []
    assert len(result.filter(1.1)) == 0


def test_numbers_alone_are_kept(np_rng: np.random.Generator) -> None:
    result = make(np_rng, picture=np.zeros((*SIZE, 3), np.uint8), timings={"network": 2.0})
    kept = result.without_picture()
    assert kept.picture is None
    assert kept.mask_probabilities is None
    assert kept.timings == result.timings
    assert kept.to_coco() == result.to_coco()
    assert np.array_equal(kept.masks, result.masks)
    assert not make(np_rng, masks=False).without_picture().has_masks


MASKED: dict[str, Callable[[Result], Any]] = {
    "runs": lambda result: result.runs,
    "masks": lambda result: result.masks,
    "areas": lambda result: result.areas,
    "crop": lambda result: result.crop(0),
    "rle": lambda result: result.rle(),
    "polygons": lambda result: result.polygons(),
}


@pytest.mark.parametrize("what", MASKED)
def test_without_masks_what_needs_them_says_so(what: str, np_rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="masks: expected a result with masks"):
        MASKED[what](make(np_rng, masks=False))


@pytest.mark.parametrize("masks", [True, False])
def test_no_detection_is_a_result_like_any(masks: bool, np_rng: np.random.Generator, tmp_path: Path) -> None:
    picture = np_rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    result = make(np_rng, 0, masks, picture=picture)
    for empty in (result, result[[]], result.filter(0.5), result.without_picture()):
        assert (len(empty), list(empty), empty.to_coco(), empty.table()) == (0, [], [], [])
        assert empty.to_labelme()["shapes"] == []
        assert empty.boxes.shape == (0, 4)
        if masks:
            assert (empty.masks.shape, empty.rle(), empty.polygons(), empty.areas.tolist()) == ((0, *SIZE), [], [], [])
        assert "no detections" in repr(empty)
    assert np.array_equal(np.asarray(result.plot()), picture)
    assert json.loads(result.save(tmp_path / "a.json").read_text())["annotations"] == []


def test_table_and_repr(np_rng: np.random.Generator) -> None:
    result = make(np_rng, path=Path("street/crossing.jpg"))
    rows = result.table()
    assert [row["mask_area"] for row in rows] == result.areas.tolist()
    assert [row["label"] for row in rows] == result.names
    assert [row["box"] for row in rows] == result.boxes.tolist()
    assert [row["score"] for row in rows] == result.scores.tolist()
    assert {row["mask_area"] for row in make(np_rng, masks=False).table()} == {None}
    assert repr(result).startswith("Result('crossing.jpg', 71 x 53, ")
    assert f"{result.names.count(result.names[0])} {result.names[0]}" in repr(result)
    assert "boxes only" in repr(make(np_rng, masks=False))
    failed = Result(np.zeros((0, 4)), [], [], (0, 0), error=ValueError("a damaged one"))
    assert repr(failed) == "Result(ValueError('a damaged one'))"


def test_no_dense_mask_is_made_on_the_way_to_numbers(np_rng: np.random.Generator, tmp_path: Path) -> None:
    result = make(np_rng, 20, path=Path("wide.jpg"))
    wide = Result(
        result.boxes + 9000, result.scores, result.labels, (20000, 20000), mask_probabilities=result.mask_probabilities
    )
    tracemalloc.start()
    wide.to_coco(), wide.polygons(), wide.to_labelme(), wide.table(), wide.save(tmp_path / "wide.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000  # one mask of the picture is 400 MB
    assert "masks" not in vars(wide)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".json"])
def test_save_picks_by_suffix(suffix: str, np_rng: np.random.Generator, tmp_path: Path) -> None:
    result = make(np_rng, picture=np_rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    path = tmp_path / f"out{suffix}"
    assert result.save(str(path)) == path
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".json":
        assert len(json.loads(path.read_text())["annotations"]) == 5
    else:
        saved = Image.open(path)
        assert saved.size == SIZE[::-1]
        if suffix == ".png":
            assert np.array_equal(np.asarray(saved), np.asarray(result.plot()))
            plain = np.asarray(Image.open(result.save(path, labels=False)))
            assert np.array_equal(plain, np.asarray(result.plot(labels=False)))


def test_save_refuses_what_it_cannot_write(np_rng: np.random.Generator, tmp_path: Path) -> None:
    result = make(np_rng)
    with pytest.raises(ValueError, match=r"path: expected .json or .*got 'out.txt'"):
        result.save(tmp_path / "out.txt")
    with pytest.raises(ValueError, match="picture: expected one to draw on"):
        result.save(tmp_path / "out.png")
    with pytest.raises(FileNotFoundError):
        result.save(tmp_path / "missing" / "out.json")
    assert os.listdir(tmp_path) == []
    assert result.plot(np.zeros(SIZE, np.uint8)).size == SIZE[::-1]


@pytest.mark.parametrize("suffix", [".png", ".json"])
def test_a_failed_save_leaves_what_was_there(
    suffix: str, np_rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = make(np_rng, picture=np.zeros((*SIZE, 3), np.uint8))
    path = tmp_path / f"out{suffix}"
    path.write_text("as before")

    def half(self: Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        result.save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_text() == "as before"


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_saved_files_have_ordinary_permissions(np_rng: np.random.Generator, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    saved = make(np_rng).save(tmp_path / "out.json")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("counts", [[2**62] * 4 + [12], [-4, 16], [2**62, 2**62, 12]])
def test_run_lengths_whose_sum_wraps_are_refused(counts: list[int]) -> None:
    entry = {"category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": {"size": [3, 4], "counts": counts}}
    with pytest.raises(ValueError, match="mask_runs: expected run lengths of 12 pixels"):
        _ = Result.from_coco([entry]).masks
