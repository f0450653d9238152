"""``trimask warmup``: compile ahead of the first picture."""

import argparse

from .console import open_console
from .options import Verbs, add_checkpoint_options, add_device_options, add_verb, checkpoint_options, kernel_cache

__all__ = ["add", "run"]


def add(verbs: Verbs) -> None:
    warmup = add_verb(
        verbs,
        "warmup",
        run,
        "compile what a model needs on a GPU, ahead of its first picture",
        "Kernels are compiled once for a machine and kept: `trimask info` says where.\n\n"
        "examples:\n"
        "  trimask warmup r50.safetensors --dtype float16\n"
        "  trimask warmup r50.safetensors --size 1080 1920 --size 480 640 --batch 1 8",
    )
    warmup.add_argument(
        "weights", nargs="?", default="people", help="checkpoint or published name (%(default)s, bundled)"
    )
    warmup.add_argument(
        "--size",
        type=int,
        nargs=2,
        action="append",
        metavar=("H", "W"),
        help="of the pictures (480 640); may be repeated",
    )
    warmup.add_argument(
        "--batch-size",
        "--batch",
        dest="batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="B",
        help="numbers of pictures at a time (1)",
    )
    add_device_options(warmup)
    add_checkpoint_options(warmup)


def run(options: argparse.Namespace) -> int:
    import torch

    from ..engine.inference.predictor import load
    from ..kernels.dispatch import use_triton

    console = open_console()
    predictor = load(
        options.weights, device=options.device, dtype=getattr(torch, options.dtype), **checkpoint_options(options)
    )
    shapes = [(tuple(size), batch) for size in options.size or [(480, 640)] for batch in options.batch]
    before = kernel_cache()[1]
    total = 0.0
    for done, (size, batch) in enumerate(shapes, start=1):
        seconds = predictor.warmup(size, batch)
        total += seconds
        pictures = f"{batch} picture{'s' * (batch > 1)} of {size[0]} x {size[1]}"
        console.print(f"{done}/{len(shapes)}  {pictures}  {seconds:.1f} s")
    if use_triton(predictor.device):
        folder, after = kernel_cache()
        console.print(
            f"{predictor}: ready in {total:.1f} s; {folder} grew by {(after - before) / 1e6:.1f} MB", soft_wrap=True
        )
    else:
        console.print(f"{predictor}: runs; there is nothing to compile, the kernels are plain torch", soft_wrap=True)
    return 0
