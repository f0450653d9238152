"""Box arithmetic and anchors, against float64 written out and against torchvision."""

import math

import numpy as np
import pytest
import torch

from trimask.engine.model import boxes as B
from trimask.engine.model.anchors import Anchors
from trimask.engine.model.config import AnchorConfig


def random_boxes(rng: torch.Generator, n: int, side: float = 100.0) -> torch.Tensor:
    """Sides from 2 to ``side``: no pair's ratio reaches 1000 / 16, where deltas are cut."""
    low = torch.rand(n, 2, generator=rng, dtype=torch.float64) * side
    return torch.cat([low, low + 2 + torch.rand(n, 2, generator=rng, dtype=torch.float64) * (side - 2)], 1)


def test_decode_one_by_hand() -> None:
    box = torch.tensor([10.0, 20.0, 30.0, 60.0], dtype=torch.float64)  # centre 20, 40, size 20 x 40
    delta = torch.tensor([1.0, -0.5, math.log(2) * 5, 100.0], dtype=torch.float64)
    found = B.decode(delta, box, (10.0, 5.0))
    width, height = 40.0, 40 * 1000 / 16  # a delta is cut at log(1000 / 16)
    expected = [22 - width / 2, 38 - height / 2, 22 + width / 2, 38 + height / 2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_encode_and_decode_are_inverse(rng: torch.Generator) -> None:
    boxes, targets = random_boxes(rng, 50), random_boxes(rng, 50)
    weights = (10.0, 5.0)
    found = B.decode(B.encode(targets, boxes, weights), boxes, weights)
    np.testing.assert_allclose(found.numpy(), targets.numpy(), rtol=1e-9, atol=1e-9)


def test_decode_stays_in_float32_for_half_deltas() -> None:
    found = B.decode(torch.full((1, 4), 0.1, dtype=torch.float16), torch.tensor([[1.0, 2, 3, 4]]), (1, 1))
    assert found.dtype == torch.float32


def test_clip_takes_each_picture_by_its_own_size() -> None:
    boxes = torch.tensor([[-5.0, -5, 500, 500]]).expand(2, 3, 4)
    found = B.clip(boxes, torch.tensor([[10, 20], [30, 40]]))
    assert found[0].tolist() == [[0, 0, 20, 10]] * 3
    assert found[1].tolist() == [[0, 0, 40, 30]] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", range(4))
def test_non_finite_boxes_are_invalid(bad: float, side: int) -> None:
    box = torch.tensor([1.0, 2, 3, 4])
    assert B.is_valid(box)
    box[side] = bad
    assert not B.is_valid(box)


def test_min_size_includes_itself() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.99], [0, 0, 1.99, 2], [2, 2, 0, 0]])
    assert B.is_valid(boxes, 2.0).tolist() == [True, False, False, False]


def test_iou_against_pixel_counting(np_rng: np.random.Generator) -> None:
    corners = np.sort(np_rng.integers(0, 20, (8, 2, 2)), axis=1)
    corners[:, 1] += 1
    boxes = torch.from_numpy(corners.reshape(8, 4)).double()
    grids = np.zeros((8, 21, 21), bool)
    for grid, (x1, y1, x2, y2) in zip(grids, corners.reshape(8, 4), strict=True):
        grid[y1:y2, x1:x2] = True
    expected = [[np.sum(a & b) / np.sum(a | b) for b in grids] for a in grids]
    np.testing.assert_allclose(B.iou(boxes, boxes).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("ratios", [(0.5, 1.0, 2.0), (0.5, 1.0, 2.0, 3.0)])
@pytest.mark.parametrize("sizes", [((32.0,), (64.0,)), ((32.0, 45.0), (64.0, 90.0))])
def test_anchors_equal_torchvision(sizes: tuple, ratios: tuple) -> None:
    rpn = pytest.importorskip("torchvision").models.detection.rpn
    image_list = pytest.importorskip("torchvision").models.detection.image_list
    images = torch.zeros(1, 3, 800, 1056)
    maps = [torch.zeros(1, 1, 200, 264), torch.zeros(1, 1, 13, 17)]  # 800 // 13 = 61, not 64
    generator = rpn.AnchorGenerator(sizes, (ratios,) * 2)
    (expected,) = generator(image_list.ImageList(images, [(800, 1056)]), maps)
    anchors = Anchors(AnchorConfig(sizes=sizes, aspect_ratios=ratios), (4, 8, 16, 32, 64))
    found = [anchors.grid(level, (x.shape[2], x.shape[3]), (800, 1056)) for level, x in enumerate(maps)]
    assert torch.equal(torch.cat(found), expected)


def test_anchors_of_nominal_stride_and_unrounded() -> None:
    anchors = Anchors(AnchorConfig(round=False, stride_from_size=False), (4, 8, 16, 32, 64))
    found = anchors.grid(4, (13, 13), (800, 800))[[0, 3 * 13 * 2 + 3 + 1]]
    half = 512 / math.sqrt(0.5) / 2, 512 * math.sqrt(0.5) / 2
    np.testing.assert_allclose(found[0], [-half[0], -half[1], half[0], half[1]], rtol=1e-6)
    np.testing.assert_allclose(found[1], [64 - 256, 128 - 256, 64 + 256, 128 + 256], rtol=1e-6)
