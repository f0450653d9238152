"""RoIAlign, RoIPool and the pyramid against float64 references, closed forms, torchvision and their own definition."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends import BACKENDS, use_backend
from tolerances import roi_align_error
from trimask.engine.model.presets import mmdet
from trimask.kernels.cpu import roi_pooling as host
from trimask.kernels.reference import roi_pooling as reference
from trimask.kernels.roi_pooling import level_thresholds, pyramid_roi_align, roi_align, roi_pool
from trimask.kernels.sampling import Sampling

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STRIDES = [4, 8, 16, 32]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 3)[:, ::2, :, ::2],
    "permuted": lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
}
CASES = [(aligned, ratio) for aligned in (False, True) for ratio in (-1, 1, 2, 3)]
TILES = {
    "roi_align": {"_BINS": 64},
    "roi_align_backward": {"_BINS": 512, "_ROUNDED": 1 << 16},
    "roi_pool": {"_BINS": 64, "_GRADIENTS": 1 << 16},
}


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch, request.module, ("roi_align", "pyramid_roi_align", "roi_pool"), TILES)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["_backend"]


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether every sample of a bin costs milliseconds, so that boxes have to be few and bins small."""
    return backend == "interpreter"


def random_boxes(rng: torch.Generator, count: int, width: float, height: float, images: int = 1) -> Tensor:
    """[K, 5]: boxes over and around a picture, up to half its size, none inverted."""
    size = torch.tensor([width, height])
    centre = (torch.rand(count, 2, generator=rng) * 1.4 - 0.2) * size
    side = (torch.rand(count, 2, generator=rng) * 0.5 + 0.02) * size
    image = torch.randint(images, (count, 1), generator=rng)
    return torch.cat([image, centre - side / 2, centre + side / 2], 1)


