"""Checkpoints of torchvision, Detectron2 and MMDetection in; safetensors with the whole config out.

    model = load_model("detectron2/mask_rcnn_R_50_FPN_3x")          # a published name: downloaded once
    model = load_model("finetuned.pth", classes=["cat", "dog"])     # a file, with what its weights cannot say
    report = convert("finetuned.pth", "finetuned.safetensors", classes=["cat", "dog"])

Nothing in a file is ever executed.
"""

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import MaskRCNNConfig, describe
from ..files import is_exported
from ..mask_rcnn import MaskRCNN
from . import family, native
from .detectron2 import DETECTRON2
from .downloading import cache_dir, cached, download, file_hash, progress_bar
from .mmdet import MMDET
from .native import save
from .options import Options
from .published import PUBLISHED, Published, find
from .reading import Contents, read
from .torchvision import TORCHVISION
from .trunk import Trunk, trunk_of

__all__ = [
    "PUBLISHED",
    "Options",
    "Published",
    "Report",
    "Trunk",
    "cache_dir",
    "cached",
    "convert",
    "inspect",
    "load_model",
    "load_model_or_trunk",
    "locate",
    "save",
]

FAMILIES = (TORCHVISION, DETECTRON2, MMDET)
BUNDLED = {"people": Path(__file__).parents[1] / "weights" / "people.safetensors"}


@dataclass(frozen=True)
class Report:
    """What a checkpoint turned out to be.

    Attributes:
        source: the file.
        family: ``"torchvision"``, ``"detectron2"``, ``"mmdet"`` or ``"trimask"``.
        architecture: in words.
        parameters: how many numbers the model has, statistics of the norms included.
        config: with the names of the classes.
        notes: assumptions that an option would override, and what was left out.
        provenance: where the weights come from.
    """

    source: Path
    family: str
    architecture: str
    parameters: int
    config: MaskRCNNConfig
    notes: tuple[str, ...]
    provenance: dict[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.class_names


def load_model(path: str | Path, **options: Any) -> MaskRCNN:
    """Load a model from a checkpoint of any family.

    Args:
        path: a file; or ``"people"``, the bundled model; or a published name (see :data:`PUBLISHED`), which is
            downloaded once.
        options: the fields of :class:`Options`.

    Returns:
        the model on the CPU, float32, in evaluation mode.

    Raises:
        ValueError: for what cannot be read, is not supported, or does not fit; naming the file and the reason.
        ConnectionError: where a published checkpoint cannot be downloaded.
    """
    return _open(path, options, hashed=False)[0]


def load_model_or_trunk(path: str | Path, **options: Any) -> MaskRCNN | Trunk:
    """As :func:`load_model`, but of an ImageNet classifier the trunk, which has no use for the options."""
    given, file = _options(path, options), locate(path)
    contents = read(file)
    with native.naming(file):
        trunk = trunk_of(contents)
    return trunk or _built(file, contents, given, hashed=False)[0]


def inspect(path: str | Path, **options: Any) -> Report:
    """What :func:`load_model` would load, without keeping it."""
    return _open(path, options)[1]


def convert(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> Report:
    """Write a checkpoint of any family as one of ours, which loads without options.

    Args:
        source, options: as for :func:`load_model`.
        target: the safetensors file to write.
        dtype: see :func:`save`.
    """
    model, report = _open(source, options)
    target = Path(target)
    if target.exists() and target.samefile(report.source):
        raise ValueError(f"target: expected another file than the source, got {target}")
    save(model, target, report.provenance, dtype)
    return report


def locate(name: str | Path) -> Path:
    """The file of a path, of ``"people"``, or of a published name, downloading it if need be."""
    path = Path(name)
    if is_exported(path):
        raise ValueError(f"{path}: expected a checkpoint, got an exported file, which trimask.export.Runtime runs")
    if path.is_file():
        return path
    if str(name) in BUNDLED:
        return BUNDLED[str(name)]
    if str(name) not in PUBLISHED and path.is_dir():
        raise ValueError(f"{path}: expected a checkpoint file, found a folder")
    if path.suffix in (".pth", ".pt", ".pkl", ".safetensors", ".bin", ".ckpt"):
        raise ValueError(f"{path}: expected a checkpoint file, found nothing")
    entry = find(str(name))
    with progress_bar(entry.name) as progress:
        return download(entry.url, entry.digest, progress=progress)


def _open(name: str | Path, given: dict[str, Any], hashed: bool = True) -> tuple[MaskRCNN, Report]:
    options, path = _options(name, given), locate(name)
    return _built(path, read(path), options, hashed)


def _options(name: str | Path, given: dict[str, Any]) -> Options:
    """What a caller gives, and what a published checkpoint of this name needs besides."""
    published = None if Path(name).is_file() else PUBLISHED.get(str(name))
    return Options.of({**(published.options if published else {}), **given})


def _built(path: Path, contents: Contents, options: Options, hashed: bool) -> tuple[MaskRCNN, Report]:
    notes: list[str]
    with native.naming(path):
        about = native.header(contents)
        if about is not None:
            if options.style is not None:
                raise ValueError(f"style: expected none for a trimask checkpoint, got {options.style!r}")
            model, notes = native.from_contents(contents, about, options.apply), []
            kind, provenance = "trimask", about["provenance"]
        else:
            found = _family(contents.tensors)
            (model, notes), kind = family.load(found, contents, options), found.name
            provenance = {"source": path.name, "family": kind, "trimask": _version()}
            if hashed:  # a second of reading for a gigabyte, which a report is worth and a load is not
                provenance["sha256"] = file_hash(path, "sha256")
        # The extremes, which a NaN is: that takes no memory, and a tenth of the time.
        bad = [
            name
            for name, x in native.weights(model).items()
            if x.numel() and not torch.stack(x.aminmax()).isfinite().all()
        ]
        if bad:
            raise ValueError(f"expected finite weights, got some that are not in {len(bad)} tensors, as {bad[0]}")
    parameters = sum(tensor.numel() for tensor in native.weights(model).values())
    config = model.config
    return model, Report(path, kind, describe(config), parameters, config, tuple(notes), provenance)


def _family(names: Iterable[str]) -> family.Family:
    for candidate in FAMILIES:
        if any(re.match(candidate.marks, name) for name in names):
            return candidate
    raise ValueError(
        f"expected the weights of an R-CNN of {', '.join(f.name for f in FAMILIES)} or trimask, got tensors named "
        f"{', '.join(sorted(names)[:6])}"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("trimask")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, never installed
        return "unknown"
