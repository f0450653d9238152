"""Segmented NMS and the drop-in functions: indices are compared exactly, always."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends import BACKENDS, use_backend
from trimask.kernels.cpu import suppression as host
from trimask.kernels.reference import suppression as reference
from trimask.kernels.suppression import batched_nms, nms, segmented_nms

SIZES = (0, 1, 63, 64, 65, 1000)
TILES = {"suppression": {"_RANKS": 4096, "_ROWS": 1024, "_PART": 32}}
# What is about the Triton kernels alone.
on_triton = pytest.mark.parametrize("_backend", BACKENDS[1:], indirect=True)
# Padding is divided by 0 / 0, and not looked at.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(request.param, monkeypatch, request.module, ("segmented_nms", "nms", "batched_nms"), TILES)
    if request.param == "interpreter":
        monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_fma", fused_multiply_add)
    return request.param


def fused_multiply_add(builder: object, x: Any, y: Any, z: Any) -> Any:
    """Of the interpreter, x * y + z rounded once, as on a GPU; before triton 3.9 its own rounds the product, too.

    As far as it goes here: exact where the sum has no more digits than the dtype, and never on its other side.
    """
    a, b, c = np.broadcast_arrays(x.data, y.data, z.data)
    with np.errstate(all="ignore"):
        if a.dtype == np.float32:
            total = a.astype(np.float64) * b + c
        else:
            # Fractions in [0.5, 1) of powers of two; the product, and what it lacks by its halves (Dekker, 1971).
            (a, a_power), (b, b_power) = np.frexp(a), np.frexp(b)
            power = a_power + b_power
            product, split = a * b, np.float64(2**27 + 1)
            a_high, b_high = a * split - (a * split - a), b * split - (b * split - b)
            a_low, b_low = a - a_high, b - b_high
            rest = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
            total = np.ldexp(product + np.ldexp(c, -power) + np.where(np.isfinite(rest), rest, 0), power)
        return type(z)(total.astype(x.data.dtype), z.dtype.scalar)


def crowd(n: int, rng: torch.Generator, spread: float = 0.12) -> tuple[Tensor, Tensor]:
    """Boxes ``[n, 4]`` jittered around an eighth as many objects of a picture, as proposals are; scores in steps."""
    objects = n // 8 + 1
    centre = torch.rand(objects, 2, generator=rng) * torch.tensor([1333.0, 800.0])
    side = 20 * 10 ** torch.rand(objects, 2, generator=rng)
    of = torch.randint(objects, (n,), generator=rng)
    side = side[of] * (spread * torch.randn(n, 2, generator=rng)).exp()
    centre = centre[of] + spread * torch.randn(n, 2, generator=rng) * side
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
    # A third of the scores are tied with another one.
    return boxes, (torch.rand(n, generator=rng) * n).floor() / max(n, 1)


def one_segment(boxes: Tensor, scores: Tensor, threshold: float, max_keep: int | None = None, **options) -> list[int]:
    """Kept indices of the op, held against the reference on the way."""
    max_keep = len(boxes) if max_keep is None else max_keep
    options = {name: value[None] if isinstance(value, Tensor) else value for name, value in options.items()}
    keep, count = segmented_nms(boxes[None], scores[None], threshold, max_keep, **options)
    expected, expected_count = reference.segmented_nms(boxes[None], scores[None], threshold, max_keep, **options)
    assert torch.equal(count, expected_count)
    assert torch.equal(keep, expected)
    return keep[0, : count[0]].tolist()


# ---- the peer


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_equals_torchvision(n: int, threshold: float, rng: torch.Generator) -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes, scores = crowd(n, rng)
    kept = nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, ops.nms(boxes, scores, threshold))
    assert torch.equal(
        nms(boxes.double(), scores.double(), threshold), ops.nms(boxes.double(), scores.double(), threshold)
    )


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_pair_planted_just_above_the_threshold(threshold: float, rng: torch.Generator) -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes, scores = crowd(1000, rng)
    # IoU of [0, 0, a, h] with [0, 0, b, h] is a / b.
    above, below = (
        torch.tensor([0, 5000, 100 * (threshold + 1e-5), 5100]),
        torch.tensor([0, 5000, 100 * (threshold - 1e-5), 5100]),
    )
    whole = torch.tensor([0.0, 5000, 100, 5100])
    boxes = torch.cat([boxes, torch.stack([whole, above, whole + 500, below + torch.tensor([500.0, 500, 500, 500])])])
    scores = torch.cat([scores, torch.tensor([0.5, 0.4, 0.5, 0.4])])
    kept = nms(boxes, scores, threshold)
    assert torch.equal(kept, ops.nms(boxes, scores, threshold))
    assert [i in kept for i in (1000, 1001, 1002, 1003)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("tenths", "suppressed"),
    [(1, True), (2, True), (3, True), (4, True), (5, False), (6, True), (7, False), (8, True), (9, False)],
)
@pytest.mark.parametrize("height", [1.0, 3.0, 100.0])
def test_exact_ratios(tenths: int, suppressed: bool, height: float) -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.tensor([[0, 0, 10, height], [0, 0, tenths, height]])
    scores = torch.tensor([0.9, 0.8])
    kept = nms(boxes, scores, tenths / 10)
    assert kept.tolist() == ([0] if suppressed else [0, 1])
    assert torch.equal(kept, ops.nms(boxes, scores, tenths / 10))
    # float64 holds the ratio as the decimal is held.
    assert nms(boxes.double(), scores, tenths / 10).tolist() == [0, 1]


@pytest.mark.parametrize(("digits", "tiny"), [(24, 1.0), (24, 2.0**-65), (53, 1.0), (53, 2.0**-520)])
@pytest.mark.parametrize("tenths", range(1, 10))
def test_ratios_a_rounding_away_from_the_threshold(tenths: int, digits: int, tiny: float, rng: torch.Generator) -> None:
    """Here ``intersection > threshold * union``, the same without rounding, is wrong in a hundredth of the cases."""
    union = torch.randint(2 ** (digits - 2), 2**digits, (500,), generator=rng)
    product = (union * (tenths / 10)).long() if digits == 24 else union * tenths // 10
    widths = torch.stack([union, product + torch.arange(500) % 3 - 1], dim=1)
    # [500, 2, 4], each pair with a label of its own; IoU is the ratio of widths.
    boxes = torch.stack([0 * widths, 0 * widths, widths, 0 * widths + 1], dim=2)
    boxes = boxes.to(torch.float32 if digits == 24 else torch.float64).view(1, 1000, 4) * tiny
    scores, labels = torch.tensor([[1.0, 0.5] * 500]), torch.arange(500).repeat_interleave(2)[None]
    expected, count = reference.segmented_nms(boxes, scores, tenths / 10, 1000, labels=labels)
    assert torch.equal(segmented_nms(boxes, scores, tenths / 10, 1000, labels=labels)[0], expected)
    assert 500 < count < 1000


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool])
@pytest.mark.parametrize("n", [0, 1, 65, 1000])
def test_batched_equals_the_loop_over_classes(
    n: int, dtype: torch.dtype, rng: torch.Generator, request: pytest.FixtureRequest
) -> None:
    ops = pytest.importorskip("torchvision").ops
    n = min(n, 200) if request.getfixturevalue("_backend") == "interpreter" else n
    boxes, scores = crowd(n, rng)
    boxes = boxes - 5000  # where class offsets by the largest coordinate fail
    classes = torch.randint(7, (n,), generator=rng).to(dtype)
    loop = [torch.nonzero(classes == c)[:, 0] for c in classes.unique()]
    loop = torch.cat(
        [members[ops.nms(boxes[members], scores[members], 0.5)] for members in loop] or [torch.arange(0)]
    ).sort()[0]
    loop = loop[scores[loop].argsort(descending=True, stable=True)]
    assert torch.equal(batched_nms(boxes, scores, classes, 0.5), loop)
    assert torch.equal(batched_nms(boxes, scores, torch.zeros_like(classes), 0.5), nms(boxes, scores, 0.5))
    # An (image, class) each as a segment of its own finds the same boxes.
    apart = [one_segment(boxes[classes == c], scores[classes == c], 0.5) for c in classes.unique()]
    assert sum(map(len, apart)) == len(loop)


def test_class_ids_far_apart(rng: torch.Generator) -> None:
    boxes, scores = crowd(200, rng)
    classes = torch.tensor([-(2**62), 0, 2**62])[torch.randint(3, (200,), generator=rng)]
    assert torch.equal(batched_nms(boxes, scores, classes, 0.5), batched_nms(boxes, scores, classes.sign(), 0.5))
    assert one_segment(boxes, scores, 0.5, labels=classes) == batched_nms(boxes, scores, classes, 0.5).tolist()


# ---- scores


def test_ties_keep_the_order_of_the_input() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 10]]).repeat(40, 1)
    assert nms(boxes, torch.zeros(160), 0.5).tolist() == [0, 2]
    apart = torch.arange(300.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    assert nms(apart, torch.full((300,), 0.25), 0.5).tolist() == list(range(300))
    assert nms(apart[:3], torch.tensor([0.0, -0.0, 0.0]), 0.5).tolist() == [0, 1, 2]


def test_nan_scores_are_dropped_and_infinite_ones_are_ordered() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 2 + [[20.0, 0, 30, 10]] * 2 + [[40.0, 0, 50, 10], [60, 0, 70, 10]])
    scores = torch.tensor([torch.nan, 0.1, -torch.inf, torch.inf, -torch.inf, torch.nan])
    assert one_segment(boxes, scores, 0.5) == nms(boxes, scores, 0.5).tolist() == [3, 1, 4]
    assert one_segment(boxes, scores, 0.5, score_threshold=-torch.inf) == [3, 1]
    assert one_segment(boxes, scores, 0.5, score_threshold=torch.nan) == []


def test_score_threshold_is_strict_and_of_the_dtype_of_the_scores() -> None:
    boxes = torch.arange(4.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    scores = torch.tensor([0.05, 0.050001, 0.04, 0.9])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        taken = (scores.to(dtype) > 0.05).nonzero()[:, 0].tolist()
        assert one_segment(boxes, scores.to(dtype), 0.5, score_threshold=0.05) == sorted(
            taken, key=lambda i: -scores[i]
        )
    assert one_segment(boxes, scores, 0.5, score_threshold=0.05) == [3, 1]


# ---- boxes


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", range(4))
def test_boxes_that_are_not_finite_are_dropped(bad: float, side: int) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    boxes[0, side] = bad
    assert (
        one_segment(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        == nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
        == [1]
    )
    assert nms(boxes[:1], torch.ones(1), 0.5).tolist() == []


def test_empty_and_inverted_boxes_overlap_nothing() -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.tensor(
        [
            [5.0, 5, 5, 5],
            [5, 5, 5, 5],
            [5, 0, 5, 10],
            [5, 0, 5, 10],
            [0, 0, 10, 10],
            [10, 10, 0, 0],
            [10, 0, 0, 10],
            [10, 10, 0, 0],
            [0, 90, 900, 0],
            [90, 0, 0, 900],
        ]
    )
    scores = torch.linspace(1, 0, 10)
    for threshold in (0.0, 0.5):
        assert nms(boxes, scores, threshold).tolist() == list(range(10))
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("scale", [1e-19, 1e-22, 1e-3, 1e4, 1e18, 1e20])
def test_any_scale(scale: float, rng: torch.Generator) -> None:
    """Areas of few digits or none, and of infinity, decide as the formula does."""
    ops = pytest.importorskip("torchvision").ops
    boxes, scores = crowd(200, rng)
    boxes = (boxes - 400) * scale
    for threshold in (0.0, 0.3, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


def test_an_iou_that_rounds_to_zero() -> None:
    """Of a box within one that is 2^170, 2^150 and 2^148 times as large."""
    for side, kept in ((2.0**-40, [0, 1]), (2.0**-30, [0, 1]), (2.0**-29, [0])):
        boxes = torch.tensor([[0, 0, 2.0**45, 2.0**45], [0, 0, side, side]])
        assert one_segment(boxes, torch.tensor([0.9, 0.8]), 0.0) == kept


def test_areas_of_a_few_digits(rng: torch.Generator) -> None:
    """A row of boxes whose areas are some 2 to 5 times the smallest float."""
    ops = pytest.importorskip("torchvision").ops
    for _ in range(30):
        left, width = torch.rand(2, 60, generator=rng) * torch.tensor([[20.0], [4.0]])
        boxes = torch.stack([left, 0 * left, left + 1 + width, 0 * left + 1], dim=1) * 10**-22.5
        scores = torch.rand(60, generator=rng)
        assert torch.equal(nms(boxes, scores, 0.5), ops.nms(boxes, scores, 0.5))


def test_classes_stay_apart_where_numbers_run_out() -> None:
    """The span of these boxes is infinite in their own dtype."""
    for dtype, far in ((torch.float32, 3e38), (torch.float64, 1.5e308)):
        step = far * 1e-3
        boxes = torch.tensor([[-far, 0, step - far, 1]] + [[far - step, 0, far, 1]] * 4, dtype=dtype)
        scores, labels = torch.linspace(1, 0, 5), torch.tensor([0, 0, 1, 1, 2])
        assert one_segment(boxes, scores, 0.5, labels=labels) == [0, 1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_boxes_are_compared_in_float32(dtype: torch.dtype, rng: torch.Generator) -> None:
    boxes, scores = crowd(400, rng)
    boxes, scores = (boxes.clamp(0, 1300) + 30).to(dtype), scores.to(dtype)
    boxes[0], scores[0] = torch.tensor([0, 0, 1300, 1300]), 1  # an area beyond the range of float16
    classes = torch.arange(400) % 91
    assert torch.equal(nms(boxes, scores, 0.5), nms(boxes.float(), scores.float(), 0.5))
    # An offset per class of the largest coordinate would leave the range of float16 from the 49th class on.
    assert torch.equal(
        batched_nms(boxes, scores, classes, 0.5), batched_nms(boxes.float(), scores.float(), classes, 0.5)
    )
    assert len(batched_nms(boxes, scores, classes, 0.5)) > len(nms(boxes, scores, 0.5))


def test_strides_and_gradients_do_not_matter(rng: torch.Generator) -> None:
    boxes, scores = crowd(100, rng)
    expected = nms(boxes, scores, 0.5)
    strided = boxes.T.contiguous().T.requires_grad_(), torch.stack([scores, scores], dim=1)[:, 0]
    assert torch.equal(nms(*strided, 0.5), expected)


# ---- segments


def test_segments_with_counts_labels_and_a_score_threshold(rng: torch.Generator) -> None:
    boxes, scores = (torch.stack(t) for t in zip(*(crowd(120, rng) for _ in range(5)), strict=True))
    counts = torch.tensor([0, 1, 120, 60, 500], dtype=torch.int32)
    boxes[3, 60:], scores[3, 60:] = torch.nan, 2.0  # padding may hold anything
    labels = torch.randint(3, (5, 120), generator=rng)
    for options in ({}, {"labels": labels}, {"score_threshold": 0.6}, {"labels": labels, "score_threshold": 0.3}):
        arguments = (boxes, scores, 0.5, 50)
        keep, count = segmented_nms(*arguments, counts=counts, **options)
        expected = reference.segmented_nms(*arguments, counts=counts, **options)
        assert keep.dtype == torch.int64
        assert count.dtype == torch.int32
        assert torch.equal(keep, expected[0])
        assert torch.equal(count, expected[1])
        assert count[0] == 0
        for kept, k in zip(keep, count.tolist(), strict=True):
            assert (kept[k:] == -1).all()
            assert (kept[:k] >= 0).all()
    assert segmented_nms(boxes, scores, 0.5, 50, counts=-counts)[1].sum() == 0


@pytest.mark.parametrize("max_keep", [0, 1, 99, 100, 101, 1000])
def test_the_cap_cuts_the_full_result(max_keep: int, rng: torch.Generator) -> None:
    boxes, scores = crowd(600, rng)
    full = nms(boxes, scores, 0.7)
    survivors, others = full[:100], torch.tensor(sorted(set(range(600)) - set(full.tolist())))
    some = torch.cat([survivors, others])  # exactly 100 of these survive, in the order of `survivors`
    scores = torch.cat([torch.linspace(2, 1, 100), scores[others] - 1])
    boxes = torch.cat([boxes[survivors], boxes[survivors][torch.arange(len(others)) % 100]])
    assert one_segment(boxes, scores, 0.7, max_keep) == list(range(min(max_keep, 100)))
    assert len(some) == len(boxes)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    keep, count = segmented_nms(torch.empty(*shape, 4), torch.empty(shape), 0.5, 7)
    assert keep.shape == (shape[0], 7)
    assert (keep == -1).all()
    assert torch.equal(count, torch.zeros(shape[0], dtype=torch.int32))


def test_a_hundred_thousand_boxes(rng: torch.Generator, request: pytest.FixtureRequest) -> None:
    half = 600 if request.getfixturevalue("_backend") == "interpreter" else 50_000
    cell = torch.arange(half)
    corner = torch.stack([cell % 250, cell // 250], dim=1) * 8 + torch.rand(half, 2, generator=rng)
    boxes = torch.cat([corner, corner + 6], dim=1)
    order = torch.randperm(2 * half, generator=rng)
    # Each box comes twice, the second time with the lower score.
    boxes, scores = boxes.repeat(2, 1)[order], torch.linspace(1, 0, 2 * half)[order]
    kept = nms(boxes, scores, 0.5)
    assert order[kept].tolist() == list(range(half))
    # And as many copies of one box.
    assert nms(boxes[:1].expand(2 * half, 4), scores, 0.5).tolist() == [int(scores.argmax())]


@pytest.mark.host
def test_memory_stays_bounded_when_a_crowd_follows_a_thin_field(rng: torch.Generator) -> None:
    field = torch.rand(8000, 1, generator=rng) + torch.arange(8000.0)[:, None] * 4 + torch.tensor([0.0, 0, 2, 2])
    boxes = torch.cat([field, torch.tensor([[0.0, 10, 9, 19]]).expand(8000, 4)])
    tracemalloc.start()
    try:
        kept = nms(boxes, torch.linspace(1, 0, 16_000), 0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept.tolist() == list(range(8001))
    assert peak < 64 * 2**20  # the 32 million pairs of the crowd alone would take 256 MiB


@pytest.mark.host
@pytest.mark.parametrize("grouped", [False, True])
def test_columns_are_as_good_as_rows(grouped: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of text: the axis on which boxes lie apart is the one that is swept."""
    swept = []
    windows = host._windows
    monkeypatch.setattr(host, "_windows", lambda *args: swept.append(windows(*args)[1].sum()) or windows(*args))
    n = 400
    low = torch.stack([5 * torch.rand(n, generator=rng), 7.0 * torch.arange(n)], 1)
    column = torch.cat([low, low + torch.tensor([300.0, 12.0])], 1)[torch.randperm(n, generator=rng)]
    scores = torch.rand(n, generator=rng)
    options = {"labels": torch.randint(2, (n,), generator=rng)} if grouped else {}
    kept = one_segment(column, scores, 0.2, **options)
    assert n / 4 < len(kept) < n
    assert len(swept) == 2
    assert swept[1] < swept[0] / 20
    assert one_segment(column[:, [1, 0, 3, 2]], scores, 0.2, **options) == kept
    assert len(swept) == 3


