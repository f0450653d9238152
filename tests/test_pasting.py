"""Pasted masks against float64 maths, torchvision, and the grid_sample form of Detectron2's rule."""

import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimask.kernels.cpu import masks as host
from trimask.kernels.paste_rule import PasteRule
from trimask.kernels.pasting import mask_probabilities, paste_masks
from trimask.kernels.reference import masks as reference

from .backends import BACKENDS, use_backend
from .tolerances import EPS, paste_tie

TILES = {"_ROWS": 64, "_COLUMNS": 128, "_PACKED_ROWS": 64, "_PACKED_BYTES": 16, "_CLEARED": 1 << 14}


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("mask_probabilities", "paste_masks")
    use_backend(request.param, monkeypatch, request.module, names, {"pasting": TILES})


def fewer(cases: tuple[int, ...]) -> tuple[int, ...]:
    """All of them, but the first half in the interpreter, which is slow."""
    return cases[: len(cases) // 2] if os.environ.get("TRIMASK_KERNELS") == "triton" else cases


RULES = {
    "torchvision": PasteRule.TORCHVISION,
    "detectron2": PasteRule.DETECTRON2,
    "other": PasteRule(padding=2, integer_boxes=False, threshold=0.3, inclusive=False),
}
both_rules = pytest.mark.parametrize(
    "rule", [RULES["torchvision"], RULES["detectron2"]], ids=["torchvision", "detectron2"]
)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def smooth_masks(rng: torch.Generator, count: int, cells: int = 28) -> Tensor:
    coarse = torch.randn(count, 1, max(cells // 4, 1), max(cells // 4, 1), generator=rng)
    return (3 * F.interpolate(coarse, size=(cells, cells), mode="bicubic")).sigmoid()[:, 0]


def random_boxes(rng: torch.Generator, count: int, size: tuple[int, int], beyond: float = 0.2) -> Tensor:
    """From a pixel to the whole picture, some of them partly off it."""
    height, width = size
    scale = torch.tensor([width, height])
    sides = torch.exp(torch.rand(count, 2, generator=rng) * torch.log(scale.float()))
    centre = (torch.rand(count, 2, generator=rng) * (1 + 2 * beyond) - beyond) * scale
    return torch.cat([centre - sides / 2, centre + sides / 2], 1)


def exact_case(rng: torch.Generator, rule: PasteRule, count: int = 12) -> tuple[Tensor, Tensor]:
    """Masks and boxes on which float32 rounds nothing that matters, and where many values equal the threshold."""
    cells = 16 - 2 * rule.padding
    sides = 2.0 ** torch.randint(2, 7, (count, 2), generator=rng)
    low = torch.randint(-64, 256, (count, 2), generator=rng) / 8
    if rule.integer_boxes:  # what is cut off is half a pixel: no rounding reaches the whole one
        low = low.floor() + 0.5
        low, sides = low.clamp(min=0.5), sides - 1
    centre = low + sides / 2
    half = sides / 2 * cells / 16
    probabilities = torch.randint(0, 3, (count, cells, cells), generator=rng) / 2
    return probabilities, torch.cat([centre - half, centre + half], 1)


@both_rules
@pytest.mark.parametrize(("box", "counts"), [((100, 90, 140, 130), (1760, 1600)), ((100, 90, 101, 91), (9, 1))])
def test_pixel_counts_of_a_full_mask(rule: PasteRule, box: tuple, counts: tuple[int, int]) -> None:
    mask = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]).float(), (480, 640), rule=rule)
    assert mask.sum().item() == counts[rule == PasteRule.DETECTRON2]


def torchvision_paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    return (roi_heads.paste_masks_in_image(probabilities[:, None], boxes, size) > 0.5)[:, 0]


def grid_sample_paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # [N, 1]
    x = (torch.arange(size[1]) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(size[0]) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)  # [N, H, W, 2]
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= 0.5


peers = pytest.mark.parametrize(
    ("rule", "peer"),
    [(PasteRule.TORCHVISION, torchvision_paste), (PasteRule.DETECTRON2, grid_sample_paste)],
    ids=["torchvision", "detectron2"],
)


