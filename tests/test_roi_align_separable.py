"""The separable RoIAlign: what it is used for, that it meets the contract of the other kernel, and how near."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from backends import BACKENDS, use_backend
from tolerances import EPS, roi_align_error
from trimask.kernels.reference import roi_pooling as reference
from trimask.kernels.roi_pooling import level_thresholds, pyramid_roi_align, roi_align
from trimask.kernels.sampling import Sampling

general = pytest.importorskip("trimask.kernels.gpu.roi_align")
separable = pytest.importorskip("trimask.kernels.gpu.roi_align_separable")

HALVES = [torch.float16, torch.bfloat16]
STRIDES = [4, 8]
OUTPUT_SIZE = (6, 9)  # two bands of 4 x 16, neither of them full
CASES = [(False, 0), (True, 0), (False, 2), (True, 3)]
TILES = {"roi_align": {"_BINS": 64}, "roi_align_separable": {"_AGAIN": 64}}


@pytest.fixture(autouse=True, params=BACKENDS[1:])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch, request.module, ["pyramid_roi_align", "roi_align"], TILES)
    if request.param == "interpreter":
        _mend_bfloat16(monkeypatch)


def _mend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts to bfloat16 instead of rounding, and multiplies matrices of its bits as of integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cast, product = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view(np.uint16), tl.bfloat16)

    def wide(self: Any, x: Any) -> Any:
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(self, wide(self, a), wide(self, b), *rest)
    )


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The separable kernel wherever it can."""
    monkeypatch.setattr(general, "is_faster", separable.is_able)


def by_bin(pool: Callable[[], Tensor]) -> Tensor:
    """The same call by the other kernel."""
    with mock.patch.object(general, "is_faster", return_value=False):
        return pool()


def pyramid(rng: torch.Generator, dtype: torch.dtype, channels: int = 24) -> list[Tensor]:
    """Two levels of a 64 x 96 picture."""
    shapes = [(2, channels, 64 // s, 96 // s) for s in STRIDES]
    features = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    return [f.to(memory_format=torch.channels_last) for f in features]


def boxes() -> Tensor:
    """[2, 4, 4]: on both levels, across the border, far beyond it, mirrored, of no size, not a number; padding."""
    return torch.tensor(
        [
            [[4.3, 10.1, 85.7, 30.2], [1, 2, 30, 20], [-150.4, 4.2, 250.5, 150.7], [45.5, 40.2, 16.1, 20.9]],
            [[75.2, -10, 101.9, 8.3], [25, 20, 25, 20], [5, 5, math.nan, 15], [0, 0, 68, 20]],
        ]
    )


def assert_near(out: Tensor, expected: Tensor, features: list[Tensor]) -> None:
    largest = max(feature.abs().max().item() for feature in features)
    assert out.dtype == features[0].dtype
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected.double(), rtol=0, atol=roi_align_error(features[0], largest))


def on_one_level(feature: Tensor, box: Tensor, size: tuple[int, int], aligned: bool, ratio: int = 0) -> Tensor:
    """Boxes [R, 4] of a single level whose pixels are those of the picture: [R, C, h, w]."""
    return pyramid_roi_align([feature], box[None], [1], size, sampling_ratio=ratio, aligned=aligned)[0]


def expected_on_one_level(feature: Tensor, box: Tensor, size: tuple[int, int], aligned: bool, ratio: int = 0) -> Tensor:
    rois = torch.cat([torch.zeros(len(box), 1), box], 1)
    return reference.roi_align(feature, rois, size, 1.0, ratio, aligned, coordinates=np.float32)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("aligned", "ratio"), CASES)
@pytest.mark.parametrize("dtype", HALVES)
def test_reference(rng: torch.Generator, dtype: torch.dtype, aligned: bool, ratio: int) -> None:
    features = pyramid(rng, dtype)
    rule: dict[str, Any] = {"sampling_ratio": ratio, "aligned": aligned}
    out = pyramid_roi_align(features, boxes(), STRIDES, OUTPUT_SIZE, counts=torch.tensor([4, 3]), **rule)
    expected = reference.pyramid_roi_align(
        features, boxes(), STRIDES, OUTPUT_SIZE, counts=[4, 3], coordinates=np.float32, **rule
    )
    assert_near(out, expected, features)
    assert not out[1, 2:].any()
    padding = pyramid_roi_align(features, boxes(), STRIDES, OUTPUT_SIZE, counts=torch.tensor([0, 2]), **rule)
    assert not padding[0].any()
    assert torch.equal(padding[1, :2], out[1, :2])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", HALVES)