@pytest.mark.host
@pytest.mark.parametrize("constants", [(1, 1, 8), (3, 7, 4), (64, 50, 64), (512, 5, 1 << 20)])
def test_the_block_and_chunk_sizes_change_nothing(
    constants: tuple[int, int, int], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("_FIRST_BLOCK", "_PAIRS_AT_ONCE", "_MAX_OVERLAPS"), constants, strict=True):
        monkeypatch.setattr(host, name, value)
    for spread, threshold in ((0.02, 0.5), (0.2, 0.3)):
        boxes, scores = crowd(150, rng, spread)
        one_segment(boxes, scores, threshold)
        one_segment(boxes, scores, threshold, 20, labels=torch.arange(150) % 2)


# ---- the Triton kernels


def random_segments(segments: int, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels, of which a few are NaN or infinite."""
    boxes, scores = (torch.stack(t) for t in zip(*(crowd(n, rng) for _ in range(segments)), strict=True))
    boxes = torch.where(torch.rand(boxes.shape, generator=rng) < 0.01, torch.nan, boxes)
    scores = torch.where(torch.rand(scores.shape, generator=rng) < 0.03, torch.nan, scores)
    return boxes, scores, torch.randint(3, (segments, n), generator=rng)


# Head of all ranks; a word in two parts; greedy after a head of two words; chunks of three words.
PLANS = {
    "head": {},
    "parts": {"_PART": 16},
    "greedy": {"_SHORT": 64},
    "chunks": {"_FEW": 0, "_LONG": 96, "_SPLIT": 32},
}


@on_triton
@pytest.mark.parametrize("n", [31, 32, 33, 63, 64, 65, 96, 97, 193])
def test_every_plan_finds_the_same(n: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores, labels = random_segments(2, n, rng)
    options = {"labels": labels, "counts": torch.tensor([n, n - 5]), "score_threshold": 0.1}
    for some in ({}, options):
        for max_keep in (n // 4, n):
            expected = reference.segmented_nms(boxes, scores, 0.5, max_keep, **some)
            for plan in PLANS.values():
                with monkeypatch.context() as patch:
                    for name, value in plan.items():
                        patch.setattr(f"trimask.kernels.gpu.suppression.{name}", value)
                    found = segmented_nms(boxes, scores, 0.5, max_keep, **some)
                assert all(map(torch.equal, found, expected))


@on_triton
@pytest.mark.parametrize("plan", PLANS)
def test_the_cap_is_kept_by_every_plan(plan: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached within the head, at the end of a chunk and of a word, and beyond."""
    for name, value in PLANS[plan].items():
        monkeypatch.setattr(f"trimask.kernels.gpu.suppression.{name}", value)
    apart = torch.arange(200.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    scores = torch.rand(200, generator=rng)
    for max_keep in (1, 32, 33, 95, 96, 97, 128, 199, 200, 210):
        one_segment(apart, scores, 0.5, max_keep)
    twice = torch.cat([apart[:96], apart[:100]])  # one is wanted after the chunk, and the next 96 are suppressed by it
    one_segment(twice, torch.linspace(1, 0, 196), 0.5, 97)


@on_triton
@pytest.mark.parametrize("plan", PLANS)
def test_chains_as_long_as_words(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each box overlaps the next alone: every second one stays."""
    for name, value in PLANS[plan].items():
        monkeypatch.setattr(f"trimask.kernels.gpu.suppression.{name}", value)
    row = torch.arange(100.0)[None, :, None] * torch.tensor([4.0, 0, 4, 0]) + torch.tensor([0.0, 0, 10, 10])
    keep, count = segmented_nms(row, torch.linspace(1, 0, 100)[None], 0.3, 100)
    assert count.tolist() == [50]
    assert keep[0, :50].tolist() == list(range(0, 100, 2))


@on_triton
@pytest.mark.parametrize("plan", PLANS)
def test_scores_end_anywhere(plan: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last box above the score threshold, at the ends of words and chunks; NaN scores before it."""
    for name, value in PLANS[plan].items():
        monkeypatch.setattr(f"trimask.kernels.gpu.suppression.{name}", value)
    boxes, _ = crowd(200, rng)
    for last in (0, 1, 31, 32, 33, 64, 95, 96, 97, 199):
        scores = torch.where(torch.arange(200) < last, 0.9, 0.1)[torch.randperm(200, generator=rng)]
        scores[torch.randperm(200, generator=rng)[:5]] = -torch.tensor(torch.nan)
        one_segment(boxes, scores, 0.6, score_threshold=0.5)


@on_triton
@pytest.mark.parametrize("segments", [1, 2, 7, 70])
def test_any_number_of_segments(segments: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores, labels = random_segments(segments, 40, rng)
    expected = reference.segmented_nms(boxes, scores, 0.4, 12, labels=labels)
    for memory in (1 << 27, 1):  # the second is for chunks of one word
        monkeypatch.setattr("trimask.kernels.gpu.suppression._MEMORY", memory)
        assert all(map(torch.equal, segmented_nms(boxes, scores, 0.4, 12, labels=labels), expected))


@on_triton
def test_the_bits_have_bounded_memory() -> None:
    gpu = pytest.importorskip("trimask.kernels.gpu.suppression")
    for segments in (1, 5, 40, 1000, 100_000, 10_000_000):
        for words in (1, 32, 3125):
            chunk = gpu._chunk(segments, words, gpu._LONG)
            assert 1 <= chunk <= words
            assert chunk == 1 or segments * chunk * chunk * 128 <= gpu._MEMORY
    assert gpu._chunk(5, 32, gpu._LONG) == 32
    assert gpu._chunk(1, 3125, gpu._LONG) == 128


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a GPU, or bring data to it or from it; and shapes that depend on data."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        booleans = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.REFUSED or name.startswith("_unique") or booleans:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@on_triton
def test_nothing_waits_for_the_device(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores, labels = random_segments(2, 100, rng)
    counts = torch.tensor([100, 40])
    with pytest.raises(AssertionError, match="waits"), NoSync():
        boxes[scores > 0.5]
    with pytest.raises(AssertionError, match="waits"), NoSync():
        counts.max().item()
    for plan in PLANS.values():
        with monkeypatch.context() as patch:
            for name, value in plan.items():
                patch.setattr(f"trimask.kernels.gpu.suppression.{name}", value)
            for some in ({}, {"labels": labels, "counts": counts, "score_threshold": 0.1}):
                with NoSync():
                    segmented_nms(boxes, scores, 0.5, 30, **some)


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 2.0**-21, 2.0**-20, 0.3, 1.0, 2.0**21])
@pytest.mark.parametrize("scale", [2.0**-545, 2.0**-500, 2.0**-300, 2.0**-74, 2.0**-37, 1.0, 2.0**50, 2.0**300])
def test_float64_of_any_scale_and_threshold(scale: float, threshold: float, rng: torch.Generator) -> None:
    boxes, scores = crowd(60, rng)
    boxes = (boxes.double() / 16).round() * scale
    one_segment(boxes, scores, threshold)
    one_segment((boxes / scale * min(max(scale, 2.0**-80), 2.0**60)).float(), scores, threshold)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"],
)
def test_labels_of_any_dtype(dtype: str, rng: torch.Generator) -> None:
    boxes, scores = crowd(100, rng)
    labels = torch.randint(3, (100,), generator=rng).to(getattr(torch, dtype))
    if labels.is_floating_point():  # NaN equals nothing, and zeros each other
        labels[:20] = torch.tensor([0.0, -0.0, torch.nan, -torch.inf] * 5)
    one_segment(boxes, scores, 0.4, labels=labels)


def test_any_strides(rng: torch.Generator) -> None:
    boxes, scores, labels = random_segments(3, 50, rng)
    counts = torch.tensor([50, 20, 33])
    expected = reference.segmented_nms(boxes, scores, 0.5, 20, labels=labels[:1].expand(3, -1), counts=counts)
    strided = {
        "boxes": boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "scores": scores.T.contiguous().T,
        "labels": labels[:1].expand(3, -1),
        "counts": counts.repeat_interleave(2)[::2],
    }
    assert all(map(torch.equal, segmented_nms(**strided, iou_threshold=0.5, max_keep=20), expected))


# ---- properties

coordinates = st.integers(-12, 12).map(lambda v: v / 2) | st.floats(-1e3, 1e3, width=32) | st.floats(width=32)


# As many on a GPU as on a CPU; the interpreter takes ten times as long.
ON_TRITON = 1.0 if torch.cuda.is_available() else 0.1
ANY_BOXES = given(
    rows=st.lists(
        st.tuples(coordinates, coordinates, coordinates, coordinates, st.integers(0, 6), st.integers(0, 2)), max_size=24
    ),
    threshold=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]) | st.floats(0, 1),
    ordered=st.booleans(),
    wide=st.booleans(),
)


