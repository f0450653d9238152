"""What the bundled model sees in real pictures, for the benchmarks: boxes before and after each choice, and masks.

    python recipes/record_cases.py --images DATA/coco_open/images --out benchmarks/recorded.safetensors

At the model's own size and at COCO's usual 800 x 1333. Boxes are kept in sixteenths of a pixel, scores in float16,
probabilities in 8 bits: every implementation gets the same rounded input. The pictures themselves are not kept.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save
from torch import Tensor

import trimask
from trimask.engine.model import heads, rpn
from trimask.engine.model.files import write_whole

PICTURES = ("000000000127", "000000000471", "000000001268")  # of COCO's, under CC BY 2.0
SIDES = {320: 512, 800: 1333}  # the short side, and the most that the long one may have


@torch.inference_mode()
def record(path: Path, side: int) -> dict[str, Tensor]:
    """The arguments of both suppressions, and what comes after each."""
    predictor = trimask.load("people", device="cpu")
    resize = replace(predictor.config.input.resize, min_size=side, max_size=SIDES[side])
    predictor = trimask.load("people", device="cpu", resize=resize)
    seen: dict[str, Any] = {}

    def watch(stack: ExitStack, owner: object, function: str, name: str) -> None:
        original = getattr(owner, function)

        def watched(*arguments: Any, **options: Any) -> Any:
            found = original(*arguments, **options)
            seen[name] = arguments, found
            return found

        stack.enter_context(mock.patch.object(owner, function, watched))

    with ExitStack() as stack:
        watch(stack, rpn, "segmented_nms", "anchors")
        watch(stack, heads, "segmented_nms", "candidates")
        watch(stack, predictor.graph.rpn, "select", "proposals")
        result = predictor.predict(path)
    (anchors, logits, *_), _ = seen["anchors"]  # [5, 1000, 4], [5, 1000]; rows beyond a level's anchors have -inf
    (candidates, scores, *_), _ = seen["candidates"]  # [1, 1000, 4], [1, 1000]
    (*_, image_sizes), (boxes, count) = seen["proposals"]
    return {
        "size": torch.tensor([*image_sizes[0].tolist(), *result.size], dtype=torch.int16),
        "level_boxes": fixed(anchors),
        "level_scores": logits.half(),
        "proposals": fixed(boxes[0, : int(count)]),
        "candidate_boxes": fixed(candidates[0]),
        "candidate_scores": scores[0].half(),
        "boxes": fixed(torch.from_numpy(result.boxes)),
        "masks": torch.from_numpy(result.mask_probabilities).mul(255).round().byte(),
    }


def fixed(boxes: Tensor) -> Tensor:
    """In sixteenths of a pixel."""
    return boxes.mul(16).round().short()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tensors = {
        f"{picture} at {side}/{name}": tensor.clone(memory_format=torch.contiguous_format)
        for picture in PICTURES
        for side in SIDES
        for name, tensor in record(options.images / f"{picture}.jpg", side).items()
    }
    data = save(tensors, {"pictures": f"COCO 2017 train: {', '.join(PICTURES)}", "model": "people"})
    write_whole(options.out, lambda file: file.write(data))
    for name, tensor in tensors.items():
        print(name, *tensor.shape)
    print(f"{len(data)} bytes")
