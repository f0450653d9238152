"""Segmented NMS and the drop-in functions: indices are compared exactly, always."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimask.kernels.cpu import suppression as host
from trimask.kernels.reference import suppression as reference
from trimask.kernels.suppression import batched_nms, nms, segmented_nms

SIZES = (0, 1, 63, 64, 65, 1000)


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


@pytest.mark.parametrize("tenths", range(1, 10))
def test_ratios_a_rounding_away_from_the_threshold(tenths: int, rng: torch.Generator) -> None:
    """Here ``intersection > threshold * union``, the same without rounding, is wrong in a hundredth of the cases."""
    union = torch.randint(2**22, 2**24, (500,), generator=rng)
    widths = torch.stack([union, (union * (tenths / 10)).long() + torch.arange(500) % 3 - 1], dim=1)
    boxes = torch.stack([0 * widths, 0 * widths, widths, 0 * widths + 1], dim=2).float()  # IoU is the ratio of widths
    scores = torch.tensor([1.0, 0.5]).expand(500, 2)
    expected, _ = reference.segmented_nms(boxes, scores, tenths / 10, 2)
    assert torch.equal(segmented_nms(boxes, scores, tenths / 10, 2)[0], expected)
    assert 0 < (expected[:, 1] == 1).sum() < 500


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool])
@pytest.mark.parametrize("n", [0, 1, 65, 1000])
def test_batched_equals_the_loop_over_classes(n: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    ops = pytest.importorskip("torchvision").ops
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
        ]
    )
    scores = torch.linspace(1, 0, 8)
    for threshold in (0.0, 0.5):
        assert nms(boxes, scores, threshold).tolist() == list(range(8))
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("scale", [1e-19, 1e-22, 1e-3, 1e4, 1e18, 1e20])
def test_any_scale(scale: float, rng: torch.Generator) -> None:
    """Areas of few digits or none, and of infinity, decide as the formula does."""
    ops = pytest.importorskip("torchvision").ops
    boxes, scores = crowd(200, rng)
    boxes = (boxes - 400) * scale
    for threshold in (0.0, 0.3, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


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


def test_a_hundred_thousand_boxes(rng: torch.Generator) -> None:
    cell = torch.arange(50_000)
    corner = torch.stack([cell % 250, cell // 250], dim=1) * 8 + torch.rand(50_000, 2, generator=rng)
    boxes = torch.cat([corner, corner + 6], dim=1)
    order = torch.randperm(100_000, generator=rng)
    # Each box comes twice, the second time with the lower score.
    boxes, scores = boxes.repeat(2, 1)[order], torch.linspace(1, 0, 100_000)[order]
    kept = nms(boxes, scores, 0.5)
    assert order[kept].tolist() == list(range(50_000))
    # And as many copies of one box.
    assert nms(boxes[:1].expand(100_000, 4), scores, 0.5).tolist() == [int(scores.argmax())]


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


# ---- properties

coordinates = st.integers(-12, 12).map(lambda v: v / 2) | st.floats(-1e3, 1e3, width=32) | st.floats(width=32)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(coordinates, coordinates, coordinates, coordinates, st.integers(0, 6), st.integers(0, 2)), max_size=24
    ),
    threshold=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]) | st.floats(0, 1),
    ordered=st.booleans(),
    wide=st.booleans(),
)
def test_properties(rows: list[tuple[float, ...]], threshold: float, ordered: bool, wide: bool) -> None:
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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 300), threshold=st.floats(0, 1), spread=st.floats(0, 0.5))
def test_random_crowds_equal_torchvision(seed: int, n: int, threshold: float, spread: float) -> None:
    ops = pytest.importorskip("torchvision").ops
    boxes, scores = crowd(n, torch.Generator().manual_seed(seed), spread)
    assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
    whole = (boxes / 16).round() * 16  # many shared sides, exact ratios and duplicates
    assert torch.equal(nms(whole, scores, threshold), ops.nms(whole, scores, threshold))


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
        ({"counts": torch.zeros(2, device="meta")}, "counts: expected the device of boxes, cpu, got meta"),
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
