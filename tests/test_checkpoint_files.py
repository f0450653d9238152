"""Checkpoint files: every container is read, every broken one is a clear error, and nothing in a file runs."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from trimask.engine.model.checkpoints import load_model
from trimask.engine.model.checkpoints.reading import Contents, read

TENSORS = {
    "half": torch.arange(4, dtype=torch.float16),
    "brain": torch.arange(4, dtype=torch.bfloat16),
    "double": torch.randn(2, 3, dtype=torch.float64),
    "turned": torch.arange(6.0).view(2, 3).T,
    "part": torch.arange(6.0)[2:4],
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


class Foreign:
    """Of a class that a reader need not have: ConfigDict, HistoryBuffer and their like."""

    def __init__(self, *held: object) -> None:
        self.held = held


class ForeignDict(dict):  # type: ignore[type-arg]
    pass


class ForeignList(list):  # type: ignore[type-arg]
    pass


def save_torch(path: Path, value: Any, container: str) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=container == "zip")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model.module._orig_mod."])
def test_prefixes_of_wrappers_in_any_order(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + name: value for name, value in TENSORS.items()}, tmp_path / "m.pth")
    assert read(tmp_path / "m.pth").tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("foreign", [False, True], ids=["weights only", "with foreign objects"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_torch_containers(container: str, foreign: bool, key: str | None, tmp_path: Path) -> None:
    """torch's own reader and ours, which takes over where objects of unknown classes lie about, agree."""
    state = OrderedDict(("module." + name, value) for name, value in TENSORS.items())
    value: Any = state if key is None else {key: state, "epoch": 3}
    if foreign:
        value = {key or "model": state}
        extra = [
            Foreign(np.float64(2), torch.ones(3)),
            ForeignDict(a=Foreign()),
            ForeignList([1]),
            {Foreign},
            Path("x"),
        ]
        value |= {"meta": {"cfg": extra, "CLASSES": ("a", "b")}, "optimizer": {"lr": torch.ones(5)}}
    path = tmp_path / "m.bin"
    save_torch(path, value, container)
    found = read(path)
    assert found.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert found.tensors[name].dtype == expected.dtype
        assert torch.equal(found.tensors[name], expected), name
    if foreign:
        assert found.classes == ("a", "b")
        assert any(name.endswith(".Foreign") for name in found.ignored)
        assert "builtins.set" in found.ignored or "__builtin__.set" in found.ignored


ARRAYS = {
    "c": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big": np.arange(3, dtype=">f8"),
    "half": np.arange(3, dtype=np.float16),
    "int": np.array(5),
    "number": np.float32(2.5),
    "empty": np.zeros((0, 2), np.float32),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_arrays(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "x"}, protocol))
    found = read(path).tensors
    assert found.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert np.array_equal(found[name].numpy(), expected), name
        assert found[name].numpy().dtype == np.dtype(expected.dtype).newbyteorder("=")


def test_arrays_pickled_by_python_2(tmp_path: Path) -> None:
    """Bytes are text there; latin1 brings them back."""
    numbers = np.array([1.5, -2.25], "<f4").tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + numbers + b"tb"
    )
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02}U\x05model}U\x01a" + array + b"ss.")
    assert read(tmp_path / "m.pkl").tensors["a"].tolist() == [1.5, -2.25]


def test_safetensors_are_known_by_more_than_a_first_byte(tmp_path: Path) -> None:
    """The header's length comes first, and may begin as a pickle or a zip does."""
    starts = set()
    for padding in range(0, 260, 8):
        save_file({"a": torch.ones(2)}, tmp_path / "m", {"padding": "x" * padding})
        starts.add((tmp_path / "m").read_bytes()[:1])
        assert read(tmp_path / "m").tensors["a"].tolist() == [1.0, 1.0]
    assert {b"\x80", b"P"} <= starts


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> dict[str, object]:
    """Objects that create ``mark`` when they are unpickled as pickles are meant to be."""
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {mark}"), inner)
    return {
        "os.system": Call(os.system, f"touch {mark}"),
        "exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "mkdir": Call(Path.mkdir, mark),
        "nested torch.load": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "numpy": Call(np.save, str(mark), np.zeros(1)),
        "tofile": Call(np.ndarray.tofile, np.zeros(1), str(mark)),
    }


