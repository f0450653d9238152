"""``trimask demo``: the main job on a sample photograph."""

import argparse
from pathlib import Path

from .console import open_console, print_result
from .options import Verbs, add_model_options, add_verb, existing, load, portrait

__all__ = ["add", "run"]


def add(verbs: Verbs) -> None:
    demo = add_verb(
        verbs,
        "demo",
        run,
        "segment a photograph with the bundled model",
        "examples:\n  trimask demo\n  trimask demo holiday.jpg --output found/",
    )
    demo.add_argument("picture", nargs="?", help="a picture of people; by default a portrait that scikit-image brings")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    add_model_options(demo)


def run(options: argparse.Namespace) -> int:
    console = open_console()
    if options.picture:
        picture, resize = existing(options.picture), None
    else:
        # The bundled model learned from whole people in the street: a portrait must be small for it.
        picture, resize = portrait("demo"), 192
    predictor = load(options, "people", resize=resize)
    predictor.predict(picture)  # the first call also pays for the allocation of every buffer
    result = predictor.predict(picture)
    options.output.mkdir(parents=True, exist_ok=True)
    print_result(console, result)
    for what, suffix in (("overlay", "-overlay.png"), ("COCO JSON", ".json")):
        console.print(f"{what:9} {result.save(options.output / (picture.stem + suffix))}", soft_wrap=True)
    return 0
