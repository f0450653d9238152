"""A font that has the letters of a text."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import ImageFont

__all__ = ["font_for"]

# Wider than Pillow's own, which knows ASCII alone: where systems keep fonts Pillow looks by itself.
_WIDER = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSans-Regular.ttf")


def font_for(text: str, size: float, path: str | None = None) -> Any:
    """A font to draw a text with.

    Args:
        text: all that is to be drawn with it.
        size: in pixels.
        path: a TrueType file to take instead. For letters beyond Latin, Greek and Cyrillic it mostly takes one.

    Raises:
        OSError: there is no font at the path.
    """
    if path:
        return ImageFont.truetype(path, size)
    for name in () if text.isascii() else (*_WIDER, *_of_matplotlib()):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _of_matplotlib() -> list[str]:
    """DejaVu comes with matplotlib, which need not be imported for that."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return []
    return [str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")]
