"""Overlays: only what was found is drawn over, labels stay inside and apart, any size of picture will do."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from trimask.engine.inference.result import Result
from trimask.engine.pictures.fonts import font_for
from trimask.engine.pictures.reading import PictureError
from trimask.engine.pictures.visualize import PALETTE, _ink_on, _Labels, _luminance, draw
from trimask.kernels.paste_rule import PasteRule

INNER = [[60.0, 50.0, 120.0, 110.0]]


def solid(boxes: object, size: tuple[int, int], masks: bool = True, name: str = "person", **fields: object) -> Result:
    """Boxes filled by their masks."""
    count = len(boxes)
    return Result(
        boxes,
        np.linspace(0.99, 0.5, count),
        np.zeros(count, int),
        size,
        names=[name] * count,
        mask_probabilities=np.ones((count, 28, 28)) if masks else None,
        rule=PasteRule.DETECTRON2,
        **fields,
    )


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def changed(picture: np.ndarray, overlay: Image.Image) -> np.ndarray:
    return (np.asarray(overlay) != picture).any(2)


def frame_around(box: list[float], margin: int, size: tuple[int, int]) -> np.ndarray:
    left, top, right, bottom = (int(side) for side in box)
    near = np.zeros(size, np.bool_)
    near[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
    return near


@pytest.mark.parametrize("masks", [True, False])
def test_only_the_neighbourhood_of_a_detection_changes(masks: bool, np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 150, 200, 3)
    before = picture.copy()
    picture.flags.writeable = False
    result = solid(INNER, (150, 200), masks)
    line = 4.0
    overlay = draw(picture, result, labels=False, line=line)
    assert (overlay.mode, overlay.size) == ("RGB", (200, 150))
    touched = changed(picture, overlay)
    assert not touched[~frame_around(INNER[0], 6, (150, 200))].any()
    inside = touched[60:100, 70:110]
    assert inside.mean() > 0.9 if masks else not inside.any()
    assert np.array_equal(picture, before)
    assert np.array_equal(np.asarray(draw(picture, result, labels=False, line=line)), np.asarray(overlay))


def test_the_outline_runs_along_the_edge_in_full_color(np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 150, 200, 3)
    overlay = np.asarray(draw(picture, solid(INNER, (150, 200)), labels=False, line=4.0))
    for row, column in ((80, 60), (80, 119), (50, 90), (109, 90)):
        assert np.array_equal(overlay[row, column], PALETTE[0])
    wide = np.asarray(draw(picture, solid(INNER, (150, 200)), labels=False, line=8.0))
    assert (wide[80, [57, 62, 117, 122]] == PALETTE[0]).all()
    blend = np.rint(0.36 * np.array(PALETTE[0]) + 0.64 * picture[80, 90])
    assert np.abs(overlay[80, 90] - blend).max() <= 1  # Pillow blends in 8 bits
    plain = np.asarray(draw(picture, solid(INNER, (150, 200)), labels=False, line=4.0, opacity=0))
    assert np.array_equal(plain[70:90, 80:100], picture[70:90, 80:100])


def test_no_line_along_the_border_of_the_picture(np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 100, 100, 3)
    overlay = np.asarray(
        draw(picture, solid([[-20.0, 30.0, 50.0, 130.0]], (100, 100)), labels=False, opacity=0, line=4.0)
    )
    assert np.array_equal(overlay[40:, 0], picture[40:, 0])
    assert np.array_equal(overlay[-1, :40], picture[-1, :40])
    assert np.array_equal(overlay[60, 50], PALETTE[0])


def test_a_box_is_a_line_centred_on_its_border(np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 150, 200, 3) // 2  # none as bright as the line
    overlay = draw(picture, solid(INNER, (150, 200), masks=False), labels=False, line=4.0)
    colored = (np.asarray(overlay) == PALETTE[0]).all(2)
    line = np.zeros((150, 200), np.bool_)
    line[48:112, 58:122] = True
    line[52:108, 62:118] = False
    assert np.array_equal(colored, line)
    rim = changed(picture, overlay) & ~line
    assert rim[47, 57:123].mean() > 0.9  # darker, unless it was black
    assert rim[52, 62:118].mean() > 0.9
    assert not rim[53:107, 63:117].any()
    assert rim.sum() <= 2 * (66 + 64) + 2 * (56 + 54)


@pytest.mark.parametrize("line", [1.5, 6.0])
def test_a_mask_drawn_in_tiles_has_no_seams(line: float) -> None:
    """Turned around, the picture is cut into other tiles."""
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    ring = 1 / (1 + np.exp(20 * (np.abs(np.hypot(x, y) - 0.6) - 0.35)))
    size, boxes = (500, 617), np.array([[40.0, 30.0, 590.0, 530.0]])

    def overlay(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
        result = Result(box, [0.9], [0], size, mask_probabilities=mask[None], rule=PasteRule.DETECTRON2)
        return np.asarray(draw(np.zeros((*size, 3), np.uint8), result, labels=False, line=line)).astype(int)

    turned = np.array([617, 500, 617, 500]) - boxes[:, [2, 3, 0, 1]]
    off = np.abs(overlay(ring, boxes) - overlay(ring[::-1, ::-1], turned)[::-1, ::-1])
    assert off.max() == 0


def test_an_edge_may_lie_where_tiles_meet() -> None:
    black = np.zeros((450, 450, 3), np.uint8)
    for end in range(302, 318):
        for box, axes in (([20, 60, 430, end], (0, 1, 2)), ([60, 20, end, 430], (1, 0, 2))):
            overlay = np.asarray(draw(black, solid([box], (450, 450)), labels=False, line=4.0)).transpose(axes)
            assert (overlay[[59, 60, end - 1, end], 40:400] == PALETTE[0]).all(), box


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3), (32, 32), (64, 300), (1000, 40)])
@pytest.mark.parametrize("masks", [True, False])
def test_any_size_of_picture(size: tuple[int, int], masks: bool, np_rng: np.random.Generator) -> None:
    height, width = size
    boxes = [[0, 0, width, height], [width / 2, 0, width / 2, height], [-5, -5, width + 5, height / 2 + 1]]
    overlay = draw(noise(np_rng, *size, 3), solid(boxes, size, masks))
    assert overlay.size == (width, height)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("masks", [True, False])
def test_wild_boxes_are_drawn_without_complaint(value: float, masks: bool, np_rng: np.random.Generator) -> None:
    boxes = [[10, 10, value, 30], [value, value, value, value], [30, 40, 10, 20]]
    draw(noise(np_rng, 50, 60, 3), solid(boxes, (50, 60), masks), boxes=True)


@pytest.mark.parametrize("shape", [(50, 60), (50, 60, 1), (50, 60, 4)])
def test_any_kind_of_picture(shape: tuple[int, ...], np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, *shape)
    result = solid([[10, 10, 40, 30]], (50, 60))
    channels = picture.reshape(50, 60, -1)[..., :3]
    rgb = np.ascontiguousarray(np.broadcast_to(channels, (50, 60, 3)))
    assert np.array_equal(np.asarray(draw(picture, result)), np.asarray(draw(rgb, result)))
    assert np.array_equal(np.asarray(draw(Image.fromarray(rgb), result)), np.asarray(draw(rgb, result)))


def test_the_small_lies_in_front_of_the_large(np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 150, 200, 3)
    small, large = [80, 60, 100, 80], [20, 20, 180, 130]
    for boxes, n in (([small, large], 0), ([large, small], 1)):
        overlay = np.asarray(draw(picture, solid(boxes, (150, 200)), labels=False, line=4.0))
        assert np.array_equal(overlay[70, 80], PALETTE[n])


def test_colors_by_instance_and_by_class(np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 60, 200, 3)
    boxes = [[10 + 60 * n, 10, 50 + 60 * n, 50] for n in range(3)]
    result = Result(boxes, [0.9, 0.8, 0.7], [4, 0, 24], (60, 200), mask_probabilities=np.ones((3, 28, 28)))

    def edge(n: int, **style: object) -> list[int]:
        return np.asarray(draw(picture, result, labels=False, line=5.0, **style))[30, 10 + 60 * n].tolist()

    assert [edge(n) for n in range(3)] == [list(PALETTE[n]) for n in range(3)]
    assert [edge(n, color_by="class") for n in range(3)] == [list(PALETTE[n]) for n in (4, 0, 4)]


def test_masks_boxes_and_labels_can_be_chosen(np_rng: np.random.Generator) -> None:
    picture = noise(np_rng, 150, 200, 3)
    result, boxes_only = solid(INNER, (150, 200)), solid(INNER, (150, 200), masks=False)

    def pixels(source: Result = result, **style: object) -> np.ndarray:
        return np.asarray(draw(picture, source, **style))

    assert np.array_equal(pixels(masks=False, labels=False), pixels(boxes_only, labels=False))
    assert np.array_equal(pixels(masks=False, boxes=False, labels=False), picture)
    assert not np.array_equal(pixels(boxes=True), pixels())
    assert not np.array_equal(pixels(labels=False), pixels())
    assert not np.array_equal(pixels(scores=False), pixels())
    assert not np.array_equal(pixels(font_size=20.0), pixels())


def test_letters_beyond_ascii_are_drawn(np_rng: np.random.Generator) -> None:
    """Where a font has them: matplotlib's does. Without one, every such letter is the same empty box."""
    pytest.importorskip("matplotlib")
    shapes = {letter: font_for(letter, 40).getmask(letter) for letter in "üéñŁж"}
    assert len({bytes(shape) for shape in shapes.values()}) == len(shapes)
    assert font_for("plain", 40).getname() == ImageFont.load_default(40).getname()