def test_how_near(rng: torch.Generator, dtype: torch.dtype) -> None:
    """The weights are rounded to half precision, which costs as much as the rounding of the result, which both have."""
    features = pyramid(rng, dtype, 64)
    corner = torch.rand(2, 6, 2, generator=rng) * torch.tensor([50.0, 30.0])
    box = torch.cat([corner, corner + 10 + 30 * torch.rand(2, 6, 2, generator=rng)], 2)

    def pool() -> Tensor:
        return pyramid_roi_align(features, box, STRIDES, 7, sampling_ratio=0, aligned=True)

    expected = reference.pyramid_roi_align(
        features, box, STRIDES, (7, 7), sampling_ratio=0, aligned=True, coordinates=np.float32
    )
    ours, other = ((out.double() - expected).square().mean().sqrt().item() for out in (pool(), by_bin(pool)))
    assert other < ours < 1.6 * other


@pytest.mark.usefixtures("everywhere")
def test_levels(rng: torch.Generator) -> None:
    """Whatever says which level a box is pooled from."""
    features = pyramid(rng, torch.float16, 8)
    sides = torch.tensor([39.9, 40, 41, 111.9999, 112])
    box = torch.stack([sides * 0, sides * 0, sides, sides], 1).expand(2, 5, 4)
    for rule in ({}, {"canonical_size": 80, "canonical_level": 4}, {"level_epsilon": 1e-6, "epsilon_inside_log": True}):
        rule = {"sampling_ratio": 1, "aligned": True, **rule}
        out = pyramid_roi_align(features, box, STRIDES, (1, 1), **rule)
        assert_near(out, reference.pyramid_roi_align(features, box, STRIDES, (1, 1), **rule), features)


