"""Drawing detections over a picture.

Every length follows the picture's diagonal, so that an overlay looks the same at 300 pixels and at 6000. A mask is
only ever touched in its crop. Its edge is drawn from a Gaussian blur of the crop: across an edge the blurred value is
`Phi(d / sigma)` of the distance d in pixels, so one table turns values into the opacity of a smooth outline, another
into that of the filling, and nothing is traced.

Needs numpy and Pillow; no torch is imported here.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .fonts import font_for
from .reading import read

__all__ = ["PALETTE", "Drawable", "draw"]

Color = tuple[int, int, int]
Point = tuple[float, float]

# Vivid colours of OKLCH (lightness 0.66, 0.75 and 0.85, the most chroma that sRGB has): starting with a blue, each is
# the one farthest in OKLab from all before it.
PALETTE: tuple[Color, ...] = tuple(
    (value >> 16, value >> 8 & 255, value & 255)
    for value in (
        *(0x3692FE, 0xABE502, 0xFB4935, 0xFFACFE, 0x14E7FD, 0x00AE67, 0xC75BE6, 0xE39F02, 0xFE7EA4, 0xAA9FFF),
        *(0x04F2A8, 0x0ABDFB, 0x0FC9B6, 0x4DCD37, 0xED47A2, 0xFEC079, 0xFB6FE8, 0x9078FF, 0xD87407, 0xAEB803),
    )
)

_INKS: tuple[Color, Color] = ((16, 16, 20), (255, 255, 255))
_RIM = 0.35  # opacity of the dark rim around lines, which keeps them apart from any ground
_REACH = 2.5  # a blur is felt this many sigmas away


def _luminance(color: Color) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [value / 255 for value in color]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _ink_on(color: Color) -> Color:
    """Of the two inks the one that stands out more."""

    def contrast(ink: Color) -> float:
        low, high = sorted((_luminance(ink), _luminance(color)))
        return (high + 0.05) / (low + 0.05)

    return max(_INKS, key=contrast)


@lru_cache(maxsize=8)
def _tables(sigma: float, line: float, opacity: float) -> tuple[list[int], list[int]]:
    """Opacity 0..255 of the rim, and of filling and line together, for each blurred value 0..255."""
    grid = np.linspace(-_REACH, _REACH, 501)
    share = [0.5 + 0.5 * math.erf(z / math.sqrt(2)) for z in grid]
    distance = np.interp(np.arange(256) / 255, share, grid) * sigma  # to the edge, positive inside

    def cover(half: float) -> NDArray[np.float64]:
        return np.clip(half + 0.5 - abs(distance), 0, 1)

    rim, edge, inside = cover(0.8 * line), cover(0.5 * line), np.clip(distance + 0.5, 0, 1)
    levels = np.rint(255 * np.stack([_RIM * rim, np.maximum(edge, opacity * inside)])).astype(int)
    levels[:, 0] = 0  # beyond the blur's reach
    return levels[0].tolist(), levels[1].tolist()


def _draw_mask(
    canvas: Image.Image, crop: NDArray[np.bool_], y: int, x: int, *, color: Color, line: float, opacity: float
) -> None:
    """One mask, given by its crop and that crop's first row and column."""
    sigma = 0.55 * line + 0.3
    margin = math.ceil(_REACH * sigma)
    tile = max(128, 8 * margin)
    top, left = max(y - margin, 0), max(x - margin, 0)
    bottom = min(y + crop.shape[0] + margin, canvas.height)
    right = min(x + crop.shape[1] + margin, canvas.width)
    # The blur repeats the window's border: no line runs along the border of the picture, where the object goes on.
    window = np.zeros((bottom - top, right - left), np.uint8)
    window[y - top :, x - left :][: crop.shape[0], : crop.shape[1]] = crop * np.uint8(255)
    blur = ImageFilter.GaussianBlur(sigma)
    for row in range(0, bottom - top, tile):
        for column in range(0, right - left, tile):
            above, before = min(row, margin), min(column, margin)
            part = window[row - above : row + tile + margin, column - before : column + tile + margin]
            if not part.any():
                continue
            height, width = window[row : row + tile, column : column + tile].shape
            if part.all():  # far from the outline, as most of a large mask is
                inside = Image.new("L", (width, height), round(255 * opacity))
                canvas.paste(color, (left + column, top + row), inside)
                continue
            near = Image.fromarray(part).filter(blur).crop((before, above, before + width, above + height))
            for paint, table in zip((_INKS[0], color), _tables(sigma, line, opacity), strict=True):
                canvas.paste(paint, (left + column, top + row), near.point(table))


