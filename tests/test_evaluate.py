"""COCO's figures: published ones to every digit, and what pycocotools gets wrong by itself."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models import small_model
from trimask.cli import main
from trimask.engine.inference.result import Result
from trimask.engine.model.checkpoints import PUBLISHED, save
from trimask.engine.training.detection import detect, lacking, matched, sources
from trimask.engine.training.evaluate import Evaluation, check_truth, evaluate, tools
from trimask.engine.training.plots import draw_curves, draw_worst

pytest.importorskip("pycocotools")

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@pytest.fixture(scope="module")
def evalref(shared_data: Path) -> Path:
    return shared_data / "evalref"


def figures(evaluation: Evaluation, kind: str) -> dict[str, float]:
    """As pycocotools has them: -1 where there is no ground truth."""
    found = {name: evaluation.summary[f"{kind}_{name}"] for name in NAMES}
    return {name: -1.0 if math.isnan(x) else x for name, x in found.items()}


def evaluate_coco(evalref: Path, kind: str, **options: Any) -> Evaluation:
    folder = evalref / "coco_val2014_100"
    results = folder / f"instances_val2014_fake{kind}100_results.json"
    return evaluate(results, folder / "instances_val2014_100.json", kinds=[kind], **options)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_published_figures_of_coco(evalref: Path, kind: str) -> None:
    folder = evalref / "coco_val2014_100"
    found = figures(evaluate_coco(evalref, kind), kind)
    expected = json.loads((folder / "expected.json").read_text())[kind]
    assert found == pytest.approx(expected, rel=0, abs=1e-15)  # numpy's versions add in orders of their own
    _, _, after = (folder / "val2014_fake_eval_res.txt").read_text().partition(f"type={kind}\n")
    published = [line.rpartition("= ")[2] for line in after.splitlines() if " = " in line][:12]
    assert [f"{x:.3f}" for x in found.values()] == published


def tumors(evalref: Path, **options: Any) -> Evaluation:
    folder = evalref / "detectron2_maskrcnn_tumor"
    return evaluate(folder / "coco_instances_results.json", folder / "ground_truth.json", **options)


def test_what_detectron2_logged(evalref: Path) -> None:
    """Masks and boxes in one file; the first annotation has id 0, and counted as missed there."""
    expected = json.loads((evalref / "detectron2_maskrcnn_tumor" / "expected.json").read_text())
    evaluation = tumors(evalref, keep_ids=True)
    assert figures(evaluation, "bbox") == expected["bbox"]
    assert figures(evaluation, "segm") == expected["segm_bbox_removed_first_as_detectron2_does"]
    assert evaluation.notes == []
    logged = expected["published_by_detectron2_percent"]
    (row,) = [row for row in evaluation.per_class if row["name"] == "Tumor" and row["objects"]]
    for kind in ("bbox", "segm"):
        for name in NAMES[:6]:
            value = logged[f"{kind}/{name}"]
            assert (100 * evaluation.summary[f"{kind}_{name}"] == value) or value is None, (kind, name)
        assert 100 * row[f"{kind}_AP"] == logged[f"{kind}/AP-Tumor"]
    assert math.isnan(evaluation.summary["bbox_APs"])


def test_annotation_id_0_is_an_object_like_the_others(evalref: Path) -> None:
    folder = evalref / "detectron2_maskrcnn_tumor"
    truth = json.loads((folder / "ground_truth.json").read_text())
    for annotation in truth["annotations"]:
        annotation["id"] += 1
    right = evaluate(folder / "coco_instances_results.json", truth, keep_ids=True)
    evaluation = tumors(evalref)
    assert evaluation.notes == ["annotation id 0, which pycocotools and Detectron2 count as missed: numbered anew"]
    for kind in ("bbox", "segm"):
        assert figures(evaluation, kind) == figures(right, kind)
    assert evaluation.summary["bbox_AP"] > tumors(evalref, keep_ids=True).summary["bbox_AP"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_faster_coco_eval_gives_the_same(evalref: Path, kind: str) -> None:
    pytest.importorskip("faster_coco_eval", reason="the other backend is optional: pip install faster-coco-eval")
    for run in (evaluate_coco, lambda evalref, kind, **options: tumors(evalref, **options)):
        slow, fast = (run(evalref, kind, backend=backend) for backend in ("pycocotools", "faster"))
        assert fast.summary.keys() == slow.summary.keys()
        for name, figure in slow.summary.items():
            # The order of one sum differs.
            assert fast.summary[name] == pytest.approx(figure, rel=0, abs=1e-12, nan_ok=True), name
        np.testing.assert_allclose(fast.curves[kind].precision, slow.curves[kind].precision, rtol=0, atol=1e-12)
        assert [matches.image["id"] for matches in fast.worst] == [matches.image["id"] for matches in slow.worst]


@pytest.mark.parametrize("limit", [1, 5, 10, 50])
def test_fewer_detections_are_those_of_the_highest_scores(evalref: Path, limit: int) -> None:
    folder = evalref / "coco_val2014_100"
    best = defaultdict(list)
    for entry in json.loads((folder / "instances_val2014_fakesegm100_results.json").read_text()):
        best[entry["image_id"], entry["category_id"]].append(entry)
    kept = [x for group in best.values() for x in sorted(group, key=lambda x: -x["score"])[:limit]]
    expected = evaluate(kept, folder / "instances_val2014_100.json", kinds=["segm"]).summary
    found = evaluate_coco(evalref, "segm", max_detections=limit).summary
    for name in NAMES[:6]:
        assert found[f"segm_{name}"] == expected[f"segm_{name}"]
    assert found[f"segm_AR{limit}"] == expected["segm_AR100"]
    assert [name for name in found if "AR" in name] == [
        *(f"segm_AR{m}" for m in (1, 10) if m < limit),
        *(f"segm_AR{x}" for x in (limit, "s", "m", "l")),
    ]


def truth_of(*boxes: tuple[float, ...], size: int = 200, **fields: Any) -> dict[str, Any]:
    """One picture with an object for each x, y, width, height."""
    annotations = [
        {"id": n, "image_id": 1, "category_id": 3, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0, **fields}
        for n, box in enumerate(boxes, 1)
    ]
    categories = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]
    return {"images": [{"id": 1, "height": size, "width": size}], "categories": categories, "annotations": annotations}


def found_at(*boxes: tuple[float, ...], score: float = 0.9, category: int = 3) -> list[dict[str, Any]]:
    return [{"image_id": 1, "category_id": category, "bbox": list(box), "score": score} for box in boxes]


BOXES: dict[str, Any] = {"kinds": ["bbox"]}


def test_what_pycocotools_confuses_or_takes() -> None:
    boxes = (1, 1, 50, 50), (100, 100, 50, 50)
    truth = truth_of(*boxes)
    for annotation in truth["annotations"]:
        annotation["id"] = 7
    truth["categories"] *= 2
    found = found_at(*boxes, score=np.float32(0.9))
    evaluation = evaluate(found, truth, **BOXES)
    assert evaluation.summary["bbox_AP"] == pytest.approx(1)
    assert evaluation.notes == ["annotations that share an id, which pycocotools takes for one: numbered anew"]
    assert [row["name"] for row in evaluation.per_class] == ["cat", "dog"]
    assert evaluate(found, truth, keep_ids=True, **BOXES).summary["bbox_AP"] < 0.6
    for annotation in truth["annotations"]:
        annotation["id"] = [7]  # nothing that pycocotools could take, and here nobody asks
    assert evaluate(found, truth, **BOXES).notes == evaluation.notes


@pytest.mark.parametrize(
    ("side", "ranges"), [(31, "s"), (32, "sm"), (33, "m"), (95, "m"), (96, "ml"), (97, "l"), (199, "l")]
)
def test_ranges_of_area_hold_both_their_ends(side: int, ranges: str) -> None:
    box = (1, 1, side, side)
    summary = evaluate(found_at(box), truth_of(box), **BOXES).summary
    for name in "sml":
        assert (
            summary[f"bbox_AP{name}"] == pytest.approx(1) if name in ranges else math.isnan(summary[f"bbox_AP{name}"])
        )
    assert summary["bbox_AP"] == pytest.approx(1)


def test_an_overlap_of_exactly_half_is_a_match() -> None:
    evaluation = evaluate(found_at((0, 0, 20, 10)), truth_of((0, 0, 10, 10)), **BOXES)
    assert evaluation.summary["bbox_AP50"] == pytest.approx(1)
    assert evaluation.summary["bbox_AP"] == pytest.approx(0.1)
    assert evaluation.worst[0].f1 == 1
    evaluation = evaluate(found_at((0, 0, 20.1, 10)), truth_of((0, 0, 10, 10)), **BOXES)
    assert evaluation.summary["bbox_AP50"] == 0
    assert evaluation.worst[0].f1 == 0


def test_of_equal_overlaps_the_last_object_is_found() -> None:
    truth = truth_of((0, 0, 10, 10), (0, 6, 10, 10))
    found = found_at((0, 3, 10, 10)) + found_at((0, 0, 10, 8), score=0.8)  # the first overlaps both by 7 / 13
    evaluation = evaluate(found, truth, **BOXES)
    assert evaluation.summary["bbox_AP50"] == pytest.approx(1)
    assert evaluation.worst[0].f1 == 1


# On a coarse grid, where many overlaps are equal or exactly half.
CELL = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 4), st.integers(1, 4))


@given(
    objects=st.lists(st.tuples(CELL, st.sampled_from([0, 0, 0, 1])), max_size=6),
    claims=st.lists(st.tuples(CELL, st.sampled_from([0.5, 0.7, 0.9])), min_size=1, max_size=6),
    limit=st.sampled_from([1, 3, 100]),
)
@settings(max_examples=150, deadline=None)
def test_pictures_are_matched_as_by_cocoeval(objects: list[Any], claims: list[Any], limit: int) -> None:
    truth = truth_of(*(box for box, _ in objects))
    for annotation, (_, crowd) in zip(truth["annotations"], objects, strict=True):
        annotation["iscrowd"] = crowd
    found = [found_at(box, score=score)[0] for box, score in claims]
    matches = evaluate(found, truth, max_detections=limit, **BOXES).worst[0]
    index, peer, _ = tools()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = index()
        coco.dataset = deepcopy(truth)
        coco.createIndex()
        run = peer(coco, coco.loadRes(deepcopy(found)), "bbox")
        run.params.maxDets = [limit]
        run.evaluate()
    expected = run.evalImgs[0]  # of all areas; the first of its thresholds is .5
    by_claim = zip(expected["dtIds"], expected["dtMatches"][0], expected["dtIgnore"][0], strict=True)
    pairs = {(claim, int(match)) for claim, match, ignored in by_claim if not ignored}
    by_object = zip(expected["gtIds"], expected["gtMatches"][0], expected["gtIgnore"], strict=True)
    assert {(claim["id"], thing["id"]) for thing, claim in matches.found} == {pair for pair in pairs if pair[1]}
    assert {claim["id"] for claim in matches.false} == {claim for claim, match in pairs if not match}
    assert {x["id"] for x in matches.missed} == {x for x, match, ignored in by_object if not match and not ignored}


def test_what_lies_in_a_crowd_is_no_mistake() -> None:
    truth = truth_of((0, 0, 50, 50), (100, 100, 80, 80))
    truth["annotations"][1]["iscrowd"] = 1
    inside = found_at((0, 0, 50, 50), score=0.6) + found_at((110, 110, 20, 20), (140, 140, 20, 20))
    evaluation = evaluate(inside, truth, **BOXES)
    assert evaluation.summary["bbox_AP"] == pytest.approx(1)
    assert (len(evaluation.worst[0].found), evaluation.worst[0].missed, evaluation.worst[0].false) == (1, [], [])
    assert evaluation.per_class[0]["objects"] == 1
    outside = [*inside, *found_at((60, 0, 20, 20))]
    assert evaluate(outside, truth, **BOXES).summary["bbox_AP"] == pytest.approx(0.5)
    assert len(evaluate(outside, truth, **BOXES).worst[0].false) == 1


def test_a_category_without_objects_counts_in_no_mean() -> None:
    box = (0, 0, 50, 50)
    evaluation = evaluate(found_at(box) + found_at(box, category=5), truth_of(box), **BOXES)
    assert evaluation.summary["bbox_AP"] == pytest.approx(1)
    cat, dog = evaluation.per_class
    assert (cat["name"], cat["objects"], cat["bbox_AP"]) == ("cat", 1, pytest.approx(1))
    assert (dog["name"], dog["objects"]) == ("dog", 0)
    assert math.isnan(dog["bbox_AP"])
    assert np.isnan(evaluation.curves["bbox"].precision[..., 1]).all()
    json.dumps(evaluation.to_json(), allow_nan=False)
    assert evaluation.to_json()["per_class"][1]["bbox_AP"] is None
    assert evaluation.to_json()["curves"]["bbox"]["precision"][0] == pytest.approx([1.0] * 101)


def test_no_detections_are_an_average_precision_of_0(tmp_path: Path) -> None:
    truth = truth_of((0, 0, 50, 50), segmentation=[[0, 0, 50, 0, 50, 50, 0, 50]])
    evaluation = evaluate([], truth)
    for kind in ("bbox", "segm"):
        assert evaluation.summary[f"{kind}_AP"] == evaluation.summary[f"{kind}_AR100"] == 0
    assert (evaluation.worst[0].f1, len(evaluation.worst[0].missed)) == (0, 1)
    nothing = evaluate([], {**truth, "annotations": []})
    assert all(math.isnan(figure) for figure in nothing.summary.values())
    assert nothing.worst[0].f1 == 1
    pytest.importorskip("matplotlib")
    draw_curves(nothing, tmp_path / "curves.png")


def test_one_picture_or_category_of_several() -> None:
    box = (0, 0, 50, 50)
    truth = truth_of(box)
    truth["images"].append({"id": 2, "height": 200, "width": 200})
    truth["annotations"] += [
        {**truth["annotations"][0], "id": 2, "image_id": 2},
        {**truth["annotations"][0], "id": 3, "category_id": 5},
    ]
    found = found_at(box)

    def ap(**options: Any) -> float:
        return evaluate(found, truth, **options, **BOXES).summary["bbox_AP"]

    assert ap() == pytest.approx(51 / 101 / 2)  # recall .5 of the cats, nothing of the dogs
    assert ap(image_ids=[1]) == pytest.approx(1 / 2)
    assert ap(category_ids=[3]) == pytest.approx(51 / 101)
    assert ap(image_ids=[1], category_ids=[3]) == pytest.approx(1)
    only = evaluate(found, truth, image_ids=[1], category_ids=[3], **BOXES)
    assert [matches.image["id"] for matches in only.worst] == [1]
    assert [(row["name"], row["objects"]) for row in only.per_class] == [("cat", 1)]


@pytest.mark.parametrize("null", [False, True])
def test_missing_fields_are_filled_in_and_named(null: bool) -> None:
    truth = truth_of((10, 20, 40, 30), segmentation=[[10, 20, 50, 20, 50, 50, 10, 50]])
    whole = evaluate(found_at((10, 20, 40, 30)), truth, **BOXES)
    assert whole.notes == []
    for name in ("iscrowd", "area", "bbox"):
        truth["annotations"][0][name] = None
        if not null:
            del truth["annotations"][0][name]
    before = deepcopy(truth)
    evaluation = evaluate(found_at((10, 20, 40, 30)), truth, **BOXES)
    assert truth == before
    assert evaluation.summary == pytest.approx(whole.summary, nan_ok=True)
    assert [note.split(":")[0] for note in evaluation.notes] == [
        "1 annotations without 'iscrowd'",
        "1 annotations without 'bbox'",
        "1 annotations without 'area'",
    ]


def test_masks_count_by_their_own_area_whatever_box_comes_along() -> None:
    """A thin mask in a large box is a small object."""
    line = [[0, 0, 150, 0, 150, 5, 0, 5]]
    truth = truth_of((0, 0, 150, 150), segmentation=line)
    truth["annotations"][0]["area"] = 750
    found = found_at((0, 0, 150, 150))
    found[0]["segmentation"] = line
    other = {"segmentation": [[0, 50, 150, 50, 150, 55, 0, 55]], "score": 0.95}  # a mistake, and a small one
    summary = evaluate([*found, {**found[0], **other}], truth).summary
    assert summary["segm_APs"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({"image_id": 7}, {}, "images of the data set, got the unknown ids 7"),
        ({"category_id": 4}, {}, "categories of 3, 5, got the unknown ids 4"),
        ({"score": math.nan}, {}, "detection 0: expected a finite score, got nan"),
        ({"score": 10**400}, {}, "detection 0: expected a finite score, got 1000"),
        ({"bbox": [0, 0, 10**400, 5]}, {}, "detection 0: expected a bbox of x, y, width and height, got"),
        ({"bbox": [0, 0, math.nan, 5]}, {}, "detection 0: expected a bbox of x, y, width and height, got"),
        ({"bbox": None}, {}, "detection 0: expected a bbox or a segmentation"),
        ({"image_id": [1]}, {}, "detection 0: expected image_id as a number or text"),
        ({"category_id": None}, {}, "detection 0: expected category_id as a number or text"),
        ({}, {"kinds": ["segm"]}, "annotation 1: expected a segmentation, got none"),
        ({}, {"kinds": ["keypoints"]}, "kinds: expected bbox, segm or both"),
        ({}, {"max_detections": 0}, "max_detections: expected at least 1, got 0"),
        ({}, {"backend": "fastest"}, "backend: expected one of pycocotools, faster"),
        ({}, {"image_ids": [9]}, "image_ids: expected ids of the data set, got 9"),
        ({}, {"category_ids": [9]}, "category_ids: expected ids of the data set, got 9"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], options: dict[str, Any], complaint: str) -> None:
    box = (0, 0, 10, 10)
    with pytest.raises(ValueError, match=complaint):
        evaluate([{**found_at(box)[0], **change}], truth_of(box), **BOXES | options)


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        ("images", {"id": None}, "image 0: expected id as a number or text, got"),
        ("categories", {"id": [3]}, "category 0: expected id as a number or text, got"),
        ("categories", {"id": "3"}, "categories: expected ids that are all numbers or all text"),
        ("categories", {"name": None}, "category 0: expected name as a number or text, got"),
        ("annotations", {"image_id": None}, "annotation 0: expected image_id as a number or text, got"),
        ("annotations", {"category_id": {}}, "annotation 0: expected category_id as a number or text, got"),
        ("annotations", {"bbox": [1, 2, 3]}, "annotation 1: expected a bbox of x, y, width and height, got"),
        ("annotations", {"bbox": [1, 2, math.inf, 3]}, "annotation 1: expected a bbox of x, y, width and height, got"),
        ("annotations", {"area": "5"}, "annotation 1: expected an area in pixels, got '5'"),
        ("annotations", {"area": math.nan}, "annotation 1: expected an area in pixels, got nan"),
    ],
)
def test_ground_truth_that_cannot_be_evaluated_is_named(
    tmp_path: Path, kind: str, change: dict[str, Any], complaint: str
) -> None:
    truth = truth_of((0, 0, 10, 10))
    truth[kind][0].update(change)
    with pytest.raises(ValueError, match=f"^{complaint}"):
        evaluate([], truth, **BOXES)
    (path := tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=rf"^.*truth\.json: {complaint}"):
        check_truth(path, ["bbox"])
    with pytest.raises(ValueError, match="annotation 0: expected id"):
        evaluate([], {**truth_of(), "annotations": [{"image_id": 1, "category_id": 3}]}, keep_ids=True)


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    truth = truth_of((0, 0, 10, 10), segmentation=[[0, 0, 10, 0, 10, 10, 0, 10]])
    found = [{"image_id": 1, "category_id": 3, "score": 1.0, "segmentation": {"size": [9, 9], "counts": [0, 81]}}]
    with pytest.raises(ValueError, match=r"detection 0: expected a mask of the size of image 1, \[200, 200\]"):
        evaluate(found, truth)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json: expected COCO results, a list of detections, got a dict"):
        evaluate(tmp_path / "results.json", truth)


def test_detect_takes_any_predictor(tmp_path: Path) -> None:
    """Ids are the data set's; pictures that cannot be read stop it; what was stored turned is taken as stored."""
    tag = Image.Exif()
    tag[0x0112] = 6
    for name, exif in (("a.jpg", Image.Exif()), ("b.jpg", tag)):
        Image.new("RGB", (30, 20)).save(tmp_path / name, exif=exif)
    calls = []

    def predict(source: Any, stream: bool = False, **options: Any) -> Any:
        calls.append(options)

        def result(item: Any) -> Result:
            size = item.shape[:2] if isinstance(item, np.ndarray) else Image.open(item).size[::-1]
            if str(item).endswith("b.jpg"):
                size = size[::-1]
            return Result(np.array([[1, 2, 5, 7]]), [0.5], [0], size, category_ids=[3])

        return (result(item) for item in source) if stream else result(source)

    images = [{"id": n, "file_name": name, "height": 20, "width": 30} for n, name in ((7, "a.jpg"), (9, "b.jpg"))]
    found = list(detect(predict, sources({"images": images}, tmp_path), batch_size=2))
    box = {"category_id": 3, "bbox": [1.0, 2.0, 4.0, 5.0], "score": 0.5, "area": 20.0}
    assert found == [[{"image_id": 7, **box}], [{"image_id": 9, **box}]]
    assert calls == [{"batch_size": 2, "run_lengths": True}, {}]

    def unreadable(source: Any, **options: Any) -> Any:
        return [Result(np.zeros((0, 4)), [], [], (20, 30), error=OSError("gone")) for _ in source]

    with pytest.raises(OSError, match="gone"):
        list(detect(unreadable, sources({"images": images}, tmp_path)))
    images[0]["height"] = 21
    with pytest.raises(ValueError, match=r"a\.jpg: expected .*30 x 21 pixels, got 30 x 20"):
        list(detect(predict, sources({"images": images}, tmp_path)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model's weights, and a data set of three pictures in which some of what it finds is an object."""
    folder = tmp_path_factory.mktemp("data")
    weights = folder / "small.safetensors"
    save(small_model(), weights)
    (folder / "annotations").mkdir()
    (folder / "val").mkdir()
    rng = np.random.default_rng(5)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": x, "name": name} for x, name in ((16, "bird"), (17, "cat"), (18, "dog"))]
    for n in (1, 2, 3):
        Image.fromarray(rng.integers(0, 256, (60, 60 + 20 * n, 3), dtype=np.uint8)).save(folder / "val" / f"{n}.png")
        content["images"].append({"id": n, "file_name": f"{n}.png", "height": 60, "width": 60 + 20 * n})
    from trimask import load

    predictor = load(weights, device="cpu")
    for found in detect(predictor.predict, sources(content, folder / "val")):
        for entry in found[::3]:
            content["annotations"].append({**entry, "id": len(content["annotations"]), "iscrowd": 0})
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return weights, folder


def run(*arguments: object) -> int:
    return main(["eval", *(str(argument) for argument in arguments)])


def test_eval_writes_figures_detections_and_pictures(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    weights, folder = small
    out = tmp_path / "out"
    assert run("--weights", weights, "--data", folder, "--device", "cpu", "--output", out) == 0
    assert {path.name for path in out.iterdir()} == {"metrics.json", "detections.json", "curves.png", "worst.jpg"}
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["weights"] == str(weights)
    assert metrics["pictures"] == 3
    assert metrics["notes"] == ["annotation id 0, which pycocotools and Detectron2 count as missed: numbered anew"]
    assert 0 < metrics["summary"]["segm_AP"] < 1
    assert len(metrics["summary"]) == 24
    for text in ("3 pictures", "APs", "AR100", "cat", "bird", f"{100 * metrics['summary']['bbox_AP']:.2f}", "note: "):
        assert text in printed
    expected = evaluate(out / "detections.json", folder / "annotations" / "instances_val.json")
    assert expected.to_json()["summary"] == metrics["summary"]

    truth = folder / "annotations" / "instances_val.json"
    scored = ("--detections", out / "detections.json", "--data", truth)
    assert run(*scored, "--json") == 0
    assert json.loads(capsys.readouterr().out)["summary"] == metrics["summary"]
    assert run(*scored, "--categories", "cat", "--kinds", "bbox", "--max-detections", 10, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["per_class"]] == ["cat"]
    assert "bbox_AR10" in found["summary"]
    assert "segm_AP" not in found["summary"]
    assert run(*scored, "--max-detections", 0) == 1
    assert "max-detections: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("launch", ["spawn", "torchrun"])
def test_processes_share_the_work_and_change_nothing(small: tuple[Path, Path], tmp_path: Path, launch: str) -> None:
    weights, folder = small
    arguments = ("--weights", weights, "--data", folder, "--device", "cpu", "--batch-size", "2", "--output")
    assert run(*arguments, tmp_path / "one") == 0
    if launch == "spawn":
        assert run(*arguments, tmp_path / "two", "--processes", 2) == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        command += ["trimask", "eval", *map(str, arguments), str(tmp_path / "two")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, timeout=400, env=environment)
    for name in ("detections.json", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def edited(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    change(content)
    target.write_text(json.dumps(content))
    return target


def test_eval_compares_like_with_like(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, folder = small
    rest = ("--weights", weights, "--images", folder / "val", "--device", "cpu", "--output", tmp_path / "out")
    lacking = edited(folder, tmp_path / "lacking.json", lambda content: content["categories"].pop(1))
    assert run("--data", lacking, *rest) == 1
    complaint = capsys.readouterr().err
    assert "expected classes of the data set (16 bird, 18 dog), got 17 cat besides" in complaint
    assert len(complaint.splitlines()) == 1
    assert run("--data", lacking, *rest, "--categories", "dog") == 0
    renamed = edited(folder, tmp_path / "renamed.json", lambda content: content["categories"][0].update(name="crow"))
    assert run("--data", renamed, *rest) == 0
    assert "category 16 is 'bird' to the model and 'crow' in the data" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_eval_says_which_classes_the_model_lacks(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    weights, folder = small

    def add(content: dict[str, Any], objects: bool) -> None:
        content["categories"] += [{"id": 1, "name": "traffic light"}, {"id": 2, "name": "bus"}]
        if objects:
            content["annotations"][0]["category_id"] = 1

    data = edited(folder, tmp_path / "more.json", lambda content: add(content, True))
    rest = ("--weights", weights, "--images", folder / "val", "--device", "cpu", "--processes", processes)
    rest += ("--output", tmp_path / "out")
    assert run("--data", data, *rest) == 0
    note = "the model has 3 of the 5 classes of the data that count; the others count as 0 (--categories "
    assert f"note: {note}" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["known_categories"] == 3
    assert any(text.startswith(note) for text in metrics["notes"])
    assert run("--data", data, *rest, "--categories", "cat", "dog") == 0
    assert "of the data that count" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["known_categories"] == 2
    # Classes without objects are no part of a mean.
    data = edited(folder, tmp_path / "empty.json", lambda content: add(content, False))
    assert run("--data", data, *rest) == 0
    assert "of the data that count" not in capsys.readouterr().out


def test_the_note_on_classes_names_what_to_choose() -> None:
    rows = [{"id": n, "name": name, "objects": 1} for n, name in enumerate(("cat", "traffic light", "dog", "cow", "x"))]
    assert lacking(rows, {0, 1})[0].endswith("as 0 (--categories cat 'traffic light' for those alone)")
    assert lacking(rows, {0, 1, 2, 3})[0].endswith("as 0 (--categories NAME ... for those alone)")
    assert lacking(rows, set())[0].endswith("the others count as 0")
    assert lacking(rows, {0, 1, 2, 3, 4}) == []


def test_eval_goes_by_names_where_ids_mean_something_else(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, folder = small
    numbers = {16: 17, 17: 0, 18: 16}

    def renumber(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["id"] = numbers[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = numbers[annotation["category_id"]]

    other = edited(folder, tmp_path / "other.json", renumber)
    rest = ("--weights", weights, "--images", folder / "val", "--device", "cpu", "--output")
    assert run("--data", folder / "annotations" / "instances_val.json", *rest, tmp_path / "a") == 0
    capsys.readouterr()
    assert run("--data", other, *rest, tmp_path / "b") == 0
    assert "category 17 of the model is 0 in the data, by its name 'cat'" in capsys.readouterr().err
    figures = [json.loads((tmp_path / part / "metrics.json").read_text())["summary"] for part in "ab"]
    assert figures[0] == figures[1]
    assert figures[0]["segm_AP"] > 0
    assert run("--data", other, *rest, tmp_path / "c", "--categories", "cat", "dog") == 0
    lacking = edited(
        folder, tmp_path / "lacking.json", lambda content: (renumber(content), content["categories"].pop())
    )
    assert run("--data", lacking, *rest, tmp_path / "d") == 1
    assert "got 18 dog besides" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--data", "{folder}/annotations/instances_val.json"), "--images DIR"),
        (("--data", "{folder}/val"), "data: expected one of instances_val2017.json"),
        (("--data", "{folder}", "--categories", "cow"), "categories: expected some of bird, cat, dog, got cow"),
        (("--data", "{folder}", "--processes", "0"), "expected at least 1"),
        (("--data", "{folder}", "--images", "nowhere"), "nowhere"),
        (("--data", "{folder}", "--output", "{folder}/val/1.png"), "output: expected a folder, got the file "),
    ],
)
def test_eval_fails_in_one_line(
    small: tuple[Path, Path], arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, folder = small
    assert run("--weights", weights, "--device", "cpu", "--json", *(x.format(folder=folder) for x in arguments)) == 1
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert complaint in printed.err


def test_eval_scores_what_predict_wrote(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Whose pictures have other ids, and paths; the model's categories are matched by name."""
    weights, folder = small
    (tmp_path / "val").mkdir()
    for n in (4, 3, 2, 1):  # one more, in another order
        source = folder / "val" / f"{min(n, 3)}.png"
        (tmp_path / "val" / f"{n}.png").write_bytes(source.read_bytes())
    sources = [str(tmp_path / "val" / f"{n}.png") for n in (4, 3, 2, 1)]
    given = ("--weights", str(weights), "--device", "cpu")
    out = tmp_path / "found"
    assert main(["predict", *sources, *given, "--score", "0.05", "--output", str(out), "--no-overlays"]) == 0

    def renumber(content: dict[str, Any]) -> None:
        for entry in (*content["categories"], *content["annotations"]):
            name = "id" if "name" in entry else "category_id"
            entry[name] -= 10

    data = edited(folder, tmp_path / "data.json", renumber)
    images = ("--images", folder / "val")
    assert run("--data", folder, *given, "--output", tmp_path / "a") == 0
    found = ("--detections", out / "detections.json")
    for n, (truth, more) in enumerate(((folder, ()), (data, images))):
        assert run("--data", truth, *found, *more, "--output", tmp_path / str(n)) == 0
        figures = [json.loads((tmp_path / part / "metrics.json").read_text()) for part in ("a", str(n))]
        assert figures[0]["summary"] == figures[1]["summary"]
        assert figures[0]["detections"] == figures[1]["detections"] > 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda found: found["images"].pop(), r"found.json: expected every picture of the data set, lacks '3\.png'"),
        (lambda found: found["images"][2].update(file_name="b/2.png"), "one picture that ends in 2.png, got another"),
        (lambda found: found["categories"][1].update(name="cow"), "expected categories of .* unknown ids 'cow'"),
        (lambda found: found["annotations"][0].pop("score"), "found.json: annotation 0: expected score"),
    ],
)
def test_a_data_set_of_detections_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    truth = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 9, "width": 9} for n in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [],
    }
    found: dict[str, Any] = deepcopy(truth)
    for image in found["images"]:
        image["file_name"] = f"photos/{image['file_name']}"
    found["annotations"] = [{"image_id": n, "category_id": 2, "score": 0.5, "bbox": [1, 1, 3, 3]} for n in (1, 2, 3)]
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    evaluate(path, truth, kinds=["bbox"])
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=complaint):
        evaluate(path, truth, kinds=["bbox"])


def test_a_model_is_evaluated_in_one_call(small: tuple[Path, Path], tmp_path: Path) -> None:
    import trimask

    weights, folder = small
    model = trimask.load(weights, device="cpu")
    assert run("--data", folder, "--weights", weights, "--device", "cpu", "--output", tmp_path / "a") == 0
    written = json.loads((tmp_path / "a" / "metrics.json").read_text())
    seen: list[int] = []

    def progress(items: Any, total: int) -> Any:
        seen.append(total)
        return items

    evaluation = trimask.evaluate_model(model, folder, progress=progress)
    assert evaluation.to_json()["summary"] == written["summary"]
    assert seen == [3]
    annotations = folder / "annotations" / "instances_val.json"
    one = trimask.evaluate_model(model, annotations, folder / "val", categories=["cat"], kinds=["bbox"], workers=2)
    assert [row["name"] for row in one.per_class] == ["cat"]
    assert one.per_class[0]["bbox_AP"] == evaluation.per_class[1]["bbox_AP"]
    assert "segm_AP" not in one.summary
    with pytest.raises(ValueError, match="images: expected the folder of the pictures, got none"):
        trimask.evaluate_model(model, annotations)
    more = edited(folder, tmp_path / "more.json", lambda content: content["categories"].append({"id": 1, "name": "x"}))
    content = json.loads(more.read_text())
    content["annotations"][0]["category_id"] = 1
    more.write_text(json.dumps(content))
    assert "has 3 of the 4 classes" in trimask.evaluate_model(model, more, folder / "val").notes[-1]


def test_eval_of_malformed_files_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    right, box = truth_of((0, 0, 10, 10)), found_at((0, 0, 10, 10))
    del right["annotations"][0]["image_id"]
    truth.write_text(json.dumps(right))
    found.write_text(json.dumps(box))
    assert run("--detections", found, "--data", truth, "--json") == 1
    assert "truth.json: annotation 0: expected image_id" in capsys.readouterr().err
    truth.write_text(json.dumps(truth_of((0, 0, 10, 10))))
    found.write_text(json.dumps([{**box[0], "category_id": [3]}]))
    assert run("--detections", found, "--data", truth, "--categories", "cat", "--json") == 1
    assert "found.json: detection 0: expected category_id" in capsys.readouterr().err


def test_eval_counts_all_categories_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    content = truth_of((0, 0, 10, 10), (50, 50, 10, 10))
    content["categories"][1]["name"] = "cat"
    content["annotations"][1]["category_id"] = 5
    truth.write_text(json.dumps(content))
    found.write_text(json.dumps(found_at((0, 0, 10, 10))))
    for chosen in ((), ("--categories", "cat")):
        assert run("--detections", found, "--data", truth, "--json", *chosen) == 0
        summary = json.loads(capsys.readouterr().out)["summary"]
        assert summary["bbox_AP"] == pytest.approx(0.5)


def test_classes_of_one_name_are_matched_by_their_ids_or_refused() -> None:
    data = {1: "cat", 2: "Cat", 3: "dog"}
    assert matched(data, data) == ({1: 1, 2: 2, 3: 3}, [])
    found, notes = matched({1: "cat", 9: "dog"}, data)
    assert found == {1: 1, 9: 3}
    assert notes == ["category 9 of the model is 3 in the data, by its name 'dog'"]
    with pytest.raises(ValueError, match=r"data: expected one category named 'cat', got the ids \[1, 2\]"):
        matched({7: "cat"}, data)


def test_classes_of_which_no_name_is_known_are_refused_unless_all_ids_are_the_same() -> None:
    fruits = {1: "date", 2: "fig", 3: "hazelnut"}
    for chosen in (None, ["date"]):
        with pytest.raises(ValueError, match=r"expected classes of the data set .* got 1 person besides"):
            matched({1: "person"}, fruits, chosen)
    assert matched({1: "pedestrian"}, {1: "person"})[0] == {1: 1}
    assert matched({1: "class_1"}, fruits) == ({1: 1}, [])
    assert matched({1: "date", 2: "person"}, fruits)[0] == {1: 1, 2: 2}


def test_eval_of_the_bundled_model(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four pictures of Penn-Fudan: whole people in the street, which it finds."""
    content = json.loads((shared_data / "pennfudan" / "annotations" / "instances_val.json").read_text())
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    (tmp_path / "four.json").write_text(json.dumps(content))
    images = shared_data / "pennfudan" / "images"
    assert run("--data", tmp_path / "four.json", "--images", images, "--device", "cpu", "--json") == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert 0.4 < summary["segm_AP"] < 0.9
    assert summary["bbox_AP50"] > 0.7


def test_the_documentation_has_the_published_figures() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| `") and "/" in row.split("`")[1]]
    models = [model for model in PUBLISHED.values() if not model.unsupported]
    assert rows == [f"| `{model.name}` | {model.box_ap or ''} | {model.mask_ap or ''} |" for model in models]


def test_the_sheet_shows_mistakes_beside_the_truth(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), (90, 90, 90)).save(tmp_path / "a.png")
    truth = truth_of((20, 20, 40, 40), (120, 120, 40, 40))
    truth["images"][0]["file_name"] = "a.png"
    pictures = sources(truth, tmp_path)
    right = evaluate(found_at((20, 20, 40, 40), (120, 120, 40, 40)), truth, **BOXES)
    assert draw_worst(right, pictures, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    wrong = evaluate(found_at((20, 20, 40, 40), (20, 120, 40, 40)), truth, **BOXES)
    (matches,) = wrong.worst
    assert (len(matches.found), len(matches.missed), len(matches.false), matches.f1) == (1, 1, 1, 0.5)
    sheet = np.asarray(Image.open(draw_worst(wrong, pictures, tmp_path / "sheet.png")))
    left, right_half = sheet[56:256, 14:214].astype(int), sheet[56:256, 228:428].astype(int)
    changed = np.abs(left - right_half).sum(2) > 60

    def border(panel: np.ndarray, x: int, y: int) -> bool:
        return bool((np.ptp(panel[y + 10 : y + 30, x - 3 : x + 4], axis=2) > 60).any(1).all())

    assert border(left, 20, 20)
    assert border(right_half, 20, 20)
    assert border(left, 120, 120)
    assert not border(right_half, 120, 120)
    assert border(right_half, 20, 120)
    assert not border(left, 20, 120)
    assert not changed[45:55, 20:60].any()  # what was found has one colour in both
