"""The project's own checkpoints: whole or not at all, the same bytes every time, and nothing guessed."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint_shapes import assert_same_weights
from models import SMALL, small_model
from trimask import MaskRCNN
from trimask.engine.model.checkpoints import load_model, native


@pytest.fixture(scope="module")
def ours() -> MaskRCNN:
    return small_model(replace(SMALL, class_names=("a", "b", "ü")))


def test_saved_and_loaded(ours: MaskRCNN, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    native.save(ours, path, {"source": "x.pth", "family": "torchvision"})
    found = load_model(path)
    assert found.config == ours.config
    assert not found.training
    assert_same_weights(found, ours)
    assert all(parameter.requires_grad for parameter in found.parameters())
    with safe_open(path, "pt") as file:
        assert not any("num_batches" in name for name in file.keys())  # noqa: SIM118
        about = json.loads(file.metadata()["trimask"])
    assert (about["format"], about["provenance"]) == (1, {"family": "torchvision", "source": "x.pth"})
    assert about["config"]["class_names"] == ["a", "b", "ü"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_model_gives_the_same_bytes(ours: MaskRCNN, tmp_path: Path) -> None:
    for i, provenance in enumerate(({"b": "1", "a": "2"}, {"a": "2", "b": "1"})):
        native.save(ours, tmp_path / str(i), provenance)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_half_precision_files(ours: MaskRCNN, tmp_path: Path) -> None:
    native.save(ours, tmp_path / "full")
    native.save(ours, tmp_path / "half", dtype=torch.float16)
    assert (tmp_path / "half").stat().st_size < 0.51 * (tmp_path / "full").stat().st_size
    found = load_model(tmp_path / "half").state_dict()
    for name, expected in ours.state_dict().items():
        assert found[name].dtype == expected.dtype
        whole = expected.dim() < 2 or name.startswith(native.PREDICTORS)
        rounded = expected if whole else expected.half().float()
        assert torch.equal(found[name], rounded), name
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float16"):
        native.save(ours, tmp_path / "other", dtype=torch.bfloat16)
    large = load_model(tmp_path / "full")
    with torch.no_grad():
        large.box_head.fcs[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"box_head\.fcs\.0\.weight has values up to 1e\+06, too large for float16"):
        native.save(large, tmp_path / "other", dtype=torch.float16)
    assert not (tmp_path / "other").exists()


def test_a_failed_save_leaves_the_old_file(ours: MaskRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:  # when everything is written
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        native.save(ours, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def changed(path: Path, target: Path, about: Callable[[dict[str, Any]], object], drop: str = "") -> Path:
    """A file of ours with another header, or without a tensor."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
        header = json.loads(file.metadata()["trimask"])
    about(header)
    save_file(tensors, target, {"trimask": json.dumps(header)})
    return target


@pytest.mark.parametrize(
    ("change", "drop", "text"),
    [
        (lambda h: h.update(format=2), "", "expected format 1 or older, got 2.*newer trimask"),
        (lambda h: h.pop("format"), "", "expected a header with a format"),
        (lambda h: h["config"].update(magic=1), "", r"unknown fields \['magic'\]"),
        (lambda h: h["config"].pop("class_names"), "", "class_names"),
        (lambda h: h["config"]["box_head"].update(fcs=[64, 65]), "", r"of another shape \(4\): box_head\.classes"),
        (lambda h: None, "rpn.deltas.bias", r"missing \(1\): rpn\.deltas\.bias"),
        (lambda h: h.pop("provenance"), "", "expected the provenance"),
        (lambda h: h.update(provenance={"source": 5}), "", "expected the provenance"),
        (lambda h: h["config"]["rpn"].update(convs=10**9), "", "expected the tensors of 10000000.. layers"),
        (lambda h: h["config"]["box_head"].update(fcs=[10**9, 64]), "", "of another shape"),
        (lambda h: h["config"].update(mask_head=None), "", r"unused \(8\): mask_head"),
    ],
)
def test_broken_files_of_ours(
    change: Callable[[dict[str, Any]], object], drop: str, text: str, ours: MaskRCNN, tmp_path: Path
) -> None:
    native.save(ours, tmp_path / "good")
    path = changed(tmp_path / "good", tmp_path / "bad", change, drop)
    with pytest.raises(ValueError, match=text) as caught:
        load_model(path)
    assert str(caught.value).count(str(path)) == 1
