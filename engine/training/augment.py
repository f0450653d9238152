"""Examples changed at random, and brought to the size that the network takes.

The steps, in their order: a window of the picture is cut out (random crop, large-scale jitter), resized as the model's
:class:`InputConfig` says, mirrored and padded; objects of a second picture, which went the same way, are pasted over it
(copy-paste, Ghiasi et al., 2021); colours change. With every step off the picture equals, bit for bit, what inference
makes of it.

Masks are resized by the value at each pixel's centre, as pictures are, so that they stay in their boxes;
torchvision's "nearest" reads up to half a pixel to the left. Only the part of a mask under its object is touched.

Boxes are scaled with the picture. Where an object was cut or covered, its box becomes the extent of what is left of its
mask; where nothing is left, or a remnant, the object goes. The regions to ignore, crowds, are treated alike, but never
pasted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.config import InputConfig
from ..pictures.preprocess import resize_picture
from ..pictures.resize import resized_size
from .config import AugmentConfig
from .data import Example

__all__ = ["Augment", "AugmentConfig"]

# A remnant has less than this share of the object's pixels, and fewer pixels than this.
REMNANT_SHARE, REMNANT_PIXELS = 0.1, 300

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Augment:
    """Changes examples, as a pure function of the example and the generator's state.

    Args:
        config: what may change.
        input: the model's: how pictures are resized, and the colour that pads them.
    """

    def __init__(self, config: AugmentConfig, input: InputConfig) -> None:
        self.config = config
        self.input = input

    def __call__(
        self, example: Example, generator: np.random.Generator, partner: Callable[[], Example] | None = None
    ) -> Example:
        """The example in the network's frame: picture float32 [h, w, 3] in 0..255, boxes, masks and polygons with it.

        Args:
            example: as it comes from the dataset; it is left as it is.
            partner: gives the picture that objects are copied from; without it nothing is pasted.
        """
        config = self.config
        pasting = generator.random() < config.copy_paste
        result = self._place(example, generator)
        if pasting and partner is not None:
            result = paste(result, self._place(partner(), generator), generator)
        if generator.random() < config.color:
            strengths = config.brightness, config.contrast, config.saturation
            brightness, contrast, saturation = (1 + generator.uniform(-x, x) for x in strengths)
            hue = generator.uniform(-config.hue, config.hue)
            result.picture = recolor(result.picture, brightness, contrast, saturation, hue)
        if generator.random() < config.grey:
            result.picture = recolor(result.picture, saturation=0)
        return result

    def _place(self, example: Example, generator: np.random.Generator) -> Example:
        """The steps that move pixels."""
        config = self.config
        size: tuple[int, int] = example.picture.shape[:2]
        window = (0, 0, *size)
        if generator.random() < config.crop:
            low, high = config.crop_range
            inside = [max(1, round(side * generator.uniform(low, high))) for side in size]
            window = _window(size, inside, generator)
            size = window[2] - window[0], window[3] - window[1]
        if config.jitter:
            target = config.jitter_size
            scale = generator.uniform(*config.jitter) * min(target[0] / size[0], target[1] / size[1])
            inside = [min(side, max(1, round(most / scale))) for side, most in zip(size, target, strict=True)]
            y1, x1, y2, x2 = _window(size, inside, generator)
            window = window[0] + y1, window[1] + x1, window[0] + y2, window[1] + x2
            scaled = [max(1, min(most, round(side * scale))) for side, most in zip(inside, target, strict=True)]
            new = scaled[0], scaled[1]
        else:
            resize = self.input.resize
            short = int(generator.choice(config.min_sizes)) if config.min_sizes else resize.min_size
            new = resized_size(size, replace(resize, min_size=short, max_size=config.max_size or resize.max_size))
        result = self._resized(example, window, new)
        if generator.random() < config.flip:
            result = flipped(result)
        return padded(result, config.jitter_size, self.input.mean) if config.jitter else result

    def _resized(self, example: Example, window: tuple[int, int, int, int], size: tuple[int, int]) -> Example:
        """A window of an example, (y1, x1, y2, x2) in whole pixels, resized."""
        y1, x1, y2, x2 = window
        picture = np.ascontiguousarray(example.picture[y1:y2, x1:x2])
        scale = np.array([size[1] / (x2 - x1), size[0] / (y2 - y1)])
        boxes = (example.boxes - np.tile([x1, y1], 2)) * np.tile(scale, 2)  # [N, 4]
        masks, shares = resized_masks(example.masks, window, size)
        limits = np.tile([size[1], size[0]], 2)
        polygons = example.polygons
        if polygons is not None:
            polygons = [[clipped((part - (x1, y1)) * scale, limits[:2]) for part in parts] for parts in polygons]
            polygons = [[part for part in parts if len(part)] for parts in polygons]
        cut = ((boxes < 0) | (boxes > limits + 1e-4 * limits)).any(1)
        result = replace(
            example,
            picture=resize_picture(picture, self.input.resize, size).permute(1, 2, 0).numpy(),
            boxes=boxes.clip(0, limits).astype(np.float32),
            masks=masks,
            polygons=polygons,
        )
        return refitted(result, cut, shares)


def clipped(corners: NDArray[np.float64], limits: NDArray[np.int64]) -> NDArray[np.float64]:
    """The part of a polygon [P, 2] between (0, 0) and ``limits``, [Q, 2] (Sutherland and Hodgman, 1974)."""
    for axis in (0, 1):
        for limit, sign in ((0, 1), (limits[axis], -1)):
            depth = sign * (corners[:, axis] - limit)  # at least 0 inside
            later, below = np.roll(corners, -1, 0), np.roll(depth, -1)
            crosses = (depth >= 0) != (below >= 0)
            share = depth / np.where(crosses, depth - below, 1)
            both = np.stack([corners, corners + share[:, None] * (later - corners)], 1)  # [P, 2, 2]
            corners = both[np.stack([depth >= 0, crosses], 1)]
    return corners


def _window(size: tuple[int, int], inside: list[int], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """A window (y1, x1, y2, x2) of that height and width, somewhere in a picture."""
    y, x = (int(generator.integers(side - part + 1)) for side, part in zip(size, inside, strict=True))
    return y, x, y + inside[0], x + inside[1]


def resized_masks(
    masks: NDArray[np.bool_], window: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """A window of masks [N, H, W], resized to [N, h, w], and the share of each mask's pixels in the window."""
    y1, x1, y2, x2 = window
    rows = y1 + (2 * np.arange(size[0]) + 1) * (y2 - y1) // (2 * size[0])  # the pixel under each centre
    columns = x1 + (2 * np.arange(size[1]) + 1) * (x2 - x1) // (2 * size[1])
    whole = window == (0, 0, masks.shape[1], masks.shape[2])
    out, shares = np.zeros((len(masks), *size), np.bool_), np.ones(len(masks))
    for n, mask in enumerate(masks):
        left, top, right, bottom = extent(mask)
        if not whole:
            visible = np.count_nonzero(mask[max(top, y1) : min(bottom, y2), max(left, x1) : min(right, x2)])
            shares[n] = visible / np.maximum(np.count_nonzero(mask[top:bottom, left:right]), 1)
        a, b = np.searchsorted(rows, (top, bottom))
        c, d = np.searchsorted(columns, (left, right))
        out[n, a:b, c:d] = mask[rows[a:b], left:right][:, columns[c:d] - left]
    return out, shares


def extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The box x1, y1, x2, y2 around a mask's pixels, zeros where there are none."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return 0, 0, 0, 0
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(0))
    return int(columns[0]), top, int(columns[-1]) + 1, bottom


def refitted(example: Example, changed: NDArray[np.bool_], shares: NDArray[np.float64]) -> Example:
    """The example with the boxes of changed objects around their masks, without what is gone or a remnant.

    Args:
        changed: bool [N], whether an object was cut or covered.
        shares: [N], how much of each is left.
    """
    boxes, kept = example.boxes.copy(), np.ones(len(example), np.bool_)
    for n, mask in enumerate(example.masks):
        if changed[n]:
            boxes[n] = extent(mask)
            kept[n] = shares[n] >= REMNANT_SHARE or np.count_nonzero(mask) >= REMNANT_PIXELS
    kept &= example.masks.any((1, 2)) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(example, boxes=boxes).take(np.flatnonzero(kept))


def flipped(example: Example) -> Example:
    """The example mirrored left and right."""
    width = example.picture.shape[1]
    boxes, polygons = example.boxes.copy(), example.polygons
    boxes[:, [0, 2]] = width - example.boxes[:, [2, 0]]
    if polygons is not None:
        polygons = [[np.stack([width - part[:, 0], part[:, 1]], 1) for part in parts] for parts in polygons]
    return replace(
        example, picture=example.picture[:, ::-1], boxes=boxes, masks=example.masks[:, :, ::-1], polygons=polygons
    )