def check_properties(rows: list[tuple[float, ...]], threshold: float, ordered: bool, wide: bool) -> None:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    boxes, scores, labels = table[:, :4], table[:, 4], table[:, 5].long()
    if ordered:
        boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
    boxes = boxes.double() if wide else boxes
    kept = one_segment(boxes, scores, threshold, labels=labels)
    assert kept == batched_nms(boxes, scores, labels, threshold).tolist()

    def suppresses(i: int, j: int) -> bool:
        return bool(labels[i] == labels[j]) and float(reference.iou(boxes[i], boxes[j : j + 1])) > threshold

    def rank(i: int) -> tuple[float, int]:
        return -float(scores[i]), i

    assert kept == sorted(kept, key=rank)
    assert not any(suppresses(i, j) for i in kept for j in kept if i != j)
    for j in set(range(len(rows))) - set(kept):
        assert not boxes[j].isfinite().all() or any(suppresses(i, j) and rank(i) < rank(j) for i in kept)


@pytest.mark.host
@settings(max_examples=300, deadline=None)
@ANY_BOXES
def test_properties(**case: Any) -> None:
    check_properties(**case)


@on_triton
@settings(max_examples=int(300 * ON_TRITON), deadline=None)
@ANY_BOXES
def test_properties_on_triton(**case: Any) -> None:
    check_properties(**case)