def random_pyramid(
    rng: torch.Generator, images: int = 2, channels: int = 3, dtype: torch.dtype = torch.float32
) -> list:
    """Levels of a 512 x 640 picture, thinned out so that they are small."""
    shapes = [(images, channels, 512 // s, 640 // s) for s in STRIDES]
    features = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    return [f.to(dtype, memory_format=torch.channels_last) for f in features]


def ramp(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, 2, H, W]: the value is 3 y - x + 1 at pixel (y, x), and y - 2 x."""
    y, x = torch.arange(height, dtype=dtype)[:, None], torch.arange(width, dtype=dtype)
    return torch.stack([3 * y - x + 1, y - 2 * x])[None]


def at_centres(box: Tensor, size: int, offset: float) -> Tensor:
    """What the ramp is at the centres of the bins of [K, 4], for pixels at `offset`: [K, 2, size, size] float64."""
    step = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    box = box.double()
    sides = (box[:, 2:] - box[:, :2]).clamp(min=0 if offset else 1)
    x = (box[:, 0, None] + sides[:, :1] * step - offset)[:, None, :]
    y = (box[:, 1, None] + sides[:, 1:] * step - offset)[:, :, None]
    return torch.stack([3 * y - x + 1, y - 2 * x], 1)


def assert_near(actual: Tensor, expected: Tensor, feature: Tensor, largest: float | None = None) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == feature.dtype
    error = roi_align_error(feature, feature.detach().abs().max().item() if largest is None else largest)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=error)


def assert_same_sums(actual: Tensor, expected: Tensor, exact: bool, largest: float | None = None) -> None:
    """Sums to the last bit; or as near as in any order they are, of terms whose magnitudes add up to `largest`."""
    if exact:
        assert torch.equal(actual, expected)
    else:
        assert_near(actual, expected, expected, expected.abs().max().item() if largest is None else largest)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(rng: torch.Generator, dtype: torch.dtype, layout: str, aligned: bool, ratio: int, mode: str) -> None:
    feature = LAYOUTS[layout](torch.randn(2, 3, 13, 17, generator=rng).to(dtype))
    boxes = random_boxes(rng, 5, 34, 26, images=2)
    before = feature.clone()
    out = roi_align(feature, boxes, (3, 2), 0.5, ratio, aligned, mode=mode)
    real = np.float64 if dtype == torch.float64 else np.float32
    expected = reference.roi_align(feature, boxes, (3, 2), 0.5, ratio, aligned, mode=mode, coordinates=real)
    assert_near(out, expected, feature)
    assert out.is_contiguous()
    assert torch.equal(feature, before)


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_float32_against_float64_coordinates(rng: torch.Generator, aligned: bool, ratio: int) -> None:
    """In the middle of a map, where no sample can fall off by a rounding, float32 stays within its bound."""
    feature = torch.randn(1, 2, 60, 90, generator=rng)
    boxes = random_boxes(rng, 8, 60, 40) * 0.5 + torch.tensor([0, 25.0, 15, 25, 15])
    out = roi_align(feature, boxes, 4, 1.0, ratio, aligned)
    assert_near(out, reference.roi_align(feature.double(), boxes.double(), (4, 4), 1.0, ratio, aligned), feature)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 0)])
@pytest.mark.parametrize("scale", [1, 0])  # all zero: every sample is the largest, and the first has the gradient
def test_gradient_of_reference(rng: torch.Generator, scale: int, aligned: bool, ratio: int, mode: str) -> None:
    feature = torch.randn(2, 3, 11, 9, generator=rng, dtype=torch.float64).mul_(scale).requires_grad_()
    boxes = random_boxes(rng, 6, 9, 11, images=2).double()
    out = roi_align(feature, boxes, (2, 3), 1.0, ratio, aligned, mode=mode)
    grad = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    (actual,) = torch.autograd.grad(out, feature, grad)
    slow = reference.roi_align(feature, boxes, (2, 3), 1.0, ratio, aligned, mode=mode)
    (expected,) = torch.autograd.grad(slow, feature, grad)
    torch.testing.assert_close(actual, expected, rtol=0, atol=roi_align_error(feature, grad.abs().sum().item()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_summed_wide(dtype: torch.dtype) -> None:
    """4000 RoIs on one pixel: a sum in bfloat16 would stop at 256."""
    feature = torch.zeros(1, 1, 4, 4, dtype=dtype, requires_grad=True)
    boxes = torch.tensor([0.0, 1, 1, 2, 2]).expand(4000, 5)
    roi_align(feature, boxes, 1, 1.0, 1, True).sum().backward()
    assert feature.grad is not None
    assert feature.grad.dtype == dtype
    assert feature.grad[0, 0, 1, 1].item() == torch.tensor(4000.0).to(dtype).item()
    assert feature.grad.count_nonzero() == 1


@pytest.mark.parametrize("channels", [1, 5, 32])
@pytest.mark.parametrize(("aligned", "ratio"), CASES)
def test_torchvision(rng: torch.Generator, aligned: bool, ratio: int, channels: int, interpreted: bool) -> None:
    ops = pytest.importorskip("torchvision").ops
    ours = torch.randn(2, channels, 40, 50, generator=rng, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    boxes = random_boxes(rng, 6 if interpreted else 100, 100, 80, images=2)
    args = ((5, 7), 0.5, ratio, aligned)
    out, expected = roi_align(ours, boxes, *args), ops.roi_align(theirs, boxes, *args)
    assert_near(out, expected, ours)
    grad = torch.randn(out.shape, generator=rng)
    out.backward(grad)
    expected.backward(grad)
    size = torch.zeros_like(ours).requires_grad_()
    roi_align(size, boxes, *args).backward(grad.abs())  # how much each sum of the gradient adds up
    assert_near(ours.grad, theirs.grad, ours, size.grad.max().item())

    lists = [boxes[boxes[:, 0] == i, 1:] for i in range(2)]
    assert torch.equal(roi_align(ours, lists, *args), roi_align(ours, boxes[boxes[:, 0].argsort(stable=True)], *args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roi_pool_torchvision(rng: torch.Generator, dtype: torch.dtype, layout: str, interpreted: bool) -> None:
    ops = pytest.importorskip("torchvision").ops
    ours = LAYOUTS[layout](torch.randn(2, 3, 20, 31, generator=rng, dtype=dtype)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    boxes = random_boxes(rng, 20 if interpreted else 60, 62, 40, images=2).to(dtype)
    boxes[::2, 1:] = boxes[::2, 1:].round()  # halves, once scaled
    out, expected = roi_pool(ours, boxes, (3, 5), 0.5), ops.roi_pool(theirs, boxes, (3, 5), 0.5)
    assert torch.equal(out, expected)
    assert out.is_contiguous()
    grad = torch.randn(out.shape, generator=rng, dtype=dtype)
    out.backward(grad)
    expected.backward(grad)
    assert_near(ours.grad, theirs.grad, ours, grad.abs().sum().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_roi_pool_reference(rng: torch.Generator, dtype: torch.dtype) -> None:
    feature = torch.randn(2, 3, 12, 10, generator=rng).to(dtype)
    boxes = torch.cat([random_boxes(rng, 8, 20, 24, images=2), torch.tensor([[1.0, 15, 9, 3, 2]])])
    real = np.float64 if dtype == torch.float64 else np.float32
    expected = reference.roi_pool(feature, boxes, (2, 3), 0.5, coordinates=real)
    assert torch.equal(roi_pool(feature, boxes, (2, 3), 0.5).double(), expected)


def test_roi_pool_in_blocks(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """More bins, channels and gradients than a program takes, none a multiple of it."""
    if backend != "torch":
        for constant, value in (("_BINS", 4), ("_CHANNELS", 2), ("_GRADIENTS", 16)):
            monkeypatch.setattr(f"trimask.kernels.gpu.roi_pool.{constant}", value)
    feature = torch.randn(2, 3, 7, 8, generator=rng, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.0, 1, 0, 6, 5], [1, 2, 2, 9, 4]], dtype=torch.float64)
    out, slow = roi_pool(feature, boxes, (3, 2)), reference.roi_pool(feature, boxes, (3, 2))
    assert torch.equal(out, slow)
    grad = torch.randn(2, 2, 3, 3, generator=rng, dtype=torch.float64).permute(0, 3, 2, 1)
    actual, expected = (torch.autograd.grad(pooled, feature, grad)[0] for pooled in (out, slow))
    torch.testing.assert_close(actual, expected, rtol=0, atol=roi_align_error(feature, grad.abs().sum().item()))


@pytest.mark.parametrize("value", [0.0, -math.inf])
def test_roi_pool_gradient_goes_to_the_first_of_equals(value: float) -> None:
    feature = torch.full((1, 1, 4, 4), value, requires_grad=True)
    roi_pool(feature, torch.tensor([[0.0, 1, 1, 2, 2]]), 1).sum().backward()
    assert feature.grad is not None
    assert feature.grad.nonzero().tolist() == [[0, 0, 1, 1]]


def test_gradient_of_a_largest_goes_to_the_first_nan() -> None:
    """Of the pixels 1 to 3 of a bin. A sample on one of them reads the next too, and NaN times 0 is NaN."""
    feature = torch.arange(25.0).view(1, 1, 5, 5)
    feature[..., 3, 2:4] = math.nan
    feature.requires_grad_()
    pooled = roi_pool(feature, torch.tensor([[0.0, 1, 1, 3, 3]]), 1)
    sampled = roi_align(feature, torch.tensor([[0.0, 1, 1, 4, 4]]), 1, 1.0, 3, True, mode="max")
    for out, first in ((pooled, [0, 0, 3, 2]), (sampled, [0, 0, 2, 1])):
        (grad,) = torch.autograd.grad(out.sum(), feature)
        assert out.isnan().all()
        assert grad.nonzero().tolist() == [first]


@pytest.mark.parametrize("dtype", DTYPES)
def test_roi_pool_gradient_is_summed_wide(dtype: torch.dtype) -> None:
    """300 bins of one pixel: a sum in bfloat16 would stop at 256."""
    feature = torch.zeros(1, 1, 4, 4, dtype=dtype, requires_grad=True)
    roi_pool(feature, torch.tensor([[0.0, 1, 1, 1, 1]]), (15, 20)).sum().backward()
    assert feature.grad is not None
    assert feature.grad.dtype == dtype
    assert feature.grad[0, 0, 1, 1].item() == 300
    assert feature.grad.count_nonzero() == 1


def test_pyramid_torchvision(rng: torch.Generator) -> None:
    poolers = pytest.importorskip("torchvision").ops.poolers
    features = random_pyramid(rng)
    boxes = [random_boxes(rng, n, 640, 512)[:, 1:] for n in (30, 20)]
    peer = poolers.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = peer({str(i): f for i, f in enumerate(features)}, boxes, [(512, 640)] * 2)
    padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True, padding_value=math.nan)
    counts = torch.tensor([30, 20])
    out = pyramid_roi_align(features, padded, STRIDES, 7, sampling_ratio=2, aligned=False, counts=counts)
    assert_near(torch.cat([out[0], out[1, :20]]), expected, features[0], max(f.abs().max().item() for f in features))
    assert not out[1, 20:].any()


def test_levels_torchvision(rng: torch.Generator) -> None:
    """Whole coordinates keep every box away from the threshold, or exactly on it."""
    poolers = pytest.importorskip("torchvision").ops.poolers
    boxes = torch.randint(0, 900, (5000, 4), generator=rng).float()
    boxes[:, :2] //= 10
    boxes[:, 2:] += boxes[:, :2] + 1
    boxes[:3] = torch.tensor([[0, 0, 112, 448], [0, 0, 56, 224], [10, 20, 1034, 216]])
    assert torch.equal(levels_of(boxes), poolers.initLevelMapper(2, 5)([boxes]))


@pytest.mark.parametrize(
    ("aligned", "first"),
    [(False, 7.5), (True, 4.5)],  # 5 y + x at y = x = 1.25, and half a pixel up and left of it
)
@pytest.mark.parametrize("ratio", [0, 1, 2, 4])
def test_golden(aligned: bool, first: float, ratio: int) -> None:
    """Bins of half a pixel over the box 1..3 of a 5 x 5 picture that counts row by row: they step by 2.5 and by 0.5."""
    picture = torch.arange(25.0).view(1, 1, 5, 5)
    expected = first + 2.5 * torch.arange(4.0)[:, None] + 0.5 * torch.arange(4.0)
    out = roi_align(picture, torch.tensor([[0.0, 1, 1, 3, 3]]), 4, 1.0, ratio, aligned)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("aligned", "box", "expected"),
    [
        # Samples at -0.75 and 1.25: the first clamps to 0. Rows 0 and 1.25, columns 0 and 1.25 of 5 y + x.
        (False, (-1.75, -1.75, 2.25, 2.25), [[0, 1.25], [6.25, 7.5]]),
        # Samples at -1.5 and 3: the first is outside, the second counts.
        (True, (-3.25, -3.25, 5.75, 5.75), [[0, 0], [0, 18]]),
        # Samples at 2.5 and 5.5: clamped to the last pixel at 4 up to 5, outside beyond.
        (False, (1.0, 1.0, 7.0, 7.0), [[15, 0], [0, 0]]),
        # Samples at 3.5 and 4.5.
        (False, (3.0, 3.0, 5.0, 5.0), [[21, 21.5], [23.5, 24]]),
    ],
)
def test_golden_border(aligned: bool, box: tuple[float, ...], expected: list[list[float]]) -> None:
    out = roi_align(torch.arange(25.0).view(1, 1, 5, 5), torch.tensor([[0, *box]]), 2, 1.0, 1, aligned)
    assert out[0, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 1])
def test_samples_at_the_very_edge(ratio: int, mode: str) -> None:
    """-1 and H still count, a hair beyond does not; one sample in the middle of a box of one pixel."""
    feature = torch.rand(1, 1, 6, 6) + 1
    corner, end, hair = -0.5, 6.5, 1 / 64
    for centre, expected in (
        (corner, feature[0, 0, 0, 0]),
        (corner - hair, 0.0),
        (end, feature[0, 0, -1, -1]),
        (end + hair, 0.0),
    ):
        box = torch.tensor([[0.0, centre - 0.5, centre - 0.5, centre + 0.5, centre + 0.5]])
        assert roi_align(feature, box, 1, 1.0, ratio, True, mode=mode).item() == expected


@pytest.mark.parametrize(("aligned", "ratio"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_picture(rng: torch.Generator, dtype: torch.dtype, aligned: bool, ratio: int) -> None:
    """Samples lie evenly about the centre of a bin, so a linear picture averages to its value there."""
    feature = ramp(50, 60, dtype)
    boxes = random_boxes(rng, 50, 60, 50)[:, 1:] * 0.4 + 15
    out = roi_align(feature, [boxes], 6, 1.0, ratio, aligned)
    assert_near(out, at_centres(boxes, 6, 0.5 if aligned else 0.0), feature)


def test_more_rois_than_a_grid_axis(rng: torch.Generator) -> None:
    feature = ramp(50, 60)
    boxes = random_boxes(rng, 70_000, 60, 50)[:, 1:] * 0.4 + 15
    assert_near(roi_align(feature, [boxes], 1, 1.0, 2, True), at_centres(boxes, 1, 0.5), feature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_far_from_the_origin(dtype: torch.dtype) -> None:
    """Beyond 2048 float16 has no odd numbers, and bfloat16 steps of 16: coordinates are neither."""
    feature = (torch.arange(4096) % 2 * 2.0 - 1).expand(1, 1, 3, 4096).to(dtype)
    boxes = torch.tensor([[0, x, 1.0, x + 1, 2.0] for x in (2049.25, 3000.125, 4000.75)])
    out = roi_align(feature, boxes, 1, 1.0, 1, True).flatten()
    # The middle lies a quarter, an eighth, three quarters of a pixel after an odd (+1), an even, an even pixel.
    assert out.tolist() == [0.5, -0.75, 0.5]


def test_grid_sample(rng: torch.Generator) -> None:
    """One sample a bin, aligned, is grid_sample at the centres with align_corners=False."""
    feature = torch.randn(1, 4, 30, 40, generator=rng)
    box = torch.tensor([3.3, 5.1, 31.7, 22.9])
    step = (torch.arange(9) + 0.5) / 9
    x = (box[0] + (box[2] - box[0]) * step) / 40 * 2 - 1
    y = (box[1] + (box[3] - box[1]) * step) / 30 * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    expected = F.grid_sample(feature, grid, padding_mode="border", align_corners=False)
    assert_near(roi_align(feature, [box[None]], 9, 1.0, 1, True), expected, feature)


@pytest.mark.parametrize("aligned", [False, True])
def test_half_resolution(rng: torch.Generator, aligned: bool) -> None:
    """Pooled by 2, an aligned RoI sees the same; one that is not sees a picture shifted by half a pixel."""
    feature = ramp(48, 64)
    boxes = random_boxes(rng, 20, 64, 48)[:, 1:] * 0.4 + 14
    boxes[:, 2:] += 2  # at least a pixel wide at either resolution
    full = roi_align(feature, [boxes], 5, 1.0, 2, aligned)
    half = roi_align(F.avg_pool2d(feature, 2), [boxes], 5, 0.5, 2, aligned)
    shift = 0.0 if aligned else 0.5
    expected = full + shift * torch.tensor([3.0 - 1, 1.0 - 2])[:, None, None]  # the slopes of the ramp
    assert_near(half, expected, feature)


def test_mirrored_and_empty_boxes(rng: torch.Generator) -> None:
    feature = torch.randn(1, 3, 16, 16, generator=rng)
    box, mirrored = torch.tensor([[0.0, 2, 3, 10, 13]]), torch.tensor([[0.0, 10, 13, 2, 3]])
    point = torch.tensor([[0.0, 5.5, 6.5, 5.5, 6.5]])
    upright = roi_align(feature, box, 4, 1.0, 2, True)
    assert_near(roi_align(feature, mirrored, 4, 1.0, 2, True), upright.flip(2, 3), feature)
    assert torch.equal(roi_align(feature, point, 2, 1.0, 2, True), feature[:, :, 6, 5, None, None].expand(1, 3, 2, 2))
    for empty in (mirrored, point):
        assert not roi_align(feature, empty, 4, 1.0, 0, True).any()
        one_pixel = torch.cat([empty[:, :3], empty[:, 1:3] + 1], 1)
        for ratio in (0, 2):
            assert torch.equal(roi_align(feature, empty, 4, 1.0, ratio), roi_align(feature, one_pixel, 4, 1.0, ratio))
    for sides in ((5.5, 3, 5.5, 9), (5.5, 3, 4.9, 9), (3, 5.5, 9, 5.5), (3, 5.5, 9, 4.9)):  # along one axis
        for mode in ("avg", "max"):
            assert not roi_align(feature, torch.tensor([[0, *sides]]), 4, 1.0, 0, True, mode=mode).any()


def levels_of(boxes: Tensor, **rule: Any) -> Tensor:
    """The levels that boxes [R, 4] are pooled from, seen from outside: level i holds i + 1."""
    features = [torch.full((1, 1, 256, 256), i + 1.0) for i in range(4)]
    out = pyramid_roi_align(features, boxes[None], STRIDES, 1, sampling_ratio=1, aligned=True, **rule)
    return out.flatten().long() - 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [0, 1, 2, 2, 3, 3]),  # torchvision: up to 1e-6 of an octave below
        ({"level_epsilon": 1e-8, "epsilon_inside_log": True}, [0, 1, 1, 2, 2, 3]),  # Detectron2
        ({"level_epsilon": 1e-6, "epsilon_inside_log": True}, [1, 1, 2, 2, 3, 3]),  # MMDetection: up to 224e-6 pixels
    ],
)
def test_level_choice(rule: dict[str, Any], expected: list[int]) -> None:
    sides = torch.tensor([111.9999, 112, 223.9999, 224, 447.9999, 448])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)
    assert levels_of(boxes, **rule).tolist() == expected
    assert [reference.level_of(box, 4, 2, **rule) for box in boxes.tolist()] == expected


def test_level_of_strange_boxes() -> None:
    """A negative area is a small one; the sizes at both ends are clamped."""
    boxes = torch.tensor([[300.0, 0, 0, 300], [5, 5, 5, 5], [4, 4, 5, 5], [0, 0, 5e3, 5e3]])
    assert levels_of(boxes).tolist() == [0, 0, 0, 3]


@pytest.mark.host
@pytest.mark.parametrize("inside", [False, True])
def test_thresholds_are_float32(inside: bool) -> None:
    """Rounded up: the float32 below decides otherwise by the formula."""
    thresholds = level_thresholds(STRIDES, 224, 4, 1e-6, inside)
    assert thresholds == sorted(thresholds)
    assert thresholds[0] == 0
    for level, threshold in enumerate(thresholds[1:], 1):
        below = np.nextafter(np.float32(threshold), np.float32(0))
        assert float(np.float32(threshold)) == threshold
        for side, expected in ((threshold, level), (float(below), level - 1)):
            assert reference.level_of([0, 0, side, side], 4, 2, epsilon_inside_log=inside) == expected


@pytest.mark.host
def test_thresholds_of_mmdetections_models() -> None:
    """``floor(log2(scale / finest_scale + 1e-6))`` with a finest scale of 56 (SingleRoIExtractor.map_roi_levels)."""
    pool = mmdet(("a",), (1,)).pool
    thresholds = level_thresholds(
        STRIDES, pool.canonical_size, pool.canonical_level, pool.level_epsilon, pool.epsilon_inside_log
    )
    for level, threshold in enumerate(thresholds[1:], 1):
        below = float(np.nextafter(np.float32(threshold), np.float32(0)))
        assert [math.floor(math.log2(side / 56 + 1e-6)) for side in (below, threshold)] == [level - 1, level]


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pyramid_reference(
    rng: torch.Generator, dtype: torch.dtype, aligned: bool, ratio: int, mode: str, interpreted: bool
) -> None:
    features = random_pyramid(rng, dtype=dtype)
    size = (8, 11) if interpreted else (2, 3)
    boxes = random_boxes(rng, 8, 640, 512)[:, 1:].view(2, 4, 4)
    rule = {"sampling_ratio": ratio, "aligned": aligned, "mode": mode}
    out = pyramid_roi_align(features, boxes, STRIDES, size, counts=torch.tensor([4, 2]), **rule)
    real = np.float64 if dtype == torch.float64 else np.float32
    expected = reference.pyramid_roi_align(features, boxes, STRIDES, size, counts=[4, 2], coordinates=real, **rule)
    assert_near(out, expected, features[0], max(f.abs().max().item() for f in features))
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 0)])
def test_pyramid_is_a_loop_over_levels(
    rng: torch.Generator, aligned: bool, ratio: int, layout: str, interpreted: bool, backend: str
) -> None:
    features = [LAYOUTS[layout](f).requires_grad_() for f in random_pyramid(rng, channels=5)]
    count, size = (4, 11) if interpreted else (40, 3)
    boxes = random_boxes(rng, 2 * count, 640, 512)[:, 1:].view(2, count, 4)
    out = pyramid_roi_align(features, boxes, STRIDES, size, sampling_ratio=ratio, aligned=aligned).flatten(0, 1)
    flat = torch.cat([torch.arange(2.0).repeat_interleave(count)[:, None], boxes.flatten(0, 1)], 1)
    levels = torch.tensor([reference.level_of(box, 4, 2) for box in flat[:, 1:].tolist()])
    grad = torch.randn(out.shape, generator=rng)
    grads = torch.autograd.grad(out, features, grad)
    for level, feature in enumerate(features):
        here = levels == level
        single = roi_align(feature, flat[here], size, 1 / STRIDES[level], ratio, aligned)
        assert torch.equal(out[here], single)
        (expected,) = torch.autograd.grad(single, feature, grad[here], retain_graph=True)
        (magnitude,) = torch.autograd.grad(single, feature, grad[here].abs())
        assert_same_sums(grads[level], expected, backend == "torch", magnitude.max().item())


def test_padding(rng: torch.Generator) -> None:
    """Rows beyond the count are zero whatever they hold, and change nothing else; nor does a zero-length count."""
    features = random_pyramid(rng)
    boxes = random_boxes(rng, 12, 640, 512)[:, 1:].view(2, 6, 4)
    whole = pyramid_roi_align(features, boxes, STRIDES, 2, sampling_ratio=2, aligned=True)
    boxes[0, 4:] = math.nan
    boxes[1] = math.inf
    for dtype in (torch.int32, torch.int64):
        counts = torch.tensor([4, 0], dtype=dtype)
        out = pyramid_roi_align(features, boxes, STRIDES, 2, sampling_ratio=2, aligned=True, counts=counts)
        assert torch.equal(out[0, :4], whole[0, :4])
        assert not out[0, 4:].any()
        assert not out[1].any()


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_not_finite_is_zero(aligned: bool, ratio: int, mode: str) -> None:
    feature = torch.rand(1, 2, 12, 16) + 1
    boxes = torch.tensor([1.0, 1, 9, 9]).repeat(13, 1)
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        boxes[range(4 * i, 4 * i + 4), range(4)] = value
    rule = {"sampling_ratio": ratio, "aligned": aligned, "mode": mode}
    outs = [
        roi_align(feature, [boxes], 2, **rule),
        pyramid_roi_align([feature, feature[..., ::2, ::2]], boxes[None], [4, 8], 2, **rule)[0],
        roi_pool(feature, [boxes], 2),
    ]
    for out in outs:
        assert not out[:12].any()
        assert out[12].all()


coordinate = st.floats(width=32) | st.floats(-40, 60, width=32) | st.sampled_from([0.0, -1.0, 16.0, 1e20, -1e20, 3e38])


def test_any_box(interpreted: bool) -> None:
    """Whatever the coordinates: no value beyond the picture's, no gradient beyond the RoI's, zero if not finite."""
    height, width = (2, 3) if interpreted else (12, 16)  # which bounds the samples that are looked at

    @settings(max_examples=12 if interpreted else 150, deadline=None)
    @given(
        st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=5),
        st.sampled_from(CASES),
        st.sampled_from(["avg", "max"]),
        st.sampled_from([0.01, 0.5, 1.0, 30.0]),
    )
    def check(boxes: list[tuple[float, ...]], case: tuple[bool, int], mode: str, scale: float) -> None:
        check_any_box(torch.rand(1, 1, height, width) + 1, torch.tensor(boxes), *case, mode, scale)

    check()


def check_any_box(feature: Tensor, rois: Tensor, aligned: bool, ratio: int, mode: str, scale: float) -> None:
    feature.requires_grad_()
    out = roi_align(feature, [rois], 2, scale, ratio, aligned, mode=mode)
    assert ((out >= 0) & (out <= feature.max() * (1 + 1e-6))).all()
    assert not out[~rois.isfinite().all(1)].any()
    (grad,) = torch.autograd.grad(out.sum(), feature)
    assert (grad >= 0).all()
    assert grad.sum() <= out.numel() * (1 + 1e-5)
    pooled = roi_pool(feature, [rois], 2, scale)
    assert torch.isin(pooled, torch.cat([feature.flatten(), torch.zeros(1)])).all()
    assert not pooled[~rois.isfinite().all(1)].any()


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 0), (True, 0), (True, 2)])
def test_roi_far_larger_than_the_picture(rng: torch.Generator, aligned: bool, ratio: int, mode: str) -> None:
    """One bin with hundreds of samples a side, nearly all outside, next to a small RoI."""
    feature = torch.randn(1, 3, 4, 5, generator=rng) - 1
    boxes = torch.tensor([[0, -30.3, -21.5, 28.2, 30.9], [0, 0.5, 0.5, 3.1, 2.2], [0, -2.0, -300, 3, 4]])
    args = ((1, 2), 1.0, ratio, aligned)
    expected = reference.roi_align(feature, boxes, *args, mode=mode, coordinates=np.float32)
    assert_near(roi_align(feature, boxes, *args, mode=mode), expected, feature)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_millions_of_samples(rng: torch.Generator, dtype: torch.dtype, aligned: bool) -> None:
    """Only those in the picture are looked at, and the average is over all of them."""
    extent, half = (1, 2), 2.0**20
    feature = torch.rand(1, 2, *extent, generator=rng, dtype=torch.float64).to(dtype) + 1
    box = torch.tensor([[0, -half, -half, half, half]], dtype=torch.float64)
    axes = []
    for pixels in extent:
        # They are a pixel apart, and so exact in float32 too.
        position = -half + torch.arange(2 * half, dtype=torch.float64) + (0 if aligned else 0.5)
        position = position[(position >= -1) & (position <= pixels)].clamp(0, pixels - 1)
        near = 1 - (torch.arange(pixels)[:, None] - position).abs()
        axes.append(near.clamp(min=0).sum(1) / (2 * half))
    expected = torch.einsum("ncyx,y,x->nc", feature.double(), *axes)[..., None, None]
    out = roi_align(feature, box, 1, 1.0, 0, aligned)
    torch.testing.assert_close(out.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_vast_boxes(mode: str) -> None:
    feature = torch.rand(1, 1, 1, 2) + 1
    boxes = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [0, 0, 0, 1e30, 2], [0, -1e9, 1, 2, 1e9]])
    out = roi_align(feature, boxes, 2, 1.0, 0, mode=mode)
    assert ((out >= 0) & (out <= feature.max())).all()


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_samples_outside_do_not_touch_a_nan(rng: torch.Generator, mode: str) -> None:
    """A bin over the corner of a map: a sample outside is zero, though the pixel that it would be clamped to is NaN."""
    feature = torch.rand(1, 2, 6, 8, generator=rng) + 1
    feature[..., 7] = feature[:, :, 5] = math.nan
    box = torch.tensor([[0, 3.6, 1.6, 10.4, 8.2]])  # samples at 5.3 and 8.7 across, and at 3.25 and 6.55 down
    expected = reference.roi_align(feature, box, (1, 1), 1.0, 2, mode=mode, coordinates=np.float32)
    assert expected.isfinite().all()
    assert_near(roi_align(feature, box, 1, 1.0, 2, mode=mode), expected, feature, 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_samples_at_the_border_do_not_touch_the_next_row(rng: torch.Generator, ratio: int, layout: str) -> None:
    """Nor the next plane or image: NaN there is not seen by boxes over the right and the lower side."""
    feature = torch.rand(2, 3, 6, 8, generator=rng) + 1
    feature[1] = feature[0, :, 0] = feature[0, :, :, 0] = math.nan
    boxes = torch.tensor([[0, 5.3, 2.2, 8.9, 4.6], [0, 2.2, 3.3, 5.4, 6.7]])
    out = roi_align(LAYOUTS[layout](feature), boxes, 2, 1.0, ratio)
    assert torch.equal(out, roi_align(LAYOUTS[layout](feature.nan_to_num()), boxes, 2, 1.0, ratio))
    assert out.isfinite().all()


@pytest.mark.parametrize("aligned", [False, True])
def test_a_sample_whose_place_takes_a_division(aligned: bool) -> None:
    """The last of seven lies at 6.5 * 14 / 7 = 13, the very edge; 6.5 * 14 * float32(1 / 7) is beyond it."""
    feature = torch.zeros(1, 1, 13, 13)
    feature[..., 12, 12] = 1
    box = torch.tensor([[0.0, 0, 0, 14, 14]]) + torch.tensor([0, 1, 1, 1, 1]) * (0.5 if aligned else 0)
    assert roi_align(feature, box, 1, 1.0, 7, aligned, mode="max").item() == 1


@pytest.mark.parametrize("levels", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_number_of_levels(rng: torch.Generator, dtype: torch.dtype, levels: int) -> None:
    """Of boxes of all sizes, every level has some."""
    strides = [2.0**i for i in range(levels)]
    features = [torch.randn(2, 4, 40 >> i, 48 >> i, generator=rng).to(dtype) for i in range(levels)]
    features = [f.contiguous(memory_format=torch.channels_last) if i != 1 else f for i, f in enumerate(features)]
    side = 2.0 ** torch.arange(6).repeat(2)[:, None] * (1 + 0.9 * torch.rand(12, 2, generator=rng))
    centre = torch.rand(12, 2, generator=rng) * torch.tensor([48.0, 40.0])
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1).view(2, 6, 4)
    rule = {"canonical_size": 2, "canonical_level": 1, "sampling_ratio": 2, "aligned": True}
    here = [reference.level_of(box, levels, 0, 2, 1) for box in boxes.flatten(0, 1).tolist()]
    assert set(here) == set(range(levels))
    real = np.float64 if dtype == torch.float64 else np.float32
    expected = reference.pyramid_roi_align(features, boxes, strides, (3, 2), coordinates=real, **rule)
    out = pyramid_roi_align(features, boxes, strides, (3, 2), **rule)
    assert_near(out, expected, features[0], max(f.abs().max().item() for f in features))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 5, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_number_of_channels(rng: torch.Generator, dtype: torch.dtype, channels: int, layout: str) -> None:
    feature = LAYOUTS[layout](torch.randn(2, channels, 9, 10, generator=rng).to(dtype))
    boxes = random_boxes(rng, 4, 20, 18, images=2)
    expected = reference.roi_align(feature, boxes, (2, 3), 0.5, 2, True, coordinates=np.float32)
    assert_near(roi_align(feature, boxes, (2, 3), 0.5, 2, True), expected, feature)
    out = pyramid_roi_align(
        [feature], boxes[None, :, 1:].expand(2, -1, -1), [2], (2, 3), sampling_ratio=2, aligned=True
    )
    assert_near(out[boxes[:, 0].long(), range(4)], expected, feature)


def test_boxes_of_any_strides(rng: torch.Generator) -> None:
    features = random_pyramid(rng)
    boxes = random_boxes(rng, 6, 640, 512)[:, 1:]
    rule = {"sampling_ratio": 2, "aligned": True}
    whole = pyramid_roi_align(features, boxes.repeat(2, 1, 1), STRIDES, 2, **rule)
    transposed = boxes.t().contiguous().t()
    for other in (boxes[None].expand(2, -1, -1), transposed[None].expand(2, -1, -1), boxes.repeat(2, 2, 1)[:, :6]):
        assert torch.equal(pyramid_roi_align(features, other, STRIDES, 2, **rule), whole)
    args = (2, 0.25, 2)
    single = roi_align(features[0], [boxes[:0], boxes], *args)
    for other in (transposed, boxes.repeat_interleave(2, 0)[::2]):
        assert torch.equal(roi_align(features[0], [other[:0], other], *args), single)
    numbered = torch.cat([torch.ones(6, 1), boxes], 1)
    for other in (numbered, numbered.t().contiguous().t()):
        assert torch.equal(roi_align(features[0], other, *args), single)


@pytest.fixture
def kernel(backend: str) -> Any:
    if backend == "torch":
        pytest.skip("is about the kernel")
    return pytest.importorskip("trimask.kernels.gpu.roi_align")


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_layouts_tiles_and_offsets_change_nothing(
    kernel: Any, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, ratio: int, mode: str
) -> None:
    """Read as it is or copied first, in tiles as shipped or not, all channels in a program or not, 64-bit or not."""
    feature = torch.randn(2, 35, 7, 9, generator=rng)
    boxes = random_boxes(rng, 3, 9, 7, images=2)
    outs = []
    for constants in (
        {"_stays_planar": lambda features, out, sampling: True},
        {"_stays_planar": lambda features, out, sampling: False},
        {"_stays_planar": lambda features, out, sampling: True, "_WIDE": 1},
        {"_stays_planar": lambda features, out, sampling: False, "_WIDE": 1, "_BINS": 1},
        {"_stays_planar": lambda features, out, sampling: True, "_BINS": 1, "_PROGRAMS": 1},
        {"_stays_planar": lambda features, out, sampling: False, "_PIXEL_BYTES": 16, "_PROGRAMS": 3},
    ):
        with monkeypatch.context() as patch:
            for constant, value in constants.items():
                patch.setattr(kernel, constant, value)
            outs.append(roi_align(feature, boxes, (2, 3), 1.0, ratio, True, mode=mode))
    expected = reference.roi_align(feature, boxes, (2, 3), 1.0, ratio, True, mode=mode, coordinates=np.float32)
    assert_near(outs[0], expected, feature)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


def test_levels_by_area() -> None:
    """The kernel compares areas where the definition compares rounded roots; both change at the same float32."""
    least_area = pytest.importorskip("trimask.kernels.gpu.roi_geometry")._least_area
    bits = np.random.default_rng(0).integers(0x1000_0000, 0x5F00_0000, 1000).astype(np.int32)  # 2.5e-29 to 9e18
    for side in [*bits.view(np.float32), *np.float32([112, 224, 448, 1, 2, 3])]:
        area = np.float32(least_area(float(side)))
        assert np.sqrt(area) >= side > np.sqrt(np.nextafter(area, np.float32(0)))
    assert least_area(0.0) == -math.inf
    assert least_area(math.inf) == least_area(1e30) == math.inf


@pytest.mark.parametrize("aligned", [False, True])
def test_nan_stays_where_it_is(aligned: bool) -> None:
    """RoIs that do not touch a NaN do not see it, though a larger one in the same call makes their bags longer."""
    feature = torch.ones(1, 2, 20, 20)
    feature[0, 0, 12, 12] = math.nan
    boxes = torch.tensor([[1.0, 1, 19, 19], [5, 5, 8, 8], [8, 8, 10.5, 10.5]])
    for ratio in (0, 2):
        for mode in ("avg", "max"):
            touched = roi_align(feature, [boxes], 3, 1.0, ratio, aligned, mode=mode).isnan().flatten(1).any(1)
            assert touched.tolist() == [True, False, False]
    assert roi_pool(feature, [boxes], 3)[:, 0].isnan().flatten(1).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("index", [-1.0, 2.0, 1e5, math.nan])
def test_batch_index_out_of_range(index: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feature, boxes = torch.rand(2, 1, 8, 8), torch.tensor([[0.0, 1, 1, 5, 5], [index, 1, 1, 5, 5]])
    if backend != "cuda":
        for op in (roi_align, roi_pool):
            with pytest.raises(ValueError, match="batch indices in"):
                op(feature, boxes, 2)
    # Where the host does not look, as on other devices, such a RoI is zero.
    sampling = Sampling([1.0], [0.0], (2, 2), 2, True, "avg")
    out = host.roi_align([feature], boxes[:, 1:], boxes[:, 0], sampling, channels_last=False)
    assert out[0].all()
    assert not out[1].any()
    assert not host.roi_pool(feature, boxes[:, 1:], boxes[:, 0], 1.0, (2, 2), False)[0][1].any()
    monkeypatch.setattr("trimask.kernels.roi_pooling._check_images", lambda images, input: None)
    for ratio in (0, 2):
        for mode in ("avg", "max"):
            out = roi_align(feature, boxes, 2, 1.0, ratio, mode=mode)
            assert out[0].all()
            assert not out[1].any()
    assert not roi_pool(feature, boxes, 2)[1].any()


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 0), (2, 0, 4), (0, 3, 0)])
def test_empty(n: int, c: int, k: int) -> None:
    feature = torch.rand(n, c, 9, 8, requires_grad=True)
    boxes = torch.tensor([0.0, 1, 1, 5, 5]).expand(k, 5)
    for mode in ("avg", "max"):
        out = roi_align(feature, boxes, (2, 3), mode=mode)
        assert out.shape == (k, c, 2, 3)
        assert torch.autograd.grad(out.sum(), feature)[0].shape == feature.shape
        out = pyramid_roi_align([feature], boxes[None, :, 1:].expand(n, k, 4), [4], 2, sampling_ratio=2, aligned=True)
        assert out.shape == (n, k, c, 2, 2)
        assert torch.autograd.grad(out.sum(), feature)[0].shape == feature.shape
    out = roi_pool(feature, boxes, (2, 3))
    assert out.shape == (k, c, 2, 3)
    assert torch.autograd.grad(out.sum(), feature)[0].shape == feature.shape
    assert roi_align(feature, [], 2).shape == (0, c, 2, 2)


@pytest.mark.parametrize("boxes_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(rng: torch.Generator, dtype: torch.dtype, boxes_dtype: torch.dtype, interpreted: bool) -> None:
    """Coordinates that every dtype holds give the same, whatever holds them."""
    feature = torch.randn(1, 3, 20, 20, generator=rng).to(dtype)
    boxes = (random_boxes(rng, 3 if interpreted else 10, 20, 20)[:, 1:] * 4).round() / 4
    for op in (roi_align, roi_pool):
        out = op(feature, [boxes.to(boxes_dtype)], 3)
        assert out.dtype == dtype
        assert torch.equal(out, op(feature, [boxes], 3))


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_autocast_changes_nothing(rng: torch.Generator, amp: torch.dtype, mode: str, backend: str) -> None:
    feature = torch.randn(1, 3, 20, 20, generator=rng, requires_grad=True)
    boxes = [random_boxes(rng, 10, 20, 20)[:, 1:]]
    for ratio in (0, 2):
        plain = roi_align(feature, boxes, 3, 1.0, ratio, mode=mode)
        with torch.autocast("cpu", amp):
            out = roi_align(feature, boxes, 3, 1.0, ratio, mode=mode)
            (grad,) = torch.autograd.grad(out.sum(), feature)
        assert torch.equal(out, plain)
        assert_same_sums(grad, torch.autograd.grad(plain.sum(), feature)[0], backend != "cuda")


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_deterministic_and_poisoned(rng: torch.Generator, mode: str, backend: str) -> None:
    """Deterministic mode fills every new tensor with NaN: nothing is left unwritten, and nothing else changes.

    Triton's gradients are then sums of fixed-point numbers instead of floats.
    """
    features = [f.requires_grad_() for f in random_pyramid(rng)]
    boxes = random_boxes(rng, 16, 640, 512)[:, 1:].view(2, 8, 4)
    boxes[0, 0] = math.nan

    def run() -> list[Tensor]:
        out = pyramid_roi_align(features, boxes, STRIDES, 7, sampling_ratio=0, aligned=True, mode=mode)
        flat = [boxes[0], boxes[1]]
        pooled = roi_pool(features[2], flat, 3, 1 / 16)
        single = roi_align(features[2], flat, 3, 1 / 16, mode=mode)
        return [out, pooled, single, *torch.autograd.grad(out.sum() + pooled.sum() + single.sum(), features)]

    plain = run()
    torch.use_deterministic_algorithms(True)
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(plain[:3], again[:3], strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    for a, b in zip(plain[3:], again[3:], strict=True):
        assert a.isfinite().all()
        assert_same_sums(b, a, exact=backend == "torch")


@pytest.mark.host
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_chunks_change_nothing(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    feature = torch.randn(1, 3, 30, 40, generator=rng, requires_grad=True)
    boxes = [random_boxes(rng, 30, 40, 30)[:, 1:]]

    def run() -> list[Tensor]:
        outs = [roi_align(feature, boxes, 3, 1.0, ratio, mode=mode) for ratio in (0, 2)] + [roi_pool(feature, boxes, 3)]
        return [*outs, torch.autograd.grad(sum(out.sum() for out in outs), feature)[0]]

    whole = run()
    monkeypatch.setattr(host, "_FORWARD_BYTES", 1)
    monkeypatch.setattr(host, "_BACKWARD_BYTES", 1)
    for a, b in zip(whole[:-1], (parts := run())[:-1], strict=True):
        assert torch.equal(a, b)
    assert_near(parts[-1], whole[-1], feature, whole[-1].abs().max().item())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.host
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 4])
def test_memory_is_bounded(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, ratio: int, mode: str) -> None:
    """RoIs of half a map, whose taps would take a hundred megabytes."""
    monkeypatch.setattr(host, "_BACKWARD_BYTES", host._FORWARD_BYTES)
    feature = torch.randn(1, 1, 120, 160, generator=rng)
    boxes = random_boxes(rng, 200, 160, 120)
    sampling = Sampling([1.0], [0.0], (3, 3), ratio, False, mode)
    with Largest() as largest:
        out = host.roi_align([feature], boxes[:, 1:], boxes[:, 0], sampling, channels_last=False)
        host.roi_align_backward(out, [feature], boxes[:, 1:], boxes[:, 0], [feature.shape], sampling)
    assert 0 < largest.bytes <= host._FORWARD_BYTES


@pytest.mark.host
def test_memory_of_roi_pool_is_bounded(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little more than the output at a time, where the pixels of all bins would be twenty times as much."""
    monkeypatch.setattr(host, "_FORWARD_BYTES", 1 << 20)
    boxes = random_boxes(rng, 2000, 160, 120)
    with Largest() as largest:
        out, argmax = host.roi_pool(torch.rand(1, 1, 120, 160), boxes[:, 1:], boxes[:, 0], 1.0, (3, 3), True)
        host.roi_pool_backward(out, argmax, (1, 1, 120, 160))
    assert 0 < largest.bytes <= 1 << 20


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 0)])
def test_gradcheck(rng: torch.Generator, aligned: bool, ratio: int, mode: str, interpreted: bool) -> None:
    features = [
        torch.randn(2, 1, 6 // s, 8 // s, generator=rng, dtype=torch.float64, requires_grad=True) for s in (1, 2)
    ]
    boxes = torch.tensor([[[0.3, 0.2, 3.1, 4.7], [1, 1, 9, 7.5]], [[-2, 3, 4, 6], [0, 0, 1, 1]]])

    def pyramid(*features: Tensor) -> Tensor:
        rule = {"sampling_ratio": ratio, "aligned": aligned, "mode": mode, "canonical_size": 5, "canonical_level": 1}
        return pyramid_roi_align(features, boxes, [1, 2], 2, counts=torch.tensor([2, 1]), **rule)

    assert {reference.level_of(box, 2, 0, 5, 1) for box in boxes.flatten(0, 1).tolist()} == {0, 1}
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=interpreted)  # along one direction
    gradcheck(pyramid, features)
    gradcheck(lambda f: roi_align(f, list(boxes), 2, 1.0, ratio, aligned, mode=mode), features[:1])
    gradcheck(lambda f: roi_pool(f, list(boxes), 2), features[:1])


