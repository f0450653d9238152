"""Preprocessing against Pillow and OpenCV to the last bit, torch's interpolation, and dense matrices in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from backends import BACKENDS, use_backend
from tolerances import EPS, resized_level
from trimask.kernels.cpu import opencv
from trimask.kernels.reference import resizing as reference
from trimask.kernels.resizing import preprocess

TILES = {"resizing": {"_ROWS": 32, "_COLUMNS": 1024, "_WEIGHTS": 2048}}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PILLOW = {"antialias": True, "quantize": True}
OPENCV = {"antialias": False, "quantize": True}
RULES = {
    "float": {"antialias": False, "quantize": False},
    "OpenCV": OPENCV,
    "Pillow": PILLOW,
    "smooth": {"antialias": True, "quantize": False},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
# (height, width) before and after: down, up, both, whole and odd ratios, single pixels, extreme aspects.
CHANGES = [
    ((60, 80), (45, 60)),
    ((40, 30), (97, 73)),
    ((37, 53), (51, 17)),
    ((64, 48), (32, 16)),
    ((33, 20), (33, 41)),
    ((20, 33), (41, 33)),
    ((1, 1), (5, 7)),
    ((19, 23), (1, 1)),
    ((1, 200), (1, 50)),
    ((150, 2), (30, 1)),
    ((190, 260), (21, 29)),
    ((64, 128), (8, 12)),
]


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(request.param, monkeypatch, request.module, ("preprocess",), TILES)


@pytest.fixture
def noise(np_rng: np.random.Generator) -> Callable[..., Tensor]:
    """Random pictures `[H, W, 3]`."""
    return lambda *size: torch.from_numpy(np_rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def pillow(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Across, then down: the order of both in one call depends on Pillow's version."""
    image = Image.fromarray(picture.contiguous().numpy())
    for step in ((size[1], image.height), (size[1], size[0])):
        image = image.resize(step, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image))


def interpolate(picture: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    x = picture.permute(2, 0, 1)[None].float()
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=antialias)[0].permute(1, 2, 0)


def one(picture: Tensor, size: tuple[int, int], **options) -> Tensor:
    """A batch of one, not padded, as `[h, w, 3]`."""
    return preprocess([picture], [size], size, **options)[0].permute(1, 2, 0)


# ---- the rules


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_equals_pillow(before: tuple[int, int], after: tuple[int, int], noise: Callable[..., Tensor]) -> None:
    picture = noise(*before)
    assert torch.equal(one(picture, after, **PILLOW), pillow(picture, after).float())


@pytest.mark.parametrize("name", ["grace_hopper", "astronaut"])
def test_equals_pillow_on_pictures(name: str) -> None:
    """At the usual sizes one call of Pillow's has the same order."""
    if name == "grace_hopper":
        path = pytest.importorskip("matplotlib.cbook").get_sample_data(f"{name}.jpg", asfileobj=False)
        picture = np.array(Image.open(path))
    else:
        picture = pytest.importorskip("skimage.data").astronaut()
    for short in (187, 600):
        scale = short / min(picture.shape[:2])
        size = tuple(round(side * scale) for side in picture.shape[:2])
        expected = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.array_equal(one(torch.from_numpy(picture), size, **PILLOW).numpy(), expected)


def test_equals_pillow_over_many_ratios(np_rng: np.random.Generator, noise: Callable[..., Tensor]) -> None:
    """Every weight of an axis, which takes but one row or column."""
    for _ in range(6):
        extent, size = np_rng.integers(1, 1500), int(np_rng.integers(150, 1500))
        across, down = noise(1, extent), noise(extent, 1)
        assert torch.equal(one(across, (1, size), **PILLOW), pillow(across, (1, size)).float())
        assert torch.equal(one(down, (size, 1), **PILLOW), pillow(down, (size, 1)).float())


@pytest.mark.parametrize("rule", [OPENCV, PILLOW], ids=["OpenCV", "Pillow"])
@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_flat_pictures_stay_flat(level: int, rule: dict) -> None:
    """Weights that add up to more than one would carry 255 too far."""
    picture = torch.full((61, 67, 3), level, dtype=torch.uint8)
    for size in ((7, 9), (83, 97)):
        assert (one(picture, size, **rule) == level).all()


@pytest.mark.parametrize(
    ("before", "after", "antialias"),
    # torch filters a single column wrongly on a CPU; the dense matrices below say what is right.
    [(*change, antialias) for change in CHANGES for antialias in (False, True) if not antialias or change[1][1] > 1],
)
def test_equals_interpolation(
    before: tuple[int, int], after: tuple[int, int], antialias: bool, noise: Callable[..., Tensor]
) -> None:
    picture = noise(*before)
    found = one(picture, after, antialias=antialias)
    expected = interpolate(picture, after, antialias)
    torch.testing.assert_close(found, expected, rtol=0, atol=resized_level(max(*before, *after)))


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_equals_opencv(before: tuple[int, int], after: tuple[int, int], noise: Callable[..., Tensor]) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = noise(*before)
    assert np.array_equal(one(picture, after, **OPENCV).numpy(), cv2.resize(picture.numpy(), after[::-1]))