def _draw_box(canvas: Image.Image, box: Sequence[float], *, color: Color, line: float) -> None:
    """The border of a box, its line centred on it and with a rim on both sides."""
    width, rim = max(1, round(line)), max(1, round(0.3 * line))
    x1, y1, x2, y2 = (round(edge - width / 2) for edge in box)
    for paint, grow, opacity in ((_INKS[0], rim, _RIM), (color, 0, 1.0)):
        left, top, right, bottom = x1 - grow, y1 - grow, x2 + width + grow, y2 + width + grow
        thick = width + 2 * grow
        for strip in (
            (left, top, right, top + thick),
            (left, bottom - thick, right, bottom),
            (left, top + thick, left + thick, bottom - thick),
            (right - thick, top + thick, right, bottom - thick),
        ):
            a, b = max(strip[0], 0), max(strip[1], 0)
            c, d = min(strip[2], canvas.width), min(strip[3], canvas.height)
            if a < c and b < d:
                canvas.paste(paint, (a, b, c, d), Image.new("L", (c - a, d - b), round(255 * opacity)))


class _Labels:
    """Labels, placed clear of each other; the text is drawn larger and shrunk, which keeps small letters in shape."""

    def __init__(self, canvas: Image.Image, points: float, font: str | None, texts: str = "") -> None:
        self.canvas = canvas
        self.scale = 4 if points < 24 else 2
        size = points * self.scale
        self.font = font_for(texts, size, font)
        self.gap = points / 4
        self.top: float
        self.bottom: float
        _, self.top, _, self.bottom = self.font.getbbox("Ag")
        self.weight = self.bottom / 2 + self.font.getbbox("A")[3] / 2  # letters look centred with half their tails
        self.taken = np.empty((0, 4), np.int64)  # left, top, right, bottom

    def size(self, text: str) -> tuple[int, int]:
        """Width and height of the text's pill in pixels."""
        left, _, right, _ = self.font.getbbox(text)
        width, height = (right - left) / self.scale, (self.bottom - self.top) / self.scale
        return math.ceil(width + 3 * self.gap), math.ceil(height + 2 * self.gap)

    def place(self, texts: Sequence[str], foot: Point, share: float) -> tuple[str, int, int] | None:
        """A place for the first text that fits into the picture at all, near to where it is wanted.

        Args:
            texts: the label in full, then shorter ones.
            foot: the point that the label's lower edge should stand on.
            share: where along that edge, from 0, its left end, to 1.

        Returns:
            The text and its left and top, or None. Standing clear of the labels before it counts above all.
        """
        for text in texts:
            size = width, height = self.size(text)
            if width > self.canvas.width or height > self.canvas.height:
                continue
            wanted = foot[0] - share * width, foot[1] - height
            down = np.arange(-4, 9)[:, None, None] * [0.0, height / 2]  # over the object rather than far above it
            along = np.arange(-4, 5)[:, None] * [width / 4, 0.0]
            spots = (wanted + down + along).reshape(-1, 2).clip(0, np.subtract(self.canvas.size, size))
            spots = np.rint(spots).astype(np.int64)
            ends = spots + size
            shared = np.minimum(ends[:, None], self.taken[:, 2:]) - np.maximum(spots[:, None], self.taken[:, :2])
            covered = shared.clip(0).prod(2).sum(1)
            away = np.abs((spots - wanted) / size).sum(1)
            best = np.lexsort((away, covered))[0]
            self.taken = np.concatenate([self.taken, [[*spots[best], *ends[best]]]])
            left, top = spots[best].tolist()
            return text, left, top
        return None

    def draw(self, text: str, left: int, top: int, color: Color) -> None:
        """The text on its pill."""
        size = self.size(text)
        wide, high = size[0] * self.scale, size[1] * self.scale
        pill, letters = Image.new("L", (wide, high)), Image.new("L", (wide, high))
        ImageDraw.Draw(pill).rounded_rectangle((0, 0, wide - 1, high - 1), 0.3 * high, fill=255)
        first, _, last, _ = self.font.getbbox(text)
        at = ((wide - first - last) / 2, (high - self.top - self.weight) / 2)
        ImageDraw.Draw(letters).text(at, text, fill=255, font=self.font)
        for paint, cover in ((color, pill), (_ink_on(color), letters)):
            self.canvas.paste(paint, (left, top), cover.resize(size, Image.Resampling.BOX))


