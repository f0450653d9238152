"""``trimask info``: versions, device and kernels in use; or what a weight file is."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .console import open_console
from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options, kernel_cache

if TYPE_CHECKING:
    import torch

    from ..engine.model.checkpoints import Trunk
    from ..engine.model.config import MaskRCNNConfig

__all__ = ["add", "run"]

PLAIN = "plain torch"
CLASSIFIER = "ImageNet classifier"
NAMED = 6  # classes on the line that tells how many there are


def add(verbs: Verbs) -> None:
    info = add_verb(
        verbs,
        "info",
        run,
        "show versions, device and kernels in use, or what a weight file is",
        "Nothing is downloaded: of a published model that is not here it tells what is known without the file.\n\n"
        "examples:\n"
        "  trimask info\n"
        "  trimask info --models\n"
        "  trimask info model_final_f10217.pkl\n"
        "  trimask info people.onnx --json",
    )
    what = info.add_mutually_exclusive_group()
    what.add_argument(
        "weights",
        nargs="?",
        metavar="FILE_OR_NAME",
        help="checkpoint, published name, ImageNet classifier or exported .onnx file",
    )
    what.add_argument("--models", action="store_true", help="list the published models that load by name")
    info.add_argument("--json", action="store_true", help="as JSON")
    add_checkpoint_options(info)


def run(options: argparse.Namespace) -> int:
    given = checkpoint_options(options)
    if options.weights is None:
        if given:
            raise ValueError(f"{', '.join(given)}: expected a checkpoint that this is about, got none")
        return _installation(options)
    exported = options.weights.endswith(".onnx")
    facts = _exported(Path(options.weights), given) if exported else _checkpoint(options.weights, given)
    if options.json:
        print(json.dumps(facts))
        return 0
    rows, console = list(_rows(facts)), open_console()
    column = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"{name:{column}}  {value}", soft_wrap=True)
    return 0


def _installation(options: argparse.Namespace) -> int:
    import torch

    from ..engine.model.checkpoints import PUBLISHED

    cuda = torch.cuda.is_available()
    kernels, why = _kernels(torch.device("cuda" if cuda else "cpu"))
    folder, size = kernel_cache()
    facts = {
        "trimask": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "pillow", "safetensors", "torchvision")},
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "kernels because": why,
        "C compiler": _c_compiler(),
        "kernel cache": str(folder),
        "kernel cache bytes": size,
    }
    if options.json:
        print(json.dumps({**facts, "models": [dataclasses.asdict(model) for model in PUBLISHED.values()]}))
        return 0
    console = open_console()
    joined = {"kernels": f"{kernels} ({why})", "kernel cache": f"{folder}, {size / 1e6:.1f} MB"}
    for name, value in (facts | joined).items():
        if name not in ("kernels because", "kernel cache bytes"):
            console.print(f"{name:12} {value if value is not None else 'not installed'}", soft_wrap=True)
    if kernels != PLAIN and facts["C compiler"] is None:
        console.print("Triton takes a C compiler: install gcc or clang, or set CC")
    if options.models:
        column = max(map(len, PUBLISHED))
        print(f"\n{'name':{column}} box AP  mask AP")
        for model in PUBLISHED.values():
            note = f"not here: {model.unsupported}" if model.unsupported else model.licence
            print(f"{model.name:{column}} {model.box_ap or '':6}  {model.mask_ap or '':7}  {note}")
    return 0


def _kernels(device: "torch.device") -> tuple[str, str]:
    """What the ops run on a device, and why."""
    from ..kernels.dispatch import use_triton

    version = _version("triton")
    choice = os.environ.get("TRIMASK_KERNELS") or "auto"
    asked = f"TRIMASK_KERNELS={choice}"
    if use_triton(device):
        return "Triton" if version is None else f"Triton {version}", asked if choice == "triton" else "a GPU and triton"
    if choice == "torch":
        return PLAIN, asked
    return PLAIN, "no CUDA device" if device.type == "cpu" else "triton is not installed"


def _c_compiler() -> str | None:
    """The compiler that Triton would take."""
    if named := os.environ.get("CC"):
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkpoint(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint, a classifier or a published model, without a download."""
    from ..engine.model.checkpoints import PUBLISHED, Trunk, cache_dir, inspect, load_model_or_trunk, locate

    entry = None if Path(name).is_file() else PUBLISHED.get(name)
    facts: dict[str, Any] = {}
    if entry is None:
        path = locate(name)
    else:
        path = cache_dir() / entry.url.rpartition("/")[2]
        there = path.is_file() and path.stat().st_size > 0  # an empty one counts as none when it is loaded, too
        facts = {"format": name.partition("/")[0], **dataclasses.asdict(entry), "downloaded": there}
        if entry.unsupported or not there:
            return {**facts, "file": str(path)}
        given = {**entry.options, **given}
    facts |= {"file": str(path), "bytes": path.stat().st_size}
    try:
        report = inspect(path, **given)
    except ValueError:
        found = load_model_or_trunk(path, **given)  # which raises the same for what is no classifier
        if not isinstance(found, Trunk):
            raise
        if given:
            raise ValueError(f"{path}: expected no {', '.join(given)}, of which a classifier has none") from None
        return {**facts, **_of_trunk(found)}
    return {
        **facts,
        "format": report.family,
        **_of_config(report.config),
        **_of_parameters(report.parameters),
        "notes": report.notes,
        "provenance": report.provenance,
    }


