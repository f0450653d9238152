"""Exported files of strangers: damaged, lying or hostile ones are errors that name the file, and never a traceback."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from PIL import Image  # noqa: E402

from exported import CONFIG, write  # noqa: E402
from trimask import cli  # noqa: E402
from trimask.export import Metadata, Runtime  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("export") / "small.onnx")


# What the metadata say.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contract": 99}, "newer trimask"),
        ({"contract": "1"}, "contract's version"),
        ({"contract": True}, "contract's version"),
        ({"masks": "some"}, "masks"),
        ({"preprocess": 1}, "preprocess"),
        ({"static": [1, 2]}, "static"),
        ({"static": [-1, 64, 64]}, "static"),
        ({"static": [1, 64, 100]}, "static"),
        ({"static": [1, 64, 1 << 20]}, "static"),
        ({"precision": None}, "precision"),
        ({"config": {}}, "class_names"),
    ],
)
def test_metadata_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metadata.from_json(json.dumps(json.loads(Metadata(CONFIG).to_json()) | change))


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000])
def test_metadata_that_are_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="expected JSON"):
        Metadata.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("detection.score_threshold", float("nan")),
        ("detection.score_threshold", -5.0),
        ("detection.nms_threshold", float("nan")),
        ("detection.max_detections", 0),
        ("input.resize.min_size", 0),
        ("input.resize.max_size", -7),
        ("input.resize.max_size", 10**9),
        ("input.size_divisible", 0),
        ("input.size_divisible", 10**7),
        ("category_ids", (1, 2, 10**30)),
    ],
)
def test_values_that_the_host_could_not_live_with(name: str, value: Any) -> None:
    text = Metadata(CONFIG.with_value(name, value)).to_json()
    with pytest.raises(ValueError, match=rf"config\.{name}.*: expected a number in .*, got"):
        Metadata.from_json(text)


# What is in the file.


def bytes_of(path: Path, change: Callable[[Any], None]) -> bytes:
    model = onnx.load(path)
    change(model)
    return model.SerializeToString()


def elsewhere(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")


def hidden_elsewhere(model: Any) -> None:
    node = model.graph.node.add(op_type="If")
    inner = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    inner.initializer.add().external_data.add(key="location", value="/etc/passwd")


def renamed(model: Any) -> None:
    model.graph.output[1].name = "corners"


def retyped(model: Any) -> None:
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def resized(model: Any) -> None:
    model.graph.output[2].type.tensor_type.shape.dim[1].dim_value = 7


def unlabelled(model: Any) -> None:
    model.metadata_props[0].key = "other"


def without_graph(model: Any) -> None:
    model.ClearField("graph")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (elsewhere, "another file"),
        (hidden_elsewhere, "another file"),
        (renamed, "outputs"),
        (retyped, "inputs"),
        (resized, "outputs"),
        (unlabelled, "metadata"),
        (without_graph, "inputs"),
    ],
)
def test_a_file_of_a_stranger(change: Callable[[Any], None], message: str, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "strange.onnx"
    path.write_bytes(bytes_of(small, change))
    with pytest.raises(ValueError, match=f"strange.onnx: .*{message}"):
        Runtime(path)


def test_what_is_no_onnx_file(small: Path, tmp_path: Path, np_rng: np.random.Generator) -> None:
    path = tmp_path / "x.onnx"
    data = small.read_bytes()
    for wrong in (data[:-1], data[: len(data) // 2], np_rng.bytes(1000), b"\x80" * 100, bytes([0x38, 1])):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"x\.onnx: expected"):
            Runtime(path)
    os.truncate(path, 1 << 31)  # takes no room on the disk
    with pytest.raises(ValueError, match="at most 2 GiB"):
        Runtime(path)


def test_what_onnx_runtime_refuses(small: Path, tmp_path: Path) -> None:
    def broken(model: Any) -> None:
        model.graph.node[0].op_type = "Nonsense"

    path = tmp_path / "x.onnx"
    path.write_bytes(bytes_of(small, broken))
    with pytest.raises(ValueError, match=r"x\.onnx: onnxruntime does not take this file: .*Nonsense"):
        Runtime(path, cache=False)


def test_eight_bits_are_not_for_openvino(small: Path, tmp_path: Path) -> None:
    """It takes such a file and finds nothing."""
    path = write(tmp_path / "x.onnx", precision="int8")
    with pytest.raises(ValueError, match=r"x\.onnx: expected onnxruntime for 8 bits, got openvino"):
        Runtime(path, backend="openvino", cache=False)


def test_files_that_resize_are_not_for_openvino(small: Path, tmp_path: Path) -> None:
    """It resizes pictures to other sizes, without a word."""
    path = write(tmp_path / "x.onnx", preprocess=True)
    with pytest.raises(ValueError, match=r"x\.onnx: expected onnxruntime for a file that resizes .*, got openvino"):
        Runtime(path, backend="openvino", cache=False)


def test_openvino_needs_no_place_to_keep_things(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, np_rng: np.random.Generator
) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIMASK_HOME", str(tmp_path / "file" / "home"))
    picture = np_rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found = Runtime(small, backend="openvino").predict(picture)
    assert len(found) == len(Runtime(small).predict(picture))


def test_a_runtime_can_be_sent_to_another_process(small: Path, np_rng: np.random.Generator) -> None:
    picture = np_rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    ours = Runtime(small, score=0.3, max_detections=3)
    again = pickle.loads(pickle.dumps(ours))
    assert again.config == ours.config
    assert len(again.predict(picture)) == len(ours.predict(picture))


# What it computes.


def of_another_name(model: Any, output: str, operator: str, *values: list[int]) -> None:
    """What the graph gives as ``output`` becomes the input of one more operator, whose output takes its name."""
    for node in model.graph.node:
        node.output[:] = [name + "_before" if name == output else name for name in node.output]
    more = [onnx.numpy_helper.from_array(np.array(value), f"{output}_{i}") for i, value in enumerate(values)]
    model.graph.initializer.extend(more)
    inputs = [x.name for x in more] if operator == "ConstantOfShape" else [output + "_before", *(x.name for x in more)]
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [output]))


@pytest.mark.parametrize(
    ("output", "operator", "values", "message"),
    [
        ("labels", "Add", [1000], "the metadata's classes"),
        ("labels", "Sub", [1000], "the metadata's classes"),
        ("num_detections", "Sub", [1 << 40], "detections of the contract's shapes"),
        ("num_detections", "Add", [1 << 40], "detections of the contract's shapes"),
        ("boxes", "Slice", [[0], [1], [1]], "detections of the contract's shapes"),
        ("masks", "Slice", [[0], [1], [1]], "detections of the contract's shapes"),
        ("scores", "ConstantOfShape", [[1 << 50]], "CPUExecutionProvider failed"),
    ],
)
def test_what_a_file_computes_is_checked(
    output: str,
    operator: str,
    values: list[Any],
    message: str,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A graph that keeps to its declarations no further than the runtime looks."""
    path = tmp_path / "strange.onnx"
    path.write_bytes(bytes_of(small, lambda model: of_another_name(model, output, operator, *values)))
    picture = tmp_path / "x.png"
    cells = np.random.default_rng(0).integers(0, 256, (9, 13, 3)).astype(np.uint8)
    Image.fromarray(cells.repeat(11, 0).repeat(11, 1)).save(picture)
    with pytest.raises((ValueError, RuntimeError), match=f"strange.onnx: .*{message}"):
        Runtime(path, threads=1, cache=False).predict(picture)
    assert cli.main(["predict", str(path), str(picture), "--json"]) == 1
    assert "strange.onnx" in capsys.readouterr().err


