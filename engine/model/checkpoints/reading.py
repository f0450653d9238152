"""Checkpoint files: from a path to named tensors, whatever the container, and without running anything in it.

Containers are told apart by their first bytes, never by the file's name: PyTorch's zip and its older format, the plain
pickles of Detectron2's model zoo, and safetensors.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .unpickling import Inert, PickledArray, PickledTensor, Refused, SafeUnpickler, Storage, short, to_tensor

__all__ = ["Contents", "read"]

LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that opens torch's format before 1.6
NESTED = ("state_dict", "model", "model_state_dict", "module")  # where training loops put the state dict
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
PREFACES = {
    b"<": "an HTML or XML page, perhaps an error page saved by a download",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89HDF": "an HDF5 file",
}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint file holds.

    Attributes:
        container: of the file, for messages.
        tensors: by name, on the CPU, in the file's dtypes.
        metadata: the strings in the header of a safetensors file.
        classes: names that a training framework stored beside the weights.
        ignored: classes of the objects that were not understood, and left out.
    """

    container: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()


def read(path: Path) -> Contents:
    """Read a checkpoint.

    Raises:
        ValueError: naming the path, for a file that is missing, empty, truncated, corrupt, hostile, or no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, found {'a folder' if path.is_dir() else 'nothing'}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path}: expected a checkpoint, got an empty file")
    if head[4:9] == b"\0\0\0\0{":  # a length of eight bytes, then JSON; the length may begin with anything
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        with _reporting(path, "PyTorch zip"):
            return _read_zip(path)
    if LEGACY_MAGIC in head:
        with _reporting(path, "PyTorch (before 1.6)"):
            return _read_legacy(path)
    if head.startswith(b"\x80"):
        with _reporting(path, "pickle"), path.open("rb") as file:
            found = SafeUnpickler(file, strict=True).load()
            return _contents("pickle", found, ())
    guess = next((text for start, text in PREFACES.items() if head.lstrip().startswith(start)), None)
    raise ValueError(
        f"{path}: expected a PyTorch, safetensors or Detectron2 .pkl checkpoint, "
        f"got {guess or f'a file that starts with {head[:16]!r}'}"
    )


@contextmanager
def _reporting(path: Path, container: str) -> Iterator[None]:
    """Whatever a broken file makes the readers raise becomes a ValueError with its path.

    The bytes decide which exception it is, so none can be left out.
    """
    try:
        yield
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"expected a {container} checkpoint, got a truncated, broken or other file"
        raise ValueError(f"{path}: {what} ({reason})") from None


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return Contents("safetensors", _without_prefix(tensors), file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got a truncated or broken one ({error})") from None


def _read_zip(path: Path) -> Contents:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise Refused("expected a state dict, got a TorchScript archive")
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise Refused("expected an archive as torch writes it, got compressed or overlapping entries")
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), None)
        if root is None:
            raise Refused("expected a state dict, got some other zip")
        unpickler = SafeUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        found = unpickler.load()
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big":
            raise Refused("expected a little-endian checkpoint, got a big-endian one")

        def storage(record: Storage) -> Tensor:
            with archive.open(f"{root}data/{record.key}") as entry:
                return _numbers(entry.read(record.length * record.dtype.itemsize + 1), record)

        return _contents("PyTorch zip", found, unpickler.replaced, storage)


def _read_legacy(path: Path) -> Contents:
    with path.open("rb") as file:
        for _ in ("magic number", "protocol", "system"):
            SafeUnpickler(file).load()
        unpickler = SafeUnpickler(file)
        found = unpickler.load()
        starts = {}  # the offset of each storage's numbers
        for key in SafeUnpickler(file).load():
            (length,) = struct.unpack("<q", file.read(8))
            record = unpickler.storages.get(key) if isinstance(key, str) else None
            if record is None:
                raise ValueError(f"no tensor has a storage {short(key)}")
            if length != record.length:
                raise ValueError(f"storage {key} has {length} numbers, expected {record.length}")
            starts[key] = file.tell()
            file.seek(length * record.dtype.itemsize, io.SEEK_CUR)

        def storage(record: Storage) -> Tensor:
            if record.key not in starts:
                raise ValueError(f"storage {record.key} has no numbers")
            file.seek(starts[record.key])
            return _numbers(file.read(record.length * record.dtype.itemsize), record)

        return _contents("PyTorch (before 1.6)", found, unpickler.replaced, storage)


def _numbers(data: bytes, record: Storage) -> Tensor:
    if len(data) != record.length * record.dtype.itemsize:
        raise ValueError(f"storage {record.key} has {len(data)} bytes, expected {record.length} of {record.dtype}")
    return torch.frombuffer(bytearray(data), dtype=record.dtype) if data else torch.empty(0, dtype=record.dtype)


def _no_storage(record: Storage) -> Tensor:
    raise Refused("expected arrays, got a tensor without its numbers")


def _contents(
    container: str, found: object, ignored: Iterable[str], storage: Callable[[Storage], Tensor] = _no_storage
) -> Contents:
    """The state dict in whatever a training loop wrapped it in, and the class names if they lie beside it."""
    classes = _class_names(found)
    for _ in NESTED:  # at most so deep: a file may hold itself
        if isinstance(found, dict):
            found = next((found[key] for key in NESTED if isinstance(found.get(key), (dict, Inert))), found)
    if isinstance(found, Inert):
        kind = type(found).__name__
        raise Refused(f"expected a state dict, got a whole pickled {kind}; save its state_dict() instead")
    if not isinstance(found, dict):
        raise Refused(f"expected a state dict, got a {type(found).__name__}")
    cache: dict[str, Tensor] = {}

    def numbers(record: Storage) -> Tensor:
        if record.key not in cache:
            cache[record.key] = storage(record)
        return cache[record.key]

    tensors = {
        name: to_tensor(value, numbers)
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, (Tensor, PickledTensor, PickledArray))
    }
    if not tensors:
        raise Refused(f"expected tensors by name, got {', '.join(map(short, list(found)[:8])) or 'nothing'}")
    return Contents(container, _without_prefix(tensors), classes=classes, ignored=tuple(sorted(ignored)))


def _class_names(found: object) -> tuple[str, ...] | None:
    """What MMDetection 2 and 3 store as meta.CLASSES and meta.dataset_meta.classes."""
    meta = found.get("meta") if isinstance(found, dict) else None
    for place in (meta, meta.get("dataset_meta") if isinstance(meta, dict) else None):
        for key in ("CLASSES", "classes"):
            names = place.get(key) if isinstance(place, dict) else None
            if isinstance(names, (tuple, list)) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