def test_equals_opencv_over_many_ratios(np_rng: np.random.Generator, noise: Callable[..., Tensor]) -> None:
    cv2 = pytest.importorskip("cv2")
    for _ in range(6):
        extent, size = (int(n) for n in np_rng.integers(1, 1500, 2))
        for picture, after in ((noise(13, extent), (11, size)), (noise(extent, 13), (size, 11))):
            assert np.array_equal(one(picture, after, **OPENCV).numpy(), cv2.resize(picture.numpy(), after[::-1]))


@pytest.mark.parametrize(("before", "after"), [*CHANGES, ((427, 640), (800, 1199))])
def test_every_backend_has_the_arithmetic_of_opencv(
    before: tuple[int, int], after: tuple[int, int], noise: Callable[..., Tensor]
) -> None:
    picture = noise(*before)
    found = one(picture, after, **OPENCV)
    assert np.array_equal(found.numpy(), opencv.resize(picture.numpy(), after))
    exact = interpolate(picture, after, antialias=False)
    assert (found - exact).abs().max() < 1


@every_rule
@pytest.mark.parametrize(("before", "after"), [((37, 53), (51, 17)), ((9, 7), (7, 23)), ((60, 2), (13, 1))])
def test_equals_dense_matrices(
    before: tuple[int, int], after: tuple[int, int], rule: dict, noise: Callable[..., Tensor]
) -> None:
    pictures = [noise(*before), noise(*after)]
    sizes, padded = [after, before], (60, 53)
    found = preprocess(pictures, sizes, padded, **rule, mean=MEAN, std=STD)
    expected = reference.preprocess(pictures, sizes, padded, **rule, mean=MEAN, std=STD)
    tolerance = resized_level(60)
    if rule == OPENCV:
        tolerance += 1  # its weights are rounded; other tests look at that
    torch.testing.assert_close(found.double(), expected, rtol=4 * EPS[torch.float32], atol=tolerance / min(STD))


@every_rule
def test_a_picture_of_its_size_is_not_touched(rule: dict, noise: Callable[..., Tensor]) -> None:
    picture = noise(31, 45)
    assert torch.equal(one(picture, (31, 45), **rule), picture.float())


# ---- the batch


@every_rule
def test_a_batch_of_mixed_sizes_with_padding(rule: dict, noise: Callable[..., Tensor]) -> None:
    """Memory that nobody wrote to holds NaN here."""
    pictures = [noise(20, 30), noise(50, 40), noise(64, 48), noise(9, 70)]
    sizes = [(40, 60), (25, 20), (64, 48), (1, 61)]
    torch.use_deterministic_algorithms(True)
    try:
        batch = preprocess(pictures, sizes, (64, 96), **rule, mean=MEAN, std=STD)
    finally:
        torch.use_deterministic_algorithms(False)
    assert batch.shape == (4, 3, 64, 96)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for image, picture, (h, w) in zip(batch, pictures, sizes, strict=True):
        alone = preprocess([picture], [(h, w)], (h, w), **rule, mean=MEAN, std=STD)[0]
        assert torch.equal(image[:, :h, :w], alone)
        assert (image[:, h:] == 0).all()
        assert (image[:, :, w:] == 0).all()
        assert alone.abs().max() > 0.1


@pytest.mark.parametrize("rule", [RULES["float"], OPENCV, PILLOW], ids=["float", "OpenCV", "Pillow"])
def test_layouts(rule: dict, noise: Callable[..., Tensor]) -> None:
    picture = noise(24, 34)
    expected = one(picture, (31, 19), **rule)
    wide = noise(48, 102)
    wide[::2, 1::3] = picture
    planar = picture.permute(2, 0, 1).contiguous()
    layouts = {
        "planar": planar,
        "planar, as a view": planar.permute(1, 2, 0),
        "every second row and third column": wide[::2, 1::3],
        "columns first": picture.transpose(0, 1).contiguous().transpose(0, 1),
        "of four channels": torch.cat([picture, picture[..., :1]], 2)[..., :3],
    }
    for name, layout in layouts.items():
        copy = layout.clone()
        assert torch.equal(one(layout, (31, 19), **rule), expected), name
        assert torch.equal(layout, copy), name
    assert torch.equal(one(picture.flip(2), (31, 19), **rule, channel_order="bgr"), expected)
    assert torch.equal(one(planar.flip(0), (31, 19), **rule, channel_order="bgr"), expected)
    assert torch.equal(one(wide[::2, 1::3].flip(2), (31, 19), **rule, channel_order="bgr"), expected)
    assert not torch.equal(one(picture, (31, 19), **rule, channel_order="bgr"), expected)
    grey = one(picture[..., 1], (31, 19), **rule)
    assert torch.equal(grey, expected[..., 1:2].expand(-1, -1, 3))


