"""Reading pictures: any source in, uint8 RGB `[H, W, 3]` out.

What counts as a picture:

- a file, its `bytes`, or what has a `read` that gives them: JPEG, MPO, PNG, WebP, BMP, TIFF, GIF, PPM, AVIF, and HEIF
  where a plugin adds it to Pillow;
- a PIL picture, treated as a file is: its orientation tag is applied, its frame is the current one;
- an ndarray `[H, W]`, `[H, W, C]`, or `[C, H, W]` where only the first axis can be the channels; C is 1, 3 or 4;
- a tensor `[H, W]`, `[C, H, W]`, or `[H, W, C]` where only the last axis can be the channels.

The EXIF orientation is applied, alpha is dropped (as Pillow's `convert("RGB")` does; premultiplied colours are divided
by it first), embedded colour profiles are ignored, and of an animation the first frame counts. 16-bit values are scaled
by 255/65535, floats must lie in 0..1, both round to nearest; but of 16-bit PNG and TIFF files of several channels
Pillow gives the high bytes, of which a quarter are a level off: half of the darkest too low, half of the brightest too
high.

Files come from strangers: Pillow is told which formats it may try, and its limit on pixels is an error here.
Needs numpy and Pillow; tensors are recognised without importing torch.
"""

import glob
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Picture",
    "PictureError",
    "expand",
    "is_picture",
    "listed",
    "open_picture",
    "orientation",
    "read",
]

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "HEIF")

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".heic", ".heif"),
    )
)

_CHANNELS = (1, 3, 4)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Modes that Pillow cannot turn into RGB in one step, or not without a warning.
_VIA = {"La": "LA", "RGBa": "RGBA", "P": "RGBA", "PA": "RGBA"}


class PictureError(ValueError):
    """A source that cannot be read as a picture; the text names it, what was expected and what came."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in memory.

    Attributes:
        array: uint8 RGB `[H, W, 3]`, contiguous. It may be the caller's own array: never write to it.
        path: the file it came from, where it came from one.
    """

    array: np.ndarray
    path: Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.array.shape[0], self.array.shape[1]


