"""Proposals: against one anchor at a time in float64, and to the last bit where no exponential is taken."""

import math

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from backends import BACKENDS, use_backend
from models import SMALL
from tolerances import decoded_box
from trimask.engine.model import boxes as B
from trimask.engine.model.anchors import Anchors
from trimask.engine.model.config import AnchorConfig, RPNConfig
from trimask.engine.model.rpn import RPN
from trimask.kernels.decoding import proposals
from trimask.kernels.reference import decoding as reference

PADDED = (96, 160)
FEATURES = ((24, 40), (12, 20), (6, 10), (3, 5), (2, 3))  # the last is 48 x 53 pixels a cell, not the nominal 64
IMAGES = torch.tensor([[96, 150], [80, 160]])
LIMIT = math.log(1000 / 16)


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch, request.module, ("proposals",), {"decoding": {"_BLOCK": 128}})


class Case:
    """Random outputs of a head on `FEATURES`, and the anchors chosen from them."""

    def __init__(self, rng: torch.Generator, dtype: torch.dtype = torch.float32, k: int = 50) -> None:
        self.anchors = Anchors(SMALL.anchors, SMALL.strides)
        self.cells = self.anchors.cells
        count = [rows * columns * 3 for rows, columns in FEATURES]
        logits = [torch.randn(2, n, generator=rng).to(dtype) for n in count]
        self.deltas = [(0.5 * torch.randn(2, n, 4, generator=rng)).to(dtype) for n in count]
        chosen = [x.topk(min(k, x.shape[1])) for x in logits]
        self.scores, self.indices = [x.values for x in chosen], [x.indices for x in chosen]
        self.widths = [columns for _, columns in FEATURES]
        self.strides = [(PADDED[0] // rows, PADDED[1] // columns) for rows, columns in FEATURES]
        self.options = {"capacity": k, "min_size": 1.0, "max_log_scale": LIMIT}

    def inputs(self) -> tuple:
        return self.scores, self.indices, self.deltas, self.cells, self.widths, self.strides, IMAGES

    def run(self, **options) -> tuple[Tensor, Tensor]:
        return proposals(*self.inputs(), **{**self.options, **options})

    def expected(self, **options) -> tuple[Tensor, Tensor]:
        return reference.proposals(*self.inputs(), **{**self.options, **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equals_one_anchor_at_a_time(dtype: torch.dtype, rng: torch.Generator) -> None:
    case = Case(rng, dtype)
    boxes, scores = case.run()
    wide = torch.promote_types(dtype, torch.float32)
    assert boxes.dtype == scores.dtype == wide
    assert boxes.shape == (10, 50, 4)
    expected, expected_scores = case.expected()
    tolerance = decoded_box(wide, 2000)
    # Rounding decides a box whose side is the smallest one.
    sides = case.expected(min_size=0.0)[0].view(-1, 2, 2).diff(dim=1).view(10, 50, 2)
    clear = ((sides - 1).abs() > 2 * tolerance).all(2)
    assert 0 < (expected_scores == -torch.inf).sum() < 400
    assert torch.equal(scores[clear].double(), expected_scores[clear])
    torch.testing.assert_close(boxes[clear].double(), expected[clear], rtol=0, atol=tolerance)


def test_without_scaling_equals_the_model_to_the_last_bit(rng: torch.Generator) -> None:
    """An exponential of 0 is 1 everywhere; all that is left is rounded alike by every device."""
    case = Case(rng, k=300)
    for delta in case.deltas:
        delta[..., 2:] = 0
    boxes, scores = case.run()
    for level, (score, index, delta) in enumerate(zip(case.scores, case.indices, case.deltas, strict=True)):
        anchors = case.anchors.grid(level, FEATURES[level], PADDED)[index]
        moves = delta.gather(1, index[..., None].expand(-1, -1, 4))
        expected = B.clip(B.decode(moves, anchors, (1.0, 1.0)), IMAGES)
        valid = B.is_valid(expected, 1.0) & (B.area(expected) > 0)
        k = score.shape[1]
        for image in range(2):
            found, ranks = boxes[image * 5 + level], scores[image * 5 + level]
            assert torch.equal(found[:k], expected[image] * valid[image][:, None])
            assert torch.equal(ranks[:k], score[image].masked_fill(~valid[image], -torch.inf))
            assert (found[k:] == 0).all()
            assert (ranks[k:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_is_limited(dtype: torch.dtype) -> None:
    """1000 / 16 at most, for an infinite delta too; shrinking is not."""
    growth = [LIMIT - 1e-3, LIMIT + 1e-3, math.inf, 50.0, -6.0]
    moves = torch.zeros(1, 6, 4, dtype=dtype)
    moves[0, 1:, 2] = moves[0, 1:, 3] = torch.tensor(growth, dtype=dtype)
    boxes, _ = proposals(
        [torch.zeros(1, 5)],
        [torch.arange(1, 6)[None]],
        [moves],
        torch.tensor([[[-8.0, -8.0, 8.0, 8.0]]]),
        [6],
        [(2000, 4000)],
        torch.tensor([[2000, 24000]]),
        capacity=5,
    )
    sides = boxes[0, :, 2:] - boxes[0, :, :2]
    expected = torch.tensor([[16 * math.exp(min(x, LIMIT))] * 2 for x in growth], dtype=dtype)
    expected[:, 1] /= 2  # the upper half lies above the picture
    torch.testing.assert_close(sides, expected, rtol=0, atol=2 * decoded_box(dtype, 20500))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_dropped_and_harms_no_neighbour(bad: float, rng: torch.Generator) -> None:
    case = Case(rng)
    boxes, scores = case.run()
    for level in range(5):
        for image in range(2):
            segment = image * 5 + level
            live = (scores[segment] > -torch.inf).nonzero()[:, 0].tolist()
            if len(live) < 4:
                continue
            case.scores[level][image, live[0]] = bad
            for side in range(2):  # of dx, dy; an infinite dw is limited, a NaN is dropped with the next
                case.deltas[level][image, case.indices[level][image, live[1 + side]], side] = bad
            case.deltas[level][image, case.indices[level][image, live[3]], 2] = torch.nan
            dropped = live[:4]
            boxes[segment, dropped], scores[segment, dropped] = 0, -torch.inf
    found_boxes, found_scores = case.run()
    assert torch.equal(found_scores, scores)
    assert torch.equal(found_boxes, boxes)


@pytest.mark.parametrize("wrong", [-1, -(2**40), 2**40, "end"])
def test_an_index_out_of_range_is_dropped(wrong: int | str, rng: torch.Generator) -> None:
    case = Case(rng)
    boxes, scores = case.run()
    for level, index in enumerate(case.indices):
        index[1, 3] = case.deltas[level].shape[1] if wrong == "end" else wrong
        boxes[5 + level, 3], scores[5 + level, 3] = 0, -torch.inf
    found_boxes, found_scores = case.run()
    assert torch.equal(found_scores, scores)
    assert torch.equal(found_boxes, boxes)


def test_sides_and_areas_at_the_limit() -> None:
    """A side equal to the smallest one stays; a box of no area does not, whatever the smallest side."""
    anchors = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 3.999], [0, 0, 3.999, 4], [0, 2, 9, 2], [1, 0, 1, 9]]])
    arguments = (
        [torch.arange(5.0)[None]],
        [torch.arange(5)[None]],
        [torch.zeros(1, 5, 4)],
        anchors,
        [1],
        [(7, 7)],
        torch.tensor([[50, 60]]),
    )
    _, scores = proposals(*arguments, capacity=5, min_size=4.0)
    assert scores.tolist() == [[0.0] + [-math.inf] * 4]
    _, scores = proposals(*arguments, capacity=5)
    assert scores.tolist() == [[0.0, 1.0, 2.0, -math.inf, -math.inf]]


def test_boxes_are_cut_to_each_picture(rng: torch.Generator) -> None:
    case = Case(rng)
    boxes, scores = case.run()
    boxes = boxes.view(2, -1, 4)
    assert (boxes >= 0).all()
    for found, ranks, (height, width) in zip(boxes, scores.view(2, -1), IMAGES.tolist(), strict=True):
        assert found[:, 2].max() == width
        assert found[:, 3].max() == height
        assert (found[ranks == -torch.inf] == 0).all()


def test_any_strides(rng: torch.Generator) -> None:
    """As a head of planar memory gives them, one picture out of several, and with small integers for sizes."""
    case = Case(rng)
    boxes, scores = case.run()
    case.deltas = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in case.deltas]
    case.scores = [x.T.contiguous().T for x in case.scores]
    case.indices = [x.repeat_interleave(2, 1)[:, ::2] for x in case.indices]
    found = proposals(*case.inputs()[:-1], IMAGES.int(), **case.options)
    assert torch.equal(found[0], boxes)
    assert torch.equal(found[1], scores)


def test_nothing_chosen(rng: torch.Generator) -> None:
    case = Case(rng)
    case.scores = [x[:, :0] for x in case.scores]
    case.indices = [x[:, :0] for x in case.indices]
    boxes, scores = case.run(capacity=3)
    assert boxes.shape == (10, 3, 4)
    assert boxes.abs().sum() == 0
    assert (scores == -torch.inf).all()
    boxes, scores = case.run(capacity=0)
    assert boxes.shape == (10, 0, 4)
    assert scores.shape == (10, 0)


def test_blocks_of_rows_join(rng: torch.Generator) -> None:
    """More rows than a program takes, and a last block that is not full."""
    case = Case(rng, k=300)
    boxes, scores = case.run()
    case.scores = [x[:, 130:290] for x in case.scores]
    case.indices = [x[:, 130:290] for x in case.indices]
    found = case.run(capacity=170)
    for level, score in enumerate(case.scores):
        k = score.shape[1]
        for segment in (level, 5 + level):
            assert torch.equal(found[0][segment, :k], boxes[segment, 130 : 130 + k])
            assert torch.equal(found[1][segment, :k], scores[segment, 130 : 130 + k])
    assert (found[1][:, 160:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scores": []}, "expected as many levels of each"),
        ({"widths": [5]}, "expected as many levels of each"),
        ({"cells": torch.zeros(5, 3, 2)}, r"cells: expected floating point \[L, A, 4\], got torch.float32 \[5, 3, 2\]"),
        ({"sizes": torch.zeros(2, 2)}, "image_sizes: expected integers"),
        ({"sizes": torch.zeros(2, 3, dtype=torch.int64)}, r"image_sizes: expected integers \[B, 2\]"),
        ({"sizes": torch.zeros(3, 2, dtype=torch.int64)}, r"scores: expected floating point \[3, k\]"),
        ({"indices": [torch.zeros(2, 7, dtype=torch.int64)] * 5}, r"indices: expected int64 \[2, 50\]"),
        ({"indices": [torch.zeros(2, 50, dtype=torch.int32)] * 5}, "indices: expected int64"),
        ({"deltas": [torch.zeros(2, 2880, 3)] * 5}, r"deltas: expected floating point \[2, N, 4\]"),
        ({"cells": torch.zeros(5, 0, 4)}, "cells, widths, strides: expected at least one shape"),
        ({"widths": [5, 5, 0, 5, 5]}, r"got cells .*, widths \[5, 5, 0, 5, 5\]"),
        ({"strides": [4, 8, 16, 32, 64]}, "a pair of strides for each level"),
        ({"strides": [(4, 4, 4)] * 5}, "a pair of strides for each level"),
        ({"capacity": 49}, "capacity: expected at least the 50 anchors chosen, got 49"),
    ],
)
@pytest.mark.host
def test_wrong_arguments_are_named(change: dict, complaint: str, rng: torch.Generator) -> None:
    case = Case(rng)
    names = ("scores", "indices", "deltas", "cells", "widths", "strides", "sizes")
    arguments = dict(zip(names, case.inputs(), strict=True)) | {k: v for k, v in change.items() if k in names}
    options = case.options | {k: v for k, v in change.items() if k not in names}
    with pytest.raises(ValueError, match=complaint):
        proposals(*arguments.values(), **options)


def test_gradients_do_not_pass(rng: torch.Generator) -> None:
    case = Case(rng)
    case.scores, case.deltas = ([x.requires_grad_() for x in xs] for xs in (case.scores, case.deltas))
    case.cells = case.cells.requires_grad_()
    assert not any(x.requires_grad for x in case.run())


def test_levels_of_one_dtype(rng: torch.Generator) -> None:
    case = Case(rng)
    case.deltas[2] = case.deltas[2].double()
    with pytest.raises(ValueError, match="expected the same dtype on every level"):
        case.run()


# ---- registration


def test_the_registration_is_sound(rng: torch.Generator) -> None:
    case = Case(rng)
    flat = [side for stride in case.strides for side in stride]
    scores, indices, deltas, cells, widths, _, sizes = case.inputs()
    torch.library.opcheck(
        torch.ops.trimask.proposals.default,
        (scores, indices, deltas, cells, widths, flat, sizes, 50, 1.0, LIMIT),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.host
@torch.no_grad()
def test_the_selection_exports_with_dynamic_sizes(rng: torch.Generator) -> None:
    class Selection(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rpn = RPN(8, RPNConfig(pre_nms=200, post_nms=100), AnchorConfig(), SMALL.strides)

        def forward(self, pyramid: list[Tensor], image_sizes: Tensor) -> tuple[Tensor, Tensor]:
            feature_sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
            padded = (4 * pyramid[0].shape[2], 4 * pyramid[0].shape[3])
            return self.rpn.select(*self.rpn(pyramid), feature_sizes, padded, image_sizes)

    def inputs(batch: int, height: int, width: int) -> tuple[list[Tensor], Tensor]:
        """Height and width of the coarsest level."""
        pyramid = [torch.randn(batch, 8, height << i, width << i, generator=rng) for i in range(4, -1, -1)]
        return pyramid, torch.tensor([[60 * height, 64 * width]]).repeat(batch, 1)

    batch, height, width = Dim("batch", max=64), Dim("height", min=2, max=84), Dim("width", min=2, max=84)
    levels = [
        {0: batch, 2: height * n if n > 1 else height, 3: width * n if n > 1 else width} for n in (16, 8, 4, 2, 1)
    ]
    selection = Selection()
    exported = torch.export.export(selection, inputs(2, 4, 6), dynamic_shapes=(levels, {0: batch})).module()
    for sizes in ((1, 2, 3), (3, 6, 2)):
        arguments = inputs(*sizes)
        for found, expected in zip(exported(*arguments), selection(*arguments), strict=True):
            assert torch.equal(found, expected)