@pytest.mark.usefixtures("everywhere")
def test_tiles(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows wider than a tile, one of them by a single pixel; several tiles of channels, the last not full."""
    features = pyramid(rng, torch.float16, 40)
    rule: dict[str, Any] = {"sampling_ratio": 0, "aligned": True}
    expected = reference.pyramid_roi_align(features, boxes(), STRIDES, (2, 3), coordinates=np.float32, **rule)
    monkeypatch.setattr(separable, "_CHANNELS", 16)
    assert_near(pyramid_roi_align(features, boxes(), STRIDES, (2, 3), **rule), expected, features)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("aligned", "shape"), [(True, (1, 1)), (False, (1, 7)), (True, (5, 1)), (False, (4, 5))])
def test_tiny_maps(rng: torch.Generator, aligned: bool, shape: tuple[int, int]) -> None:
    """RoIs that are larger than the map, hundreds of samples a bin, down to a map of a pixel."""
    feature = torch.randn(1, 8, *shape, generator=rng).half()
    box = torch.tensor(
        [[-30.3, -21.5, 28.2, 30.9], [-0.5, -0.5, 1.5, 1.5], [0.5, 0.5, 3.1, 2.2], [-2, -300, 3, 4], [-9, -9, -3, -3]]
    )
    out = on_one_level(feature, box, (2, 3), aligned)
    assert_near(out[None], expected_on_one_level(feature, box, (2, 3), aligned)[None], [feature])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("aligned", [False, True])
def test_a_thousand_samples_a_side(rng: torch.Generator, aligned: bool) -> None:
    """A pixel apart; only those in the picture are looked at, and all are averaged. Then boxes without end."""
    half = 2.0**9
    feature = torch.rand(1, 8, 2, 3, generator=rng).half() + 1
    box = torch.tensor([[-half, -half, half, half]])
    expected = by_bin(lambda: on_one_level(feature, box, (1, 1), aligned)).double()
    out = on_one_level(feature, box, (1, 1), aligned).double()
    assert expected.all()
    # Numbers below the normal ones of float16 have no relative precision.
    torch.testing.assert_close(out, expected, rtol=2 * EPS[torch.float16], atol=2.0**-24)
    vast = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [0, 0, 1e30, 2], [-1e9, 1, 2, 1e9], [-3e38, 0, 3e38, 1]])
    out = on_one_level(feature, vast, (2, 2), aligned)
    assert ((out >= 0) & (out <= feature.max())).all()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("axis", [0, 1])
def test_samples_at_the_very_edge(axis: int, rng: torch.Generator) -> None:
    """-1 and the extent still count, a rounding beyond does not; the other kernel's places decide."""
    feature = torch.rand(1, 8, 6, 6, generator=rng).half() + 1
    edges = []
    for size in (1.3, 3.7):  # of a bin
        samples = math.ceil(size)
        for step in range(samples):
            for limit in (-1.0, 6.0):
                start = np.float32(limit - (step + 0.5) * size / samples + 0.5)
                for nudge in (-np.inf, None, np.inf):
                    first = start if nudge is None else np.nextafter(start, np.float32(nudge))
                    edges.append((float(first), float(first) + 2 * size))
    along = torch.tensor(edges)
    box = torch.cat([torch.full((len(along), 2), 0.5), torch.full((len(along), 2), 4.5)], 1)
    box[:, axis], box[:, 2 + axis] = along.T
    out, other = on_one_level(feature, box, (2, 2), True), by_bin(lambda: on_one_level(feature, box, (2, 2), True))
    expected = expected_on_one_level(feature, box, (2, 2), True)
    assert_near(other[None], expected[None], [feature])
    assert_near(out[None], expected[None], [feature])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is(value: float, rng: torch.Generator) -> None:
    """In the bins that touch it; what those hold, and all others, is as the other kernel says, to the last bit.

    A RoI that does not touch it is pooled separably.
    """
    feature = torch.randn(1, 24, 20, 20, generator=rng).half()
    feature[0, 0, 12, 12] = value
    box = torch.tensor([[1.0, 1, 19, 19], [5, 5, 8, 8], [8, 8, 10.5, 10.5]])
    for size in ((3, 3), OUTPUT_SIZE):
        out = on_one_level(feature, box, size, True)
        other = by_bin(lambda size=size: on_one_level(feature, box, size, True))
        assert torch.equal(out[0].isfinite(), other[0].isfinite())
        bad = ~out.isfinite()
        assert bad[0, 0].any()
        assert not bad[0].all(1).any()
        assert not bad[1:].any()
        assert torch.equal(out[bad].nan_to_num(7), other[bad].nan_to_num(7))
        largest = float(feature[feature.isfinite()].abs().max())
        assert float((out - other)[~bad].abs().max()) <= roi_align_error(feature, largest)
    beyond = torch.zeros(1, 8, 6, 6).half()
    beyond[0, 0, 5, 4:] = value
    outside = torch.tensor([[8.68, 18.4, 20.1, 27.8]])
    assert not pyramid_roi_align([beyond], outside[None], [2], 3, sampling_ratio=0, aligned=True).any()


@pytest.mark.usefixtures("everywhere")
def test_the_largest_numbers_stay_finite() -> None:
    """The average of equal numbers is no larger than they are, although the weights are rounded, some of them up."""
    largest = torch.finfo(torch.float16).max
    feature = torch.full((1, 8, 20, 20), largest, dtype=torch.float16)
    box = torch.tensor([[1.3, 2.1, 14.7, 17.9], [3.1, 2.2, 16.6, 9.7], [0, 0, 19, 19], [4.4, 4.1, 9.3, 12.8]])
    out = on_one_level(feature, box, OUTPUT_SIZE, True)
    assert out.isfinite().all()
    assert float(out.min()) >= largest * (1 - 2 * EPS[torch.float16])


@pytest.mark.usefixtures("everywhere")
def test_neighbouring_lines_and_images_are_not_touched(rng: torch.Generator) -> None:
    feature = torch.rand(2, 8, 6, 8, generator=rng).half() + 1
    feature[1] = feature[0, :, 0] = feature[0, :, :, 0] = math.nan
    box = torch.tensor([[[5.3, 2.2, 8.9, 4.6], [2.2, 3.3, 5.4, 6.7]], [[0, 0, 1, 1], [0, 0, 1, 1]]])
    rule: dict[str, Any] = {"sampling_ratio": 0, "aligned": False}
    out, clean = (
        pyramid_roi_align([f.to(memory_format=torch.channels_last)], box, [1], 2, **rule)[0]
        for f in (feature, feature.nan_to_num())
    )
    assert out.isfinite().all()
    assert torch.equal(out, clean)


@pytest.mark.usefixtures("everywhere")
def test_every_value_is_written(rng: torch.Generator) -> None:
    """Also of RoIs that are not there, and of bands that are not full."""
    features = pyramid(rng, torch.float16)
    sampling = Sampling([1 / s for s in STRIDES], level_thresholds(STRIDES), OUTPUT_SIZE, 0, True, "avg")
    out = torch.full((8, *OUTPUT_SIZE, 24), math.nan, dtype=torch.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on = [x.to(device) for x in (*features, boxes(), torch.tensor([4, 1]), out)]
    separable.separable_roi_align(on[:2], *on[2:4], sampling, on[4])
    assert on[4].isfinite().all()
    assert not on[4][5:].any()


def _sampling(size: int, ratio: int, mode: str = "avg") -> Sampling:
    return Sampling([1.0], [0.0], (size, size), ratio, True, mode)


@pytest.mark.parametrize("dtype", HALVES)
def test_where_it_is_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an H200 was measured to be faster with it, and nowhere else."""
    monkeypatch.setattr(separable, "_is_hopper", lambda device: True)
    last = torch.zeros(1, 256, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
    for ratio in (-1, 0):
        assert all(separable.is_faster([last], _sampling(size, ratio)) for size in (7, 14))
    assert separable.is_faster([last], _sampling(14, 2))
    for size, ratio in ((7, 2), (7, 1), (14, 1), (14, 4), (1, 0), (8, 0), (28, 0)):
        assert not separable.is_faster([last], _sampling(size, ratio))
    assert not separable.is_faster([last], _sampling(7, 0, "max"))
    assert not separable.is_faster([last.float()], _sampling(7, 0))
    assert not separable.is_faster([last.double()], _sampling(7, 0))
    assert not separable.is_faster([last[:, :128].contiguous(memory_format=torch.channels_last)], _sampling(7, 0))
    assert separable.is_able([last], _sampling(64, 0))
    assert not separable.is_able([last], _sampling(65, 0))
    shifted = torch.zeros(256 * 4 + 3, dtype=dtype)[3:].view(1, 2, 2, 256).permute(0, 3, 1, 2)
    assert not separable.is_faster([shifted], _sampling(7, 0))
    with mock.patch.object(separable, "_WIDE", 1024):
        assert not separable.is_faster([last], _sampling(7, 0))


@pytest.mark.parametrize(("major", "hip", "expected"), [(9, None, True), (8, None, False), (9, "7.0", False)])
def test_which_devices(major: int, hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert separable._is_hopper(torch.device("cuda")) == expected
    assert not separable._is_hopper(torch.device("cpu"))


@pytest.mark.parametrize("planar", [False, True])
def test_the_op_dispatches(planar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCHW maps too, once turned; but not the drop-in, whose result is NCHW."""
    monkeypatch.setattr(separable, "_is_hopper", lambda device: True)
    layout = torch.contiguous_format if planar else torch.channels_last
    feature = torch.ones(1, 256, 4, 4, dtype=torch.float16).to(memory_format=layout)
    with mock.patch.object(general, "separable_roi_align", wraps=separable.separable_roi_align) as used:
        out = pyramid_roi_align([feature], torch.tensor([[[0.0, 0, 4, 4]]]), [1], 7, sampling_ratio=0, aligned=True)
        assert torch.equal(out, torch.ones_like(out))
        roi_align(feature, [torch.tensor([[0.0, 0, 4, 4]])], 7, 1.0, 0, True)
    assert used.call_count == 1