def _natural(path: str) -> list[str | int]:
    """The sort key that puts `frame9` before `frame10`."""
    return [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", path)]


def is_picture(source: Any) -> bool:
    """Whether `read` takes it for one picture, whatever is in it: anything but a path, a batch or a collection."""
    if _is_array(source):
        return bool(source.ndim != 4)
    return isinstance(source, (Picture, Image.Image, bytes, bytearray, memoryview)) or _is_open(source)


def _is_open(source: Any) -> bool:
    """Whether it is a file-like object, which iterates over lines."""
    return callable(getattr(source, "read", None))


def _is_array(source: Any) -> bool:
    return isinstance(source, np.ndarray) or (hasattr(source, "detach") and hasattr(source, "ndim"))


def _files(source: str) -> list[str]:
    """The picture files that a path, a folder or a pattern stands for, in natural order, with broken links."""
    if os.path.isfile(source):
        return [source]
    if re.match(r"\w{2,}://", source):
        raise FileNotFoundError(
            f"expected a picture or a folder, got {source!r}: URLs are not fetched, download the picture first"
        )
    if os.path.isdir(source):
        visible = (entry for entry in os.scandir(source) if not entry.name.startswith("."))
        found = [entry.path for entry in visible if entry.is_file() or (entry.is_symlink() and not entry.is_dir())]
    elif glob.has_magic(source):
        matching = glob.glob(source, recursive=True)
        found = [
            path for path in matching if os.path.isfile(path) or (os.path.islink(path) and not os.path.isdir(path))
        ]
    else:
        raise FileNotFoundError(f"expected a picture, a folder or a pattern, but there is nothing at {source!r}")
    pictures = sorted((path for path in found if os.path.splitext(path)[1].lower() in SUFFIXES), key=_natural)
    if not pictures:
        kind = "in the folder" if os.path.isdir(source) else "that match the pattern"
        raise FileNotFoundError(
            f"expected picture files ({' '.join(sorted(SUFFIXES))}) {kind} {source!r}, got {len(found)} other files"
        )
    return pictures


def expand(source: Any, reused: bool = False) -> Iterator[Any]:
    """The single pictures that a source stands for, one after the other.

    Args:
        source: a path, a folder (its own picture files, hidden ones left out), a pattern (`shots/**/*.jpg`), the bytes
            of a picture file, an open one, a PIL picture, an ndarray, a tensor, a batch of arrays `[B, ...]` of four
            axes, or any iterable of these, nested as you like. Nothing is read ahead of what is asked for.
        reused: copy arrays, whose memory holds another picture later. So it is of what a generator gives: cameras and
            videos read into one buffer.

    Yields:
        What `read` takes. The files of a folder or a pattern come in natural order: 2 before 10.

    Raises:
        FileNotFoundError: a path, folder or pattern that leads to no picture; inside an iterable it is yielded instead,
            as it is, for `read` to complain about.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from map(Path, _files(os.fspath(source)))
    elif is_picture(source):
        yield _copied(source) if reused else source
    elif _is_array(source):
        for item in source:
            yield from expand(item, reused)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        reused = reused or not isinstance(source, Sequence)
        for item in source:
            try:
                yield from expand(item, reused)
            except FileNotFoundError:
                yield item  # one of several: `read` complains about it, and the others go on
    else:
        yield source


def listed(source: Any) -> list[Any]:
    """All the pictures that a source stands for, to know before the work that each path leads to a file.

    Raises:
        FileNotFoundError: one does not.
    """
    pictures = list(expand(source))
    for picture in pictures:
        if isinstance(picture, (str, os.PathLike)):
            _files(os.fspath(picture))
    return pictures


def _copied(picture: Any) -> Any:
    """The same picture in memory of its own, where it is one that its owner can write to."""
    if isinstance(picture, (bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, np.ndarray) or type(picture) is Image.Image:  # that of a file is of a class of its own
        return picture.copy()
    return picture.clone() if _is_array(picture) else picture


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or it cannot be read."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag leaves a picture that is fine otherwise
        return 1


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    """Values of any supported dtype as 0..255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise PictureError(f"{name}: expected uint8, uint16, bool or float values, got {values.dtype}")
    # 0..1 with the slack that still rounds to 0..255; NaN fails every comparison.
    low, high = float(values.min()), float(values.max())
    if not (low >= -0.5 / 255 and high <= 255.5 / 255):
        raise PictureError(f"{name}: expected float values in 0..1, got {low:g}..{high:g}")
    return np.rint(values.astype(np.float32) * np.float32(255)).clip(0, 255).astype(np.uint8)


def _rgb_of_pil(picture: Image.Image, name: str) -> np.ndarray:
    if 0 in picture.size:
        raise PictureError(f"{name}: expected at least one pixel, got {picture.size[0]} x {picture.size[1]}")
    picture.load()  # before the orientation is asked for: a TIFF turns itself upright here, and says so then
    turn = _UPRIGHT.get(orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    mode = picture.mode
    if mode == "I" or mode == "F" or mode.startswith("I;16"):
        values = np.asarray(picture)
        if mode == "I":  # what Pillow makes of 16-bit PPM and PNG files: 32 bits that hold 16
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 65535:
                raise PictureError(f"{name}: expected integer values in 0..65535, got {low}..{high}")
        values = _to_uint8(values if mode == "F" else values.astype(np.uint16), name)
        return np.repeat(values[..., None], 3, axis=2)
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        picture = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB") or picture
    if mode in _VIA:
        picture = picture.convert(_VIA[mode])
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return np.array(picture)  # a copy: Pillow's own view of its pixels cannot be written to, which torch dislikes


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Whatever goes wrong in a decoder becomes a `PictureError` that names the picture."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        hint = " (HEIC needs the package pillow-heif)" if name.lower().endswith((".heic", ".heif")) else ""
        raise PictureError(f"{name}: expected a picture ({', '.join(FORMATS)}), got something else{hint}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, got more ({error}); for pictures that you "
            "trust, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # OSError, SyntaxError, struct.error, EOFError, ...
        raise PictureError(f"{name}: expected a whole picture, got a damaged one ({error})") from error


def open_picture(file: IO[bytes] | Path) -> Image.Image:
    """Pillow's picture of a file in one of the formats that are read here, not decoded yet."""
    Image.init()  # so that the formats which need a plugin are known
    return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])


def _decode(file: IO[bytes], name: str) -> np.ndarray:
    """The pixels of an encoded picture."""
    if not file.read(1):
        raise PictureError(f"{name}: expected a picture, got an empty file")
    with _damage_named(name), open_picture(file) as picture:
        width, height = picture.size
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{width} x {height}")
        return _rgb_of_pil(picture, name)


def _content(file: Any) -> tuple[IO[bytes], str]:
    """All of an open file, from its beginning where it can go back there, and its name."""
    name = str(getattr(file, "name", None) or type(file).__name__)
    with suppress(OSError, ValueError, AttributeError):
        file.seek(0)
    try:
        content = file.read()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # closed, or a download that broke off
        raise PictureError(f"{name}: expected a file that can be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, (bytes, bytearray)):
        raise PictureError(f"{name}: expected a file whose read() gives bytes, got {type(content).__name__}")
    return io.BytesIO(content), name


def _rgb_of_array(array: np.ndarray, name: str, channel_order: str, channels_first: bool) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[0] in _CHANNELS and (channels_first or array.shape[2] not in _CHANNELS):
        array = np.moveaxis(array, 0, 2)
    if array.ndim != 3 or array.shape[2] not in _CHANNELS or array.size == 0:
        expected = "[C, H, W]" if channels_first else "[H, W, C]"
        raise PictureError(f"{name}: expected a shape {expected} or [H, W] with C of 1, 3 or 4, got {array.shape}")
    array = array[..., :3]
    if channel_order == "bgr":
        array = array[..., ::-1]
    array = _to_uint8(array, name)  # [H, W, 1 or 3]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def read(item: Any, channel_order: str = "rgb") -> Picture:
    """Reads one picture.

    Args:
        item: one of the things that `expand` yields; the table at the top says what is understood.
        channel_order: "rgb", or "bgr" for arrays and tensors in OpenCV's order. Files and PIL pictures know their own.

    Returns:
        The picture, upright, uint8 RGB. An array that is all of this already is taken as it is, not copied.

    Raises:
        PictureError: not a picture, damaged, too large, or values, shape or dtype out of bounds.
        OSError: a file that is missing or must not be read.
    """
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f'channel_order: expected "rgb" or "bgr", got {channel_order!r}')
    if isinstance(item, Picture):
        return item
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        if not path.is_file():
            _files(os.fspath(item))  # says what is not there
        with path.open("rb") as file:
            return Picture(_decode(file, str(path)), path)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return Picture(_decode(io.BytesIO(item), "bytes"))
    if _is_open(item):
        return Picture(_decode(*_content(item)))
    if isinstance(item, Image.Image):
        filename = getattr(item, "filename", "")
        name = os.fsdecode(filename) if filename else "PIL picture"
        with _damage_named(name):
            return Picture(_rgb_of_pil(item, name), Path(name) if filename else None)
    if isinstance(item, np.ndarray):
        return Picture(_rgb_of_array(item, "array", channel_order, channels_first=False))
    if _is_array(item):
        if str(item.dtype) == "torch.bfloat16":  # which numpy lacks
            item = item.float()
        try:
            array = item.detach().cpu().numpy()
        except (TypeError, NotImplementedError) as error:  # sparse, or without values
            raise PictureError(f"tensor: expected one that numpy can take ({error})") from error
        return Picture(_rgb_of_array(array, "tensor", channel_order, channels_first=True))
    raise PictureError(f"expected a path, file, bytes, PIL picture, array or tensor, got {type(item).__name__}")
