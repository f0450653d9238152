"""What follows a convolution: each sum in float32, rounded once, against float64 and torch's own operations."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backends import BACKENDS, use_backend
from tolerances import EPS
from trimask.kernels.epilogue import add_bias, conv_relu, has_conv_relu, pool_bias_relu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST = torch.channels_last
CUTS = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter cuts to bfloat16, and does not round


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("add_bias", "pool_bias_relu", "conv_relu")
    use_backend(request.param, monkeypatch, request.module, names, {"epilogue": {"_BLOCK": 4096}})


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def assert_rounded_once(got: Tensor, exact: Tensor, terms: int) -> None:
    """Within half a unit in the last place of the dtype, and what float32 loses in a few sums."""
    assert got.shape == exact.shape
    assert got.is_contiguous(memory_format=LAST)
    error = (got.double() - exact).abs()
    half = 1.0001 if CUTS and got.dtype == torch.bfloat16 else 0.5001
    assert bool((error <= half * EPS[got.dtype] * exact.abs() + terms * EPS[torch.float32] * 8).all())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [None, (9, 7), (5, 4), (3, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_residual_and_rectifier(
    rng: torch.Generator, dtype: torch.dtype, residual: tuple[int, int] | None, relu: bool
) -> None:
    x, bias = random(rng, 2, 24, 9, 7, dtype=dtype), random(rng, 24, dtype=dtype)
    coarse = None if residual is None else random(rng, 2, 24, *residual, dtype=dtype)
    exact = x.double() + bias.double()[:, None, None]
    if coarse is not None:
        exact = exact + F.interpolate(coarse.double(), size=(9, 7), mode="nearest")
    exact = exact.relu() if relu else exact
    for memory in (torch.contiguous_format, LAST):
        got = add_bias(x.contiguous(memory_format=memory), bias, coarse, relu=relu)
        assert got.dtype == dtype
        assert_rounded_once(got, exact, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 10), (9, 7), (1, 1), (2, 3)], ids=str)
def test_pooling(rng: torch.Generator, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, bias = random(rng, 3, 16, *size, dtype=dtype) - 1, random(rng, 16, dtype=dtype)
    exact = F.max_pool2d((x.double() + bias.double()[:, None, None]).relu(), 3, 2, 1)
    assert exact.any()
    for memory in (torch.contiguous_format, LAST):
        assert_rounded_once(pool_bias_relu(x.contiguous(memory_format=memory), bias), exact, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(rng: torch.Generator, groups: int, stride: int, dilation: int, dtype: torch.dtype) -> None:
    x, weight = random(rng, 2, 16, 9, 8, dtype=dtype), random(rng, 24, 16 // groups, 3, 3, dtype=dtype)
    bias = random(rng, 24, dtype=dtype)
    x, weight = x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    plain = F.conv2d(x.double(), weight.double(), bias.double(), stride, dilation, dilation, groups)
    residual = random(rng, *plain.shape, dtype=dtype).contiguous(memory_format=LAST)
    around = dilation, dilation
    options = {"stride": (stride, stride), "padding": around, "dilation": around, "groups": groups}
    for extra in (None, residual):
        exact = (plain if extra is None else plain + extra.double()).relu()
        got = conv_relu(x, weight, bias, extra, **options)
        # A fused kernel rounds once; others round the convolution, then the sum.
        slack = 3 * EPS[dtype] * float(plain.abs().max()) + 64 * EPS[torch.float32] * float(plain.abs().max())
        assert float((got.double() - exact).abs().max()) <= slack


def test_not_a_number_stays_one() -> None:
    x = torch.zeros(1, 8, 4, 4)
    x[0, 3, 1, 1] = math.nan
    for relu in (False, True):
        assert torch.equal(add_bias(x, torch.ones(8), relu=relu).isnan(), x.isnan())
    pooled = pool_bias_relu(x, torch.ones(8))
    assert torch.equal(pooled.isnan(), F.max_pool2d(x, 3, 2, 1).isnan())
    assert pooled.isnan().any()


def test_nothing_gives_nothing() -> None:
    assert add_bias(torch.zeros(0, 8, 4, 4), torch.ones(8)).shape == (0, 8, 4, 4)
    assert pool_bias_relu(torch.zeros(0, 8, 4, 4), torch.ones(8)).shape == (0, 8, 2, 2)


@pytest.mark.skipif(torch.version.hip is not None, reason="is about cuDNN")
def test_bfloat16_is_cudnns_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for number, capability in enumerate([(7, 5), (8, 0), (9, 0)], 50):  # of devices that nobody has asked about
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        device = torch.device("cuda", number)
        assert has_conv_relu(device, torch.bfloat16) == (capability >= (8, 0))
        assert has_conv_relu(device, torch.float16)


def test_where_one_kernel_does_it() -> None:
    assert not has_conv_relu(torch.device("cpu"), torch.float16)
    assert not has_conv_relu(torch.device("cuda"), torch.float32)
    assert has_conv_relu(torch.device("cuda"), torch.bfloat16) == (torch.version.hip is None)
