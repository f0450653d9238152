"""The gradient of RoIAlign in Triton: both ways of summing it, against float64 references and bit by bit."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends import BACKENDS, use_backend
from tolerances import roi_align_error
from trimask.kernels.reference import roi_pooling as reference
from trimask.kernels.roi_pooling import level_thresholds
from trimask.kernels.sampling import Sampling

pytest.importorskip("triton")

from trimask.kernels.gpu.roi_align_backward import roi_align_backward

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STRIDES = [1, 2]
SHAPES = [(2, 5, 14, 18), (2, 5, 7, 9)]
CASES = [(False, 0), (False, 2), (True, 0), (True, 1), (True, 2), (True, 3)]


@pytest.fixture(autouse=True, params=BACKENDS[1:])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"roi_align_backward": {"_BINS": 512, "_ROUNDED": 1 << 16}}
    use_backend(request.param, monkeypatch, request.module, ["roi_align_backward"], tiles)


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def sampling(ratio: int = 2, aligned: bool = True, mode: str = "avg", size: tuple[int, int] = (2, 3)) -> Sampling:
    """Of levels of strides 1 and 2, as a box of 6 x 6 or of 12 x 12 pixels is of the second."""
    return Sampling([1.0, 0.5], level_thresholds(STRIDES, 6, 1), size, ratio, aligned, mode)


def one_level(ratio: int = 2, mode: str = "avg", size: tuple[int, int] = (2, 3)) -> Sampling:
    return Sampling([1.0], [0.0], size, ratio, True, mode)


def random_boxes(rng: torch.Generator, *shape: int) -> Tensor:
    """[*shape, 4]: in and around a picture of 14 x 18 pixels, of 1 to 12 pixels a side."""
    corner = torch.rand(*shape, 2, generator=rng) * torch.tensor([18.0, 14.0]) - 4
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, generator=rng) * 11], -1)


def random_features(rng: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in SHAPES]


def run(
    grad: Tensor,
    boxes: Tensor,
    rule: Sampling,
    *,
    features: list[Tensor] | None = None,
    images: Tensor | None = None,
    counts: Tensor | None = None,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> list[Tensor]:
    """The gradients of the levels, `[N, C, H, W]`."""
    planes = roi_align_backward(grad, features or [], boxes, images, counts, shapes[: len(rule.scales)], rule)
    assert all(plane.is_contiguous() and plane.dtype == grad.dtype for plane in planes)
    return [plane.permute(0, 3, 1, 2) for plane in planes]


def assert_same_sums(a: Tensor, b: Tensor) -> None:
    """Equal, but for the order in which a GPU's atomics come."""
    slack = 16 * torch.finfo(b.dtype).eps * float(b.abs().max()) if torch.cuda.is_available() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=slack)


def expected(
    grad: Tensor, features: list[Tensor], boxes: Tensor, rule: Sampling, counts: list[int] | None = None
) -> tuple[Tensor, ...]:
    """What the definition gives, in float64."""
    planes = [feature.double().requires_grad_() for feature in features]
    pooled = reference.pyramid_roi_align(
        planes,
        boxes,
        STRIDES[: len(planes)],
        rule.output_size,
        sampling_ratio=rule.sampling_ratio,
        aligned=rule.aligned,
        mode=rule.mode,
        canonical_size=6,
        canonical_level=1,
        counts=counts,
        coordinates=np.float64 if grad.dtype == torch.float64 else np.float32,
    )
    return torch.autograd.grad(pooled.flatten(0, 1), planes, grad.double(), allow_unused=True, materialize_grads=True)


def assert_near(actual: list[Tensor], wanted: tuple[Tensor, ...], grad: Tensor) -> None:
    for plane, double in zip(actual, wanted, strict=True):
        error = roi_align_error(plane, grad.double().abs().sum().item())
        torch.testing.assert_close(plane.double(), double, rtol=0, atol=error)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("aligned", "ratio"), CASES)
