"""``trimask info``: versions, device and kernels in use; or what a weight file is."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from typing import TYPE_CHECKING

from .. import __version__
from .console import open_console
from .facts import facts_of, rows_of
from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options, kernel_cache

if TYPE_CHECKING:
    import torch

__all__ = ["add", "run"]

PLAIN = "plain torch"


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
    facts = facts_of(options.weights, given)
    if options.json:
        print(json.dumps(facts))
        return 0
    rows, console = list(rows_of(facts)), open_console()
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
    if device.type == "cpu":
        return PLAIN, "no CUDA device"
    return PLAIN, "triton is not installed" if version is None else "the GPU is older than compute capability 7.5"


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