@pytest.mark.filterwarnings("error::UserWarning")  # torch warns of ops that have no gradient of their own
@pytest.mark.parametrize(("aligned", "ratio"), [(False, 2), (True, 0)])
def test_gradients_of_gradients(rng: torch.Generator, aligned: bool, ratio: int, interpreted: bool) -> None:
    features = [
        torch.randn(2, 1, 6 // s, 8 // s, generator=rng, dtype=torch.float64, requires_grad=True) for s in (1, 2)
    ]
    boxes = torch.tensor([[[0.3, 0.2, 3.1, 4.7], [1, 1, 9, 7.5]], [[-2, 3, 4, 6], [0, 0, 1, 1]]])
    rule = {"sampling_ratio": ratio, "aligned": aligned, "canonical_size": 5, "canonical_level": 1}
    check = partial(torch.autograd.gradgradcheck, fast_mode=interpreted, nondet_tol=1e-12)
    check(lambda *maps: pyramid_roi_align(maps, boxes, [1, 2], 2, counts=torch.tensor([2, 1]), **rule), features)
    check(lambda f: roi_align(f, list(boxes), 2, 1.0, ratio, aligned), features[:1])
    check(lambda f: roi_pool(f, list(boxes), 2), features[:1])
    (grad,) = torch.autograd.grad(
        roi_align(features[0], list(boxes), 2, mode="max").square().sum(), features[0], create_graph=True
    )
    with pytest.raises(NotImplementedError, match='expected mode "avg" where a gradient is to have a gradient'):
        grad.square().sum().backward()


def test_the_largest_is_the_same_with_and_without_a_gradient(rng: torch.Generator) -> None:
    feature = torch.randint(0, 9, (2, 3, 24, 30), generator=rng).float()  # with equal ones
    feature[0, 1, 4:7, 3:9] = math.nan
    boxes = random_boxes(rng, 40, 30, 24, images=2)
    for size in (1, (3, 2)):
        plain, learned = (roi_pool(x, boxes, size) for x in (feature, feature.clone().requires_grad_()))
        assert torch.equal(plain.nan_to_num(-7), learned.detach().nan_to_num(-7))


def test_a_kept_program_has_a_gradient(rng: torch.Generator) -> None:
    feature, boxes = torch.randn(1, 2, 12, 16, generator=rng), torch.tensor([[0, 2.0, 3.0, 11.0, 9.5]])

    class One(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return roi_pool(x, boxes, 2)

    with torch.no_grad():
        kept = torch.export.export(One(), (feature,)).module()
    grads = []
    for function in (One(), kept):
        x = feature.clone().requires_grad_()
        function(x).sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)
    x = feature.clone().requires_grad_()
    out, _ = torch.ops.trimask.roi_pool(x, boxes[:, 1:], boxes[:, 0], 1.0, [2, 2], False)
    with pytest.raises(ValueError, match="numbered: expected True where there is to be a gradient"):
        out.sum().backward()


@pytest.mark.host
@pytest.mark.parametrize("op", ["avg", "max", "pool"])
def test_few_boxes_leave_most_of_a_map_unread(rng: torch.Generator, op: str) -> None:
    feature = torch.randn(3, 4, 200, 300, generator=rng, requires_grad=True)
    boxes = torch.tensor([[0, 10, 20, 31, 52.5], [2, -9, 150, 25, 230], [2, 280.5, 3, 299, 20]])
    other = feature.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with Largest() as largest:
        outs = [roi_pool(f, boxes, 3) if op == "pool" else roi_align(f, boxes, 3, mode=op) for f in (feature, other)]
    assert 0 < largest.bytes < feature.nbytes / 10
    assert torch.equal(*outs)
    weights = torch.randn(outs[0].shape, generator=rng)
    assert torch.equal(
        *(torch.autograd.grad((out * weights).sum(), f)[0] for out, f in zip(outs, (feature, other), strict=True))
    )


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_opcheck(rng: torch.Generator, mode: str, interpreted: bool) -> None:
    features = [f.requires_grad_() for f in random_pyramid(rng)]
    boxes = random_boxes(rng, 8, *((64, 48) if interpreted else (640, 512)))[:, 1:].view(2, 4, 4)
    flat, images = boxes.flatten(0, 1), torch.arange(2).repeat_interleave(4)
    ops = torch.ops.trimask
    scales, thresholds = [1 / s for s in STRIDES], level_thresholds(STRIDES)
    rule = ([2, 3], 2, True, mode)
    for counts in (None, torch.tensor([4, 1])):
        torch.library.opcheck(ops.pyramid_roi_align.default, (features, boxes, counts, scales, thresholds, *rule))
    torch.library.opcheck(ops.roi_align.default, (features[0], flat, images, 0.25, *rule))
    torch.library.opcheck(ops.flat_roi_align.default, (features, flat, images, scales, thresholds, *rule))
    torch.library.opcheck(ops.roi_pool.default, (features[0], flat, images, 0.25, [2, 3], True))
    plain = [f.detach() for f in features]
    shapes = [n for f in plain for n in f.shape]
    grad = torch.randn(8, 3, 2, 3, generator=rng)
    torch.library.opcheck(
        ops.roi_align_backward.default, (grad, plain, flat, images, shapes, scales, thresholds, 2, True, mode, None)
    )
    _, argmax = ops.roi_pool(plain[0], flat, images, 0.25, [2, 3], True)
    torch.library.opcheck(ops.roi_pool.default, (plain[0], flat, images, 0.25, [2, 3], False))
    torch.library.opcheck(ops.roi_pool_backward.default, (grad, argmax, list(plain[0].shape)))


class Pool(torch.nn.Module):
    """All three, for tracing."""

    def forward(self, fine: Tensor, coarse: Tensor, boxes: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        rule = {"sampling_ratio": 2, "aligned": True, "counts": counts}
        pooled = pyramid_roi_align([fine, coarse], boxes, [4, 8], 3, **rule)
        flat = torch.nn.functional.pad(boxes[0], (1, 0))
        return pooled, roi_align(fine, flat, 2, 0.25, mode="max"), roi_pool(fine, flat, 2, 0.25)


def test_compile(rng: torch.Generator, interpreted: bool, backend: str) -> None:
    """One graph, forward and backward, whatever the number of boxes."""
    extent = (64, 48) if interpreted else (640, 512)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager")
    fine, coarse = (f.requires_grad_() for f in random_pyramid(rng)[:2])
    for count in (6, 9):
        boxes = random_boxes(rng, 2 * count, *extent)[:, 1:].view(2, count, 4)
        torch._dynamo.mark_dynamic(boxes, 1)
        results = []
        for run in (Pool(), compiled):
            outs = run(fine, coarse, boxes, torch.tensor([count, 3]))
            results.append([*outs, *torch.autograd.grad(sum(out.sum() for out in outs), (fine, coarse))])
        for a, b in zip(*results, strict=True):
            assert_same_sums(a, b, backend != "cuda")
            assert a.stride() == b.stride()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_export_with_any_number_of_boxes(rng: torch.Generator, interpreted: bool) -> None:
    fine, coarse = random_pyramid(rng)[:2]
    extent = (64, 48) if interpreted else (640, 512)

    def arguments(count: int) -> tuple[Tensor, ...]:
        boxes = random_boxes(rng, 2 * count, *extent)[:, 1:].view(2, count, 4)
        return fine, coarse, boxes, torch.tensor([count, 3])

    dynamic = {"fine": None, "coarse": None, "boxes": {1: torch.export.Dim("R", max=5000)}, "counts": None}
    exported = torch.export.export(Pool(), arguments(7), dynamic_shapes=dynamic)
    names = [str(node.target) for node in exported.graph.nodes if "trimask" in str(node.target)]
    assert sorted(names) == [f"trimask.{op}.default" for op in ("pyramid_roi_align", "roi_align", "roi_pool")]
    for count in (3, 11):
        args = arguments(count)
        for a, b in zip(exported.module()(*args), Pool()(*args), strict=True):
            assert torch.equal(a, b)


class PoolOfLists(torch.nn.Module):
    """Boxes of each image, as torchvision takes them."""

    def forward(self, feature: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return roi_align(feature, [first, second], 2), roi_pool(feature, [first, second], 2)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_export_and_trace_of_boxes_in_a_list(rng: torch.Generator) -> None:
    feature = torch.randn(2, 3, 12, 16, generator=rng)
    boxes = random_boxes(rng, 12, 16, 12)[:, 1:]
    n, m = torch.export.Dim("n"), torch.export.Dim("m")
    example = (feature, boxes[:5], boxes[5:8])
    exported = torch.export.export(PoolOfLists(), example, dynamic_shapes=(None, {0: n}, {0: m})).module()
    traced = torch.jit.trace(PoolOfLists(), example)
    for cut in (2, 8):
        given = (feature, boxes[:cut], boxes[cut:])
        for a, b, c in zip(PoolOfLists()(*given), exported(*given), traced(*given), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(rng: torch.Generator) -> None:
    """Torch's fallback loops where it can, and says so where it cannot."""
    features, boxes = torch.randn(3, 2, 4, 8, 8, generator=rng), random_boxes(rng, 5, 8, 8, images=2)
    out = torch.vmap(lambda f: roi_align(f, boxes, 2))(features)
    assert torch.equal(out, torch.stack([roi_align(f, boxes, 2) for f in features]))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(lambda f: pyramid_roi_align([f], f.new_ones(2, 5, 4), [1], 2, sampling_ratio=2, aligned=True))(
            features
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input", {"input": torch.rand(3, 8, 8)}),
        ("input", {"input": torch.ones(1, 1, 8, 8, dtype=torch.int64)}),
        ("input", {"input": torch.rand(1, 1, 0, 8)}),
        ("input", {"input": torch.zeros(1, 1, 8, 8, dtype=torch.float8_e4m3fn)}),
        ("boxes", {"boxes": np.zeros((2, 5))}),
        ("boxes", {"boxes": torch.rand(2, 4)}),
        ("boxes", {"boxes": [torch.rand(2, 5)]}),
        ("boxes", {"boxes": torch.rand(5)}),
        ("output_size", {"output_size": 0}),
        ("output_size", {"output_size": (2, 2, 2)}),
        ("mode", {"mode": "median"}),
    ],
)
def test_wrong_arguments(name: str, change: dict[str, Any]) -> None:
    arguments = {"input": torch.rand(1, 1, 8, 8), "boxes": torch.zeros(2, 5), "output_size": 2} | change
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        roi_align(**arguments)
    if name != "mode":
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            roi_pool(**arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features", {"features": [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4, 4)]}),
        ("features", {"features": [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4).half()]}),
        ("features", {"features": [torch.rand(2, 3, 8, 8), torch.rand(3, 4, 4)]}),
        ("strides", {"features": []}),
        ("strides", {"strides": [4]}),
        ("strides", {"strides": [4, 12]}),
        ("boxes", {"boxes": torch.zeros(5, 4)}),
        ("boxes", {"boxes": torch.zeros(1, 5, 4)}),
        ("boxes", {"boxes": torch.zeros(2, 5, 5)}),
        ("counts", {"counts": torch.zeros(3, dtype=torch.int64)}),
        ("output_size", {"output_size": -1}),
        ("mode", {"mode": ""}),
    ],
)
def test_wrong_pyramid_arguments(name: str, change: dict[str, Any]) -> None:
    features = [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)]
    arguments = {"features": features, "boxes": torch.zeros(2, 5, 4), "strides": [4, 8], "output_size": 2} | change
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        pyramid_roi_align(**arguments, sampling_ratio=2, aligned=True)