NAMES = list(payloads(Path("x")))


def read_or_refuse(path: Path) -> Contents | None:
    """What the file holds, or None after an error that names it."""
    try:
        return read(path)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container", ["pkl", "zip", "legacy"])
@pytest.mark.parametrize("place", ["whole", "in meta", "as a tensor", "as a key"])
def test_nothing_in_a_file_runs(name: str, container: str, place: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = payloads(mark)[name]
    state = {"a": np.zeros(2, np.float32) if container == "pkl" else torch.zeros(2)}
    value: Any = {
        "whole": payload,
        "in meta": {"model": state, "meta": {"hooks": [payload]}},
        "as a tensor": {"model": {**state, "b": payload}},
        "as a key": {"model": state, payload: 1},
    }[place]
    path = tmp_path / f"m.{container}"
    if container == "pkl":
        path.write_bytes(pickle.dumps(value))
    else:
        save_torch(path, value, container)
    found = read_or_refuse(path)
    if found is not None:
        assert list(found.tensors) == ["a"]
        assert found.ignored
    assert not mark.exists()
    assert list(tmp_path.iterdir()) == [path]
    # A plain pickle may name nothing; elsewhere what means harm is refused, and what is merely unknown is left out.
    assert (found is None) == (container == "pkl" or place == "whole" or name in ("os.system", "exec"))


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """The test above would pass on duds."""
    pickle.loads(pickle.dumps(payloads(tmp_path / "mark")["os.system"]))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("container", ["pkl", "zip", "legacy"])
def test_a_refusal_names_what_was_refused(container: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    value = {"model": {"a": np.zeros(1)}, "x": Call(os.system, "true")}
    if container == "pkl":
        path.write_bytes(pickle.dumps(value))
    else:
        save_torch(path, value, container)
    with pytest.raises(ValueError, match=rf"refused to read {os.system.__module__}\.system"):
        read(path)


@pytest.mark.parametrize(
    "target",
    ["collections OrderedDict", "torch._utils _rebuild_tensor_v2", "numpy dtype", "numpy ndarray", "os.path x"],
)
def test_a_file_leaves_no_mark_on_what_it_names(target: str, tmp_path: Path) -> None:
    """BUILD sets attributes on whatever lies on the stack, functions and classes too."""
    module, name = target.split()
    build = f"c{module}\n{name}\n".encode() + b"(N}U\x08trespassK\x01stb0"
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02" + build + b"}U\x05model}ss.")
    with pytest.raises(ValueError, match=r"m\.pkl"):
        read(tmp_path / "m.pkl")
    assert not hasattr(OrderedDict, "trespass")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "trespass")
    assert not hasattr(np.dtype, "trespass")
    found = sys.modules["trimask.engine.model.checkpoints.unpickling"]
    assert not any(hasattr(value, "trespass") for value in vars(found).values())