def test_reference(rng: torch.Generator, aligned: bool, ratio: int, mode: str, exact: bool) -> None:
    features, boxes, counts = random_features(rng), random_boxes(rng, 2, 6), torch.tensor([6, 4])
    rule = sampling(ratio, aligned, mode)
    grad = torch.randn(12, 5, 2, 3, generator=rng)
    wanted = expected(grad, features, boxes, rule, counts.tolist())
    with deterministic(exact):
        assert_near(run(grad, boxes, rule, features=features, counts=counts), wanted, grad)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(rng: torch.Generator, dtype: torch.dtype, mode: str, exact: bool) -> None:
    features, boxes = random_features(rng, dtype), random_boxes(rng, 2, 6)
    grad = torch.randn(12, 5, 2, 3, generator=rng, dtype=torch.float64).to(dtype)
    wanted = expected(grad, features, boxes, sampling(mode=mode))
    with deterministic(exact):
        assert_near(run(grad, boxes, sampling(mode=mode), features=features), wanted, grad)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3, 5])
def test_samples_near_and_far_apart(rng: torch.Generator, ratio: int) -> None:
    """Samples that share both pixels with their neighbours, one, or none; from left to right, and mirrored."""
    start = torch.rand(1, 12, 2, generator=rng) * torch.tensor([12.0, 8.0])
    side = torch.tensor([0.0, 0.1, 0.4, 0.9, 1, 2.2, 5, -0.3, -1, -1.7, 11, 24])[:, None] * torch.tensor([1, 0.8])
    boxes = torch.cat([start, start + side], -1)
    grad = torch.rand(12, 5, 2, 3, generator=rng) + 0.5
    rule = one_level(ratio)
    assert_near(
        run(grad, boxes, rule, shapes=[(1, *SHAPES[0][1:])]),
        expected(grad, [torch.zeros(1, *SHAPES[0][1:])], boxes, rule),
        grad,
    )


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_changes_no_bit(rng: torch.Generator, dtype: torch.dtype, ratio: int, mode: str) -> None:
    """A few hundred bins on each pixel, whose gradients are of all sizes, added up in two orders."""
    shapes = [(1, 5, 4, 5)]
    feature = torch.randn(shapes[0], generator=rng).to(dtype)
    boxes, images = random_boxes(rng, 100) / 4, torch.zeros(100)
    grad = torch.randn(100, 5, 2, 3, generator=rng) * 2.0 ** torch.randint(-12, 4, (100, 1, 1, 1), generator=rng)
    grad, order = grad.to(dtype), torch.randperm(100, generator=rng)
    rule = one_level(ratio, mode)

    def both() -> list[Tensor]:
        (one,) = run(grad, boxes, rule, features=[feature], images=images, shapes=shapes)
        (other,) = run(grad[order], boxes[order], rule, features=[feature], images=images, shapes=shapes)
        return [one, other]

    floats = both()
    if dtype in (torch.float32, torch.float64):
        assert not torch.equal(*floats)
    with deterministic():
        one, other = both()
    assert torch.equal(one, other)
    torch.testing.assert_close(one, floats[0], rtol=0, atol=roi_align_error(one, grad.double().abs().sum().item()))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 2.0**-24),
        (torch.float16, 15.5),
        (torch.bfloat16, 2.0**100),
        (torch.float32, 2.0**-149),
        (torch.float32, 1e-30),
        (torch.float32, 1 / 3),
        (torch.float32, 1e30),
        (torch.float32, 8.3e34),  # the sum is just below the largest of float32
        (torch.float64, 2.0**-1030),
        (torch.float64, 2.0**-1022),
        (torch.float64, 1.3125),
        (torch.float64, 2.0**1011),
    ],
)
def test_headroom(dtype: torch.dtype, size: float) -> None:
    """4096 bins that read one pixel, of the same gradient: the sum is exact, whatever its size and sign."""
    value = torch.tensor([[size], [-size]], dtype=dtype)
    point = torch.tensor([[2.5, 1.5, 2.5, 1.5]])
    grad = value[None, :, :, None].expand(1, 2, 64, 64)
    with deterministic():
        (total,) = run(grad, point, one_level(1, size=(64, 64)), images=torch.zeros(1), shapes=[(1, 2, 4, 4)])
    assert torch.equal(total[0, :, 1, 2], 4096 * value[:, 0])
    assert total.count_nonzero() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_magnitude_may_be_negative(dtype: torch.dtype) -> None:
    grad = torch.tensor([1.0, -(2.0**40)], dtype=dtype).view(2, 1, 1, 1)
    points = torch.tensor([[2.5, 1.5, 2.5, 1.5], [0.5, 3.5, 0.5, 3.5]])
    with deterministic():
        (total,) = run(grad, points, one_level(1, size=(1, 1)), images=torch.zeros(2), shapes=[(1, 1, 4, 4)])
    wanted = torch.zeros_like(total)
    wanted[0, 0, [1, 3], [2, 0]] = grad.flatten()
    assert torch.equal(total, wanted)


