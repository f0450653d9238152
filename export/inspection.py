"""What an ONNX file holds, read from its bytes before any runtime sees it. Needs the standard library alone.

A file that trimask writes is whole: its tensors lie in it. One that names other files is refused, since such a name
may lead anywhere (``../../secret``, a link), and runtimes have followed it.
"""

from collections.abc import Iterator
from pathlib import Path

from .metadata import KEY, Metadata

__all__ = ["inspect"]

# Field numbers of onnx.proto: where a message may hold, at any depth, a tensor that lies in another file.
_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 13, 14, 1  # of a tensor
_METADATA = 14  # of a model

_DEPTH = 100  # of messages in messages: more than any graph has


def inspect(data: bytes | memoryview, path: Path) -> Metadata:
    """The metadata of a file that holds all its tensors.

    Args:
        data: the file's bytes.
        path: for errors.

    Raises:
        ValueError: no ONNX file, one that trimask did not write, or one that names other files.
    """
    view = memoryview(data)
    text = None
    try:
        if any(_is_external(tensor) for tensor in _tensors(view, "model")):
            raise ValueError(f"{path}: expected all tensors in the file, got a reference to another file")
        for number, value in _fields(view):
            if number == _METADATA and isinstance(value, memoryview):
                entry = dict(_fields(value))
                if bytes(entry.get(1, b"")) == KEY.encode():
                    text = bytes(entry.get(2, b"")).decode()
    except (IndexError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: expected an ONNX file, got a damaged one or something else") from None
    if text is None:
        raise ValueError(
            f"{path}: expected the metadata of a file written by `trimask export`, found none under {KEY!r}"
        )
    try:
        return Metadata.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tensors(message: memoryview, kind: str, depth: int = 0) -> Iterator[memoryview]:
    if depth > _DEPTH:
        raise RecursionError
    for number, value in _fields(message):
        inner = _PATHS[kind].get(number)
        if inner is None or not isinstance(value, memoryview):
            continue
        if inner == "tensor":
            yield value
        else:
            yield from _tensors(value, inner, depth + 1)


def _is_external(tensor: memoryview) -> bool:
    return any(
        number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value == _EXTERNAL)
        for number, value in _fields(tensor)
    )


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an integer, or the bytes of a text, an array or a message."""
    place = 0
    while place < len(message):
        key, place = _integer(message, place)
        number, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == 0:
            value, place = _integer(message, place)
        elif wire in (1, 2, 5):
            length, place = (8, place) if wire == 1 else (4, place) if wire == 5 else _integer(message, place)
            if place + length > len(message):
                raise IndexError
            value, place = message[place : place + length], place + length
        else:
            raise IndexError
        yield number, value


def _integer(message: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise IndexError
