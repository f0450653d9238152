"""Pickles, read without running them.

A pickle is a program: it names functions and calls them. Here every name resolves to something of ours. The few that
tensors and arrays need become records, which :func:`to_tensor` turns into tensors once the whole file has been read;
every other name is refused, or stands for an inert object that swallows whatever is done to it. No function of the
file's choice is ever imported, let alone called.

What is handed to the unpickler is made anew for every use, because a pickle may also set attributes of what it holds:
a file cannot leave a mark on the process. Nor do we compare, hash or print what a file has nested: a few bytes can nest
deeper than the interpreter's stack, or print as more text than there is memory.
"""

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Inert", "PickledArray", "PickledTensor", "Refused", "SafeUnpickler", "Storage", "short", "to_tensor"]

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
ARRAY_TYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"})

# Names that no checkpoint has an honest use for: such a file is refused rather than read around.
HOSTILE = re.compile(
    r"(bdb|ctypes|importlib|marshal|nt|os|pdb|pickle|posix|pty|runpy|shutil|socket|subprocess|sys|timeit|webbrowser)\..*"
    r"|(builtins|__builtin__)\.(__import__|breakpoint|compile|eval|exec|execfile|input|open)"
)


ATOMS = (str, int, float, bytes, type(None))


class Refused(ValueError):
    """The pickle names something that it may not."""


class Inert:
    """Stands for an object of a class that we do not know: takes everything, does nothing, holds nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> "Inert":
        return Inert()

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...


def short(value: object) -> str:
    """A value from a file for a message: text if it is text, else its type alone."""
    return repr(value[:60]) if isinstance(value, str) else type(value).__name__


@dataclass(frozen=True)
class Storage:
    """A run of numbers, stored apart from the pickle under ``key``."""

    dtype: torch.dtype
    key: str
    length: int


@dataclass
class PickledTensor:
    """A view of a storage: a torch tensor before its numbers are read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class _ArrayType:
    code: str
    byte_order: str = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]


@dataclass
class PickledArray:
    """A numpy array, as numpy's own pickles describe it."""

    shape: tuple[int, ...] = ()
    type: _ArrayType = field(default_factory=lambda: _ArrayType("f4"))
    fortran: bool = False
    data: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.type, self.fortran, data = state
        self.data = data.encode("latin1") if isinstance(data, str) else data  # written by Python 2


class _Dict(dict[Any, Any]):
    """An OrderedDict that takes any state: torch hangs ``_metadata`` on its own."""

    def __setstate__(self, state: object) -> None: ...


class _Call:
    """A function of ours under a name of the file's; not a class, and nothing else can be reached from it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, *args: object) -> object:
        return self.function(*args)


def _rebuild_tensor(storage: Storage, offset: int, size: Any, stride: Any, *_: object) -> PickledTensor:
    return PickledTensor(storage, offset, tuple(size), tuple(stride))


def _encode(text: str, codec: str) -> bytes:
    if not isinstance(codec, str) or codec != "latin1":
        raise Refused(f"refused the codec {short(codec)}; bytes are pickled as latin1")
    return text.encode("latin1")


_NUMPY = ("numpy.core", "numpy._core")
_FUNCTIONS: dict[str, Callable[..., object]] = {
    "__builtin__.bytes": lambda: b"",  # how protocol 2 writes no bytes; others are encoded
    "_codecs.encode": _encode,
    "numpy.dtype": lambda code, *_: _ArrayType(code),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    **{f"{numpy}.multiarray._reconstruct": lambda *_: PickledArray() for numpy in _NUMPY},
    **{f"{numpy}.multiarray.scalar": lambda type, data: PickledArray((), type, False, data) for numpy in _NUMPY},
    **{
        f"{numpy}.numeric._frombuffer": lambda data, type, shape, order: PickledArray(shape, type, order == "F", data)
        for numpy in _NUMPY
    },
}


class SafeUnpickler(pickle._Unpickler):
    """Reads builtin containers, numbers, strings, torch tensors and numpy arrays; the last two as records.

    It builds on the unpickler in Python, because the one in C makes its memo as long as a file says, and lets nobody
    see the keys of a dict before they are hashed.

    Args:
        file: where the pickle starts.
        strict: refuse unknown names; otherwise they become :class:`Inert`.

    Attributes:
        replaced: the dotted names that became inert.
        storages: every storage that was named, by key.

    Raises:
        Refused: while loading, for an unknown name if strict, and for names that mean harm in any case.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], *, strict: bool = False) -> None:
        super().__init__(file, encoding="latin1")
        self.strict = strict
        self.replaced: set[str] = set()
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _FUNCTIONS:
            return _Call(_FUNCTIONS[full])
        if full == "collections.OrderedDict":
            return type("OrderedDict", (_Dict,), {})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if full == "numpy.ndarray":
            return type(full, (Inert,), {})
        if self.strict or HOSTILE.fullmatch(full):
            raise Refused(f"refused to read {full}: only tensors, arrays and plain containers may be pickled")
        self.replaced.add(full)
        return type(full, (Inert,), {})

    def persistent_load(self, saved_id: Any) -> Storage:
        match saved_id:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(length), *view) if not any(view):
                return self.storages.setdefault(key, Storage(dtype, key, length))
        raise Refused(f"expected the id of a storage, got {short(saved_id)}")