def _shown(score: float) -> str:
    """Two digits, and 1.00 for nothing less than certainty."""
    return f"{score if score >= 1 else min(score, 0.99):.2f}"


def _head(crop: NDArray[np.bool_], y: int, x: int) -> Point:
    """The middle of the uppermost part of a mask that is not empty."""
    rows = np.flatnonzero(crop.any(1))
    columns = np.flatnonzero(crop[rows[0] : rows[0] + 1 + len(rows) // 12].any(0))
    return float(x + columns.mean() + 0.5), float(y + rows[0])


class Drawable(Protocol):
    """Objects of a picture; :class:`~trimask.engine.inference.result.Result` is one.

    Its items have a ``name`` and a ``score``.
    """

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def has_masks(self) -> bool: ...

    @property
    def labels(self) -> NDArray[np.int64]: ...

    @property
    def boxes(self) -> NDArray[np.float32]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def crop(self, index: int, /) -> tuple[NDArray[np.bool_], int, int]: ...


def draw(
    picture: Any,
    result: Drawable,
    *,
    masks: bool = True,
    boxes: bool | None = None,
    labels: bool = True,
    scores: bool = True,
    color_by: str = "instance",
    opacity: float = 0.36,
    line: float | None = None,
    font: str | None = None,
    font_size: float | None = None,
) -> Image.Image:
    """Detections over a picture: filled masks with an outline, or boxes, and labels.

    Args:
        picture: anything that :func:`.reading.read` takes; it is left as it is.
        result: what was found in it.
        masks: draw masks where there are any.
        boxes: draw boxes; by default where no masks are drawn.
        labels: write the class names.
        scores: write the scores behind them, with two digits.
        color_by: "instance" for a colour each, so that neighbours of one class differ, or "class".
        opacity: of a mask's filling, 0 to 1.
        line: width of outlines in pixels; by default 1/420 of the picture's diagonal, at least 1.25.
        font: a TrueType file; by default the font in Pillow, and DejaVu or another that is found for more than ASCII.
        font_size: in pixels; by default 1/56 of the diagonal, at least 10, or 7 where the picture is tiny.

    Returns:
        A new RGB picture of the same size. A label that is too large for it loses its score, else is left out.

    Raises:
        ValueError: a picture of another size than the result's, or an argument out of its range.
    """
    if color_by not in ("instance", "class"):
        raise ValueError(f'color_by: expected "instance" or "class", got {color_by!r}')
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number in 0..1, got {opacity}")
    for name, length in (("line", line), ("font_size", font_size)):
        if length is not None and not length > 0:
            raise ValueError(f"{name}: expected a length above 0, got {length}")
    pixels = read(picture).array
    if pixels.shape[:2] != result.size:
        raise ValueError(f"picture: expected the result's size {result.size}, got {pixels.shape[:2]}")
    canvas = Image.fromarray(pixels)
    diagonal = math.hypot(*result.size)
    line = line or max(1.25, diagonal / 420)
    masks = masks and result.has_masks
    boxes = not masks if boxes is None else boxes
    keys = result.labels.tolist() if color_by == "class" else range(len(result))
    colors = [PALETTE[key % len(PALETTE)] for key in keys]
    edges = np.nan_to_num(result.boxes.astype(np.float64)).clip(-1e6, 1e6)  # so that wild numbers stay numbers
    feet: list[tuple[Point, float]] = [((x1, y1), 0.0) for x1, y1, _, _ in edges.tolist()]

    extents = (edges[:, 2:] - edges[:, :2]).clip(0).prod(1)
    order = np.argsort(-extents, kind="stable").tolist()  # the small in front of the large
    for n in order:
        if masks:
            crop, y, x = result.crop(n)
            if crop.any():
                _draw_mask(canvas, crop, y, x, color=colors[n], line=line, opacity=opacity)
                feet[n] = _head(crop, y, x), 0.5
        if boxes:
            _draw_box(canvas, edges[n].tolist(), color=colors[n], line=line)
    if labels:
        pills = _Labels(
            canvas,
            font_size or max(diagonal / 56, min(10.0, max(7.0, diagonal / 9))),
            font,
            "".join(one.name for one in result),
        )
        texts = [[f"{one.name} {_shown(one.score)}", one.name] if scores else [one.name] for one in result]
        places = [
            pills.place(text, (x, y - line / 2), share) for text, ((x, y), share) in zip(texts, feet, strict=True)
        ]
        for place, color in reversed(list(zip(places, colors, strict=True))):  # the surest in front
            if place:
                pills.draw(*place, color)
    return canvas
