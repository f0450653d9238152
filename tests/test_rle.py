"""COCO run lengths against pycocotools, runs counted one by one, and the masks that they come from."""

import os
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimask.kernels.cpu import masks as host
from trimask.kernels.paste_rule import PasteRule
from trimask.kernels.pasting import paste_masks
from trimask.kernels.reference import masks as reference
from trimask.kernels.rle import masks_to_rle

from .backends import BACKENDS, use_backend

TILES = {
    "pasting": {"_ROWS": 64, "_COLUMNS": 128, "_CLEARED": 1 << 14},
    "rle": {"_PROGRAMS": 1, "_LANES": 128, "_ROWS": 32},
}


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch, request.module, ("masks_to_rle", "paste_masks"), TILES)


def fewer(cases: tuple[int, ...]) -> tuple[int, ...]:
    """All of them, but the first half in the interpreter, which is slow."""
    return cases[: len(cases) // 2] if os.environ.get("TRIMASK_KERNELS") == "triton" else cases


RULES = {
    "tv": PasteRule.TORCHVISION,
    "d2": PasteRule.DETECTRON2,
    "other": PasteRule(padding=2, integer_boxes=False, threshold=0.3, inclusive=False),
}
both_rules = pytest.mark.parametrize("rule", [PasteRule.TORCHVISION, PasteRule.DETECTRON2], ids=["tv", "d2"])

SHAPES = [
    "zeros",
    "ones",
    "first",
    "last",
    "first_column",
    "full_height",
    "full_width",
    "stripes",
    "checkers",
    "random",
]


def dense_mask(shape: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    y, x = np.mgrid[:height, :width]
    return {
        "zeros": np.zeros(size, bool),
        "ones": np.ones(size, bool),
        "first": (y == 0) & (x == 0),
        "last": (y == height - 1) & (x == width - 1),
        "first_column": x == 0,
        "full_height": (x > 0) & (x < width - 1),  # its columns run into each other
        "full_width": (y > 0) & (y < height - 1),
        "stripes": y % 2 == 1,
        "checkers": (y + x) % 2 == 0,
        "random": rng.random(size) < 0.3,
    }[shape]


def mask_case(rng: torch.Generator, count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smooth masks, and boxes of which every third is at least as high as the picture."""
    coarse = torch.randn(count, 1, 5, 5, generator=rng)
    probabilities = (3 * torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic")).sigmoid()[:, 0]
    scale = torch.tensor([size[1], size[0]])
    centre, sides = (torch.rand(count, 2, generator=rng) * scale for _ in range(2))
    boxes = torch.cat([centre - sides / 2, centre + sides / 2 + 1], 1)
    boxes[::3, 1], boxes[::3, 3] = -3, size[0] + 4.0
    probabilities[::6] = 1 - 0.2 * probabilities[::6]  # full: whole columns of ones
    return probabilities, boxes


@pytest.mark.host
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 12), (40, 33)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pycocotools(np_rng: np.random.Generator, shape: str, size: tuple[int, int]) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = dense_mask(shape, size, np_rng)
    expected = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    counts = host.runs_of_mask(mask)
    assert counts.tolist() == reference.runs_of_mask(torch.from_numpy(mask))
    assert host.encode_runs(counts).encode() == expected["counts"]
    assert host.area_of_runs(counts) == coco.area(expected) == mask.sum()
    assert list(host.box_of_runs(counts, size[0])) == coco.toBbox(expected).tolist()
    np.testing.assert_array_equal(host.decode_runs(expected["counts"]), counts)
    np.testing.assert_array_equal(host.mask_of_runs(counts, size), mask)


@pytest.mark.host
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
@both_rules
@pytest.mark.parametrize("size", [(1, 60), (60, 1), (48, 66)], ids=str)
def test_pasted_masks_equal_pycocotools(rng: torch.Generator, rule: PasteRule, size: tuple[int, int]) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    probabilities, boxes = mask_case(rng, 18, size)
    probabilities[0], boxes[0] = 1.0, torch.tensor([-9.0, -9, size[1] + 9, size[0] + 9])
    masks = paste_masks(probabilities, boxes, size, rule=rule).numpy()
    assert masks.all(1).any()  # a column of ones from top to bottom
    runs = host.paste_to_runs(probabilities.numpy(), boxes.numpy(), size, rule=rule)
    for mask, counts in zip(masks, runs, strict=True):
        expected = coco.encode(np.asfortranarray(mask.view(np.uint8)))
        assert host.encode_runs(counts).encode() == expected["counts"]
        np.testing.assert_array_equal(coco.decode(expected), mask)


def counts_of(runs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Without the padding, which must be zeros."""
    assert not any(row[length:].any() for row, length in zip(runs, lengths.tolist(), strict=True))
    return [row[:length].tolist() for row, length in zip(runs, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("size", [(1, 60), (60, 1), (48, 66)], ids=str)
def test_runs_equal_pycocotools(rng: torch.Generator, rule: PasteRule, size: tuple[int, int]) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    probabilities, boxes = mask_case(rng, 6, size)
    probabilities[1] = torch.rand(28, 28, generator=rng)  # a column changes many times
    boxes[0] = torch.tensor([-3, -3, size[1] + 3, size[0] + 4])  # columns of ones that follow each other
    masks = paste_masks(probabilities, boxes, size, rule=rule).numpy()
    assert masks.all(1).any()  # a column of ones from top to bottom
    runs = counts_of(*masks_to_rle(probabilities, boxes, size, rule=rule, capacity=2000))
    for mask, counts in zip(masks, runs, strict=True):
        assert host.encode_runs(counts).encode() == coco.encode(np.asfortranarray(mask.view(np.uint8)))["counts"]


TILINGS = {  # programs, lanes, rows at a time, rows of a piece
    "blocks and pieces": (8, 16, 8, 8),
    "pieces": (4, 64, 4, 8),
    "several columns a lane": (1, 16, 32, 16),
}


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_any_division_of_the_work_gives_the_same(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tiling: tuple[int, ...]
) -> None:
    """Noise, in boxes as high as the picture, as wide, at its corners, inside it and around it."""
    gpu = pytest.importorskip("trimask.kernels.gpu.rle")
    for constant, value in zip(("_PROGRAMS", "_LANES", "_ROWS", "_PIECE"), tiling, strict=True):
        monkeypatch.setattr(gpu, constant, value)
    corners = [(-9, -9, 50, 40), (9, -5, 30, 40), (9, 9, 21, 60), (12, -9, 27, 20), (-5, 3, 60, 30), (25, 20, 60, 60)]
    boxes, size = torch.tensor(corners).float(), (37, 41)
    probabilities = torch.rand(len(boxes), 28, 28, generator=rng)
    probabilities[-1] = 1
    runs = masks_to_rle(probabilities, boxes, size, rule=PasteRule.DETECTRON2, capacity=1000)
    masks = paste_masks(probabilities, boxes, size, rule=PasteRule.DETECTRON2)
    assert masks[0, 0, 1:].any()
    assert masks[0, -1, :-1].any()
    assert masks[-1, -1, -1]
    assert counts_of(*runs) == [reference.runs_of_mask(mask) for mask in masks]


@both_rules
def test_each_mask_of_a_batch_has_its_own_picture(rng: torch.Generator, rule: PasteRule) -> None:
    probabilities, boxes = mask_case(rng, 9, (48, 66))
    sizes = [(48, 66), (66, 48), (20, 20), (0, 5), (5, 0), (1, 1), (100, 90), (48, 66), (7, 300)]
    options = {"rule": rule, "capacity": 700}
    runs = counts_of(*masks_to_rle(probabilities, boxes, torch.tensor(sizes), **options))
    assert runs[3] == runs[4] == [0]
    for n, size in enumerate(sizes):
        if min(size):
            mask = paste_masks(probabilities[n : n + 1], boxes[n : n + 1], size, rule=rule)[0]
            assert runs[n] == reference.runs_of_mask(mask)


@both_rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_runs_in_any_precision(rng: torch.Generator, rule: PasteRule, dtype: torch.dtype) -> None:
    probabilities, boxes = mask_case(rng, 4, (40, 50))
    probabilities[2, 3:5] = float("nan")
    probabilities, boxes = probabilities.to(dtype), boxes.to(dtype)
    runs = counts_of(*masks_to_rle(probabilities, boxes, (40, 50), rule=rule, capacity=400))
    assert runs == [reference.runs_of_mask(mask) for mask in paste_masks(probabilities, boxes, (40, 50), rule=rule)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_boxes_that_are_none_or_everything(rule: PasteRule) -> None:
    boxes = torch.tensor([(9, 9, 2, 2), (float("nan"), 0, 5, 5), (90, 9, 95, 20), (-1e9, -1e9, 1e9, 1e9)])
    runs = masks_to_rle(torch.ones(4, 28, 28), boxes, (48, 66), rule=rule, capacity=3)
    assert counts_of(*runs) == [[48 * 66]] * 3 + [[0, 48 * 66]]
    runs = masks_to_rle(torch.ones(4, 28, 28), boxes, (0, 66), rule=rule, capacity=3)
    assert counts_of(*runs) == [[0]] * 4


def test_pictures_that_only_a_tensor_shows_to_be_too_large() -> None:
    """On a GPU nobody reads their sizes; there is no run then, while an empty picture has one of 0."""
    sizes = torch.tensor([(9, 9), (2**16, 2**15), (2**40, 2**40), (-1, 9), (9, -1), (-9, -9), (2**40, 0)])
    inputs = torch.ones(7, 2, 2), torch.tensor([(-1e30, -1e30, 1e30, 1e30)] * 7), sizes
    options = {"rule": PasteRule.TORCHVISION, "capacity": 4}
    if os.environ.get("TRIMASK_KERNELS") == "torch":
        with pytest.raises(ValueError, match="sizes: expected pictures of fewer than"):
            masks_to_rle(*inputs, **options)
    else:
        assert counts_of(*masks_to_rle(*inputs, **options)) == [[0, 81], [], [], [], [], [], [0]]


@pytest.mark.host
@both_rules
def test_each_mask_has_its_own_picture(rng: torch.Generator, rule: PasteRule) -> None:
    probabilities, boxes = (part.numpy() for part in mask_case(rng, 9, (48, 66)))
    sizes = np.array([(48, 66), (66, 48), (20, 20), (0, 5), (5, 0), (1, 1), (100, 90), (48, 66), (7, 300)])
    runs = host.paste_to_runs(probabilities, boxes, sizes, rule=rule)
    for n, (height, width) in enumerate(sizes.tolist()):
        mask = host.paste_masks(probabilities[n : n + 1], boxes[n : n + 1], (height, width), rule=rule)[0]
        np.testing.assert_array_equal(host.mask_of_runs(runs[n], (height, width)), mask)
        np.testing.assert_array_equal(runs[n], host.runs_of_mask(mask))


@pytest.mark.host
@both_rules
def test_boxes_that_are_none_and_empty_pictures(rule: PasteRule) -> None:
    boxes = np.array([(9, 9, 2, 2), (np.nan, 0, 5, 5), (70, 9, 90, 20), (-1e9, -1e9, 1e9, 1e9)], np.float32)
    runs = host.paste_to_runs(np.ones((4, 28, 28), np.float32), boxes, (48, 66), rule=rule)
    assert [counts.tolist() for counts in runs] == [[48 * 66]] * 3 + [[0, 48 * 66]]
    assert host.paste_to_runs(np.ones((0, 28, 28)), np.ones((0, 4)), (48, 66), rule=rule) == []
    assert (
        host.runs_of_mask(np.zeros((0, 5), bool)).tolist() == host.runs_of_mask(np.zeros((5, 0), bool)).tolist() == [0]
    )


@pytest.mark.host
def test_no_dense_masks_are_made() -> None:
    size, count = (3000, 4000), 40
    boxes = np.tile(np.array([[1000, 1000, 1040, 1040]], np.float32), (count, 1))
    tracemalloc.start()
    runs = host.paste_to_runs(np.ones((count, 28, 28), np.float32), boxes, size, rule=PasteRule.DETECTRON2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert host.area_of_runs(runs[-1]) == 40 * 40
    assert peak < size[0] * size[1]


@pytest.mark.host
@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 40) | st.integers(0, 2**24 - 1), max_size=30))
def test_strings_of_any_counts(counts: list[int]) -> None:
    """Five characters a count at the most: pycocotools has memory for less than six, and writes beyond it."""
    coco = pytest.importorskip("pycocotools.mask")
    string = host.encode_runs(counts)
    assert host.decode_runs(string).tolist() == host.decode_runs(string.encode()).tolist() == counts
    assert coco.frPyObjects({"counts": counts, "size": [1, 1]}, 1, 1)["counts"] == string.encode()


@pytest.mark.host
@pytest.mark.parametrize("top", [2**29, 2**31, 2**45])
def test_strings_of_huge_counts(np_rng: np.random.Generator, top: int) -> None:
    counts = np_rng.integers(0, top, 200)
    np.testing.assert_array_equal(host.decode_runs(host.encode_runs(counts)), counts)


@pytest.mark.host
@settings(deadline=None, max_examples=200)
@given(st.integers(0, 9), st.integers(0, 9), st.data())
def test_round_trip_of_any_mask(height: int, width: int, data: st.DataObject) -> None:
    pixels = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(pixels, bool).reshape(height, width)
    counts = host.runs_of_mask(mask)
    assert (counts[1:] > 0).all()
    np.testing.assert_array_equal(host.mask_of_runs(host.decode_runs(host.encode_runs(counts)), mask.shape), mask)
    x, y, w, h = host.box_of_runs(counts, height)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not mask.any():
        assert (x, y, w, h) == (0, 0, 0, 0)
    else:
        assert (x, x + w) == (columns[0], columns[-1] + 1)
        assert y <= rows[0]
        assert y + h > rows[-1]


@pytest.mark.host
@pytest.mark.parametrize("string", ["P", "0P", "o" * 20 + "0", "\x7f", " ", "é", "O"], ids=repr)
def test_strings_that_no_counts_give(string: str) -> None:
    with pytest.raises(ValueError, match="string: expected"):
        host.decode_runs(string)


@pytest.mark.host
@pytest.mark.parametrize("counts", [[5], [7], [9, -3], []])
def test_counts_that_do_not_fit(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="counts: expected"):
        host.mask_of_runs(counts, (2, 3))


@both_rules
@pytest.mark.parametrize("capacity", [0, 5, 400])
def test_padded_runs_and_the_length_needed(rng: torch.Generator, rule: PasteRule, capacity: int) -> None:
    probabilities, boxes = mask_case(rng, 8, (48, 66))
    runs, lengths = masks_to_rle(probabilities, boxes, (48, 66), rule=rule, capacity=capacity)
    assert runs.dtype == lengths.dtype == torch.int32
    assert runs.shape == (8, capacity)
    masks = paste_masks(probabilities, boxes, (48, 66), rule=rule)
    expected = [reference.runs_of_mask(mask) for mask in masks]
    assert lengths.tolist() == [len(counts) for counts in expected]
    assert runs.tolist() == [(counts + [0] * capacity)[:capacity] for counts in expected]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_runs_that_do_not_fit_are_not_written_elsewhere(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("trimask.kernels.gpu.rle"), "_PROGRAMS", 2)
    inputs = torch.ones(2, 28, 28), torch.tensor([(3.0, 4, 9, 8), (1, 2, 11, 6)]), (20, 30)
    expected = [reference.runs_of_mask(mask) for mask in paste_masks(*inputs, rule=PasteRule.DETECTRON2)]
    capacity = len(expected[0]) - missing
    runs, lengths = masks_to_rle(*inputs, rule=PasteRule.DETECTRON2, capacity=capacity)
    assert lengths.tolist() == list(map(len, expected)) == [13, 21]
    assert runs.tolist() == [(counts + [0] * capacity)[:capacity] for counts in expected]


def test_sizes_as_a_tensor_and_as_a_pair(rng: torch.Generator) -> None:
    probabilities, boxes = mask_case(rng, 4, (48, 66))
    options = {"rule": PasteRule.TORCHVISION, "capacity": 300}
    one = masks_to_rle(probabilities, boxes, (48, 66), **options)
    many = masks_to_rle(probabilities.double().float(), boxes, torch.tensor([[48, 66]] * 4), **options)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    mixed = torch.tensor([[48, 66], [30, 66], [48, 30], [10, 10]], dtype=torch.int32)
    assert masks_to_rle(probabilities, boxes, mixed, **options)[0].sum(1).tolist() == mixed.prod(1).tolist()


def test_no_masks() -> None:
    empty = torch.empty(0, 28, 28), torch.empty(0, 4)
    runs, lengths = masks_to_rle(*empty, (48, 66), rule=PasteRule.TORCHVISION, capacity=7)
    assert (runs.shape, lengths.shape) == ((0, 7), (0,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": torch.ones(3, 4)}, "boxes"),
        ({"probabilities": torch.ones(2, 28, 27)}, "probabilities"),
        ({"sizes": torch.ones(3, 2, dtype=torch.int64)}, "sizes"),
        ({"sizes": (8, 8, 8)}, "sizes"),
        ({"sizes": (1 << 16, 1 << 15)}, "sizes"),
        ({"sizes": (-1, 8)}, "sizes"),
        ({"capacity": -1}, "capacity"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict, message: str) -> None:
    fitting = {"probabilities": torch.ones(2, 28, 28), "boxes": torch.ones(2, 4), "sizes": (8, 8), "capacity": 9}
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        masks_to_rle(**{**fitting, **changed}, rule=PasteRule.DETECTRON2)


@both_rules
def test_opcheck(rng: torch.Generator, rule: PasteRule) -> None:
    sizes = torch.tensor([[20, 30], [30, 20], [9, 9]])
    arguments = (rule.padding, rule.integer_boxes, rule.threshold, rule.inclusive, 50)
    torch.library.opcheck(torch.ops.trimask.masks_to_rle, (*mask_case(rng, 3, (20, 30)), sizes, *arguments))
    torch.library.opcheck(torch.ops.trimask.masks_to_rle, (*mask_case(rng, 3, (20, 30)), None, *arguments, 20, 30))


@both_rules
def test_compiles_and_exports(rng: torch.Generator, rule: PasteRule) -> None:
    class Runs(torch.nn.Module):
        def forward(self, probabilities: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
            return masks_to_rle(probabilities, boxes, (60, 70), rule=rule, capacity=200)

    count = torch.export.Dim("count")
    exported = torch.export.export(
        Runs(), mask_case(rng, 5, (60, 70)), dynamic_shapes=({0: count}, {0: count})
    ).module()
    compiled = torch.compile(Runs(), fullgraph=True, backend="aot_eager", dynamic=True)
    for masks in fewer((0, 1, 5, 9)):
        inputs = mask_case(rng, masks, (60, 70))
        expected = Runs()(*inputs)
        for outputs in (compiled(*inputs), exported(*inputs)):
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.host
def test_run_lengths_whose_sum_wraps_are_refused() -> None:
    string = host.encode_runs([2**58] * 64 + [12])
    for counts in ([2**62] * 4 + [12], host.decode_runs(string)):
        assert np.sum(counts, dtype=np.int64) == 12
        with pytest.raises(ValueError, match="counts: expected run lengths that sum to 3 x 4"):
            host.mask_of_runs(counts, (3, 4))


@pytest.mark.parametrize("size", [(2**40, 2**40), (2**32, 2**32), (2**16, 2**15)])
def test_pictures_of_too_many_pixels_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sizes: expected pictures of fewer than"):
        masks_to_rle(torch.ones(1, 2, 2), torch.zeros(1, 4), size, rule=PasteRule.TORCHVISION, capacity=4)


def test_sizes_of_pictures_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"sizes: expected integers \[1, 2\] on cpu, got torch.float32 \[1, 2\]"):
        masks_to_rle(
            torch.ones(1, 2, 2), torch.zeros(1, 4), torch.ones(1, 2) * 9.7, rule=PasteRule.TORCHVISION, capacity=4
        )


@pytest.mark.parametrize("counts", [[-3, 4], [3.7, 4], [[3, 4]], 7])
def test_counts_that_are_none_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match="counts: expected whole numbers of at least 0 in a row"):
        host.encode_runs(counts)


def test_export_with_a_free_size(rng: torch.Generator) -> None:
    class Runs(torch.nn.Module):
        def forward(self, probabilities: Tensor, boxes: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
            return masks_to_rle(probabilities, boxes, picture.shape[:2], rule=PasteRule.TORCHVISION, capacity=50)

    probabilities, boxes = mask_case(rng, 3, (40, 50))
    height, width = torch.export.Dim("h", max=5000), torch.export.Dim("w", max=5000)
    program = torch.export.export(
        Runs(), (probabilities, boxes, torch.zeros(40, 50)), dynamic_shapes=(None, None, {0: height, 1: width})
    ).module()
    for size in ((40, 50), (33, 71)):
        given = probabilities, boxes, torch.zeros(size)
        assert all(map(torch.equal, program(*given), Runs()(*given)))
