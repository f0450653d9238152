"""``trimask convert``: foreign checkpoints to safetensors."""

import argparse
import json
from pathlib import Path

from .options import Verbs, add_checkpoint_options, add_verb, checkpoint_options

__all__ = ["add", "run"]


def add(verbs: Verbs) -> None:
    convert = add_verb(
        verbs,
        "convert",
        run,
        "turn a checkpoint of torchvision, Detectron2 or MMDetection into safetensors",
        "Architecture and class count are read from the checkpoint's keys; the options say what keys cannot.\n\n"
        "examples:\n"
        "  trimask convert model_final_f10217.pkl r50.safetensors\n"
        "  trimask convert mine.pth mine.safetensors --classes cat dog --min-size 640 --half",
    )
    convert.add_argument("source", help="checkpoint, or the name of a published model")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--half", action="store_true", help="store float16: half the size")
    convert.add_argument("--json", action="store_true", help="report as JSON")
    add_checkpoint_options(convert)


def run(options: argparse.Namespace) -> int:
    import torch

    from ..engine.model.checkpoints import convert

    if options.target.suffix != ".safetensors":
        raise ValueError(f"target: expected a .safetensors file, got {options.target}")
    report = convert(
        options.source,
        options.target,
        dtype=torch.float16 if options.half else None,
        **checkpoint_options(options),
    )
    megabytes = options.target.stat().st_size / 1e6
    if options.json:
        facts = {
            "source": str(report.source),
            "target": str(options.target),
            "family": report.family,
            "architecture": report.architecture,
            "parameters": report.parameters,
            "notes": report.notes,
            "config": json.loads(report.config.to_json()),
        }
        print(json.dumps(facts))
        return 0
    print(f"{report.source.name}: {report.family}, {report.architecture}, {report.parameters / 1e6:.1f} M parameters")
    for note in report.notes:
        print(f"  assumed: {note}")
    print(f"wrote {options.target}, {megabytes:.1f} MB")
    return 0
