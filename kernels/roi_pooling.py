"""RoIAlign over a feature pyramid, and the drop-in `roi_align` and `roi_pool`.

RoIAlign (He et al., Mask R-CNN, 2017) divides a box into bins and averages, or takes the largest of, bilinear samples
in each. What decides a result, on every device:

- Coordinates are continuous xyxy in pixels of the picture. With ``aligned`` the centre of a pixel lies at .5 (as in
  Detectron2); without, pixels lie at integers and RoIs are made at least one feature pixel wide and high.
- A sample below -1 or beyond the extent of the feature map is zero, and counts; any other is clamped to the map.
- Adaptive sampling (ratio <= 0) takes ceil(bin size) samples per axis: none of an inverted or empty box, which gives
  zero. With a fixed ratio an inverted box is mirrored and an empty one reads one point, if ``aligned``.
- A RoI gives zero if its coordinates, scaled to the map, are not finite or too large for their magnitudes to add up.
- Coordinates, weights and sums are float32 for features up to float32, and float64 for float64, whatever the boxes'
  dtype. (On a CPU the weights of float16 and bfloat16 features are rounded to that dtype.) Autocast changes nothing.
- The gradient goes to the features alone and is summed in float32 at least. It has a gradient too, but for mode "max".
"""

import math
import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .cpu import roi_pooling as _host
from .dispatch import use_triton
from .registration import register
from .sampling import Sampling

__all__ = ["level_thresholds", "pyramid_roi_align", "roi_align", "roi_pool"]

_MODES = ("avg", "max")


def level_thresholds(
    strides: Sequence[float],
    canonical_size: float = 224,
    canonical_level: float = 4,
    level_epsilon: float = 1e-6,
    epsilon_inside_log: bool = False,
) -> list[float]:
    """The sqrt(area) of a box from which on each level is taken; rising, from 0.

    ``level = floor(canonical_level + log2(sqrt(area) / canonical_size) + level_epsilon)``, or with the epsilon added to
    the quotient, clamped to the levels there are (Lin et al., Feature Pyramid Networks, 2017, equation 1). Solved for
    sqrt(area) in float64, and rounded up to float32, so that ``sqrt_area >= threshold`` decides the same in both.

    Args:
        strides: Picture pixels per feature pixel of each level, each twice the one before. Level numbers are log2.
        canonical_size: Side in pixels of a box that belongs on the canonical level.
        canonical_level: Number of that level.
        level_epsilon: 1e-6 outside in torchvision; 1e-8 inside in Detectron2, 1e-6 inside in MMDetection.
        epsilon_inside_log: Where it is added.

    Raises:
        ValueError: If the strides are not positive or do not double.
    """
    if any(not stride > 0 for stride in strides):
        raise ValueError(f"strides: expected positive numbers, got {list(strides)}")
    if any(b != 2 * a for a, b in pairwise(strides)):
        raise ValueError(f"strides: expected each to be twice the one before, got {list(strides)}")
    thresholds = [0.0]
    for stride in strides[1:]:
        octaves = math.log2(stride) - canonical_level
        if epsilon_inside_log:
            exact = canonical_size * (2.0**octaves - level_epsilon)
        else:
            exact = canonical_size * 2.0 ** (octaves - level_epsilon)
        thresholds.append(_float32_not_below(exact))
    return thresholds