def test_three_columns_are_a_picture_and_not_channels(noise: Callable[..., Tensor]) -> None:
    picture = noise(3, 3)
    assert torch.equal(one(picture, (3, 3)), picture.float())


@every_rule
def test_normalisation_is_rounded_as_the_model_rounds(rule: dict, noise: Callable[..., Tensor]) -> None:
    picture = noise(40, 50)
    plain = preprocess([picture], [(30, 60)], (32, 64), **rule)[:, :, :30, :60]
    found = preprocess([picture], [(30, 60)], (32, 64), **rule, mean=MEAN, std=STD)[:, :, :30, :60]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.equal(found, (plain - mean) / std)
    shifted = preprocess([picture], [(30, 60)], (32, 64), **rule, mean=(1.0, 2.0, 3.0))[:, :, :30, :60]
    assert torch.equal(shifted, plain - torch.tensor([1.0, 2.0, 3.0])[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_at_the_end(
    dtype: torch.dtype, noise: Callable[..., Tensor], request: pytest.FixtureRequest
) -> None:
    picture = noise(40, 50)
    options = {**PILLOW, "mean": MEAN, "std": STD}
    exact = preprocess([picture], [(30, 60)], (32, 64), **options)
    found = preprocess([picture], [(30, 60)], (32, 64), **options, dtype=dtype)
    assert found.dtype == dtype
    if dtype == torch.bfloat16 and "interpreter" in request.node.name:
        exact = (exact.view(torch.int32) & -(1 << 16)).view(
            torch.float32
        )  # Triton's interpreter cuts, and does not round
    assert torch.equal(found, exact.to(dtype))


# ---- what is wrong


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pictures": [], "sizes": []}, r"sizes: expected one for each of 0 \(at least 1\) pictures, got 0"),
        ({"sizes": [(8, 8)] * 2}, "sizes: expected one for each of 1"),
        ({"sizes": [(33, 8)]}, r"sizes: expected between \(1, 1\) and padded_size \(32, 32\), got \(33, 8\)"),
        ({"sizes": [(8, 0)]}, r"got \(8, 0\)"),
        ({"pictures": [torch.zeros(4, 4, 3)]}, r"pictures: expected uint8 .* got torch.float32 \[4, 4, 3\]"),
        ({"pictures": [torch.zeros(4, 4, 4, dtype=torch.uint8)]}, r"pictures: expected uint8 .* \[4, 4, 4\]"),
        ({"pictures": [torch.zeros(0, 4, 3, dtype=torch.uint8)]}, r"with pixels, got torch.uint8 \[0, 4, 3\]"),
        ({"pictures": [torch.zeros(1, 4, 4, 3, dtype=torch.uint8)]}, "pictures: expected uint8"),
        ({"dtype": torch.float64}, "dtype: expected one of"),
        ({"mean": (0.0,)}, "mean, std: expected three numbers each"),
        ({"std": (1.0, 0.0, 1.0)}, "no std of 0"),
        ({"channel_order": "gbr"}, 'channel_order: expected "rgb" or "bgr"'),
    ],
)
@pytest.mark.host
def test_wrong_arguments_are_named(change: dict, complaint: str) -> None:
    arguments = {
        "pictures": [torch.zeros(4, 4, 3, dtype=torch.uint8)],
        "sizes": [(8, 8)],
        "padded_size": (32, 32),
        **change,
    }
    with pytest.raises(ValueError, match=complaint):
        preprocess(**arguments)


def test_the_registration_is_sound(noise: Callable[..., Tensor]) -> None:
    pictures = [noise(9, 7).flip(0).transpose(0, 1), noise(5, 5)]
    for antialias in (False, True):
        torch.library.opcheck(
            torch.ops.trimask.preprocess.default,
            (pictures, [8, 8, 5, 4], 9, 11, antialias, True, True, [1.0] * 3, [2.0] * 3, torch.float16),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_weights_of_pillow_in_the_open() -> None:
    """A white pixel shows its weights: 3/8 in its own output, and 1/8 made 1/7 in the one at the border."""
    impulse = torch.zeros(1, 8, 3, dtype=torch.uint8)
    impulse[0, 2] = 255
    found = one(impulse, (1, 4), **PILLOW)[0, :, 0]
    assert found.tolist() == [math.floor(255 * weight + 0.5) for weight in (1 / 7, 3 / 8, 0, 0)]
