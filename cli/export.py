"""``trimask export``: a model as an ONNX file."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .console import open_console
from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options

if TYPE_CHECKING:
    from ..export.verification import Verification

__all__ = ["add", "run"]


def add(verbs: Verbs) -> None:
    export = add_verb(
        verbs,
        "export",
        run,
        "write a model as an ONNX file of standard operators",
        "docs/export.md says what goes in and comes out.\n\n"
        "examples:\n"
        "  trimask export people people.onnx\n"
        "  trimask export r50.safetensors r50.onnx --preprocess --masks full\n"
        "  trimask export r50.safetensors r50-trt.onnx --static 1 800 1344 --half\n"
        "  trimask export r50.safetensors repository/ --target triton-server",
    )
    export.add_argument("weights", help="checkpoint or published name")
    export.add_argument("output", type=Path, help="the .onnx file to write, or the folder of the target")
    export.add_argument(
        "--target",
        choices=("file", "triton-server"),
        default="file",
        help="a file, or a model repository for NVIDIA's Triton Inference Server (%(default)s)",
    )
    export.add_argument("--opset", type=int, default=20, help="18 to 21 (%(default)s)")
    export.add_argument(
        "--masks",
        choices=("roi", "full", "none"),
        default="roi",
        help="probabilities over each box, pixels in the picture, or none (%(default)s)",
    )
    export.add_argument("--preprocess", action="store_true", help="take one uint8 picture of any size")
    export.add_argument(
        "--static", type=int, nargs=3, metavar=("B", "H", "W"), help="fix batch and size, multiples of 32: for TensorRT"
    )
    precision = export.add_mutually_exclusive_group()
    precision.add_argument("--half", action="store_true", help="weights and features in float16")
    precision.add_argument("--int8", nargs="+", metavar="PICTURE", help="8 bits, calibrated on these pictures")
    export.add_argument("--score", type=float, help="lowest score of a detection (the model's: mostly 0.05)")
    export.add_argument("--nms", type=float, metavar="IOU", help="above which one suppresses another (the model's)")
    export.add_argument("--max-detections", type=int, metavar="N", help="per picture (the model's: mostly 100)")
    export.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the file with the checkpoint; status 1 where they differ, and the file stays (yes)",
    )
    export.add_argument("--pictures", nargs="+", metavar="PICTURE", help="to verify with (scikit-image's portrait)")
    export.add_argument("--data", type=Path, help="COCO data set to compare AP on, as `trimask eval` takes it")
    export.add_argument("--images", type=Path, metavar="DIR", help="folder of its pictures (in its folder: found)")
    export.add_argument("--json", action="store_true", help="report as JSON")
    add_checkpoint_options(export)


def run(options: argparse.Namespace) -> int:
    from ..engine.pictures.reading import listed
    from ..engine.training.detection import data_set
    from ..export.onnx import to_onnx
    from ..export.triton_server import model_path, write_config

    data = None
    told = [name for name in ("pictures", "data", "images") if getattr(options, name)]
    if told and not options.verify:
        raise ValueError(f"{', '.join(told)}: expected with --verify alone, got --no-verify")
    if options.images and not options.data:
        raise ValueError("images: expected beside --data, got no data set")
    if options.verify:  # before the work
        from ..export.backends import load_onnxruntime

        load_onnxruntime()
        options.pictures = options.pictures and listed(options.pictures)
    if options.data:
        annotations, images = data_set(options.data, options.images)
        if images is None:
            raise ValueError("images: expected the folder of the pictures (--images DIR), got none")
        data = annotations, images
    name, served = Path(options.weights).stem, options.target == "triton-server"
    exported = to_onnx(
        options.weights,
        model_path(options.output, name) if served else options.output,
        opset=options.opset,
        masks=options.masks,
        preprocess=options.preprocess,
        static=options.static,
        half=options.half,
        int8=options.int8,
        score=options.score,
        nms=options.nms,
        max_detections=options.max_detections,
        **checkpoint_options(options),
    )
    if served:
        write_config(options.output, name, exported.about)
    verification = None
    if not options.json:
        print(
            f"wrote {exported.path}, {exported.megabytes:.1f} MB, {exported.nodes} nodes, opset {exported.opset}, "
            f"in {exported.seconds:.0f} s"
        )
    if options.verify:
        from ..export.verification import verify

        verification = verify(
            exported.path, options.weights, options.pictures, data=data, **checkpoint_options(options)
        )
    if options.json:
        facts = {
            "path": str(exported.path),
            "megabytes": exported.megabytes,
            "seconds": exported.seconds,
            "opset": exported.opset,
            "operators": exported.operators,
            "metadata": json.loads(exported.about.to_json()),
        }
        if verification is not None:
            facts["verification"] = [vars(check) for check in verification.checks]
        print(json.dumps(facts))
    elif verification is not None:
        _print(verification, exported.about.precision)
    return 0 if verification is None or verification.good else 1


def _print(verification: "Verification", precision: str) -> None:
    table = Table("check", "outcome", "", box=None, pad_edge=False)
    for check in verification.checks:
        table.add_row(check.what, check.outcome, "good" if check.good else "NOT GOOD")
    console = open_console()
    console.print(table)
    nearness = "equal to the checkpoint" if precision == "float32" else f"near the checkpoint, as {precision} may be"
    console.print(f"{'' if verification.good else 'not '}{nearness}, run by {verification.provider}")
