"""Winograd's convolution against a direct one in float64."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import WINOGRAD
from trimask.kernels.cpu import winograd
from trimask.kernels.cpu.winograd import differentiable_conv, transform_weight, winograd_conv


def check(n: int, c: int, o: int, h: int, w: int, rng: torch.Generator, low: float = 0.0) -> None:
    x, weight, bias = (torch.randn(shape, generator=rng) for shape in ((n, c, h, w), (o, c, 3, 3), (o,)))
    copy = x.clone()
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).clamp(min=low)
    found = winograd_conv(x, transform_weight(weight), bias, low, torch.inf)
    assert found.shape == (n, o, h, w)
    assert found.is_contiguous(memory_format=torch.channels_last)
    terms = x.abs().max() * weight.abs().sum((1, 2, 3)).max() + bias.abs().max()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=WINOGRAD * terms.item())
    assert torch.equal(x, copy)


@pytest.mark.parametrize("channels", [(64, 64), (256, 128), (3, 5)])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (13, 21), (40, 64), (3, 400), (400, 3)])
def test_equals_a_direct_convolution(channels: tuple[int, int], size: tuple[int, int], rng: torch.Generator) -> None:
    check(1, *channels, *size, rng)


@pytest.mark.parametrize("images", [2, 5, 30])
def test_many_small_maps(images: int, rng: torch.Generator) -> None:
    check(images, 32, 32, 14, 14, rng, low=-torch.inf)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 9),
    o=st.integers(1, 9),
    h=st.integers(1, 70),
    w=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_any_shape(n: int, c: int, o: int, h: int, w: int, seed: int) -> None:
    check(n, c, o, h, w, torch.Generator().manual_seed(seed))


def test_both_memory_formats(rng: torch.Generator) -> None:
    x, weight = torch.randn(2, 8, 9, 10, generator=rng), transform_weight(torch.randn(8, 8, 3, 3, generator=rng))
    one, other = (
        winograd_conv(x.contiguous(memory_format=kind), weight, torch.zeros(8), -1.0, 1.0)
        for kind in (torch.contiguous_format, torch.channels_last)
    )
    assert torch.equal(one, other)
    assert one.abs().max() == 1


def test_no_image() -> None:
    weight = transform_weight(torch.zeros(4, 4, 3, 3))
    assert winograd_conv(torch.zeros(0, 4, 8, 8), weight, torch.zeros(4), 0.0, 1.0).shape == (0, 4, 8, 8)


def test_autocast_changes_nothing(rng: torch.Generator) -> None:
    x, weight = torch.randn(1, 8, 9, 10, generator=rng), transform_weight(torch.randn(8, 8, 3, 3, generator=rng))
    expected = winograd_conv(x, weight, torch.zeros(8), -1.0, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(winograd_conv(x, weight, torch.zeros(8), -1.0, 1.0), expected)


def test_constants_do_not_depend_on_where_they_are_made() -> None:
    spec = importlib.util.spec_from_file_location("winograd_again", winograd.__file__)
    assert spec
    assert spec.loader
    again = importlib.util.module_from_spec(spec)
    with torch.inference_mode(), torch.device("meta"):
        spec.loader.exec_module(again)
    for name in ("_INPUT", "_OUTPUT", "_G"):
        constant = getattr(again, name)
        assert not constant.is_inference()
        assert torch.equal(constant, getattr(winograd, name))


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 4, 4), (2, 8, 6, 13, 21), (20, 4, 8, 14, 14), (1, 16, 16, 50, 70)], ids=str
)
def test_gradients_equal_those_of_a_direct_convolution(shape: tuple[int, ...], rng: torch.Generator) -> None:
    n, c, o, h, w = shape
    sizes = ((n, c, h, w), (o, c, 3, 3), (o,))
    x, weight, _ = inputs = [torch.randn(size, generator=rng).requires_grad_() for size in sizes]
    grad = torch.randn(n, o, h, w, generator=rng)
    found = torch.autograd.grad(differentiable_conv(*inputs), inputs, grad)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = torch.autograd.grad(F.conv2d(*exact, padding=1), exact, grad.double())
    # All that could be summed, as WINOGRAD has it.
    pixels = grad.abs().sum((0, 2, 3)).max()
    terms = (grad.abs().max() * weight.abs().sum((0, 2, 3)).max(), x.abs().max() * pixels, pixels)
    for value, wanted, most in zip(found, expected, terms, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=WINOGRAD * most.item())


def test_only_gradients_that_are_asked_for_are_computed(rng: torch.Generator) -> None:
    x, weight = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(4, 4, 3, 3, generator=rng, requires_grad=True)
    differentiable_conv(x, weight, torch.zeros(4)).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
