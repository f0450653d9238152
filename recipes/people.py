"""How the bundled model was trained: people, on a MobileNetV2, in about an hour on two CPU cores.

    python recipes/people.py --data DATA --out runs/people
    trimask convert runs/people/last.safetensors engine/model/weights/people.safetensors --half

``DATA`` holds ``pennfudan/`` and ``coco_open/``, each with ``images/`` and COCO files
``annotations/instances_train.json`` and ``instances_val.json``, and ``weights/mobilenet_v2_imagenet_dequantized.pth``,
an ImageNet classifier with torchvision's names; engine/model/weights/people.md says what they are. The weights that are
kept are those of the last iteration: nothing is chosen by the validation pictures. Further options go to
``trimask train``.
"""

import argparse
import json
import sys
from pathlib import Path

from trimask.cli import main

SETS = ("pennfudan", "coco_open")
OPTIONS = """
    --preset mobilenet --activation relu
    --iterations 1800 --batch 4 --workers 1 --precision bfloat16
    --optimizer adamw --learning-rate 3e-4 --reference-batch 4 --weight-decay 0.05 --clip-norm 5 --ema 0.998
    --warmup 100 --schedule cosine
    --augment-min-sizes 240 272 304 336 --augment-max-size 512
    --augment-crop 0.5 --augment-crop-range 0.4 1.0 --augment-copy-paste 0.3 --augment-color 0.5 --augment-grey 0.1
    --loss-roi-samples 128 --loss-pre-nms 1000 --loss-post-nms 500
    --save-every 100 --evaluate-every 600
"""


def people(data: Path, part: str) -> dict[str, list[dict[str, object]]]:
    """The people of all sets as one COCO file's content; pictures without any are kept."""
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for name in SETS:
        content = json.loads((data / name / "annotations" / f"instances_{part}.json").read_text())
        (person,) = (category["id"] for category in content["categories"] if category["name"] == "person")
        numbers = {}
        for image in content["images"]:
            numbers[image["id"]] = len(images) + 1
            file_name = f"{name}/images/{image['file_name']}"
            images.append({**image, "id": numbers[image["id"]], "file_name": file_name})
        for entry in content["annotations"]:
            if entry["category_id"] == person:
                at = {"id": len(annotations) + 1, "image_id": numbers[entry["image_id"]], "category_id": 1}
                annotations.append({**entry, **at})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/people"))
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {part: options.out / f"{part}.json" for part in ("train", "val")}
    for part, file in files.items():
        file.write_text(json.dumps(people(options.data, part)))
    weights = options.data / "weights" / "mobilenet_v2_imagenet_dequantized.pth"
    command = ["train", "--train", str(files["train"]), "--val", str(files["val"]), "--images", str(options.data)]
    command += ["--out", str(options.out), "--weights", str(weights), *OPTIONS.split(), *more]
    sys.exit(main(command))
