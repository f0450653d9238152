"""The ablations of the Mask R-CNN paper (tables 2 and 3) as options of one training command, and their table.

    python recipes/ablations.py --train train.json --val val.json --images photos/ --out runs/ablations ...

Further options go to every ``trimask train``. Each run resumes where it was interrupted; those that are done are only
read. The table goes to ``OUT/table.md``.
"""

import argparse
import json
import sys
from pathlib import Path

from trimask.cli import main

ABLATIONS = {
    "as it is: RoIAlign, average; a mask per class, by a sigmoid": [],
    "RoIAlign, maximum": ["--set", "pool.maximum=true"],
    "RoIPool": ["--set", "pool.quantized=true"],
    "class-agnostic masks": ["--set", "mask_head.class_agnostic=true"],
    "softmax over the classes": ["--set", "mask_head.softmax=true"],
    "boxes only": ["--no-masks", "--best", "bbox_AP"],
}
FIGURES = ("bbox_AP", "bbox_AP75", "segm_AP", "segm_AP50", "segm_AP75")


def table(rows: dict[str, dict[str, float]]) -> str:
    """Figures of each ablation in points, as Markdown."""
    lines = ["| | option | " + " | ".join(FIGURES) + " |", "|---" * (2 + len(FIGURES)) + "|"]
    for name, summary in rows.items():
        cells = (f"{100 * summary[figure]:.1f}" if figure in summary else "-" for figure in FIGURES)
        option = " ".join(ABLATIONS[name]).partition(" --best")[0]
        lines.append(f"| {name} | {f'`{option}`' if option else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    options, more = parser.parse_known_args()
    rows = {}
    for number, (name, flags) in enumerate(ABLATIONS.items()):
        folder = options.out / str(number)
        print(f"{name}: {folder}")
        if status := main(["train", "--out", str(folder), "--resume", *more, *flags]):
            sys.exit(status)
        rows[name] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        (options.out / "table.md").write_text(table(rows))
    print(table(rows), end="")