def test_a_font_of_ones_own(np_rng: np.random.Generator) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSerif.ttf"
    picture = noise(np_rng, 150, 200, 3)
    result = solid(INNER, (150, 200))
    assert not np.array_equal(np.asarray(draw(picture, result, font=str(font))), np.asarray(draw(picture, result)))


class Recorder:
    """Notes the text and the place of every label."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.labels: list[tuple[str, int, int, int, int]] = []
        original = _Labels.draw

        def note(labels: _Labels, text: str, left: int, top: int, color: tuple[int, int, int]) -> None:
            width, height = labels.size(text)
            self.labels.append((text, left, top, left + width, top + height))
            original(labels, text, left, top, color)

        monkeypatch.setattr(_Labels, "draw", note)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("size", [(120, 160), (300, 400), (2000, 1500)])
def test_labels_stay_inside_and_apart(
    size: tuple[int, int], masks: bool, np_rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    height, width = size
    corners = [[0, 0], [0.9, 0], [0, 0.9], [0.9, 0.9], [0.45, 0.45]]
    boxes = [[x * width, y * height, (x + 0.1) * width, (y + 0.1) * height] for x, y in corners]
    picture = noise(np_rng, *size, 3)
    result = solid(boxes, size, masks)
    overlay = draw(picture, result)
    assert [text for text, *_ in recorder.labels] == [f"person {score:.2f}" for score in result.scores[::-1]]
    places = [place for _, *place in recorder.labels]
    for left, top, right, bottom in places:
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
    for one, other in itertools.combinations(places, 2):
        assert min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[1], other[1])
    near = np.zeros(size, np.bool_)
    for left, top, right, bottom in places:
        near[top:bottom, left:right] = True
    for box in boxes:
        near |= frame_around(box, 10, size)
    assert not changed(picture, overlay)[~near].any()


def test_labels_of_a_crowd_step_aside(np_rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours whose labels would lie on each other."""
    recorder = Recorder(monkeypatch)
    boxes = [[100 + 15 * n, 100, 112 + 15 * n, 200] for n in range(6)]
    draw(noise(np_rng, 300, 300, 3), solid(boxes, (300, 300)))
    for (_, *one), (_, *other) in itertools.combinations(recorder.labels, 2):
        assert min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[1], other[1])