ANY_CROWD = given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(0, 300), threshold=st.floats(0, 1), spread=st.floats(0, 0.5)
)


def check_against_torchvision(seed: int, n: int, threshold: float, spread: float) -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes, scores = crowd(n, torch.Generator().manual_seed(seed), spread)
    assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
    whole = (boxes / 16).round() * 16  # many shared sides, exact ratios and duplicates
    assert torch.equal(nms(whole, scores, threshold), ops.nms(whole, scores, threshold))


@pytest.mark.host
@settings(max_examples=50, deadline=None)
@ANY_CROWD
def test_random_crowds_equal_torchvision(**case: Any) -> None:
    check_against_torchvision(**case)


@on_triton
@settings(max_examples=int(50 * ON_TRITON), deadline=None)
@ANY_CROWD
def test_random_crowds_equal_torchvision_on_triton(**case: Any) -> None:
    check_against_torchvision(**case)


# ---- as an op


def _options(rng: torch.Generator) -> list[dict[str, Tensor | float]]:
    labels, counts = torch.randint(3, (2, 40), generator=rng), torch.tensor([40, 17])
    return [{}, {"labels": labels}, {"counts": counts, "score_threshold": 0.2, "labels": labels}]


def _segments(rng: torch.Generator, n: int = 40) -> tuple[Tensor, Tensor]:
    boxes, scores = (torch.stack(t) for t in zip(crowd(n, rng), crowd(n, rng), strict=True))
    return boxes, scores