@peers
@pytest.mark.parametrize("whole", [False, True], ids=["real", "whole"])
def test_equals_the_peers(rng: torch.Generator, rule: PasteRule, peer: Callable[..., Tensor], whole: bool) -> None:
    """Within the two pixels a mask that rounding may move; torchvision refuses boxes off the picture."""
    size = (160, 213)
    boxes = random_boxes(rng, 24, size, beyond=0)
    boxes = torch.stack([boxes[:, 0].clamp(0, 200), boxes[:, 1].clamp(0, 150), boxes[:, 2], boxes[:, 3]], 1)
    boxes[:, 2:] = torch.maximum(torch.minimum(boxes[:, 2:], torch.tensor([213, 160])), boxes[:, :2] + 0.5)
    if whole:
        boxes = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1)
    probabilities = smooth_masks(rng, 24)
    mine, theirs = paste_masks(probabilities, boxes, size, rule=rule), peer(probabilities, boxes, size)
    assert theirs.any(2).any(1).sum() > 12
    assert (mine != theirs).sum((1, 2)).max() <= 2


@peers
def test_equals_the_peers_on_values_at_the_threshold(
    rng: torch.Generator, rule: PasteRule, peer: Callable[..., Tensor]
) -> None:
    probabilities, boxes = exact_case(rng, rule)
    boxes += boxes[:, :2].amin(0).neg().clamp(min=0).ceil().repeat(2)
    expected = peer(probabilities, boxes, (120, 120))
    assert torch.equal(paste_masks(probabilities, boxes, (120, 120), rule=rule), expected)
    other = PasteRule(rule.padding, rule.integer_boxes, inclusive=not rule.inclusive)
    assert (paste_masks(probabilities, boxes, (120, 120), rule=other) != expected).sum() > 50


@every_rule
@pytest.mark.parametrize("cells", [1, 2, 14, 28])
def test_equals_float64_maths(rng: torch.Generator, rule: PasteRule, cells: int) -> None:
    size = (57, 83)
    probabilities, boxes = smooth_masks(rng, 12, cells).double(), random_boxes(rng, 12, size).double()
    probabilities[0], boxes[0] = 1, torch.tensor([10, 12, 40, 49])
    expected = reference.paste_masks(probabilities, boxes, size, rule=rule)
    assert expected[0].any()
    assert torch.equal(paste_masks(probabilities, boxes, size, rule=rule), expected)


def test_float32_differs_from_float64_only_at_the_threshold(rng: torch.Generator) -> None:
    size, rule = (120, 150), PasteRule.DETECTRON2
    probabilities, boxes = smooth_masks(rng, 16), random_boxes(rng, 16, size)
    values = reference.paste_values(probabilities.double(), boxes.double(), size, rule=rule)
    wrong = paste_masks(probabilities, boxes, size, rule=rule) != (values >= 0.5)
    assert (
        (values - 0.5).abs()[wrong].max(initial=0)
        if False
        else not (wrong & ((values - 0.5).abs() > paste_tie(28))).any()
    )


@both_rules
def test_values_exactly_at_the_threshold(rng: torch.Generator, rule: PasteRule) -> None:
    size = (64, 80)
    probabilities, boxes = exact_case(rng, rule)
    values = reference.paste_values(probabilities.double(), boxes.double(), size, rule=rule)
    assert (values == 0.5).sum() > 50
    for inclusive, expected in ((True, values >= 0.5), (False, values > 0.5)):
        chosen = PasteRule(rule.padding, rule.integer_boxes, 0.5, inclusive)
        assert torch.equal(paste_masks(probabilities, boxes, size, rule=chosen), expected)