def _hashes(opcode: bytes, first: int, step: int) -> None:
    """Let an opcode hash only what cannot be deep; its keys lie at ``stack[first::step]``."""
    inner = SafeUnpickler.dispatch[opcode[0]]

    def load(unpickler: Any) -> None:
        for key in unpickler.stack[first::step]:
            flat = isinstance(key, tuple) and all(isinstance(item, ATOMS) for item in key)
            if not (flat or isinstance(key, (*ATOMS, Inert))):
                raise Refused(f"expected the keys of a dict to be names or numbers, got {short(key)}")
        inner(unpickler)

    SafeUnpickler.dispatch[opcode[0]] = load


_hashes(pickle.SETITEM, -2, 2)
_hashes(pickle.SETITEMS, 0, 2)
_hashes(pickle.DICT, 0, 2)
_hashes(pickle.ADDITEMS, 0, 1)
_hashes(pickle.FROZENSET, 0, 1)
# As bytes, which need no room before they have been read.
SafeUnpickler.dispatch[pickle.BYTEARRAY8[0]] = SafeUnpickler.dispatch[pickle.BINBYTES8[0]]


def to_tensor(record: Tensor | PickledTensor | PickledArray, storage: Callable[[Storage], Tensor]) -> Tensor:
    """The tensor of a record.

    Args:
        record: what :class:`SafeUnpickler` gave, or a tensor, which passes through.
        storage: reads the numbers of a storage, 1-D, or raises :class:`ValueError`.

    Raises:
        ValueError: for a record that contradicts itself.
    """
    if isinstance(record, Tensor):
        return record
    if isinstance(record, PickledTensor):
        if not isinstance(record.storage, Storage) or not _are_sizes(record.size) or not _are_sizes(record.stride):
            raise ValueError("a tensor has a broken storage, shape or stride")
        numbers = storage(record.storage)
        if math.prod(record.size) > numbers.numel():  # an expanded one: a small file would become a large model
            raise ValueError(f"a tensor of shape {list(record.size)} has a storage of {numbers.numel()} numbers")
        try:
            return torch.as_strided(numbers, record.size, record.stride, record.offset)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"a tensor does not fit its storage ({error})") from None
    code = record.type.code
    if not isinstance(code, str) or code not in ARRAY_TYPES or not isinstance(record.data, (bytes, bytearray)):
        raise ValueError(f"expected an array of numbers, got one of type {short(code)}")
    if not _are_sizes(record.shape):
        raise ValueError("an array has a broken shape")
    dtype = np.dtype(code).newbyteorder(">" if record.type.byte_order == ">" else "<")
    if len(record.data) != math.prod(record.shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {list(record.shape)} and type {code} has {len(record.data)} bytes")
    array = np.frombuffer(record.data, dtype).reshape(record.shape, order="F" if record.fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _are_sizes(values: object) -> bool:
    """Whether these are numbers that a shape may hold, and not more of them than numpy has dimensions."""
    return (
        isinstance(values, tuple)
        and len(values) <= 64
        and all(isinstance(value, int) and 0 <= value < 1 << 63 for value in values)
    )