def test_opcheck(rng: torch.Generator) -> None:
    boxes, scores = _segments(rng)
    for options in _options(rng):
        torch.library.opcheck(torch.ops.trimask.segmented_nms.default, (boxes, scores, 0.5, 12), options)
    torch.library.opcheck(torch.ops.trimask.segmented_nms.default, (boxes.requires_grad_(), scores, 0.5, 12))


def test_compiles_without_a_graph_break(rng: torch.Generator) -> None:
    compiled = torch.compile(segmented_nms, fullgraph=True, backend="aot_eager", dynamic=True)
    boxes, scores = _segments(rng)
    for options in _options(rng):
        for max_keep in (10, 20):
            expected = segmented_nms(boxes, scores, 0.5, max_keep, **options)
            assert all(map(torch.equal, compiled(boxes, scores, 0.5, max_keep, **options), expected))


def test_compiles_for_no_boxes_and_for_what_another_has_kept(rng: torch.Generator) -> None:
    def twice(boxes: Tensor, scores: Tensor) -> Tensor:
        kept = nms(boxes, scores, 0.7)
        return batched_nms(boxes[kept], scores[kept], kept % 2, 0.3)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for size in (5, 7, 0, 1, 9):
        boxes, scores = (x[0] for x in _segments(rng, size))
        assert torch.equal(compiled(boxes, scores), twice(boxes, scores))


