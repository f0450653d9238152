"""Reading: every kind of file, of array and of source, and what is said of those that cannot be read."""

import colorsys
import contextlib
import io
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trimask.engine.pictures.reading import FORMATS, SUFFIXES, Picture, PictureError, expand, read

from .tolerances import COLOR_LEVELS, JPEG_LEVELS

# Where the first row and the first column of the stored picture belong (EXIF 2.32, tag 0x0112).
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels of a file of this orientation that shows `upright`."""
    rows, columns = SIDES.get(orientation, ("top", "left"))
    pixels = upright.swapaxes(0, 1) if rows in ("left", "right") else upright
    pixels = pixels[::-1] if rows in ("bottom", "right") else pixels
    return pixels[:, ::-1] if columns in ("bottom", "right") else pixels


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def patches(channels: int, seed: int, levels: int = 256, dtype: type = np.uint8) -> np.ndarray:
    """Flat patches of 16 x 16 pixels, 2 rows of 3: JPEG keeps them."""
    colors = np.random.default_rng(seed).integers(0, levels, (2, 3, channels)).astype(dtype)
    return colors.repeat(16, 0).repeat(16, 1)


def pil(values: np.ndarray, mode: str) -> Image.Image:
    """A picture of a mode, its channels as they are."""
    if values.shape[2] == 1:
        return Image.frombytes(mode, values.shape[1::-1], np.ascontiguousarray(values).tobytes())
    bands = [Image.fromarray(np.ascontiguousarray(values[..., k])) for k in range(values.shape[2])]
    return Image.merge(mode, bands)


@pytest.mark.parametrize("orientation", [*SIDES, 0, 9, 65535])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_is_applied(kind: str, orientation: int, seed: int) -> None:
    upright = patches(3, seed)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    data = encode(Image.fromarray(np.ascontiguousarray(stored(upright, orientation))), kind, exif=exif, **options)
    seen = read(data).array
    assert seen.shape == upright.shape
    off = np.abs(seen.astype(int) - upright).max()
    assert off <= JPEG_LEVELS if kind == "JPEG" else off == 0
    in_memory = read(Image.open(io.BytesIO(data))).array
    assert np.array_equal(in_memory, seen)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense"])
def test_a_damaged_tag_does_not_spoil_the_picture(exif: bytes, seed: int) -> None:
    pixels = patches(3, seed)
    assert np.array_equal(read(encode(Image.fromarray(pixels), "PNG", exif=exif)).array, pixels)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("L", "TIFF"), ("LA", "PNG"), ("RGB", "BMP"), ("RGB", "PPM"), ("RGBA", "PNG"), ("RGBA", "TIFF")],
)
def test_grey_and_rgb_keep_their_values_and_lose_alpha(mode: str, kind: str, seed: int) -> None:
    values = patches(len(mode), seed)
    values[:4, :4, -1] = 0  # alpha, where there is one: what lies under it shows
    seen = read(encode(pil(values, mode), kind)).array
    assert np.array_equal(seen, np.repeat(values[..., :1], 3, 2) if mode[0] == "L" else values[..., :3])
    assert seen.flags.c_contiguous
    assert seen.flags.writeable


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "BMP"])
def test_one_bit(kind: str, np_rng: np.random.Generator) -> None:
    bits = np_rng.random((7, 13)) < 0.5
    seen = read(encode(Image.fromarray(bits), kind)).array
    assert np.array_equal(seen, np.repeat(bits[..., None] * np.uint8(255), 3, 2))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette(transparency: int | bytes | None, np_rng: np.random.Generator) -> None:
    colors = np_rng.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = np_rng.integers(0, 256, (9, 5), dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(colors.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = read(encode(picture, "PNG", **options)).array
    assert np.array_equal(seen, colors[indices])


def test_premultiplied_colors_are_divided_by_alpha(seed: int) -> None:
    values = patches(4, seed) | 64  # enough alpha to divide by
    exact = values[..., :3]
    premultiplied = pil(values, "RGBA").convert("RGBa")
    off = read(premultiplied).array.astype(int) - exact
    assert np.abs(off).max() <= np.ceil(0.5 * 255 / 64) + 1
    grey = read(pil(values[..., [0, 3]], "LA").convert("La")).array.astype(int) - values[..., :1]
    assert np.abs(grey).max() <= np.ceil(0.5 * 255 / 64) + 1


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind: str, seed: int) -> None:
    """JPEG files store it inverted, as Adobe does; TIFF files do not."""
    ink = patches(4, seed)
    options = {"quality": 95} if kind == "JPEG" else {}
    seen = read(encode(pil(ink, "CMYK"), kind, **options)).array
    light = 255.0 - ink
    tolerance = JPEG_LEVELS + COLOR_LEVELS if kind == "JPEG" else COLOR_LEVELS
    assert np.abs(seen - light[..., :3] * light[..., 3:] / 255).max() <= tolerance


def test_hsv_and_ycbcr(seed: int) -> None:
    values = patches(3, seed)
    seen = read(pil(values, "HSV")).array
    want = [[colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in row] for row in values]
    assert np.abs(seen - 255 * np.array(want)).max() <= COLOR_LEVELS
    y, cb, cr = (values[..., k].astype(float) for k in range(3))
    cb, cr = cb - 128, cr - 128
    want = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2).clip(0, 255)
    assert np.abs(read(pil(values, "YCbCr")).array - want).max() <= COLOR_LEVELS


def test_lab(np_rng: np.random.Generator) -> None:
    """CIELAB with the white of ICC profiles, D50, to which Bradford's matrix takes the D65 of sRGB."""
    color = pytest.importorskip("skimage.color")
    bradford = np.array([[1.04781, 0.02289, -0.05013], [0.02954, 0.99048, -0.01705], [-0.00923, 0.01504, 0.75213]])
    # Muted colours: towards the edge of sRGB, littlecms interpolates in a coarse table.
    rgb = (np_rng.integers(90, 170, (6, 6, 1)) + np_rng.integers(-20, 21, (6, 6, 3))).astype(np.uint8)
    lab = color.xyz2lab(color.rgb2xyz(rgb) @ bradford.T, illuminant="D50")
    levels = np.rint(lab * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    back = color.lab2xyz((levels.astype(float) - [0, 128, 128]) / [2.55, 1, 1], illuminant="D50")
    want = 255 * color.xyz2rgb(back @ np.linalg.inv(bradford).T)
    got = read(encode(pil(levels, "LAB"), "TIFF")).array
    assert np.abs(got - want).max() <= COLOR_LEVELS


@pytest.mark.parametrize("case", ["I;16 png", "I;16 tiff", "I;16B tiff", "I ppm", "I;16 pil", "I pil"])
def test_sixteen_bits_are_scaled_by_their_range(case: str, np_rng: np.random.Generator) -> None:
    values = np_rng.integers(0, 65536, (11, 7), dtype=np.uint16)
    values.flat[:4] = 0, 65535, 128, 129  # 128 / 257 rounds to 0, 129 / 257 to 1
    mode, kind = case.split()
    if mode == "I":
        picture = Image.fromarray(values.astype(np.int32))
    else:
        ordered = values.astype(">u2" if mode.endswith("B") else "<u2")
        picture = Image.frombytes(mode, values.shape[::-1], ordered.tobytes())
    assert picture.mode == mode
    seen = read(picture if kind == "pil" else encode(picture, kind.upper())).array
    want = np.floor(values.astype(float) / 257 + 0.5)
    assert np.array_equal(seen, np.repeat(want[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bits_of_several_channels_are_within_a_level(kind: str) -> None:
    cv2 = pytest.importorskip("cv2")
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1) ^ np.array([0, 0x5A5A, 0xFFFF], np.uint16)
    seen = read(cv2.imencode(f".{kind}", values[..., ::-1])[1].tobytes()).array
    off = seen - np.floor(values.astype(float) / 257 + 0.5)
    assert np.abs(off).max() == (0 if kind == "ppm" else 1)
    if kind != "ppm":
        assert np.array_equal(seen, values >> 8)
        assert np.abs(off).mean() == pytest.approx(0.25, abs=0.01)
        assert off[values < 256 * 64].max() == 0 == off[values >= 256 * 192].min()


def test_values_beyond_a_mode_are_refused() -> None:
    for values, told in (
        (np.array([[0, 70000]], np.int32), r"0\.\.65535, got 0\.\.70000"),
        (np.array([[-1, 5]], np.int32), r"got -1\.\.5"),
        (np.array([[0.0, 255.0]], np.float32), r"0\.\.1, got 0\.\.255"),
        (np.array([[0.0, np.nan]], np.float32), r"0\.\.1, got nan"),
    ):
        with pytest.raises(PictureError, match=told):
            read(Image.fromarray(values))


def test_float_files(np_rng: np.random.Generator) -> None:
    values = np_rng.random((5, 6), np.float32)
    seen = read(encode(Image.fromarray(values), "TIFF")).array
    assert np.array_equal(seen[..., 2], np.rint(values * 255))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ((250, 10, 10), (10, 250, 10), (10, 10, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    seen = read(data).array
    assert np.abs(seen.astype(int) - [250, 10, 10]).max() <= (JPEG_LEVELS if kind == "MPO" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_truncated_file_is_named(kind: str, share: float, tmp_path: Path, np_rng: np.random.Generator) -> None:
    data = encode(Image.fromarray(np_rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PictureError, match=f"half.{kind.lower()}: expected a"):
        read(path)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    for name, content, told in (
        ("empty.png", b"", "an empty file"),
        ("text.jpg", b"to be or not to be", "got something else"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "pillow-heif|damaged"),
        ("icon.ico", encode(picture, "ICO"), "got something else"),  # Pillow reads it: not one of the formats meant
        ("paint.pcx", encode(picture, "PCX"), "got something else"),
        ("stars.fits", b"SIMPLE  =                    T" + b" " * 3000, "got something else"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(PictureError, match=f"{name}.*({told})"):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10, 11), (100, 100)])
def test_a_bomb_is_an_error(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("L", size).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match=r"bomb.png: expected at most 100 pixels.*MAX_IMAGE_PIXELS"):
        read(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read(path).size == size[::-1]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.jpg"):
        read(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match=r"nothing at .*nowhere"):
        list(expand(str(tmp_path / "nowhere")))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_gives_a_picture_or_a_picture_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    content = bytearray(encode(Image.fromarray(np.arange(108, dtype=np.uint8).reshape(9, 12)), kind))
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
        content[position] = value
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        seen = read(bytes(content))
    except PictureError:
        return
    assert seen.array.dtype == np.uint8
    assert seen.array.shape[2:] == (3,)


def test_a_photograph_is_read_as_pillow_reads_it() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    picture = read(path)
    assert np.array_equal(picture.array, np.asarray(Image.open(path).convert("RGB")))
    assert (picture.path, picture.size) == (path, (600, 512))
    opened = read(Image.open(path))
    assert opened.path == path
    assert np.array_equal(opened.array, picture.array)
    assert read(picture) is picture


LAYOUTS = {
    "[H, W]": ((7, 9), lambda a: np.repeat(a[..., None], 3, 2)),
    "[H, W, 1]": ((7, 9, 1), lambda a: np.repeat(a, 3, 2)),
    "[H, W, 3]": ((7, 9, 3), lambda a: a),
    "[H, W, 4]": ((7, 9, 4), lambda a: a[..., :3]),
    "[1, H, W]": ((1, 7, 9), lambda a: np.repeat(a[0][..., None], 3, 2)),
    "[3, H, W]": ((3, 7, 9), lambda a: np.stack(list(a), 2)),
    "[4, H, W]": ((4, 7, 9), lambda a: np.stack(list(a)[:3], 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float16", "float32", "float64"])
def test_arrays(layout: str, dtype: str, np_rng: np.random.Generator) -> None:
    shape, rgb = LAYOUTS[layout]
    levels = np_rng.integers(0, 2 if dtype == "bool" else 256, shape)
    scale = {"uint8": 1, "uint16": 257, "bool": 1}.get(dtype, 1 / 255)
    array = (levels * scale).astype(dtype)
    for given_array in (array, array[::-1].copy()[::-1], np.asfortranarray(array), np.repeat(array, 2, -1)[..., ::2]):
        before = given_array.copy()
        given_array.flags.writeable = False
        seen = read(given_array).array
        assert np.array_equal(seen, rgb(levels * (255 if dtype == "bool" else 1)))
        assert seen.dtype == np.uint8
        assert seen.flags.c_contiguous
        assert np.array_equal(given_array, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_tensors(layout: str, dtype: torch.dtype, np_rng: np.random.Generator) -> None:
    shape, rgb = LAYOUTS[layout]
    levels = np_rng.integers(0, 256, shape)
    if dtype == torch.bfloat16:
        levels = np.where(levels < 128, 0, 255)  # which it can hold
    tensor = torch.from_numpy(levels / 255).to(dtype) if dtype.is_floating_point else torch.from_numpy(levels).to(dtype)
    if dtype.is_floating_point:
        tensor.requires_grad_()
    assert np.array_equal(read(tensor).array, rgb(levels))


def test_where_both_ends_could_be_channels(np_rng: np.random.Generator) -> None:
    array = np_rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert np.array_equal(read(array).array, array)
    assert np.array_equal(read(torch.from_numpy(array)).array, array.transpose(1, 2, 0))


def test_what_is_ready_is_not_copied(np_rng: np.random.Generator) -> None:
    array = np_rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.shares_memory(read(array).array, array)


def test_channel_order(np_rng: np.random.Generator) -> None:
    array = np_rng.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    for values in (array, array[..., :3]):
        assert np.array_equal(read(values, "bgr").array, array[..., [2, 1, 0]])
        assert np.array_equal(read(torch.from_numpy(values).permute(2, 0, 1), "bgr").array, array[..., [2, 1, 0]])
    grey = array[..., 0]
    assert np.array_equal(read(grey, "bgr").array, read(grey).array)
    picture = Image.fromarray(array[..., :3].copy())
    assert np.array_equal(read(picture, "bgr").array, array[..., :3])
    with pytest.raises(ValueError, match='channel_order: expected "rgb" or "bgr", got'):
        read(array, "RGB")


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (np.zeros((5, 6, 2), np.uint8), r"\[H, W, C\].*got \(5, 6, 2\)"),
        (np.zeros((0, 6, 3), np.uint8), r"got \(0, 6, 3\)"),
        (np.zeros(7, np.uint8), r"got \(7,\)"),
        (np.zeros((1, 1, 5, 6), np.uint8), r"got \(1, 1, 5, 6\)"),
        (torch.zeros(2, 5, 6), r"tensor: .*\[C, H, W\].*got \(2, 5, 6\)"),
        (np.zeros((5, 6), np.int64), "expected uint8, uint16, bool or float values, got int64"),
        (np.zeros((5, 6), object), "got object"),
        (np.full((5, 6), 255.0), r"in 0\.\.1, got 255\.\.255"),
        (np.full((5, 6), -0.01), r"got -0\.01"),
        (np.full((5, 6), np.nan), "got nan"),
        (np.full((5, 6), np.inf), "got inf"),
        (Image.new("RGB", (0, 4)), "at least one pixel, got 0 x 4"),
        (None, "got NoneType"),
        (3.5, "got float"),
    ],
)
def test_what_is_refused_and_why(item: object, told: str) -> None:
    with pytest.raises(PictureError, match=told):
        read(item)


def test_rounding_slack_of_floats() -> None:
    edges = np.array([[-0.0015, 0.0, 0.00195, 0.00197, 1.0, 1.0015]])
    assert read(edges).array[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("frame10.PNG", "frame9.png", "Frame1.jpg", "notes.txt", ".hidden.png", "deep/a.png", "deep/er/b.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_folders_and_patterns(folder: Path) -> None:
    def found(source: object) -> list[str]:
        return [path.relative_to(folder).as_posix() for path in expand(source)]

    frames = ["Frame1.jpg", "frame9.png", "frame10.PNG"]
    assert found(folder) == found(str(folder)) == frames
    assert found(str(folder / "*")) == frames
    assert found(folder / "frame?.p*") == ["frame9.png"]
    assert sorted(found(str(folder / "**" / "*.png"))) == ["deep/a.png", "deep/er/b.png", "frame9.png"]
    assert found([folder / "frame9.png", [folder / "deep"]]) == ["frame9.png", "deep/a.png"]
    bracket = folder / "shot[1].png"
    bracket.write_bytes(b"")
    assert found(str(bracket)) == ["shot[1].png"]


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"picture files .*in the folder .*got 1 other files"):
        next(expand(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"picture files .*match the pattern"):
        next(expand(str(tmp_path / "*.jpg")))


def test_one_of_several_that_is_not_there_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sources = [str(tmp_path / "empty"), str(tmp_path / "*.xyz"), tmp_path / "typo.jpg", "http://example.com/a.jpg"]
    items = list(expand(sources))
    assert items == sources
    for item, told in zip(
        items, ("in the folder", "match the pattern", "nothing at", "URLs are not fetched"), strict=True
    ):
        with pytest.raises(FileNotFoundError, match=told) as caught:
            read(item)
        assert str(item) in str(caught.value)


@pytest.mark.parametrize("how", ["whole", "behind", "unseekable", "spooled", "file"])
def test_open_files(how: str, tmp_path: Path, np_rng: np.random.Generator) -> None:
    array = np_rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(array).save(path)
    with contextlib.ExitStack() as stack:
        file: Any = io.BytesIO(path.read_bytes())
        if how == "behind":  # as after it has been written
            file.seek(0, io.SEEK_END)
        elif how == "unseekable":
            file = SimpleNamespace(read=file.read)
        elif how == "spooled":
            file = stack.enter_context(tempfile.SpooledTemporaryFile())
            file.write(path.read_bytes())
        elif how == "file":
            file = stack.enter_context(path.open("rb"))
        (item,) = expand([file])
        assert np.array_equal(read(item).array, array)


def test_a_file_open_for_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a")
    with path.open() as file, pytest.raises(PictureError, match=r"x\.txt: .*read\(\) gives bytes, got str"):
        read(file)


def test_every_suffix_is_of_a_format_that_may_be_opened() -> None:
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert known | {".heic", ".heif"} >= SUFFIXES


def test_streams_are_read_on_demand(np_rng: np.random.Generator) -> None:
    array = np_rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    drawn = []

    def camera():
        for number in range(1000):
            drawn.append(number)
            yield array

    stream = expand(camera())
    assert np.array_equal(read(next(stream)).array, array)
    assert drawn == [0]

    batch = np.stack([array, array + 1])
    singles = [b"bytes", Image.fromarray(array), array, torch.zeros(3, 4, 5), Picture(array)]
    assert [type(item) for item in expand(iter(singles))] == [type(item) for item in singles]
    assert [item.tolist() for item in expand(batch)] == batch.tolist()
    assert [tuple(item.shape) for item in expand((torch.zeros(2, 3, 4, 5), array))] == [(3, 4, 5)] * 2 + [(4, 5, 3)]
    assert list(expand([])) == []


def test_the_host_side_works_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
from trimask.engine.pictures.reading import read
from trimask.engine.inference.result import Result
picture = read(np.zeros((40, 50, 3), np.uint8)).array
result = Result([[5, 5, 30, 30]], [0.9], [0], (40, 50), mask_probabilities=np.ones((1, 28, 28)), picture=picture)
result.save({str(tmp_path / "a.png")!r})
result.save({str(tmp_path / "a.json")!r})
assert result.polygons() and result.to_coco() and result.to_labelme()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