def test_a_sum_beyond_its_dtype_is_infinite() -> None:
    point, rule = torch.tensor([[2.5, 1.5, 2.5, 1.5]]), one_level(1, size=(2, 2))
    for dtype in DTYPES:
        grad = torch.full((1, 2, 2, 2), torch.finfo(dtype).max, dtype=dtype)
        grad[:, 1] *= -1
        for exact in (False, True):
            with deterministic(exact):
                (total,) = run(grad, point, rule, images=torch.zeros(1), shapes=[(1, 2, 4, 4)])
            assert total[0, :, 1, 2].tolist() == [math.inf, -math.inf]
            assert total.count_nonzero() == 2


def test_opposites_cancel(rng: torch.Generator) -> None:
    """To the last bit, and beside far smaller ones that remain."""
    boxes = random_boxes(rng, 50)
    grad = torch.randn(50, 5, 2, 3, generator=rng)
    small = torch.tensor([[2.3, 1.7, 9.1, 7.9]])
    tiny = torch.full((1, 5, 2, 3), 2.0**-20)
    with deterministic():
        (total,) = run(
            torch.cat([grad, tiny, -grad]), torch.cat([boxes, small, boxes]), one_level(), images=torch.zeros(101)
        )
        (alone,) = run(tiny, small, one_level(), images=torch.zeros(1))
    torch.testing.assert_close(total, alone, rtol=0, atol=256 * 2.0 ** (10 - 60) * grad.abs().max().item())
    assert alone.any()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(rng: torch.Generator, dtype: torch.dtype, exact: bool) -> None:
    with deterministic(exact):
        for plane in run(torch.zeros(12, 5, 2, 3, dtype=dtype), random_boxes(rng, 2, 6), sampling()):
            assert not plane.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(rng: torch.Generator, dtype: torch.dtype, value: float) -> None:
    """Floats keep it to the pixels that its bin reads; fixed-point numbers have no room for it, and all is NaN."""
    boxes = torch.tensor([[2.0, 2, 6, 5], [9, 8, 13, 11]])[None]
    grad = torch.randn(2, 5, 2, 3, generator=rng).to(dtype)
    shapes = [(1, *shape[1:]) for shape in SHAPES]
    clean = run(grad, boxes, sampling(), shapes=shapes)
    grad[1, 3, 1, 2] = value
    dirty = run(grad, boxes, sampling(), shapes=shapes)
    changed = ~dirty[0].isfinite()
    assert changed.any()
    assert not changed[:, [0, 1, 2, 4]].any()
    assert not changed[..., :8, :].any()
    assert_same_sums(torch.where(changed, 0, dirty[0]), torch.where(changed, 0, clean[0]))
    with deterministic():
        assert all(plane.isnan().all() for plane in run(grad, boxes, sampling(), shapes=shapes))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_an_infinite_gradient_stays_on_its_pixel(mode: str) -> None:
    """Of a sample in the middle of a pixel: those beside it have a weight of 0."""
    grad = torch.tensor([math.inf, -math.inf]).view(1, 2, 1, 1)
    point, shape = torch.tensor([[2.5, 1.5, 2.5, 1.5]]), (1, 2, 4, 4)
    rule = one_level(1, mode, (1, 1))
    (total,) = run(grad, point, rule, features=[torch.zeros(shape)], images=torch.zeros(1), shapes=[shape])
    wanted = torch.zeros(shape)
    wanted[..., 1, 2] = grad[..., 0, 0]
    assert torch.equal(total, wanted)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_what_is_not_there_is_not_read(rng: torch.Generator, mode: str, exact: bool) -> None:
    """Padding, boxes that are not finite and images that there are none of: NaN gradients there change nothing."""
    features, boxes, counts = random_features(rng), random_boxes(rng, 2, 6), torch.tensor([6, 3])
    boxes[0, 1, 2], boxes[0, 4, 0], boxes[1, 3:] = math.inf, math.nan, math.nan
    absent = torch.tensor([1, 4, 9, 10, 11])
    grad = torch.randn(12, 5, 2, 3, generator=rng)
    grad[absent] = 0
    poisoned = grad.clone()
    poisoned[absent] = math.nan
    with deterministic(exact):
        wanted = run(grad, boxes, sampling(mode=mode), features=features, counts=counts)
        padded = run(poisoned, boxes, sampling(mode=mode), features=features, counts=counts)
    for a, b in zip(padded, wanted, strict=True):
        if exact:
            assert torch.equal(a, b)
        assert_same_sums(a, b)
        assert a.isfinite().all()

    flat = boxes.nan_to_num(5).flatten(0, 1)
    images = torch.tensor([0.0, -1, 1, 0, 2, 1, 0, 0, 1, math.nan, -1, 2])
    with deterministic(exact):
        wanted = run(grad, flat, sampling(mode=mode), features=features, images=images)
        numbered = run(poisoned, flat, sampling(mode=mode), features=features, images=images)
    for a, b in zip(numbered, wanted, strict=True):
        if exact:
            assert torch.equal(a, b)
        assert_same_sums(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_strides(rng: torch.Generator, mode: str) -> None:
    """Of gradients, boxes, images and features."""
    features, boxes = random_features(rng), random_boxes(rng, 12)
    images = torch.randint(2, (12,), generator=rng)
    grad = torch.randn(12, 5, 2, 3, generator=rng)
    with deterministic():
        wanted = run(grad, boxes, sampling(mode=mode), features=features, images=images)
        for strided in (
            grad.to(memory_format=torch.channels_last),
            grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            grad.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
        ):
            again = run(
                strided,
                boxes.t().contiguous().t(),
                sampling(mode=mode),
                features=[f.to(memory_format=torch.channels_last) for f in features],
                images=images.repeat_interleave(2)[::2],
            )
            assert all(map(torch.equal, again, wanted))
        flat = torch.tensor(0.25).expand(grad.shape)
        same = run(flat, boxes, sampling(mode=mode), features=features, images=images)
        assert all(
            map(torch.equal, same, run(flat.clone(), boxes, sampling(mode=mode), features=features, images=images))
        )


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_tiles_change_nothing(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, ratio: int, mode: str) -> None:
    """One bin a program, as on a GPU; and a few, with more channels and pixels than a program has."""
    features, grad = random_features(rng), torch.randn(2, 5, 1, 2, generator=rng)
    boxes = torch.tensor([[[2.3, 1.7, 6.1, 7.9]], [[5.2, 3.3, 17, 12.4]]])  # one on each level
    rule = sampling(ratio, True, mode, (1, 2))
    module = "trimask.kernels.gpu.roi_align_backward"
    with deterministic():
        whole = run(grad, boxes, rule, features=features)
        for tiles in ({"_BINS": 1}, {"_BINS": 2, "_CHANNELS": 2, "_ROUNDED": 512}):
            for name, value in tiles.items():
                monkeypatch.setattr(f"{module}.{name}", value)
            assert all(map(torch.equal, run(grad, boxes, rule, features=features), whole))
    assert all(plane.any() for plane in whole)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("n", "c", "k"), [(2, 5, 0), (2, 0, 3), (0, 5, 0), (0, 5, 3)])