def complaint(path: Path) -> str:
    try:
        Runtime(path, threads=1, cache=False)
    except ValueError as error:
        return str(error)
    return ""


def test_damage_is_an_error_that_names_the_file(
    small: Path, tmp_path: Path, np_rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes outside of the tensors, where the structure is: some are another name, which no one misses."""
    data = np.frombuffer(small.read_bytes(), np.uint8)
    path = tmp_path / "x.onnx"
    complaints = []
    for _ in range(30):
        damaged = data.copy()
        places = np_rng.integers(0, 40_000, 3) * np_rng.choice([1, -1], 3)  # from either end
        damaged[places] = np_rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        complaints.append(complaint(path))
    assert sum(map(bool, complaints)) > 5
    assert [text for text in complaints if text and not text.startswith(f"{path}: ")] == []
    assert capfd.readouterr().out == ""


def test_a_complaint_that_is_no_text_is_one_too(small: Path, tmp_path: Path) -> None:
    """ONNX Runtime repeats a name of the file, which here is no UTF-8."""
    path = tmp_path / "x.onnx"
    data = bytes_of(small, lambda model: model.graph.node[3].input.__setitem__(0, "nowhere_to_be_found"))
    path.write_bytes(data.replace(b"nowhere_to_be_found", b"nowhere_to_be_f\xdfund"))
    assert complaint(path).startswith(f"{path}: onnxruntime does not take this file")