@pytest.mark.host
def test_another_device_is_refused() -> None:
    x, boxes = torch.zeros(1, 2, 8, 8), torch.zeros(3, 5, device="meta")
    for pool in (roi_align, roi_pool):
        for wrong in (boxes, [boxes[:, 1:]]):
            with pytest.raises(ValueError, match="boxes: expected the device of the features, cpu, got meta"):
                pool(x, wrong, 2)
    corners, counts = torch.zeros(1, 3, 4), torch.ones(1, dtype=torch.int64)
    for name, moved in (("boxes", (corners.to("meta"), counts)), ("counts", (corners, counts.to("meta")))):
        with pytest.raises(ValueError, match=f"{name}: expected the device of the features, cpu, got meta"):
            pyramid_roi_align([x], moved[0], [4], 2, sampling_ratio=2, aligned=True, counts=moved[1])


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [1, 2, 0])
def test_bins_beyond_the_picture_are_zero_beside_a_nan(ratio: int, mode: str) -> None:
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 5, 4] = x[0, 0, 5, 5] = torch.nan
    boxes = torch.tensor([[0, 8.68, 18.4, 20.1, 27.8]])
    assert torch.equal(roi_align(x, boxes, 3, 0.5, ratio, True, mode=mode), torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [1, 3, 0])
