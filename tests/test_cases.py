"""What the benchmarks measure: recorded inputs are whole, our ops are right on them, nothing is left out unsaid."""

import pytest
import torch

from tolerances import roi_align_error
from trimask.benchmarks import bench_ops, cases
from trimask.benchmarks.comparison import NEEDS_A_GPU, Comparison, Planned, affordable, bounded
from trimask.benchmarks.harness import Row
from trimask.benchmarks.inputs import STRIDES
from trimask.kernels import PasteRule, paste_masks, pyramid_roi_align, segmented_nms
from trimask.kernels.reference import masks as reference_masks
from trimask.kernels.reference import roi_pooling as reference_pooling
from trimask.kernels.reference import suppression as reference_suppression

recorded = pytest.mark.parametrize("name", cases.RECORDED)


@recorded
def test_a_recording_is_of_one_picture(name: str) -> None:
    seen = cases.recording(name)
    height, width = seen.size
    assert min(seen.size) <= int(name.rpartition(" ")[2])
    for boxes in (seen.level_boxes, seen.proposals, seen.candidate_boxes):
        assert boxes.dtype == torch.float32
        assert boxes[..., 0::2].min() >= 0
        assert boxes[..., 1::2].min() >= 0
        assert boxes[..., 0::2].max() <= width
        assert boxes[..., 1::2].max() <= height
    assert seen.level_boxes.shape == (5, 1000, 4)
    for scores in seen.level_scores:
        there = scores[scores > -torch.inf]
        assert len(there) > 50
        assert (there[1:] <= there[:-1]).all()
    assert seen.proposals.shape == seen.candidate_boxes.shape == (1000, 4)
    assert 10 <= len(seen.boxes) == len(seen.masks)
    assert seen.boxes[:, 2].max() <= seen.original_size[1]
    assert seen.masks.shape[1:] == (28, 28)
    assert 0 <= seen.masks.min() < 0.1 < 0.9 < seen.masks.max() <= 1


def test_another_recording_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recording: expected one of 000000000127 at 320, .* got 'street'"):
        cases.recording("street")


@recorded
def test_suppression_of_real_boxes_is_exact(name: str) -> None:
    seen = cases.recording(name)
    levels = seen.level_boxes[:, :300], seen.level_scores[:, :300], 0.7, 200
    options = {"score_threshold": -torch.inf}
    assert_same(segmented_nms(*levels, **options), reference_suppression.segmented_nms(*levels, **options))
    boxes, scores, labels = cases.DetectionCase(name).candidates()
    found = boxes[None], scores[None], 0.5, 100
    options = {"labels": labels[None], "score_threshold": 0.05}
    assert_same(segmented_nms(*found, **options), reference_suppression.segmented_nms(*found, **options))


@pytest.mark.parametrize("case", [*cases.nms_cases(quick=True)], ids=str)
def test_suppression_at_each_density_is_exact(case: cases.NMSCase) -> None:
    arguments = case.boxes()[None], case.scores()[None], case.iou_threshold, case.kept or case.count
    assert_same(segmented_nms(*arguments), reference_suppression.segmented_nms(*arguments))


def assert_same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert expected[1].min() > 0
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@recorded
def test_pooling_of_real_proposals(name: str) -> None:
    case = cases.RoIAlignCase(name, count=40, channels=2)
    planar, boxes = case.features(), case.boxes()[None]
    expected = reference_pooling.pyramid_roi_align(planar, boxes, STRIDES, (7, 7), sampling_ratio=2, aligned=False)
    for features in (planar, [x.to(memory_format=torch.channels_last) for x in planar]):
        got = pyramid_roi_align(features, boxes, STRIDES, 7, sampling_ratio=2, aligned=False)
        assert float((got.double() - expected).abs().max()) <= max(
            roi_align_error(x, float(x.abs().max())) for x in planar
        )


@recorded
def test_pasting_of_real_masks(name: str) -> None:
    masks, boxes, size = cases.MaskCase(name).masks()
    masks, boxes = masks[:10], boxes[:10]
    got = paste_masks(masks, boxes, size, rule=PasteRule.TORCHVISION)
    expected = reference_masks.paste_masks(masks, boxes, size, rule=PasteRule.TORCHVISION)
    assert int((got != expected).sum((1, 2)).max()) <= 2
    assert got.any((1, 2)).all()


def test_the_sweeps_are_as_wide_as_they_say() -> None:
    rois = [*cases.roi_align_cases(quick=False)]
    assert {case.count for case in rois} >= {100, 5000}
    assert {case.channels for case in rois} >= {64, 128, 256, 512}
    assert {case.output for case in rois} == {7, 14, 28}
    assert {case.dtype for case in rois} == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    assert {case.recorded for case in rois} == {"", *cases.RECORDED}
    maps = [*cases.map_cases(quick=False)]
    assert {(case.maximum, case.stride) for case in maps} == {(m, s) for m in (False, True) for s in (4, 16)}
    boxes = [*cases.nms_cases(quick=False)]
    assert {(case.count, case.density) for case in boxes} >= {(n, d) for n in (100, 100_000) for d in cases.DENSITIES}
    masks = [*cases.mask_cases(quick=False)]
    assert {case.count for case in masks} >= {1, 300}
    assert max(case.size for case in masks) == (4000, 6000)
    assert len({(case.name, case.dtype) for case in rois}) == len(rois)
    assert len({case.name for case in masks}) == len(masks)


def test_all_that_fits_into_memory_fits_into_the_time() -> None:
    """By what the cases say they cost, five calls of each."""
    assert 5 * sum(cost for _, _, cost, _ in bench_ops.plan(quick=False)) < 60 * bench_ops.MINUTES
    assert 5 * sum(cost for _, _, cost, _ in bench_ops.plan(quick=True)) < 60


def test_what_there_is_no_time_for_is_named() -> None:
    made: list[str] = []

    def case(name: str, seconds: float) -> Planned:
        def rows() -> list[Row]:
            made.append(name)
            absent = {"peer": NEEDS_A_GPU}
            return Comparison("op", name, {"trimask": lambda: 1}, lambda a, b: "", absent=absent).rows(1, quick=False)

        return Planned("op", name, seconds, rows)

    planned = [case("cheap", 0.0), case("dear", 100.0)]
    (ours, peer), (left,) = bounded(planned, threads=1, quick=False, seconds=60)
    assert made == ["cheap"]
    assert ours.p50_ms is not None
    assert (peer.implementation, peer.note, peer.correct, peer.p50_ms) == ("peer", NEEDS_A_GPU, None, None)
    assert (left.subject, left.case, left.p50_ms, left.correct) == ("op", "dear", None, None)
    assert left.note.startswith("left out: about 800 s, and ")
    assert len([*bounded(planned, threads=1, quick=True, seconds=0)]) == 2  # what is quick is never left out


def test_what_there_is_no_memory_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert affordable(1000) == ""
    assert affordable(1 << 60) == "left out: needs 1152921505 GB of memory"
    monkeypatch.setattr(bench_ops, "affordable", lambda size: affordable(1 << 60) if size > 1e6 else "")
    case = cases.MaskCase(cases.RECORDED[1])
    for make in (bench_ops._paste, bench_ops._run_lengths):
        assert "left out" in make(case).absent["torchvision"]
    assert "trimask" in bench_ops._run_lengths(case).implementations


def test_every_subject_lists_what_needs_a_gpu() -> None:
    for *_, make in bench_ops.plan(quick=True):
        one = make()
        assert one.absent["trimask, Triton"] == NEEDS_A_GPU, one.case
        assert len({*one.implementations, *one.absent}) == len(one.implementations) + len(one.absent)