def _exported(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What an exported file says of itself. Needs no torch."""
    from ..export.inspection import read_file
    from ..export.metadata import BOOL, FLOAT, INT64, UINT8, signature

    if given:
        raise ValueError(f"{path}: expected no {', '.join(given)}, which the export has fixed")
    if not path.is_file():
        raise ValueError(f"{path}: expected an exported file, found {'a folder' if path.is_dir() else 'nothing'}")
    data, about = read_file(path)
    types = {FLOAT: "float32", UINT8: "uint8", INT64: "int64", BOOL: "bool"}
    inputs, outputs = (
        {name: {"dtype": types[kind], "shape": shape} for name, (kind, shape) in ends.items()}
        for ends in signature(about)
    )
    facts = _of_config(about.config)
    if about.masks == "none":
        facts["heads"].pop("masks", None)
    return {
        "format": "onnx",
        "file": str(path),
        "bytes": len(data),
        **facts,
        "trimask": about.version,
        "opset": _opset(data),
        "precision": about.precision,
        "masks": about.masks,
        "preprocess": about.preprocess,
        "static": about.static,
        "inputs": inputs,
        "outputs": outputs,
        "provenance": about.source,
    }


def _opset(data: bytes) -> int | None:
    """Of a file that has been inspected; None where it names none."""
    from ..export.inspection import _fields, _message

    with contextlib.suppress(IndexError):  # what is damaged here keeps no runtime from saying so
        for number, value in _fields(memoryview(data)):
            entry = dict(_fields(_message(value))) if number == 8 else {}  # opset_import: domain, version
            version = entry.get(2)
            if isinstance(version, int) and bytes(_message(entry.get(1))) in (b"", b"ai.onnx"):
                return version
    return None


def _of_trunk(trunk: "Trunk") -> dict[str, Any]:
    from ..engine.model.checkpoints.architecture import describe
    from ..engine.model.config import MaskRCNNConfig

    model = describe(MaskRCNNConfig(("",), (0,), backbone=trunk.config))
    return {
        "format": CLASSIFIER,
        "architecture": model.split(", ")[1].removesuffix(" FPN"),
        **_of_parameters(sum(x.numel() for x in trunk.state.values() if x.is_floating_point())),  # no counters
        "unused": trunk.unused,
    }


def _of_parameters(count: int) -> dict[str, int]:
    return {"parameters": count, "parameter_bytes": 4 * count}


def _of_config(config: "MaskRCNNConfig") -> dict[str, Any]:
    heads = {"boxes": config.box_head, "masks": config.mask_head}
    return {
        "architecture": _architecture(config),
        "pyramid": config.fpn is not None,
        "heads": {name: {"class_agnostic": head.class_agnostic} for name, head in heads.items() if head},
        "mask_side": config.mask_side,
        "classes": config.num_classes,
        "class_names": config.class_names,
        "category_ids": config.category_ids,
        "min_size": config.input.resize.min_size,
        "max_size": config.input.resize.max_size,
        "channels": "RGB",  # of every model: the first convolution of one that wants BGR is turned when it is read
        "mean": config.input.mean,
        "std": config.input.std,
        "score_threshold": config.detection.score_threshold,
        "nms_threshold": config.detection.nms_threshold,
        "max_detections": config.detection.max_detections,
    }


def _architecture(config: "MaskRCNNConfig") -> str:
    try:
        from ..engine.model.checkpoints.architecture import describe
    except ModuleNotFoundError:  # no torch, which an exported file runs without
        kind = "Mask R-CNN" if config.mask_head else "Faster R-CNN"
        trunk = type(config.backbone).__name__.removesuffix("Config")
        return f"{kind}, {trunk}{' FPN' if config.fpn else ''}"
    return describe(config)


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts for people, as names and values."""
    if facts["format"] == "onnx":
        yield "format", f"ONNX, exported by trimask {facts['trimask']}"
    else:
        yield "format", facts["format"] + (" checkpoint" if facts["format"] != CLASSIFIER else "")
    if "name" in facts:
        yield "name", facts["name"]
    if "bytes" in facts:
        yield "file", f"{facts['file']}, {facts['bytes'] / 1e6:.1f} MB"
    else:
        yield "file", f"{facts['file']}{'' if facts['downloaded'] else ', not downloaded'}"
    if "architecture" in facts:
        yield "architecture", facts["architecture"]
    if "heads" in facts:
        yield from _config_rows(facts)
    if "parameters" in facts:
        count, size = facts["parameters"], facts["parameter_bytes"]
        yield "parameters", f"{count / 1e6:.1f} M, {size / 1e6:.1f} MB in float32"
    if facts["format"] == "onnx":
        yield from _exported_rows(facts)
    if facts["format"] in ("trimask", "onnx") and facts["provenance"]:
        yield "made from", ", ".join(f"{name} {value}" for name, value in facts["provenance"].items())
    for note in facts.get("notes", ()):
        yield "assumed", note
    if unused := facts.get("unused"):
        yield "left out", ", ".join(unused)
    if "url" in facts:
        yield from _published_rows(facts)


def _config_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    heads = []
    for name, head in facts["heads"].items():
        text = name if name == "boxes" else f"masks of {facts['mask_side']} x {facts['mask_side']}"
        if facts["classes"] > 1:
            text += " for all classes alike" if head["class_agnostic"] else " for each class"
        heads.append(text)
    yield "heads", ", ".join(heads)
    named = [f"{name} ({i})" for name, i in zip(facts["class_names"], facts["category_ids"], strict=True)][:NAMED]
    yield "classes", f"{facts['classes']}: {', '.join(named)}{', ...' if facts['classes'] > NAMED else ''}"
    yield "resize", f"short side to {facts['min_size']}, long side to at most {facts['max_size']}"
    mean, std = (" ".join(f"{level:g}" for level in facts[name]) for name in ("mean", "std"))
    yield "pixels", f"{facts['channels']} in 0..255, mean {mean}, deviation {std}"
    yield "score", f"above {facts['score_threshold']:g}"
    yield "NMS", f"IoU above {facts['nms_threshold']:g}"
    yield "detections", f"at most {facts['max_detections']} per picture"


def _exported_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "opset", str(facts["opset"] or "not said")
    yield "precision", facts["precision"]
    yield "masks", {"roi": "over each box", "full": "in the picture", "none": "none"}[facts["masks"]]
    yield "resizes", "by itself" if facts["preprocess"] else "no, it takes resized pictures"
    for kind in ("inputs", "outputs"):
        for i, (name, end) in enumerate(facts[kind].items()):
            shape = ", ".join("?" if side is None else str(side) for side in end["shape"])
            yield "" if i else kind, f"{name}: {end['dtype']} [{shape}]"


def _published_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["unsupported"]:
        yield "not here", facts["unsupported"]
    scores = [f"{what} {facts[key]}" for what, key in (("box", "box_ap"), ("mask", "mask_ap")) if facts[key]]
    yield "AP", ", ".join(scores) or "not reported"
    yield "licence", facts["licence"]
    yield "URL", facts["url"]
    yield "hash", facts["digest"]
    for name, value in facts["options"].items():
        yield name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