def test_exports_with_a_dynamic_number_of_boxes(rng: torch.Generator) -> None:
    class Keep(torch.nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
            every, every_count = segmented_nms(boxes, scores, 0.5, boxes.shape[1], score_threshold=0.1)
            return every, every_count, *segmented_nms(boxes, scores, 0.5, 10), nms(boxes[0], scores[0], 0.5)

    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(Keep(), _segments(rng), dynamic_shapes={"boxes": {1: n}, "scores": {1: n}}).module()
    for size in (5, 90):
        arguments = _segments(rng, size)
        assert all(map(torch.equal, program(*arguments), Keep()(*arguments)))


# ---- errors

BOXES, SCORES = torch.zeros(2, 5, 4), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES[0]}, r"boxes: expected \[S, N, 4\], got \[5, 4\]"),
        ({"boxes": BOXES[..., :3]}, r"boxes: expected \[S, N, 4\], got \[2, 5, 3\]"),
        ({"boxes": BOXES.long()}, "boxes: expected a floating point dtype of at least 16 bits, got torch.int64"),
        ({"scores": SCORES.int()}, "scores: expected a floating point dtype of at least 16 bits, got torch.int32"),
        ({"scores": SCORES[:, :4]}, r"scores: expected \[2, 5\] beside boxes \[2, 5, 4\], got \[2, 4\]"),
        ({"labels": SCORES[0]}, r"labels: expected \[2, 5\] beside .*, got \[5\]"),
        ({"counts": SCORES}, r"counts: expected \[2\] beside .*, got \[2, 5\]"),
        ({"counts": torch.zeros(2, device="meta")}, "counts: expected the device of boxes, (cpu|cuda:0), got meta"),
        ({"max_keep": -1}, "max_keep: expected 0 or more, got -1"),
        ({"iou_threshold": -0.1}, "iou_threshold: expected 0 or more, got -0.1"),
        ({"iou_threshold": float("nan")}, "iou_threshold: expected 0 or more, got nan"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmented_nms(**{"boxes": BOXES, "scores": SCORES, "iou_threshold": 0.5, "max_keep": 3, **change})


def test_wrong_arguments_of_the_drop_ins_are_named() -> None:
    with pytest.raises(ValueError, match=r"boxes: expected \[N, 4\], got \[2, 5, 4\]"):
        nms(BOXES, SCORES, 0.5)
    with pytest.raises(ValueError, match=r"scores: expected \[5\] beside boxes \[5, 4\], got \[2, 5\]"):
        nms(BOXES[0], SCORES, 0.5)
    with pytest.raises(ValueError, match=r"idxs: expected \[5\] beside boxes \[5, 4\], got \[4\]"):
        batched_nms(BOXES[0], SCORES[0], torch.zeros(4), 0.5)
    with pytest.raises(ValueError, match="iou_threshold"):
        nms(BOXES[0], SCORES[0], -1.0)


def test_the_input_is_not_changed(rng: torch.Generator) -> None:
    boxes, scores = crowd(100, rng)
    copies = boxes.clone(), scores.clone()
    nms(boxes, scores, 0.5)
    np.testing.assert_array_equal(boxes, copies[0])
    np.testing.assert_array_equal(scores, copies[1])


def test_boxes_without_a_second_dimension_are_empty() -> None:
    torchvision = pytest.importorskip("torchvision")
    empty = torch.empty(0)
    expected = torchvision.ops.batched_nms(empty, empty, empty, 0.5)
    found = batched_nms(empty, empty, empty, 0.5)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_dtypes_of_eight_bits_are_refused(name: str) -> None:
    tensors = {"boxes": torch.zeros(2, 4), "scores": torch.zeros(2)}
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"{name}: expected a floating point dtype of at least 16 bits, got .*float8"):
        nms(**tensors, iou_threshold=0.5)