@both_rules
def test_crop_then_paste_returns_the_shape(rule: PasteRule) -> None:
    y, x = torch.meshgrid(torch.arange(300.0), torch.arange(400.0), indexing="ij")
    shape = ((x - 190) / 130) ** 2 + ((y - 150) / 90) ** 2 < 1 + 0.2 * torch.cos(5 * torch.atan2(y - 150, x - 190))
    rows, columns = shape.any(1).nonzero(), shape.any(0).nonzero()
    y1, y2, x1, x2 = (int(edge) for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    crop = F.interpolate(shape[None, None, y1:y2, x1:x2].float(), size=(28, 28), mode="area")[0]
    mask = paste_masks(crop, torch.tensor([[x1, y1, x2, y2]]).float(), (300, 400), rule=rule)[0]
    assert (mask & shape).sum() / (mask | shape).sum() > 0.94


@every_rule
@pytest.mark.parametrize(
    "box",
    [(-50, -40, -20, -10), (90, 10, 120, 30), (-8, -9, 6, 7), (60, 30, 400, 300), (10.6, 5.6, 10.9, 5.8),
     (3, 3, 3.01, 40), (-1e9, -1e9, 1e9, 1e9), (0, -1e9, 40, 1e9), (1e9, 1e9, 2e9, 2e9), (-1e30, -5, 1e30, 60)],
    ids=str,
)  # fmt: skip
def test_legal_boxes_of_any_place_and_size(rng: torch.Generator, rule: PasteRule, box: tuple[float, ...]) -> None:
    size = (48, 66)
    probabilities, boxes = smooth_masks(rng, 1).double(), torch.tensor([box], dtype=torch.float64)
    values = reference.paste_values(probabilities, boxes, size, rule=rule)
    clear = (values - rule.threshold).abs() > paste_tie(28)  # coordinates of 1e30 have no fractions
    mine = paste_masks(probabilities, boxes, size, rule=rule)
    assert torch.equal(mine[clear], (values > rule.threshold)[clear])
    assert clear.sum() > 0.9 * clear.numel()
    single = paste_masks(probabilities.float(), boxes.float(), size, rule=rule)
    assert (single != mine).sum() <= 2


@every_rule
@pytest.mark.parametrize(
    "box",
    [(5, 5, 5, 9), (5, 5, 9, 5), (5, 5, 5, 5), (9, 5, 5, 9), (9, 9, 5, 5), (float("nan"), 0, 9, 9),
     (0, 0, 9, float("nan")), (float("-inf"), 0, 9, 9), (0, 0, float("inf"), 9), (-3e38, 0, 3e38, 9),
     (5, 0, 5, 3e38), (2e38, 0, 3e38, 9)],
    ids=str,
)  # fmt: skip
def test_boxes_that_are_none_give_empty_masks(rule: PasteRule, box: tuple[float, ...]) -> None:
    boxes = torch.tensor([(2, 2, 30, 30), box, (2, 2, 30, 30)], dtype=torch.float32)
    masks = paste_masks(torch.ones(3, 28, 28), boxes, (48, 66), rule=rule)
    assert not masks[1].any()
    assert masks[0].any()
    assert torch.equal(masks[0], masks[2])


@every_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_probabilities_that_are_none_count_as_zero(rng: torch.Generator, rule: PasteRule, value: float) -> None:
    probabilities, boxes = smooth_masks(rng, 4), random_boxes(rng, 4, (40, 50))
    holes = torch.rand(probabilities.shape, generator=rng) < 0.1
    mine = paste_masks(probabilities.masked_fill(holes, value), boxes, (40, 50), rule=rule)
    assert torch.equal(mine, paste_masks(probabilities.masked_fill(holes, 0), boxes, (40, 50), rule=rule))
    assert not paste_masks(torch.full((1, 28, 28), value), boxes[:1], (40, 50), rule=rule).any()


@pytest.mark.host
@pytest.mark.parametrize("packed", [False, True])
def test_huge_boxes_take_no_more_than_the_picture(packed: bool) -> None:
    boxes = np.array([[-1e9, -1e9, 1e9, 1e9], [-5e4, 0, 5e4, 9e4]], np.float32)
    probabilities = np.ones((2, 28, 28), np.float32)
    tracemalloc.start()
    masks = host.paste_masks(probabilities, boxes, (2000, 3000), rule=PasteRule.DETECTRON2, packed=packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masks[:, 100, 100].all()
    assert peak < masks.nbytes + 4 * 2000 * 3000  # two crops of a byte a pixel, and bands of floats


@every_rule
@pytest.mark.parametrize("size", [(40, 1), (40, 7), (40, 8), (40, 65), (1, 50), (0, 5), (5, 0)])
def test_packed_is_packbits(rng: torch.Generator, rule: PasteRule, size: tuple[int, int]) -> None:
    probabilities, boxes = smooth_masks(rng, 9), random_boxes(rng, 9, (40, 50))
    masks = paste_masks(probabilities, boxes, size, rule=rule)
    packed = paste_masks(probabilities, boxes, size, rule=rule, packed=True)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(masks.numpy(), axis=2, bitorder="little"))


@both_rules
def test_neither_neighbours_nor_bands_matter(
    rng: torch.Generator, rule: PasteRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    probabilities, boxes = exact_case(rng, rule)
    together = paste_masks(probabilities, boxes, (64, 80), rule=rule)
    alone = [paste_masks(probabilities[n : n + 1], boxes[n : n + 1], (64, 80), rule=rule) for n in range(len(boxes))]
    assert torch.equal(torch.cat(alone), together)
    for band in (1, 200):
        monkeypatch.setattr(host, "_BAND", band)
        assert torch.equal(paste_masks(probabilities, boxes, (64, 80), rule=rule), together)


@pytest.fixture
def _filled_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds ones, so that what nobody writes shows; what lies behind it is not changed."""
    empty, behind = torch.empty, []

    def filled(shape: tuple[int, ...], **options: Any) -> Tensor:
        memory = empty(math.prod(shape) + 256, **options).fill_(1)
        behind.append(memory[-256:].fill_(2))
        return memory[:-256].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", filled)
        yield
    assert all((memory == 2).all() for memory in behind)


SIDES = [1, 7, 8, 31, 32, 33, 127, 129]


@pytest.mark.usefixtures("_filled_memory")
@pytest.mark.parametrize("tiles", [(4, 16, 4, 2, 16), (64, 128, 64, 16, 1 << 14)], ids=["small", "large"])
@pytest.mark.parametrize("width", SIDES)
def test_every_byte_is_written(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, width: int, tiles: tuple[int, ...]
) -> None:
    """Rows that begin anywhere in 16 bytes, tiles that end in and beside the box, one row, and no box at all."""
    gpu = pytest.importorskip("trimask.kernels.gpu.pasting")
    for constant, value in zip(TILES, tiles, strict=True):
        monkeypatch.setattr(gpu, constant, value)
    size = (13, width)
    boxes = torch.tensor([(width + 9, 0, width + 20, 13), (width / 3, 4.5, width / 3 + 6, 9), (-3, -3, width + 3, 16)])
    probabilities = smooth_masks(rng, 3).double()
    probabilities[2] = 1
    boxes = boxes.double()
    expected = reference.paste_masks(probabilities, boxes, size, rule=PasteRule.DETECTRON2)
    assert expected[2].all()
    assert torch.equal(paste_masks(probabilities, boxes, size, rule=PasteRule.DETECTRON2), expected)
    packed = paste_masks(probabilities, boxes, size, rule=PasteRule.DETECTRON2, packed=True)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(expected.numpy(), axis=2, bitorder="little"))


@both_rules
def test_nothing_to_paste(rule: PasteRule) -> None:
    assert paste_masks(torch.empty(0, 28, 28), torch.empty(0, 4), (30, 40), rule=rule).shape == (0, 30, 40)
    assert paste_masks(torch.empty(0, 28, 28), torch.empty(0, 4), (30, 41), rule=rule, packed=True).shape == (0, 30, 6)
    assert paste_masks(torch.ones(2, 28, 28), torch.ones(2, 4), (0, 0), rule=rule).shape == (2, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(rng: torch.Generator, dtype: torch.dtype) -> None:
    probabilities, boxes = smooth_masks(rng, 6).to(dtype), random_boxes(rng, 6, (60, 70))
    mine = paste_masks(probabilities, boxes, (60, 70), rule=PasteRule.DETECTRON2)
    assert torch.equal(mine, paste_masks(probabilities.float(), boxes, (60, 70), rule=PasteRule.DETECTRON2))


@both_rules
def test_strides_and_gradients_of_the_inputs_do_not_matter(rng: torch.Generator, rule: PasteRule) -> None:
    probabilities, boxes = smooth_masks(rng, 6), random_boxes(rng, 6, (60, 70))
    expected = paste_masks(probabilities, boxes, (60, 70), rule=rule)
    before = probabilities.clone(), boxes.clone()
    strided = torch.stack([probabilities, probabilities], -1)[..., 0].requires_grad_(True)
    assert torch.equal(paste_masks(strided, boxes.T.contiguous().T, (60, 70), rule=rule), expected)
    assert torch.equal(probabilities, before[0])
    assert torch.equal(boxes, before[1])


@pytest.mark.parametrize(
    ("probabilities", "boxes", "size", "message"),
    [
        (torch.ones(2, 28), torch.ones(2, 4), (8, 8), "probabilities"),
        (torch.ones(2, 28, 14), torch.ones(2, 4), (8, 8), "probabilities"),
        (torch.ones(2, 0, 0), torch.ones(2, 4), (8, 8), "probabilities"),
        (torch.ones(2, 28, 28), torch.ones(3, 4), (8, 8), "boxes"),
        (torch.ones(2, 28, 28), torch.ones(2, 5), (8, 8), "boxes"),
        (torch.ones(2, 28, 28), torch.ones(2, 4, device="meta"), (8, 8), "boxes"),
        (torch.ones(2, 28, 28), torch.ones(2, 4), (-1, 8), "size"),
    ],
)
def test_what_does_not_fit_is_named(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        paste_masks(probabilities, boxes, size, rule=PasteRule.DETECTRON2)


@pytest.mark.host
@pytest.mark.parametrize("values", [{"padding": -1}, {"threshold": 0}, {"threshold": 1.5}, {"threshold": float("nan")}])
def test_rules_that_mean_nothing_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(values))}: expected"):
        PasteRule(**{"padding": 0, "integer_boxes": False, **values})


@pytest.mark.host
def test_host_side_needs_no_torch() -> None:
    code = "import sys, trimask.kernels.cpu.masks; assert 'numpy' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@every_rule
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(rng: torch.Generator, rule: PasteRule, packed: bool) -> None:
    arguments = (rule.padding, rule.integer_boxes, rule.threshold, rule.inclusive, packed)
    for probabilities in (smooth_masks(rng, 3), smooth_masks(rng, 3).requires_grad_(True)):
        boxes = random_boxes(rng, 3, (20, 30))
        torch.library.opcheck(torch.ops.trimask.paste_masks, (probabilities, boxes, 20, 30, *arguments))


@both_rules
def test_compiles_and_exports(rng: torch.Generator, rule: PasteRule) -> None:
    class Paste(torch.nn.Module):
        def forward(self, probabilities: Tensor, boxes: Tensor) -> Tensor:
            return paste_masks(probabilities, boxes, (60, 70), rule=rule, packed=True)

    count = torch.export.Dim("count")
    example = (smooth_masks(rng, 5), random_boxes(rng, 5, (60, 70)))
    exported = torch.export.export(Paste(), example, dynamic_shapes=({0: count}, {0: count})).module()
    compiled = torch.compile(Paste(), fullgraph=True, backend="aot_eager", dynamic=True)
    for masks in fewer((0, 1, 5, 9)):
        inputs = (smooth_masks(rng, masks), random_boxes(rng, masks, (60, 70)))
        expected = Paste()(*inputs)
        assert torch.equal(compiled(*inputs), expected)
        assert torch.equal(exported(*inputs), expected)


EXTREMES = [float("nan"), float("inf"), float("-inf"), 0.0, 1e-45, 3.4e38, -3.4e38, 1e38, 1e9, 5.0, 7.5, -3.0]


@pytest.mark.host
@every_rule
def test_extreme_coordinates_neither_fail_nor_warn(np_rng: np.random.Generator, rule: PasteRule) -> None:
    boxes = np_rng.choice(np.array(EXTREMES, np.float32), (3000, 4))
    masks = host.paste_masks(np.ones((3000, 4, 4), np.float32), boxes, (9, 13), rule=rule)
    assert masks[np.isfinite(boxes).all(1)].any()
    assert not masks[~np.isfinite(boxes).all(1)].any()


@pytest.mark.host
@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(*[st.floats(width=32) | st.floats(-20, 60, width=32)] * 4), max_size=4),
    st.tuples(st.integers(0, 33), st.integers(0, 33)),
    st.sampled_from(list(RULES.values())),
)
def test_any_box_stays_inside_itself_and_the_picture(boxes: list, size: tuple[int, int], rule: PasteRule) -> None:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    masks = host.paste_masks(np.ones((len(boxes), 4, 4), np.float32), corners, size, rule=rule)
    assert masks.shape == (len(boxes), *size)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for mask, (x1, y1, x2, y2) in zip(masks, corners.tolist(), strict=True):
        cells = 0.5 + rule.padding  # beyond the box; and whole pixels, and what float32 rounds off
        dx = cells * (x2 - x1) / 4 + 2 + 1e-6 * max(abs(x1), abs(x2))
        dy = cells * (y2 - y1) / 4 + 2 + 1e-6 * max(abs(y1), abs(y2))
        outside = (x < x1 - dx) | (x > x2 + dx) | (y < y1 - dy) | (y > y2 + dy)
        assert not (mask & outside).any()


def chosen(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([mask[label] for mask, label in zip(logits, labels.tolist(), strict=True)])


# A probability is at most 1, and its exponential, sum and quotient are off by an ulp or two each.
PROBABILITY = {dtype: 4 * EPS[dtype] for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("classes", "cells"), [(1, 28), (5, 14), (3, 1), (2, 40)])
def test_mask_probabilities(rng: torch.Generator, dtype: torch.dtype, classes: int, cells: int) -> None:
    logits = (4 * torch.randn(4, classes, cells, cells, generator=rng)).to(dtype)
    labels = torch.randint(classes, (4,), generator=rng)
    expected = 1 / (1 + (-chosen(logits, labels).double()).exp())
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"rtol": 0, "atol": PROBABILITY[computed]}
    mine = mask_probabilities(logits, labels)
    assert mine.dtype == computed
    torch.testing.assert_close(mine.double(), expected, **tolerance)
    strided = logits.to(memory_format=torch.channels_last)
    assert torch.equal(mask_probabilities(strided, labels.int()), mine)
    assert torch.equal(mask_probabilities(chosen(logits, labels)), mine)
    assert torch.equal(mask_probabilities(chosen(logits, labels).transpose(1, 2)), mine.transpose(1, 2))


def test_probabilities_of_extreme_logits() -> None:
    logits = torch.tensor([0.0, float("inf"), float("-inf"), float("nan"), 200, -200, 3e38, -3e38, 0]).reshape(1, 3, 3)
    expected = torch.tensor([0.5, 1, 0, float("nan"), 1, 0, 1, 0, 0.5]).reshape(1, 3, 3)
    torch.testing.assert_close(mask_probabilities(logits), expected, rtol=0, atol=1e-38, equal_nan=True)


def test_probabilities_of_no_masks_and_of_unknown_labels(rng: torch.Generator) -> None:
    assert mask_probabilities(torch.empty(0, 28, 28)).shape == (0, 28, 28)
    assert mask_probabilities(torch.empty(0, 3, 28, 28), torch.empty(0, dtype=torch.int64)).shape == (0, 28, 28)
    logits, labels = torch.randn(5, 3, 4, 4, generator=rng), torch.tensor([1, -1, 3, 2**40, 0])
    if os.environ.get("TRIMASK_KERNELS") == "torch":
        with pytest.raises(ValueError, match=r"^labels: expected classes of 0 to 2, got \[-1, 3, 1099511627776\]"):
            mask_probabilities(logits, labels)
    else:
        mine = mask_probabilities(logits, labels)
        assert not mine[1:4].any()
        assert torch.equal(mine[[0, 4]], mask_probabilities(logits[[0, 4]], labels[[0, 4]]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.ones(2, 3, 4, 4), None, "logits"),
        (torch.ones(2, 4, 4), torch.zeros(2, dtype=torch.int64), "logits"),
        (torch.ones(2, 4, 5), None, "logits"),
        (torch.ones(2, 4, 4, dtype=torch.int64), None, "logits"),
        (torch.ones(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64), "labels"),
        (torch.ones(2, 3, 4, 4), torch.zeros(2), "labels"),
        (torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64, device="meta"), "labels"),
    ],
)
def test_logits_that_do_not_fit_are_named(logits: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        mask_probabilities(logits, labels)


def test_opcheck_of_mask_probabilities(rng: torch.Generator) -> None:
    logits = torch.randn(3, 2, 6, 6, generator=rng)
    for dtype in (torch.float16, torch.float32, torch.float64):
        labels = torch.tensor([0, 1, 1])
        torch.library.opcheck(torch.ops.trimask.mask_probabilities, (logits.to(dtype), labels))
        torch.library.opcheck(torch.ops.trimask.mask_probabilities, (logits[:, :1].to(dtype), None))