def padded(example: Example, size: tuple[int, int], color: tuple[float, float, float]) -> Example:
    """The example with pixels of one colour on the right and below, up to a size."""
    height, width = example.picture.shape[:2]
    if (height, width) == size:
        return example
    picture = np.empty((*size, 3), np.float32)
    picture[:] = color
    picture[:height, :width] = example.picture
    masks = np.zeros((len(example), *size), np.bool_)
    masks[:, :height, :width] = example.masks
    return replace(example, picture=picture, masks=masks)


def paste(example: Example, other: Example, generator: np.random.Generator) -> Example:
    """Some of the objects of another example over this one, both with their top left corners at the same place.

    What they cover is taken out of the masks below them. Crowds are not pasted, and polygons are lost.
    """
    size = example.picture.shape[:2]
    height, width = np.minimum(size, other.picture.shape[:2]).tolist()
    other = other.take(np.flatnonzero(~other.crowd & (generator.random(len(other)) < 0.5)))
    masks = np.zeros((len(other), *size), np.bool_)
    masks[:, :height, :width] = other.masks[:, :height, :width]
    limits = np.tile(np.array([width, height], np.float32), 2)
    above = replace(other, boxes=other.boxes.clip(0, limits), masks=masks, polygons=None)
    above = refitted(above, np.max(other.boxes > limits, axis=1), _shares(masks, other.masks))
    if not len(above):
        return example
    cover = np.logical_or.reduce(above.masks)  # [H, W]
    picture = np.array(example.picture)
    picture[:height, :width][cover[:height, :width]] = other.picture[:height, :width][cover[:height, :width]]
    masks = example.masks & ~cover
    shares = _shares(masks, example.masks)
    below = refitted(replace(example, masks=masks), shares < 1, shares)
    return replace(
        below,
        picture=picture,
        boxes=np.concatenate([below.boxes, above.boxes]),
        labels=np.concatenate([below.labels, above.labels]),
        masks=np.concatenate([below.masks, above.masks]),
        crowd=np.concatenate([below.crowd, above.crowd]),
        polygons=None,
    )


def _shares(masks: NDArray[np.bool_], before: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How much of each mask is left, [N]."""
    pairs = zip(masks, before, strict=True)
    return np.array([np.count_nonzero(now) / np.maximum(np.count_nonzero(then), 1) for now, then in pairs], np.float64)


def recolor(
    picture: NDArray[Any], brightness: float = 1, contrast: float = 1, saturation: float = 1, hue: float = 0
) -> NDArray[np.float32]:
    """Colours changed by factors, and hue by a share of the circle: one affine map of RGB, clipped to 0..255.

    Saturation scales, and hue turns, the chroma of YIQ; contrast scales the distance to the picture's mean grey.
    """
    angle = 2 * np.pi * hue
    cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
    chroma = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    matrix = brightness * contrast * np.linalg.solve(TO_YIQ, chroma @ TO_YIQ)  # [3, 3]
    grey = picture.mean((0, 1), dtype=np.float64) @ LUMA
    offset = brightness * (1 - contrast) * grey
    out = picture @ matrix.T.astype(np.float32) + np.float32(offset)
    return out.clip(0, 255, out=out)
