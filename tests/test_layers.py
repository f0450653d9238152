"""A convolution with a norm, as training computes it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trimask.engine.model import layers
from trimask.engine.model.config import MaskHeadConfig
from trimask.engine.model.heads import MaskHead
from trimask.engine.model.layers import ConvNorm


def test_a_frozen_norm_in_training_has_the_gradients_of_a_norm(rng: torch.Generator) -> None:
    layer = ConvNorm(3, 4, 3, norm_eps=1e-3).double().eval()
    for value in layer.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
    x = torch.randn(2, 3, 8, 9, generator=rng, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    grad = torch.randn(2, 4, 8, 9, generator=rng, dtype=torch.float64)
    found = layer(x)
    expected = layer.norm(layer.conv(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=1e-10, atol=1e-10
    )


def change_in_place(layer: ConvNorm) -> None:
    layer.norm.running_var.mul_(3)


def learn(layer: ConvNorm) -> None:
    layer.norm.requires_grad_(True)
    layer.norm.bias.grad = torch.ones_like(layer.norm.bias)
    torch.optim.SGD([layer.norm.bias], lr=0.5).step()
    layer.norm.requires_grad_(False)


def load(layer: ConvNorm, **options: bool) -> None:
    layer.load_state_dict({name: x + 1 for name, x in layer.state_dict().items()}, **options)


def replace(layer: ConvNorm) -> None:
    load(layer, assign=True)


@pytest.mark.parametrize("change", [change_in_place, learn, load, replace, nn.Module.double, copy.deepcopy])
def test_a_norm_that_does_not_learn_follows_its_tensors(change: Callable[[Any], Any], rng: torch.Generator) -> None:
    layer = ConvNorm(3, 4, 3, norm_eps=1e-3).eval()
    layer.norm.requires_grad_(False)
    x = torch.randn(2, 3, 8, 9, generator=rng)
    before, known = layer(x), layer._affine
    layer(x)
    assert layer._affine is known
    layer = change(layer) or layer
    x = x.to(layer.conv.weight.dtype)
    found = layer(x)
    assert layer._affine is not known
    torch.testing.assert_close(found, layer.norm(layer.conv(x)))
    assert torch.equal(found.float(), before) == (change is copy.deepcopy)


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [(128, (1, 32, 36), True), (64, (1, 32, 36), False), (128, (9, 5, 5), False), (128, (1, 16, 16), False)],
)
def test_winograd_is_for_maps_where_it_is_faster(
    channels: int, size: tuple[int, int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = layers.differentiable_conv
    monkeypatch.setattr(layers, "differentiable_conv", lambda *args: calls.append(args) or original(*args))
    layer = ConvNorm(channels, channels, 3, activation=nn.ReLU())
    x = torch.randn(size[0], channels, *size[1:])
    found = layer(x)
    assert bool(calls) == expected
    torch.testing.assert_close(found, layer.conv(x).relu(), rtol=0, atol=1e-4)
    layer.double()(x.double())
    with torch.no_grad():
        layer.float()(x)
    assert len(calls) == expected


@pytest.mark.parametrize("agnostic", [True, False])
def test_masks_of_a_softmax_are_probabilities_of_the_class(agnostic: bool, rng: torch.Generator) -> None:
    head = MaskHead(8, 3, MaskHeadConfig(convs=(8,), deconv_channels=8, softmax=True, class_agnostic=agnostic))
    features, labels = torch.randn(5, 8, 4, 4, generator=rng), torch.tensor([0, 2, 1, 1, 0])
    scores = head.logits(head.deconv(head.convs(features)).relu()).softmax(1)
    assert scores.shape[1] == (2 if agnostic else 4)
    expected = torch.stack([scores[n, 0 if agnostic else label] for n, label in enumerate(labels)])
    torch.testing.assert_close(head(features, labels).sigmoid(), expected)
    own, background = head.log_probabilities(features, labels)
    torch.testing.assert_close(own.exp(), expected)
    torch.testing.assert_close(background.exp(), scores[:, -1])
