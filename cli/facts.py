"""What a weight file is, for programs and for people."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.model.config import MaskRCNNConfig, describe, describe_trunk
from ..engine.model.files import is_exported

if TYPE_CHECKING:
    from ..engine.model.checkpoints import Trunk

__all__ = ["facts_of", "rows_of"]

CLASSIFIER = "ImageNet classifier"
NAMED = 6  # classes on the line that tells how many there are


def facts_of(weights: str, given: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint, a published model's name, an ImageNet classifier or an exported file; nothing is downloaded.

    Args:
        given: options of a foreign checkpoint.

    Raises:
        ValueError: a file that is none of these, or options that do not go with it.
    """
    return _exported(Path(weights), given) if is_exported(weights) else _checkpoint(weights, given)


def _checkpoint(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint, a classifier or a published model, without a download."""
    from ..engine.model.checkpoints import PUBLISHED, Trunk, cached, inspect, load_model_or_trunk, locate

    entry = None if Path(name).is_file() else PUBLISHED.get(name)
    facts: dict[str, Any] = {}
    if entry is None:
        path = locate(name)
    else:
        there = cached(entry.url)
        facts = {"format": name.partition("/")[0], **dataclasses.asdict(entry), "downloaded": there is not None}
        if entry.unsupported or there is None:
            return facts
        path = there
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
    from ..export.inspection import opset, read_file
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
        "opset": opset(data),
        "precision": about.precision,
        "masks": about.masks,
        "preprocess": about.preprocess,
        "static": about.static,
        "inputs": inputs,
        "outputs": outputs,
        "provenance": about.source,
    }


def _of_trunk(trunk: "Trunk") -> dict[str, Any]:
    return {
        "format": CLASSIFIER,
        "architecture": describe_trunk(trunk.config),
        **_of_parameters(sum(x.numel() for x in trunk.state.values() if x.is_floating_point())),  # no counters
        "unused": trunk.unused,
    }


def _of_parameters(count: int) -> dict[str, int]:
    return {"parameters": count, "parameter_bytes": 4 * count}


def _of_config(config: "MaskRCNNConfig") -> dict[str, Any]:
    heads = {"boxes": config.box_head, "masks": config.mask_head}
    return {
        "architecture": describe(config),
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


def rows_of(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts for people, as names and values."""
    if facts["format"] == "onnx":
        yield "format", f"ONNX, exported by trimask {facts['trimask']}"
    else:
        yield "format", facts["format"] + (" checkpoint" if facts["format"] != CLASSIFIER else "")
    if "name" in facts:
        yield "name", facts["name"]
    if "bytes" in facts:
        yield "file", f"{facts['file']}, {facts['bytes'] / 1e6:.1f} MB"
    elif not facts["downloaded"]:
        yield "file", "not downloaded"
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
    yield "opset", str(facts["opset"])
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
