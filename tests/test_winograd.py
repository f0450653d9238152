"""Winograd's convolution against a direct one in float64."""

import copy
import importlib.util
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerances import WINOGRAD
from trimask.engine.inference.layers import WinogradConv
from trimask.engine.model.layers import ConvNorm
from trimask.kernels.cpu import winograd
from trimask.kernels.cpu.winograd import differentiable_conv, prepare_weight, tiles_at_a_time, winograd_conv


def check(n: int, c: int, o: int, h: int, w: int, rng: torch.Generator, low: float = 0.0) -> None:
    x, weight, bias = (torch.randn(shape, generator=rng) for shape in ((n, c, h, w), (o, c, 3, 3), (o,)))
    copy = x.clone()
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).clamp(min=low)
    found = winograd_conv(x, prepare_weight(weight), bias, low, torch.inf)
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
    x, weight = torch.randn(2, 8, 9, 10, generator=rng), prepare_weight(torch.randn(8, 8, 3, 3, generator=rng))
    one, other = (
        winograd_conv(x.contiguous(memory_format=kind), weight, torch.zeros(8), -1.0, 1.0)
        for kind in (torch.contiguous_format, torch.channels_last)
    )
    assert torch.equal(one, other)
    assert one.abs().max() == 1


@pytest.mark.parametrize("channels", [(64, 64), (130, 70)])
def test_without_onednn(channels: tuple[int, int], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_has_grouped_products", lambda: False)
    assert prepare_weight(torch.zeros(*channels[::-1], 3, 3)).shape == (36, channels[1], channels[0])
    check(2, *channels, 13, 21, rng)


def test_a_laid_out_weight_is_neither_copied_nor_pickled(rng: torch.Generator) -> None:
    layer = ConvNorm(128, 128, 3, activation=nn.ReLU()).eval()
    lean = WinogradConv(layer)
    x = torch.randn(1, 128, 36, 36, generator=rng)
    with torch.no_grad():
        expected = lean(x)
        assert lean._prepared is not None
        for again in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
            assert again._prepared is None
            assert torch.equal(again(x), expected)
        largest = float(layer.conv.weight.abs().sum((1, 2, 3)).max() * x.abs().max())
        torch.testing.assert_close(expected, layer(x), rtol=0, atol=WINOGRAD * largest)


def test_another_number_of_threads_lays_the_weight_out_anew(rng: torch.Generator) -> None:
    lean = WinogradConv(ConvNorm(128, 128, 3))
    x = torch.randn(1, 128, 72, 72, generator=rng)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(lean(x))
            assert lean._prepared is not None
            assert lean._prepared[0] == tiles_at_a_time() == winograd.TILES * threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (9, 2), (13, 21), (7, 400), (60, 72)])
@pytest.mark.parametrize("images", [1, 3])
def test_the_result_in_the_place_of_the_input(size: tuple[int, int], images: int, rng: torch.Generator) -> None:
    x, weight, bias = (torch.randn(shape, generator=rng) for shape in ((images, 16, *size), (16, 16, 3, 3), (16,)))
    x = x.contiguous(memory_format=torch.channels_last)
    prepared = prepare_weight(weight)
    expected = winograd_conv(x, prepared, bias, 0.0, torch.inf)
    found = winograd_conv(x, prepared, bias, 0.0, torch.inf, overwrite=True)
    assert torch.equal(found, expected)
    assert found.data_ptr() == x.data_ptr()


def test_an_input_of_other_channels_stays(rng: torch.Generator) -> None:
    x, weight = torch.randn(1, 8, 20, 20, generator=rng), prepare_weight(torch.randn(6, 8, 3, 3, generator=rng))
    before = x.clone()
    found = winograd_conv(x, weight, torch.zeros(6), 0.0, torch.inf, overwrite=True)
    assert torch.equal(found, winograd_conv(x, weight, torch.zeros(6), 0.0, torch.inf))
    assert torch.equal(x, before)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_linear_layer_behind_it(
    overwrite: bool, onednn: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(winograd, "_has_grouped_products", lambda: False)
    sizes = ((2, 8, 13, 30), (8, 8, 3, 3), (8,), (8, 8), (8,))
    x, weight, bias, *then = (torch.randn(shape, generator=rng) for shape in sizes)
    prepared = prepare_weight(weight)
    pixels = winograd_conv(x, prepared, bias, 0.0, torch.inf)
    expected = F.conv2d(pixels.double(), then[0][:, :, None, None].double(), then[1].double())
    found = winograd_conv(x, prepared, bias, 0.0, torch.inf, overwrite=overwrite, then=(then[0], then[1]))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_no_image() -> None:
    weight = prepare_weight(torch.zeros(4, 4, 3, 3))
    assert winograd_conv(torch.zeros(0, 4, 8, 8), weight, torch.zeros(4), 0.0, 1.0).shape == (0, 4, 8, 8)


def test_autocast_changes_nothing(rng: torch.Generator) -> None:
    x, weight = torch.randn(1, 8, 9, 10, generator=rng), prepare_weight(torch.randn(8, 8, 3, 3, generator=rng))
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
