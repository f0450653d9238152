"""What an ONNX file holds, read from its bytes before any runtime sees it. Needs the standard library alone.

A file that trimask writes is whole: its tensors lie in it. One that names other files is refused, since such a name
may lead anywhere (``../../secret``, a link), and runtimes have followed it. So is one whose inputs and outputs are
other than its metadata say.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .metadata import KEY, Metadata, Signature, signature

__all__ = ["inspect", "opset", "read_file"]

_LARGEST = (1 << 31) - 1  # bytes: what the format's encoding can hold

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
_GRAPH, _OPSET, _METADATA = 7, 8, 14  # of a model
_INPUTS, _OUTPUTS = 11, 12  # of a graph

_DEPTH = 100  # of messages in messages: more than any graph has


def read_file(path: Path) -> tuple[bytes, Metadata]:
    """A file's bytes and metadata, inspected; errors as of :func:`inspect`, and OSError."""
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path}: expected an ONNX file of at most 2 GiB, got {size} bytes")
    data = path.read_bytes()
    return data, inspect(data, path)


def inspect(data: bytes | memoryview, path: Path) -> Metadata:
    """The metadata of a file that holds all its tensors.

    Args:
        data: the file's bytes.
        path: for errors.

    Raises:
        ValueError: no ONNX file, one that trimask did not write, one that names other files, or one whose inputs or
            outputs are not those of its metadata.
    """
    view = memoryview(data)
    text = None
    found: tuple[Signature, Signature] = {}, {}
    try:
        if any(_is_external(tensor) for tensor in _tensors(view, "model")):
            raise ValueError(f"{path}: expected all tensors in the file, got a reference to another file")
        for number, value in _fields(view):
            if number == _METADATA:
                entry = dict(_fields(_message(value)))
                if bytes(_message(entry.get(1))) == KEY.encode():
                    text = bytes(_message(entry.get(2))).decode()
            elif number == _GRAPH:
                found = _values(_message(value), _INPUTS), _values(_message(value), _OUTPUTS)
    except (IndexError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: expected an ONNX file, got a damaged one or something else") from None
    if text is None:
        raise ValueError(
            f"{path}: expected the metadata of a file written by `trimask export`, found none under {KEY!r}"
        )
    try:
        about = Metadata.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for kind, there, expected in zip(("inputs", "outputs"), found, signature(about), strict=True):
        if not _fits(there, expected):
            raise ValueError(f"{path}: expected the {kind} that the metadata promise, {expected}, got {there}")
    return about


def opset(data: bytes | memoryview) -> int:
    """The version of ONNX's operators in a file that :func:`inspect` has let through; 0 where it tells none."""
    with suppress(IndexError):  # damage that inspection does not look for
        for number, value in _fields(memoryview(data)):
            entry = dict(_fields(_message(value))) if number == _OPSET else {}  # domain, version
            version = entry.get(2)
            if isinstance(version, int) and bytes(_message(entry.get(1))) in (b"", b"ai.onnx"):
                return version
    return 0


def _fits(there: Signature, expected: Signature) -> bool:
    """Whether names, types and sizes agree; a size that either leaves open agrees with any."""
    return list(there) == list(expected) and all(
        kind == there[name][0]
        and len(sizes) == len(there[name][1])
        and all(a is None or b is None or a == b for a, b in zip(sizes, there[name][1], strict=True))
        for name, (kind, sizes) in expected.items()
    )


def _values(graph: memoryview, wanted: int) -> Signature:
    """Inputs or outputs of a graph."""
    found: Signature = {}
    for number, value in _fields(graph):
        if number != wanted:
            continue
        entry = dict(_fields(_message(value)))  # name, type
        tensor = dict(_fields(_message(dict(_fields(_message(entry.get(2)))).get(1))))  # type, shape
        sizes = [dict(_fields(_message(side))).get(1) for key, side in _fields(_message(tensor.get(2))) if key == 1]
        kind = tensor.get(1, 0)
        if not isinstance(kind, int):
            raise IndexError
        name = bytes(_message(entry.get(1))).decode()
        found[name] = kind, tuple(size if isinstance(size, int) else None for size in sizes)
    return found


def _message(value: "int | memoryview | None") -> memoryview:
    """A field that has to hold bytes; an absent one is empty."""
    if isinstance(value, int):
        raise IndexError
    return memoryview(b"") if value is None else value


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