def test_a_label_that_does_not_fit_is_shortened_or_left_out(
    np_rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    for width in (200, 45, 20):
        draw(noise(np_rng, 60, width, 3), solid([[2, 20, 18, 40]], (60, width)))
    assert [text for text, *_ in recorder.labels] == ["person 0.99", "person"]


def test_a_score_is_shown_as_one_only_if_it_is(np_rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    boxes = [[5 + 60 * n, 60, 40 + 60 * n, 90] for n in range(4)]
    draw(noise(np_rng, 100, 260, 3), Result(boxes, [1.0, 0.9999, 0.29, 0.006], [0] * 4, (100, 260)))
    assert [text for text, *_ in recorder.labels][::-1] == ["0 1.00", "0 0.99", "0 0.29", "0 0.01"]


@pytest.mark.parametrize("diagonal", [250, 1000, 5000])
def test_letters_grow_with_the_picture_and_can_be_read(diagonal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    size = (int(0.6 * diagonal), int(0.8 * diagonal))
    draw(np.zeros((*size, 3), np.uint8), solid([[0, size[0] / 2, *size[::-1]]], size))
    ((_, _, top, _, bottom),) = recorder.labels
    assert max(12, diagonal / 56) <= bottom - top <= max(20, diagonal / 30)


def test_text_is_drawn_on_its_pill() -> None:
    """The ink of a label against Pillow's own text, drawn in one step at its final size."""
    canvas = Image.new("RGB", (300, 100), (0, 0, 255))
    labels = _Labels(canvas, 40.0, None)
    width, height = labels.size("person")
    labels.draw("person", 10, 20, (255, 255, 0))
    red, _, blue = (np.asarray(canvas)[..., k] for k in range(3))
    rows, columns = np.nonzero((red < 128) & (blue < 128))  # neither pill nor ground
    plain = Image.new("L", (300, 100))
    ImageDraw.Draw(plain).text((10, 10), "person", fill=255, font=ImageFont.load_default(40.0))
    left, top, right, bottom = plain.point(lambda value: value > 127 and 255).getbbox()
    assert abs(np.ptp(columns) + 1 - (right - left)) <= 2
    assert abs(np.ptp(rows) + 1 - (bottom - top)) <= 2
    assert abs((columns.min() + columns.max() + 1) / 2 - (10 + width / 2)) <= 2
    assert rows.min() >= 20 + labels.gap / 2
    assert rows.max() <= 20 + height - labels.gap / 2


def test_colors_are_far_from_each_other_and_carry_their_ink() -> None:
    def oklab(color: tuple[int, int, int]) -> np.ndarray:
        """Ottosson, 2020, by way of CIE XYZ."""
        encoded = np.array(color) / 255
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
        m1 = [
            [0.8189330101, 0.3618667424, -0.1288597137],
            [0.0329845436, 0.9293118715, 0.0361456387],
            [0.0482003018, 0.2643662691, 0.6338517070],
        ]
        m2 = [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
        return np.array(m2) @ np.cbrt(np.array(m1) @ np.array(xyz) @ linear)

    labs = [oklab(color) for color in PALETTE]
    assert len(set(PALETTE)) == 20
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 0.09
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs[:6], 2)) > 0.2
    for color in (*PALETTE, (0, 0, 60), (255, 255, 255), (0, 0, 0)):
        low, high = sorted((_luminance(_ink_on(color)), _luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # what WCAG 2 asks for text


def test_a_large_picture_costs_its_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty masks on 12 megapixels: the memory of numpy stays below that of one dense mask, beside the picture."""
    size = (3000, 4000)
    picture = np.zeros((*size, 3), np.uint8)
    boxes = [[100 * n, 60 * n, 100 * n + 300, 60 * n + 200] for n in range(30)]
    result = solid(boxes, size)
    tracemalloc.start()
    draw(picture, result, labels=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - picture.nbytes < size[0] * size[1]


@pytest.mark.parametrize(
    ("style", "told"),
    [
        ({"color_by": "label"}, 'color_by: expected "instance" or "class", got \'label\''),
        ({"opacity": 1.5}, r"opacity: expected a number in 0..1, got 1.5"),
        ({"line": 0.0}, "line: expected a length above 0, got 0"),
        ({"font_size": -3.0}, "font_size: expected a length above 0, got -3"),
    ],
)
def test_styles_that_are_refused(style: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        draw(np.zeros((50, 60, 3), np.uint8), solid(INNER, (50, 60)), **style)


def test_pictures_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"picture: expected the result's size \(50, 60\), got \(60, 50\)"):
        draw(np.zeros((60, 50, 3), np.uint8), solid(INNER, (50, 60)))
    with pytest.raises(PictureError):
        draw(None, solid(INNER, (50, 60)))