@pytest.mark.parametrize("corner", [(0, 0), (7, 3)])
def test_samples_beyond_the_picture_meet_no_nan_at_its_edge(corner: tuple[int, int], ratio: int, mode: str) -> None:
    """A bin that begins outside reads pixels inside, and zeros for the rest: not the pixel that is nearest."""
    x = torch.ones(1, 1, 8, 4)
    x[0, 0, corner[0], corner[1]] = torch.nan
    for box in ([-9.0, -9.0, 8.0, 16.0], [-4.0, 2.0, 13.0, 19.0]):
        boxes = torch.tensor([[0, *box]])
        expected = reference.roi_align(x, boxes, (2, 2), 1.0, ratio, False, mode=mode).float()
        assert expected.isfinite().any()
        torch.testing.assert_close(roi_align(x, boxes, 2, 1.0, ratio, False, mode=mode), expected, equal_nan=True)


@pytest.mark.parametrize("size", [np.int64(2), (np.int32(2), 2), torch.Size((2, 2))])
def test_output_sizes_of_other_integers(size: Any, rng: torch.Generator) -> None:
    x, boxes = torch.randn(1, 2, 8, 8, generator=rng), torch.tensor([[0, 1.0, 1.0, 6.0, 7.0]])
    for pool in (roi_align, roi_pool):
        assert torch.equal(pool(x, boxes, size), pool(x, boxes, 2))


@pytest.mark.host
@pytest.mark.parametrize("strides", [[0.0, 0.0], [-4.0, -8.0], [0.0]])
def test_strides_must_be_positive(strides: list[float]) -> None:
    with pytest.raises(ValueError, match="strides: expected positive numbers"):
        level_thresholds(strides)
