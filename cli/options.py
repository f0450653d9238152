"""Options that several verbs share, and what they mean."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.model.files import is_exported

if TYPE_CHECKING:
    from ..engine.inference.predicting import Predicting
    from ..engine.inference.predictor import Predictor

__all__ = [
    "DTYPES",
    "Verbs",
    "add_checkpoint_options",
    "add_device_options",
    "add_model_options",
    "add_verb",
    "add_weights_option",
    "checkpoint_options",
    "existing",
    "kernel_cache",
    "load",
    "load_any",
    "portrait",
]

DTYPES = ("float32", "bfloat16", "float16")
RUNTIMES = ("onnxruntime", "openvino")

Verbs = Any  # what ArgumentParser.add_subparsers gives, which argparse has no public name for


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str, epilog: str
) -> argparse.ArgumentParser:
    """A verb's parser; ``run`` takes the parsed options and gives the exit status."""
    added = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    return added


def add_weights_option(parser: argparse.ArgumentParser, *, exported: bool = False) -> None:
    """
    Args:
        exported: whether the verb takes what `trimask export` wrote too; it then loads by :func:`load_any`.
    """
    kinds = "checkpoint, published name or exported .onnx file" if exported else "checkpoint or published name"
    parser.add_argument("--weights", "-w", default="people", help=f"{kinds} (%(default)s, bundled)")
    if exported:
        parser.add_argument("--runtime", choices=RUNTIMES, help=f"that runs an exported file ({RUNTIMES[0]})")
        parser.add_argument(
            "--threads", type=int, metavar="N", help="that compute on a CPU (as many as there are cores)"
        )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score to report (%(default)s; 0.05 to evaluate)"
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (the GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (%(default)s)")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a foreign checkpoint's keys cannot say (default: its family's convention)")
    group.add_argument("--min-size", type=int, metavar="PIXELS", help="short side of the resized picture")
    group.add_argument("--max-size", type=int, metavar="PIXELS", help="limit of its long side")
    group.add_argument("--pixel-mean", type=float, nargs=3, metavar="LEVEL", help="of red, green and blue, in 0..255")
    group.add_argument("--pixel-std", type=float, nargs=3, metavar="LEVEL", help="their standard deviation")
    group.add_argument(
        "--anchor-sizes",
        type=float,
        nargs="+",
        metavar="SIZE",
        help="one for each of the five levels, or all of the only map",
    )
    group.add_argument("--aspect-ratios", type=float, nargs="+", metavar="RATIO", help="of anchors, height over width")
    group.add_argument("--activation", choices=("relu", "relu6"), help="of a MobileNetV2 trunk")
    group.add_argument("--taps", type=int, nargs=4, metavar="BLOCK", help="of a MobileNetV2, for the pyramid")
    group.add_argument("--norm-eps", type=float, metavar="EPS", help="epsilon of the norms")
    group.add_argument("--norm-groups", type=int, metavar="N", help="of group norms")
    group.add_argument("--pre-nms", type=int, metavar="N", help="anchors of a level that go into suppression")
    group.add_argument("--rpn-nms-threshold", type=float, metavar="IOU", help="above which proposals are suppressed")
    group.add_argument("--sampling-ratio", type=int, metavar="N", help="of RoIAlign; 0 adapts to the RoI")
    group.add_argument("--proposals", type=int, metavar="N", help="of a picture, for the box head; fewer are faster")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="names of the foreground classes, in order")
    group.add_argument("--category-ids", type=int, nargs="+", metavar="ID", help="the data set's id of each class")
    group.add_argument("--style", choices=("pytorch", "bgr", "caffe"), help="of a Detectron2 or MMDetection trunk")


def checkpoint_options(options: argparse.Namespace) -> dict[str, Any]:
    sizes = ("min_size", "max_size", "pixel_mean", "pixel_std", "anchor_sizes", "aspect_ratios")
    network = ("activation", "taps", "norm_eps", "norm_groups", "sampling_ratio", "style")
    names = (*sizes, *network, "pre_nms", "rpn_nms_threshold", "proposals", "classes", "category_ids")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def load(options: argparse.Namespace, weights: str, **more: Any) -> "Predictor":
    import torch

    from ..engine.inference.predictor import load

    return load(weights, device=options.device, dtype=getattr(torch, options.dtype), score=options.score, **more)


def load_any(options: argparse.Namespace, **limits: Any) -> "Predicting":
    """The predictor of a checkpoint or of an exported file, which needs no torch."""
    weights, given = options.weights, checkpoint_options(options)
    if not is_exported(weights):
        if options.runtime:
            raise ValueError(f"runtime: expected an exported .onnx file with it, got {weights}")
        if options.threads is not None:
            import torch

            if options.threads < 1:
                raise ValueError(f"threads: expected at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        return load(options, weights, **limits, **given)
    if given:
        raise ValueError(f"{weights}: expected no {', '.join(given)}, which the export has fixed")
    from ..export.runtime import Runtime

    runtime = Runtime(
        weights,
        device=options.device,
        score=options.score,
        backend=options.runtime or RUNTIMES[0],
        dtype=options.dtype,
        threads=options.threads,
        **limits,
    )
    print(f"trimask: {weights} runs on {runtime.provider}", file=sys.stderr)
    return runtime


def existing(picture: str) -> Path:
    if not Path(picture).is_file():
        raise ValueError(f"expected a picture, found no file at {picture!r}")
    return Path(picture)


def portrait(verb: str) -> Path:
    """Eileen Collins, NASA, public domain: one of scikit-image's sample pictures."""
    try:
        from skimage.data import data_dir
    except ImportError:
        raise ImportError(
            f"{verb}: expected scikit-image, whose sample portrait is the default picture; pip install scikit-image, "
            f"or name a picture: trimask {verb} PICTURE"
        ) from None
    return Path(data_dir) / "astronaut.png"


def kernel_cache() -> tuple[Path, int]:
    """Where Triton keeps what it compiled, and its size in bytes."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may be at work there
            size += file.stat().st_size if file.is_file() else 0
    return folder, size