def test_empty(n: int, c: int, k: int, exact: bool) -> None:
    shapes = [(n, c, *shape[2:]) for shape in SHAPES]
    features = [torch.zeros(shape) for shape in shapes]
    for mode in ("avg", "max"):
        with deterministic(exact):
            planes = run(
                torch.ones(k, c, 2, 3),
                torch.tensor([0.0, 0, 4, 4]).expand(k, 4),
                sampling(mode=mode),
                features=features,
                images=torch.zeros(k),
                shapes=shapes,
            )
        assert [plane.shape for plane in planes] == [torch.Size(shape) for shape in shapes]
        assert not any(plane.any() for plane in planes)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ratio", [0, 2, 3])
def test_the_first_of_equal_samples(ratio: int, exact: bool) -> None:
    """Of a flat picture. Each bin is 3 x 3 pixels: the first sample of the first lies at y = x = 2.5 / 2.25 / 2."""
    feature, box = torch.full((1, 1, 14, 18), 7.0), torch.tensor([[2.0, 2, 11, 8]])
    grad = torch.zeros(1, 1, 2, 3)
    grad[0, 0, 1, 1] = 1
    with deterministic(exact):
        (plane,) = run(
            grad, box, one_level(ratio, "max"), features=[feature], images=torch.zeros(1), shapes=[feature.shape]
        )
    step = 3 / (ratio or 3) / 2 - 0.5
    low, high = 1 - step % 1, step % 1
    y, x = 5 + math.floor(step), 5 + math.floor(step)
    wanted = torch.zeros_like(plane)
    wanted[0, 0, y : y + 2, x : x + 2] = torch.tensor([[low * low, low * high], [high * low, high * high]])
    assert torch.equal(plane, wanted)