def _float32_not_below(x: float) -> float:
    """The smallest float32 that is at least `x`: its 24 bits of mantissa, rounded up."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.ceil(math.ldexp(mantissa, 24)), exponent - 24)


@register("trimask::pyramid_roi_align")
def _pyramid_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    counts: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    sampling = Sampling(scales, thresholds, output_size, sampling_ratio, aligned, mode)
    if use_triton(boxes.device):
        from .gpu.roi_align import roi_align

        pooled = roi_align(features, boxes, None, counts, sampling, channels_last=True)
    else:
        pooled = _host.roi_align(features, boxes.flatten(0, 1), _images(boxes, counts), sampling, channels_last=True)
    return pooled.unflatten(0, boxes.shape[:2]).permute(0, 1, 4, 2, 3)


@_pyramid_roi_align.register_fake
def _(
    features: Sequence[Tensor],
    boxes: Tensor,
    counts: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    *_: Any,
) -> Tensor:
    return features[0].new_empty(*boxes.shape[:2], *output_size, features[0].shape[1]).permute(0, 1, 4, 2, 3)


@register("trimask::roi_align")
def _roi_align(
    input: Tensor,
    boxes: Tensor,
    images: Tensor,
    scale: float,
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    return _pooled([input], boxes, images, Sampling([scale], [0.0], output_size, sampling_ratio, aligned, mode))


@_roi_align.register_fake
def _(input: Tensor, boxes: Tensor, images: Tensor, scale: float, output_size: Sequence[int], *_: Any) -> Tensor:
    return input.new_empty(boxes.shape[0], input.shape[1], *output_size)


@register("trimask::flat_roi_align")
def flat_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
) -> Tensor:
    """`roi_align` of several levels: an op of its own, since torch maps none that takes a list (`vmap`)."""
    sampling = Sampling(scales, thresholds, output_size, sampling_ratio, aligned, mode)
    return _pooled(features, boxes, images, sampling)


@flat_roi_align.register_fake
def _(
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    scales: Sequence[float],
    thresholds: Sequence[float],
    output_size: Sequence[int],
    *_: Any,
) -> Tensor:
    return features[0].new_empty(boxes.shape[0], features[0].shape[1], *output_size)


def _pooled(features: Sequence[Tensor], boxes: Tensor, images: Tensor, sampling: Sampling) -> Tensor:
    """Boxes `[K, 4]` of the images `[K]`: `[K, C, h, w]`."""
    _check_images(images, features[0])
    if use_triton(features[0].device):
        from .gpu.roi_align import roi_align

        return roi_align(features, boxes, images, None, sampling, channels_last=False)
    return _host.roi_align(features, boxes, images, sampling, channels_last=False)


@register("trimask::roi_align_backward")
def _roi_align_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor | None,
    shapes: Sequence[int],
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    mode: str,
    counts: Tensor | None,
) -> list[Tensor]:
    """`shapes` holds (N, C, H, W) of each level in a row; `features` may be empty unless mode is "max".

    `boxes` are [K, 4] with `images`, [K], or else [B, R, 4], of which only the first `counts` of an image are there.
    """
    sampling = Sampling(scales, thresholds, grad.shape[2:], sampling_ratio, aligned, mode)
    if use_triton(grad.device):
        from .gpu.roi_align_backward import roi_align_backward

        planes = roi_align_backward(grad, features, boxes, images, counts, _in_fours(shapes), sampling)
    else:
        if images is None:
            boxes, images = boxes.flatten(0, 1), _images(boxes, counts)
        planes = _host.roi_align_backward(grad, features, boxes, images, _in_fours(shapes), sampling)
    return [plane.permute(0, 3, 1, 2) for plane in planes]


@_roi_align_backward.register_fake
def _(
    grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor | None,
    shapes: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    return [grad.new_empty(n, h, w, c).permute(0, 3, 1, 2) for n, c, h, w in _in_fours(shapes)]


@register("trimask::roi_pool")
def _roi_pool(
    input: Tensor, boxes: Tensor, images: Tensor, scale: float, output_size: Sequence[int], numbered: bool
) -> tuple[Tensor, Tensor]:
    """The second output is empty unless `numbered`: only a gradient asks for it, and on a CPU it takes time."""
    _check_images(images, input)
    if not use_triton(input.device):
        return _host.roi_pool(input, boxes, images, scale, output_size, numbered)
    from .gpu.roi_pool import roi_pool

    pooled, argmax = roi_pool(input, boxes, images, scale, output_size)
    return pooled, argmax if numbered else torch.empty_like(argmax[:0])


@_roi_pool.register_fake
def _(
    input: Tensor, boxes: Tensor, images: Tensor, scale: float, output_size: Sequence[int], numbered: bool
) -> tuple[Tensor, Tensor]:
    pooled = input.new_empty(boxes.shape[0], input.shape[1], *output_size)
    return pooled, torch.empty_like(pooled if numbered else pooled[:0], dtype=torch.int64)


@register("trimask::roi_pool_backward")
def _roi_pool_backward(grad: Tensor, argmax: Tensor, shape: Sequence[int]) -> Tensor:
    # Torch's scatter is deterministic when asked; Triton's atomic sums are not.
    if use_triton(grad.device) and not torch.are_deterministic_algorithms_enabled():
        from .gpu.roi_pool import roi_pool_backward as run
    else:
        run = _host.roi_pool_backward
    return run(grad, argmax, shape).permute(0, 3, 1, 2)


@_roi_pool_backward.register_fake
def _(grad: Tensor, argmax: Tensor, shape: Sequence[int]) -> Tensor:
    n, c, h, w = shape
    return grad.new_empty(n, h, w, c).permute(0, 3, 1, 2)


def _images(boxes: Tensor, counts: Tensor | None) -> Tensor:
    """Which image each of the boxes `[B, R, 4]` lies in, `[B * R]`; -1 for padding."""
    b, r = boxes.shape[:2]
    images = torch.arange(b, device=boxes.device)[:, None].expand(b, r)
    if counts is not None:
        images = torch.where(torch.arange(r, device=boxes.device) < counts[:, None], images, -1)
    return images.flatten()


def _check_images(images: Tensor, input: Tensor) -> None:
    """Refuse batch indices out of range where the host can see them without waiting for a device."""
    if images.device.type == "cpu":
        wrong = images[~((images >= 0) & (images < input.shape[0]))]
        if len(wrong):
            raise ValueError(f"boxes: expected batch indices in 0..{input.shape[0] - 1}, got {wrong[0].item()}")


def _in_fours(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[i : i + 4] for i in range(0, len(numbers), 4)]


def _save_levels(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of several levels; which image a box lies in is said by `counts`, of a pyramid, or by `images`."""
    features, boxes, which, ctx.scales, ctx.thresholds, _, ctx.sampling_ratio, ctx.aligned, ctx.mode = inputs
    ctx.shapes = [n for feature in features for n in feature.shape]
    ctx.save_for_backward(boxes, which, *(features if ctx.mode == "max" else ()))


