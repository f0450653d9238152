"""Every detection equals torchvision's: same weights, same picture, float32."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import trimask
from matching import Found, differences, of_result, of_torchvision
from models import PEOPLE_OPTIONS
from seeded import seeded_state
from tolerances import AVERAGE_PRECISION, HALF_AVERAGE_PRECISION
from trimask.benchmarks.device import has_bfloat16


def photographs() -> list[np.ndarray]:
    """Three real pictures of different sizes that come with scikit-image."""
    data = pytest.importorskip("skimage.data")
    return [np.ascontiguousarray(picture) for picture in (data.astronaut(), data.coffee(), data.chelsea())]


def frozen_v1(detection: Any) -> torch.nn.Module:
    """The model as its published COCO weights want it: norms frozen, their epsilon zero."""
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    model = detection.MaskRCNN(backbone, num_classes=91)
    overwrite_eps(model, 0.0)
    return model


BUILDERS = {
    "v1": lambda detection: detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None),
    "v1 frozen": frozen_v1,
    "v2": lambda detection: detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None),
}


@pytest.fixture(scope="module", params=list(BUILDERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, trimask.Predictor]:
    """A model of torchvision with seeded weights, and ours loaded from the file that torch saved.

    The first sees pictures at the published size, the others at less than half of it.
    """
    detection = pytest.importorskip("torchvision").models.detection
    theirs = BUILDERS[request.param](detection).eval()
    size = {} if request.param == "v1" else {"min_size": 480, "max_size": 800}
    if size:
        theirs.transform.min_size, theirs.transform.max_size = (480,), 800
    theirs.load_state_dict(seeded_state(theirs.state_dict(), seed=7))
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(theirs.state_dict(), path)
    return theirs, trimask.load(path, device="cpu", **size)


def run(model: Any, pictures: list[np.ndarray]) -> list[Found]:
    tensors = [torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pictures]
    with torch.inference_mode():
        return [of_torchvision(output) for output in model(tensors)]


def test_every_detection_of_every_picture(pair: tuple[Any, trimask.Predictor]) -> None:
    theirs, ours = pair
    for picture in photographs():
        (expected,) = run(theirs, [picture])
        assert len(expected.scores) > 20, "seeded weights that find next to nothing prove next to nothing"
        assert differences(of_result(ours.predict(picture)), expected, cut=True) == []


def test_a_batch_of_mixed_sizes_equals_the_same_batch(pair: tuple[Any, trimask.Predictor]) -> None:
    theirs, ours = pair
    pictures = [picture[::2, ::2] for picture in photographs()]
    for result, expected in zip(ours.predict(pictures, batch_size=3), run(theirs, pictures), strict=True):
        assert differences(of_result(result), expected, cut=True) == []


def test_half_a_pixel_is_noticed(pair: tuple[Any, trimask.Predictor]) -> None:
    """The comparison itself can fail: boxes moved by half a pixel in the network's frame do not pass."""
    theirs, _ = pair
    (expected,) = run(theirs, [photographs()[2][::4, ::4]])
    assert differences(expected._replace(boxes=expected.boxes + 0.5), expected, cut=True) != []


@pytest.fixture(scope="module")
def people(shared_data: Path) -> trimask.Predictor:
    path = shared_data / "weights" / "people_mobilenetv2_fpn128_torchvision.pth"
    return trimask.load(path, device="cpu", **PEOPLE_OPTIONS)


def decode(found: dict[str, Any]) -> Found:
    mask = pytest.importorskip("pycocotools.mask")
    masks = [mask.decode({"size": m["size"], "counts": m["counts"].encode()}) for m in found["masks"]]
    scores = np.array(found["scores"])
    return Found(np.array(found["boxes"]), scores, np.zeros(len(scores), int), np.array(masks, bool))


def test_the_people_model_on_every_validation_picture(
    people: trimask.Predictor, golden: Path, shared_data: Path
) -> None:
    recorded = json.loads((golden / "torchvision_people.json").read_text())["images"]
    assert len(recorded) == 34
    wrong = {}
    for name, found in recorded.items():
        result = people.predict(shared_data / "pennfudan" / "images" / name)
        wrong[name] = differences(of_result(result), decode(found), cut=True)
    assert {name: what for name, what in wrong.items() if what} == {}


def average_precision(predictor: trimask.Predictor, folder: Path) -> dict[str, np.ndarray]:
    """The twelve figures of COCO for boxes and for masks, from `Result.to_coco`."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth = coco.COCO(str(folder / "annotations" / "instances_val.json"))
    entries = [
        entry
        for number, picture in truth.imgs.items()
        for entry in predictor.predict(folder / "images" / picture["file_name"]).to_coco(number)
    ]
    figures = {}
    for kind in ("bbox", "segm"):
        evaluator = evaluation.COCOeval(truth, truth.loadRes(entries), kind)
        evaluator.params.catIds = [1]  # people
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        figures[kind] = evaluator.stats
    return figures


def test_average_precision_of_the_people_model(people: trimask.Predictor, golden: Path, shared_data: Path) -> None:
    recorded = json.loads((golden / "torchvision_people.json").read_text())["stats"]["pennfudan_val"]
    figures = average_precision(people, shared_data / "pennfudan")
    for kind in ("bbox", "segm"):
        np.testing.assert_allclose(figures[kind], recorded[kind], rtol=0, atol=AVERAGE_PRECISION)


@pytest.mark.parametrize(("data", "key"), [("pennfudan", "pennfudan_val"), ("coco_open", "coco_open_val_person")])
def test_the_bundled_model_beats_that_one(data: str, key: str, golden: Path, shared_data: Path) -> None:
    """In half precision on disk, as it ships."""
    recorded = json.loads((golden / "torchvision_people.json").read_text())["stats"][key]
    bundled = average_precision(trimask.load("people", device="cpu"), shared_data / data)
    for kind in ("bbox", "segm"):
        assert bundled[kind][0] > recorded[kind][0]


@pytest.mark.skipif(not has_bfloat16(), reason="needs a processor that computes in bfloat16")
@pytest.mark.parametrize("data", ["pennfudan", "coco_open"])
def test_bfloat16_finds_as_much(data: str, shared_data: Path) -> None:
    exact, rough = (
        average_precision(trimask.load("people", device="cpu", dtype=dtype), shared_data / data)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for kind in ("bbox", "segm"):
        assert abs(rough[kind][0] - exact[kind][0]) < HALF_AVERAGE_PRECISION


def test_people_on_a_public_portrait() -> None:
    """Runs everywhere: Grace Hopper, in matplotlib, is one person before a flag that passes for another."""
    matplotlib = pytest.importorskip("matplotlib")
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = trimask.load("people", device="cpu", score=0.95).predict(path)
    assert result.names == ["person"]
    width, height = Image.open(path).size
    assert result.masks.shape == (1, height, width)
    assert 0.4 < result.masks.mean() < 0.9