@pytest.mark.parametrize("ratio", [0, 2])
def test_the_largest_may_be_outside_or_nan(rng: torch.Generator, ratio: int) -> None:
    """Zero of a sample beyond the picture has its gradient to itself; of several NaN, the first has it."""
    boxes = torch.tensor([[[-7.0, -5, 5, 7], [12, 9, 26, 21], [2, 2, 14, 12], [-9, -9, 30, 24]]])
    shape = (1, 5, 14, 18)
    grad = torch.randn(4, 5, 2, 3, generator=rng)
    for features in (torch.rand(shape, generator=rng) - 2, torch.rand(shape, generator=rng)):
        features[:, 3:, 4:9, 6:14] *= math.nan if features.min() > 0 else 1
        rule = one_level(ratio, "max")
        (plane,) = run(grad, boxes, rule, features=[features], shapes=[shape])
        assert_near([plane], expected(grad, [features], boxes, rule), grad)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_far_larger_than_the_picture(rng: torch.Generator, mode: str) -> None:
    """One bin with some 50 samples a side, of which the first and the last lie outside."""
    features, boxes = [torch.rand(1, 3, 4, 5, generator=rng) + 1], torch.tensor([[[-30.3, -21.5, 28.2, 30.9]]])
    grad, rule = torch.rand(1, 3, 1, 1, generator=rng) + 0.5, one_level(0, mode, (1, 1))
    planes = run(grad, boxes, rule, features=features, shapes=[(1, 3, 4, 5)])
    assert_near(planes, expected(grad, features, boxes, rule), grad)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("reach", [1e3, 1e6, 1e9, 1e20])
def test_vast_boxes(reach: float, mode: str) -> None:
    """Whose samples nearly all lie beyond the picture: no more than their bins' gradients, in bounded time."""
    boxes = torch.tensor([[-reach, -reach / 2, reach, reach], [3, -reach, 9, 5]])
    features = [torch.rand(1, 1, 4, 5) + 1]
    for ratio in (0, 2):
        (plane,) = run(
            torch.ones(2, 1, 1, 2),
            boxes,
            one_level(ratio, mode, (1, 2)),
            features=features,
            images=torch.zeros(2),
            shapes=[features[0].shape],
        )
        assert (plane >= 0).all()
        assert plane.sum() <= 4 * (1 + 1e-5)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_bounded(rng: torch.Generator, dtype: torch.dtype) -> None:
    """By the features alone, of float32, or eight bytes each; however many RoIs there are and samples in each."""
    shape, boxes = (1, 2, 120, 160), random_boxes(rng, 200) * 2
    grad = torch.randn(200, 2, 3, 3, generator=rng).to(dtype)
    for exact in (False, True):
        with deterministic(exact), Largest() as largest:
            run(grad, boxes, one_level(4, size=(3, 3)), images=torch.zeros(200), shapes=[shape])
        assert 0 < largest.bytes <= max(8 if exact else 4, grad.element_size()) * (math.prod(shape) + (1 << 16) + 1)


def test_opcheck(rng: torch.Generator) -> None:
    """With padding instead of a number of an image for each box."""
    boxes, grad = random_boxes(rng, 2, 6), torch.randn(12, 5, 2, 3, generator=rng)
    rule = sampling()
    shapes = [n for shape in SHAPES for n in shape]
    for counts in (None, torch.tensor([6, 2])):
        torch.library.opcheck(
            torch.ops.trimask.roi_align_backward.default,
            (grad, [], boxes, None, shapes, rule.scales, rule.thresholds, 2, True, "avg", counts),
        )