@pytest.mark.parametrize("container", ["pkl", "zip", "legacy", "foreign zip", "foreign legacy", "safetensors"])
def test_truncated_files(container: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut.pth"
    write_container(whole, container)
    assert read(whole).tensors["a"].tolist() == [1.0, 2.0, 3.0]
    data = whole.read_bytes()
    for length in [*range(0, min(len(data), 200), 7), *range(200, len(data), max(1, len(data) // 40))]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


def write_container(path: Path, container: str) -> None:
    state = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.randn(20)}
    if container == "pkl":
        path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    elif container == "safetensors":
        save_file(state, path)
    else:
        foreign, _, kind = container.rpartition(" ")
        save_torch(path, {"state_dict": state, "meta": Foreign() if foreign else 1}, kind)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    container=st.sampled_from(["pkl", "foreign zip", "foreign legacy", "safetensors"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_broken_bytes_are_a_value_error_or_harmless(container: str, flips: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    write_container(path, container)
    data = bytearray(path.read_bytes())
    for place, change in flips:
        data[place % len(data)] ^= change
    path.write_bytes(data)
    found = read_or_refuse(path)
    assert found is None or all(isinstance(tensor, Tensor) for tensor in found.tensors.values())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "got an empty file"),
        (b"\n<!DOCTYPE html><html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x89PNG\r\n\x1a\n" * 9, "a file that starts with"),
        (b"(dp0\nS'model'\np1\n", "a file that starts with"),
        (pickle.dumps([1, 2]), "expected a state dict, got a list"),
        (pickle.dumps({"lr": 1, "steps": 2}), "expected tensors by name, got 'lr', 'steps'"),
        (struct.pack("<Q", 1 << 30) + b"{}", "expected a safetensors file, got a truncated or broken one"),
    ],
)
def test_files_that_are_no_checkpoints(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(data)
    with pytest.raises(ValueError, match=text) as caught:
        load_model(tmp_path / "m.pth")
    assert str(tmp_path / "m.pth") in str(caught.value)


def test_other_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(
        ValueError, match=r"a whole pickled torch\.nn\.modules\.container\.Sequential; save its state_dict"
    ):
        read(path)
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(ValueError, match="a whole pickled torch"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match="TorchScript"):
        read(path)
    with pytest.raises(ValueError, match="found a folder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="found nothing"):
        load_model(tmp_path / "absent.pth")
    itself: dict[str, Any] = {}
    itself["model"] = itself
    path.write_bytes(pickle.dumps(itself))
    with pytest.raises(ValueError, match="expected tensors by name"):
        read(path)


BOMBS = (
    b"})" + b"\x85" * 200_000 + b"K\x01s.",  # a tuple too deep to be hashed, as a key: set one by one,
    b"}()" + b"\x85" * 200_000 + b"K\x01u.",  # together,
    b"()" + b"\x85" * 200_000 + b"K\x01d.",  # in a dict made at once,
    b"\x8f()" + b"\x85" * 200_000 + b"\x90.",  # in a set,
    b"()" + b"\x85" * 200_000 + b"\x91.",  # and in a frozen one
    b"c_codecs\nencode\nU\x01xK\x01" + b"2\x86" * 60 + b"\x86R.",  # a codec of 2^60 numbers when printed
    b"K\x01" + b"2\x86" * 60 + b"Q.",  # and an id of a storage
    b"}r" + struct.pack("<I", 0x10000000) + b".",  # a memo of 2^28 entries
    b"\x96" + struct.pack("<Q", 1 << 36) + b"x.",  # 64 GiB of bytes that are not there
)


def test_small_pickles_that_would_take_all_there_is(tmp_path: Path) -> None:
    """In a process of their own, which they would bring down."""
    for i, bomb in enumerate(BOMBS):
        (tmp_path / f"{i}.pkl").write_bytes(b"\x80\x05" + bomb)
    code = (
        "import resource, sys; from pathlib import Path; from trimask.engine.model.checkpoints.reading import read\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    before = peak()\n"
        "    try: read(Path(path))\n"
        "    except ValueError as error: print(len(str(error)) < 1000 and peak() - before < 300_000, flush=True)\n"
    )
    paths = [str(tmp_path / f"{i}.pkl") for i in range(len(BOMBS))]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=100)
    assert result.stdout.split() == ["True"] * len(BOMBS), (result.returncode, result.stderr[-500:])


def test_tuples_of_names_and_numbers_are_keys(tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"model": ARRAYS, ("a", 1): 2, None: 3, 2.5: 4, "set": {1, "a"}}, 4))
    assert read(path).tensors.keys() == ARRAYS.keys()


def test_a_legacy_file_without_its_numbers(tmp_path: Path) -> None:
    """Else the weights would be whatever lay in that memory before."""
    path = tmp_path / "m.pth"
    torch.save({"a": torch.zeros(12000)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    head = data[: data.rindex(b"\x80\x02]")]  # the list of the storages that follow, and their numbers
    path.write_bytes(head + pickle.dumps([], 2))
    with pytest.raises(ValueError, match=r"m\.pth.*storage \d+ has no numbers"):
        read(path)


def test_a_compressed_archive(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth") as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert read(tmp_path / "m.pth").tensors["a"].numel() == 100_000
    with pytest.raises(ValueError, match="compressed or overlapping entries"):
        read(tmp_path / "bomb.pth")


def test_a_broken_number_in_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"a": torch.full((1000,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 1.5) * 10) + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read(path)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_tensor_larger_than_its_storage(container: str, tmp_path: Path) -> None:
    save_torch(tmp_path / "m.pth", {"a": torch.zeros(1).expand(1 << 40)}, container)
    with pytest.raises(ValueError, match="has a storage of 1 numbers"):
        read(tmp_path / "m.pth")
