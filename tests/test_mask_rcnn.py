"""The model as a whole, on small random networks: contracts, invariances, odd inputs."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from models import SMALL, VARIANTS, small_model
from tolerances import FOLDED
from trimask.engine.inference.graph import optimize
from trimask.engine.model.heads import select_detections
from trimask.engine.model.mask_rcnn import Detections

CPU = torch.device("cpu")
SIZES = torch.tensor([[128, 160], [100, 130]])


def batch(rng: torch.Generator) -> torch.Tensor:
    return torch.rand(2, 3, 128, 160, generator=rng) * 255


def one(found: Detections, i: int) -> list[torch.Tensor]:
    n = int(found.count[i])
    return [x[i, :n] for x in (found.boxes, found.scores, found.labels, found.mask_logits) if x is not None]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.inference_mode()
def test_every_variant_keeps_the_contract(config, rng: torch.Generator) -> None:
    model = small_model(config)
    originals = SIZES * 3
    found = model(batch(rng), SIZES, originals, detection=replace(config.detection, score_threshold=0.0))
    assert int(found.count.min()) > 0
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.labels.dtype == found.count.dtype == torch.int64
    assert (found.mask_logits is None) == (config.mask_head is None)
    capacity = found.boxes.shape[1]
    assert found.scores.shape == found.labels.shape == (2, capacity)
    for i in range(2):
        boxes, scores, labels, *masks = one(found, i)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= originals[i].flip(0)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (scores.diff() <= 0).all()
        assert (scores > 0).all()
        assert ((labels >= 0) & (labels < config.num_classes)).all()
        for mask in masks:
            assert mask.shape == (len(boxes), config.mask_side, config.mask_side)
        rest = int(found.count[i])
        assert found.boxes[i, rest:].abs().sum() == found.scores[i, rest:].sum() == found.labels[i, rest:].sum() == 0


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=FOLDED, atol=FOLDED * expected.abs().max().item())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.inference_mode()
def test_folded_and_fused_equals_plain(config, rng: torch.Generator) -> None:
    """Part by part, since the selection between them turns a rounding into another choice."""
    plain = small_model(config)
    fused = optimize(plain, CPU, torch.float32)
    x = plain.normalize(batch(rng), SIZES)
    pyramid = plain.fpn(plain.backbone(x))
    for found, expected in zip(fused.fpn(fused.backbone(x)), pyramid, strict=True):
        assert_near(found, expected)
    for found, expected in zip(chain(*fused.rpn(pyramid)), chain(*plain.rpn(pyramid)), strict=True):
        assert_near(found, expected)
    corners = torch.rand(2, 9, 2, generator=rng) * 60
    boxes, count = torch.cat([corners, corners + 8 + corners.flip(2)], 2), torch.tensor([9, 7])

    def rois(resolution: int) -> torch.Tensor:
        found, expected = (model.pool(pyramid, boxes, count, resolution) for model in (fused, plain))
        for features in (found, expected):
            features[1, 7:] = 0  # what is not there
        assert_near(found, expected)
        return expected.flatten(0, 1)

    features = rois(config.box_head.resolution)
    for found, expected in zip(fused.box_head(features), plain.box_head(features), strict=True):
        assert_near(found, expected)
    if config.mask_head:
        features, labels = rois(config.mask_head.resolution), torch.arange(18) % 3
        assert_near(fused.mask_head(features, labels), plain.mask_head(features, labels))


def test_optimize_leaves_the_model_alone() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimize(model, CPU, torch.bfloat16)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.inference_mode()
def test_a_picture_does_not_depend_on_its_neighbours_at_equal_padded_size(rng: torch.Generator) -> None:
    """Features to rounding; what is selected from given scores and deltas, to the last bit."""
    model = optimize(small_model(), CPU, torch.float32)
    x = model.normalize(batch(rng), SIZES)
    pyramid = model.fpn(model.backbone(x))
    sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
    logits, deltas = model.rpn(pyramid)
    boxes, count = model.rpn.select(logits, deltas, sizes, (128, 160), SIZES)
    scores, moves = torch.randn(2, 100, 4, generator=rng), torch.randn(2, 100, 3, 4, generator=rng)
    together = select_detections(scores, moves, boxes, count, SIZES, SMALL.detection)
    for i in range(2):
        one = slice(i, i + 1)
        for alone, level in zip(model.fpn(model.backbone(x[one])), pyramid, strict=True):
            assert_near(alone, level[one])
        found = model.rpn.select([y[one] for y in logits], [y[one] for y in deltas], sizes, (128, 160), SIZES[one])
        assert torch.equal(found[0], boxes[one])
        assert torch.equal(found[1], count[one])
        alone = select_detections(scores[one], moves[one], boxes[one], count[one], SIZES[one], SMALL.detection)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


@torch.inference_mode()
def test_what_lies_in_the_padding_is_ignored(rng: torch.Generator) -> None:
    model = small_model()
    image = batch(rng)
    other = image.clone()
    other[1, :, 100:] = torch.nan
    other[1, :, :, 130:] = torch.inf
    for a, b in zip(model(image, SIZES, SIZES), model(other, SIZES, SIZES), strict=True):
        assert torch.equal(a, b)


@torch.inference_mode()
def test_nothing_found_is_a_normal_case(rng: torch.Generator) -> None:
    detection = replace(SMALL.detection, score_threshold=1.0)
    found = small_model()(batch(rng), SIZES, SIZES, detection=detection)
    assert found.count.tolist() == [0, 0]
    assert found.boxes.abs().sum() == found.scores.sum() == found.labels.sum() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@torch.inference_mode()
def test_bad_values_find_nothing_and_harm_no_neighbour(bad: float, rng: torch.Generator) -> None:
    model = small_model()
    image = batch(rng)
    expected = one(model(image, SIZES, SIZES), 1)
    image[0] = bad
    found = model(image, SIZES, SIZES)
    assert all(torch.isfinite(x).all() for x in one(found, 0))
    for a, b in zip(one(found, 1), expected, strict=True):
        torch.testing.assert_close(a, b)


@torch.inference_mode()
def test_repeated_calls_repeat(rng: torch.Generator) -> None:
    model = optimize(small_model(), CPU, torch.float32)
    image = batch(rng)
    copy = image.clone()
    first = model(image, SIZES, SIZES)
    for _ in range(3):
        for a, b in zip(first, model(image, SIZES, SIZES), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(image, copy)


@torch.inference_mode()
def test_detections_are_cut_at_the_capacity(rng: torch.Generator) -> None:
    model = small_model()
    image = batch(rng)
    everything = model(image, SIZES, SIZES, detection=replace(SMALL.detection, score_threshold=0.0))
    five = model(image, SIZES, SIZES, detection=replace(SMALL.detection, score_threshold=0.0, max_detections=5))
    assert five.count.tolist() == [5, 5]
    assert torch.equal(five.scores, everything.scores[:, :5])
    assert torch.equal(five.boxes, everything.boxes[:, :5])


@torch.inference_mode()
def test_bfloat16_is_close(rng: torch.Generator) -> None:
    """Boxes and scores stay float32, and the best detection is the same one."""
    model = small_model()
    image = batch(rng)
    exact, rough = (optimize(model, CPU, dtype)(image, SIZES, SIZES) for dtype in (torch.float32, torch.bfloat16))
    assert rough.boxes.dtype == rough.scores.dtype == torch.float32
    torch.testing.assert_close(rough.scores[:, 0], exact.scores[:, 0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_trunks_have_the_published_number_of_parameters(depth: int) -> None:
    """torchvision documents them, classifier included: it has 1000 outputs."""
    from trimask.engine.model.backbone import ResNet
    from trimask.engine.model.config import ResNetConfig

    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    published = {18: 11689512, 34: 21797672, 50: 25557032, 101: 44549160, 152: 60192808}[depth]
    with torch.device("meta"):
        trunk = ResNet(ResNetConfig(blocks, bottleneck=depth >= 50))
    classifier = 1000 * trunk.channels[-1] + 1000
    assert sum(p.numel() for p in trunk.parameters()) + classifier == published
