"""``trimask check-data``: faults of a data set, before they cost a training run."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .console import open_console, progress
from .options import Verbs, add_verb

if TYPE_CHECKING:
    from ..engine.training.checking import Report

__all__ = ["add", "run"]

SHOWN = 3  # offenders of each kind on the terminal
CLASSES = 20  # most frequent classes there


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "check-data",
        run,
        "look for faults in a data set: annotations in COCO's format and every picture",
        "The exit status is 1 where faults were found.\n\n"
        "examples:\n"
        "  trimask check-data --annotations train.json --images photos/ --output checked/\n"
        "  trimask check-data --annotations train.json --images photos/ --fix clean.json",
    )
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO JSON file")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder its file names start from")
    parser.add_argument("--no-masks", action="store_true", help="boxes only: segmentations are not looked at")
    parser.add_argument("--fix", type=Path, metavar="FILE", help="write a copy of the annotations without the faults")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write report.json and contact_sheet.jpg here")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(options: argparse.Namespace) -> int:
    from ..engine.model.files import write_json, write_whole
    from ..engine.training.checking import check

    def shown(items: Iterable[Any], total: int) -> Iterable[Any]:
        return progress(items, total, "pictures", alone=True)

    report = check(options.annotations, options.images, boxes_only=options.no_masks, progress=shown)
    written = []
    if options.fix and report.clean["annotations"]:
        written.append(report.write_clean(options.fix))
    if options.output:
        from ..engine.training.sheets import contact_sheet

        options.output.mkdir(parents=True, exist_ok=True)
        written.append(write_json(options.output / "report.json", report.to_json(), indent=1))
        sheet = contact_sheet(options.annotations, options.images, report.faults)
        jpeg = options.output / "contact_sheet.jpg"
        written.append(write_whole(jpeg, lambda file: sheet.save(file, "JPEG", quality=90)))
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        _print(report, fixing=bool(options.fix))
        for path in written:
            print(f"wrote {path}")
    return 1 if report.faults else 0


def _print(report: "Report", fixing: bool) -> None:
    from ..engine.training.checking import FAULTS

    console = open_console()
    console.print(
        f"{report.pictures:,} pictures ({report.empty:,} without objects), {report.objects:,} objects, "
        f"{report.crowds:,} crowds",
        soft_wrap=True,
    )
    frequent = dict(sorted(report.classes.items(), key=lambda item: -item[1])[:CLASSES])
    for title, counts in (("class", frequent), ("size in pixels", report.sizes)):
        table = Table(title, "objects", "", box=None, pad_edge=False)
        most = max(counts.values(), default=0)
        for name, count in counts.items():
            table.add_row(name, f"{count:,}", "█" * -(-24 * count // max(most, 1)))
        console.print(table)
    if without := [name for name, count in report.classes.items() if not count]:
        console.print(f"{len(without)} classes without objects: {', '.join(without)}", soft_wrap=True)
    if not report.faults:
        console.print("no faults")
    for kind, count in report.counts.items():
        console.print(f"{count:,} x {kind}{f' ({FAULTS[kind]})' if fixing else ''}", soft_wrap=True)
        for fault in [fault for fault in report.faults if fault.kind == kind][:SHOWN]:
            at = [fault.image, None if fault.annotation is None else f"annotation {fault.annotation}"]
            console.print("    " + ": ".join([*filter(None, at), fault.detail]), soft_wrap=True)