def _rule(ctx: Any) -> tuple[Any, ...]:
    return ctx.shapes, ctx.scales, ctx.thresholds, ctx.sampling_ratio, ctx.aligned, ctx.mode


def _pyramid_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, counts, *features = ctx.saved_tensors
    return _roi_align_backward(grad.flatten(0, 1), features, boxes, None, *_rule(ctx), counts), *[None] * 8


def _flat_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, images, *features = ctx.saved_tensors
    return _roi_align_backward(grad, features, boxes, images, *_rule(ctx), None), *[None] * 8


def _save_single(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, boxes, images, ctx.scale, _, ctx.sampling_ratio, ctx.aligned, ctx.mode = inputs
    ctx.shape = input.shape
    ctx.save_for_backward(boxes, images, *([input] if ctx.mode == "max" else []))


def _single_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, images, *features = ctx.saved_tensors
    (grad_input,) = _roi_align_backward(
        grad, features, boxes, images, ctx.shape, [ctx.scale], [0.0], ctx.sampling_ratio, ctx.aligned, ctx.mode, None
    )
    return grad_input, *[None] * 7


def _save_bins(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, features, boxes, images, *rule, counts = inputs
    ctx.shapes, ctx.scales, ctx.thresholds, ctx.sampling_ratio, ctx.aligned, ctx.mode = rule
    ctx.maps, ctx.output_size = len(features), grad.shape[2:]
    ctx.save_for_backward(boxes, images, counts)


def _second_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What is linear in the gradients of the bins has the pooling itself for its gradient."""
    if ctx.mode != "avg":
        raise NotImplementedError('roi_align: expected mode "avg" where a gradient is to have a gradient, got "max"')
    boxes, images, counts = ctx.saved_tensors
    some = next(grad for grad in grads if grad is not None)
    shapes = _in_fours(ctx.shapes)
    planes = [some.new_zeros(*shape) if grad is None else grad for grad, shape in zip(grads, shapes, strict=True)]
    sampling = (list(ctx.output_size), ctx.sampling_ratio, ctx.aligned, ctx.mode)
    if images is None:
        bins = _pyramid_roi_align(planes, boxes, counts, ctx.scales, ctx.thresholds, *sampling).flatten(0, 1)
    else:
        bins = flat_roi_align(planes, boxes, images, ctx.scales, ctx.thresholds, *sampling)
    return bins, [None] * ctx.maps, *[None] * 9


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1])


def _pool_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    (argmax,) = ctx.saved_tensors
    if argmax.shape != grad.shape:
        raise ValueError("numbered: expected True where there is to be a gradient, got False")
    return _roi_pool_backward(grad, argmax, ctx.shape), *[None] * 5


def _save_argmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _second_pool_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (argmax,) = ctx.saved_tensors
    channels = torch.arange(argmax.shape[1], device=argmax.device)[:, None, None]
    picked = grad.permute(0, 2, 3, 1).flatten(0, 2)[argmax.clamp(min=0), channels]
    return picked.masked_fill(argmax < 0, 0.0), None, None


_pyramid_roi_align.register_autograd(_pyramid_gradient, setup_context=_save_levels)
_roi_align.register_autograd(_single_gradient, setup_context=_save_single)
flat_roi_align.register_autograd(_flat_gradient, setup_context=_save_levels)
_roi_pool.register_autograd(_pool_gradient, setup_context=_save_pool)
_roi_align_backward.register_autograd(_second_gradient, setup_context=_save_bins)
_roi_pool_backward.register_autograd(_second_pool_gradient, setup_context=_save_argmax)


def pair(output_size: int | Sequence[int]) -> list[int]:
    """Bins, height and width."""
    sides = list(output_size) if isinstance(output_size, Iterable) else [output_size] * 2
    size = [operator.index(side) for side in sides]  # numpy's integers too
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"output_size: expected a positive int or a pair of them, got {output_size!r}")
    return size


def _check_feature(name: str, feature: Tensor) -> None:
    real = feature.is_floating_point() and feature.dtype.itemsize > 1
    if feature.dim() != 4 or feature.shape[2] == 0 or feature.shape[3] == 0 or not real:
        got = f"{feature.dtype} {list(feature.shape)}"
        raise ValueError(f"{name}: expected floating point [N, C, H, W] of 16 bits or more, with pixels, got {got}")


def check_features(features: Sequence[Tensor]) -> None:
    """Refuse levels that do not go together."""
    for feature in features:
        _check_feature("features", feature)
        _check_device("features", feature, features[0])
        if feature.shape[:2] != features[0].shape[:2] or feature.dtype != features[0].dtype:
            raise ValueError(
                f"features: expected {features[0].dtype} {list(features[0].shape[:2])} as on the first level, "
                f"got {feature.dtype} {list(feature.shape[:2])}"
            )


def _check_device(name: str, tensor: Tensor, feature: Tensor) -> None:
    if tensor.device != feature.device:
        raise ValueError(f"{name}: expected the device of the features, {feature.device}, got {tensor.device}")


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {_MODES}, got {mode!r}")


def split_boxes(boxes: Tensor | Sequence[Tensor], input: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes `[K, 4]` and the images they lie in, `[K]`, from either of torchvision's forms."""
    for part in [boxes] if isinstance(boxes, Tensor) else boxes:
        if not isinstance(part, Tensor):
            raise ValueError(f"boxes: expected a tensor, or one for each image, got {type(part).__name__}")
        _check_device("boxes", part, input)
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"boxes: expected [K, 5] (batch index, x1, y1, x2, y2), got {list(boxes.shape)}")
        return boxes[:, 1:], boxes[:, 0]
    for image in boxes:
        if image.dim() != 2 or image.shape[1] != 4:
            raise ValueError(f"boxes: expected a list of [L, 4] (x1, y1, x2, y2), got {list(image.shape)}")
    if not boxes:
        return input.new_empty(0, 4), input.new_empty(0)
    # Made like the boxes, not of their number, which a trace would keep.
    images = [torch.full_like(image[:, 0], i, dtype=torch.int64) for i, image in enumerate(boxes)]
    return torch.cat(list(boxes)), torch.cat(images)


def pyramid_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[float],
    output_size: int | Sequence[int],
    *,
    sampling_ratio: int,
    aligned: bool,
    mode: str = "avg",
    canonical_size: float = 224,
    canonical_level: float = 4,
    level_epsilon: float = 1e-6,
    epsilon_inside_log: bool = False,
    counts: Tensor | None = None,
) -> Tensor:
    """Pool every box from the level of a feature pyramid that fits its size.

    Args:
        features: `[B, C, H_l, W_l]` for each level, finest first; channels_last memory is read without a copy.
        boxes: `[B, R, 4]` xyxy in pixels of the picture.
        strides: Picture pixels per feature pixel of each level, each twice the one before.
        output_size: Bins, (height, width) or one number for both.
        sampling_ratio: Samples per bin and axis; ceil(bin size) of them if not positive.
        aligned: Whether the centre of a pixel lies at .5 (the module's docstring says what else it changes).
        mode: "avg" or "max" of the samples of a bin.
        canonical_size: `level_thresholds` explains this and the next three.
        canonical_level: See there.
        level_epsilon: See there.
        epsilon_inside_log: See there.
        counts: `[B]` integers; only the first `counts[b]` boxes of an image are there.

    Returns:
        `[B, R, C, h, w]` in the features' dtype, strided as a contiguous `[B, R, h, w, C]`; zero beyond `counts`.
        Differentiable with respect to the features.

    Raises:
        ValueError: For shapes, dtypes or values that do not fit.
    """
    _check_mode(mode)
    if not features or len(features) != len(strides):
        raise ValueError(f"strides: expected one for each of {len(features)} (at least 1) levels, got {list(strides)}")
    check_features(features)
    _check_device("boxes", boxes, features[0])
    if boxes.dim() != 3 or boxes.shape[0] != features[0].shape[0] or boxes.shape[2] != 4:
        raise ValueError(f"boxes: expected [{features[0].shape[0]}, R, 4], got {list(boxes.shape)}")
    if counts is not None and counts.shape != boxes.shape[:1]:
        raise ValueError(f"counts: expected [{boxes.shape[0]}], got {list(counts.shape)}")
    if counts is not None:
        _check_device("counts", counts, features[0])
    thresholds = level_thresholds(strides, canonical_size, canonical_level, level_epsilon, epsilon_inside_log)
    scales = [1.0 / stride for stride in strides]
    return _pyramid_roi_align(
        list(features), boxes, counts, scales, thresholds, pair(output_size), sampling_ratio, aligned, mode
    )


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
) -> Tensor:
    """RoIAlign on one feature map, with the signature and meaning of `torchvision.ops.roi_align`.

    Args:
        input: `[N, C, H, W]`; channels_last memory is read without a copy.
        boxes: `[K, 5]` (batch index, x1, y1, x2, y2), or for each image `[L, 4]`; in pixels of the picture.
        output_size: Bins, (height, width) or one number for both.
        spatial_scale: Feature pixels per picture pixel.
        sampling_ratio: Samples per bin and axis; ceil(bin size) of them if not positive.
        aligned: Whether the centre of a pixel lies at .5 (the module's docstring says what else it changes).
        mode: "avg" or "max" of the samples of a bin.

    Returns:
        `[K, C, h, w]`, contiguous, in the dtype of `input`. Differentiable with respect to `input`.

    Raises:
        ValueError: For shapes, dtypes or values that do not fit; on a CPU also for a batch index out of range (on other
            devices such a RoI is zero).
    """
    _check_mode(mode)
    _check_feature("input", input)
    corners, images = split_boxes(boxes, input)
    return _roi_align(input, corners, images, spatial_scale, pair(output_size), sampling_ratio, aligned, mode)


def roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """RoIPool (Girshick, Fast R-CNN, 2015), with the signature and meaning of `torchvision.ops.roi_pool`.

    Args:
        input: `[N, C, H, W]`.
        boxes: `[K, 5]` (batch index, x1, y1, x2, y2), or for each image `[L, 4]`; in pixels of the picture.
        output_size: Bins, (height, width) or one number for both.
        spatial_scale: Feature pixels per picture pixel.

    Returns:
        `[K, C, h, w]`, contiguous, in the dtype of `input`; 0 in empty bins. Differentiable with respect to `input`.

    Raises:
        ValueError: As for `roi_align`.
    """
    _check_feature("input", input)
    corners, images = split_boxes(boxes, input)
    # A program that is kept may be asked for a gradient later.
    kept = torch.compiler.is_exporting() or torch.jit.is_tracing()
    numbered = kept or (input.requires_grad and torch.is_grad_enabled())
    return _roi_pool(input, corners, images, spatial_scale, pair(output_size), numbered)[0]
