"""Average precision after the same recipe in trimask and in torchvision: the same start, pictures and optimiser.

    python recipes/beside_torchvision.py --data DATA/fruits_nuts --weights mobilenet_v2.pth --seeds 0 1 2

Both train a small MobileNetV2 model from an ImageNet trunk; torchvision computes its own forward pass and losses and
draws its own samples, ours draws others from the same rule. Both are evaluated by trimask, which gives torchvision's
detections for torchvision's weights. Figures go to ``OUT/figures.json``.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimask.benchmarks.bench_training import TERMS
from trimask.benchmarks.peers import torchvision as torchvision_peer
from trimask.engine.inference.predictor import Predictor
from trimask.engine.model import presets
from trimask.engine.model.checkpoints import load_model
from trimask.engine.model.checkpoints.options import Options
from trimask.engine.model.loss_config import LossConfig
from trimask.engine.model.mask_rcnn import MaskRCNN
from trimask.engine.training.augment import Augment
from trimask.engine.training.config import AugmentConfig, TrainConfig
from trimask.engine.training.data import CocoDataset
from trimask.engine.training.detection import detect
from trimask.engine.training.distributed import processes
from trimask.engine.training.evaluate import evaluate
from trimask.engine.training.loading import loader
from trimask.engine.training.optimizing import learning_rate, make_optimizer
from trimask.engine.training.starting import Start, start
from trimask.engine.training.trainer import Trainer

CONFIG = TrainConfig(
    iterations=80, batch=2, workers=0, optimizer="adamw", learning_rate=3e-4, reference_batch=2, weight_decay=0.05,
    warmup=20, schedule="cosine", save_every=0, samples=0,
)  # fmt: skip
AUGMENT = AugmentConfig(flip=0.5)
CPU = torch.device("cpu")


def ours(begun: Start, data: CocoDataset, config: TrainConfig, out: Path) -> MaskRCNN:
    with processes("cpu") as group:
        trainer = Trainer(out, begun, data, None, config, AUGMENT, LossConfig.TORCHVISION, processes=group)
        trainer.run()
    return trainer.model


def theirs(begun: Start, data: CocoDataset, config: TrainConfig, out: Path) -> MaskRCNN:
    twin: Any = torchvision_peer.twin(begun.model).train().requires_grad_(True)
    twin.transform._skip_resize = True
    optimizer = make_optimizer(twin, config)
    batches = loader(data, Augment(AUGMENT, begun.model.config.input), batch_size=config.batch, seed=config.seed)
    for iteration, batch in zip(range(config.iterations), (x.to(CPU) for x in batches), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        images, objects = [], []
        for n, (height, width) in enumerate(batch.image_sizes.tolist()):
            images.append((batch.image[n, :, :height, :width] / 255).contiguous())
            rows = slice(int(batch.targets.count[n]))
            assert batch.targets.masks is not None
            masks = batch.targets.masks[n, rows, :height, :width]
            objects.append(
                {"boxes": batch.targets.boxes[n, rows], "labels": batch.targets.labels[n, rows] + 1} | {"masks": masks}
            )
        found = twin(images, objects)
        optimizer.zero_grad()
        torch.stack([found[term] for term in TERMS.values()]).sum().backward()
        optimizer.step()
    torch.save(twin.state_dict(), out)
    config_of = begun.model.config
    given: dict[str, Any] = {"min_size": config_of.input.resize.min_size, "max_size": config_of.input.resize.max_size}
    given |= {"anchor_sizes": [x[0] for x in config_of.anchors.sizes], "aspect_ratios": config_of.anchors.aspect_ratios}
    return load_model(out, activation="relu", classes=data.class_names, category_ids=data.category_ids, **given)


def figures(model: MaskRCNN, validation: CocoDataset) -> dict[str, float]:
    stream = detect(Predictor(model.eval(), device="cpu").predict, validation.records)
    summary = evaluate([x for found in stream for x in found], validation.annotations).summary
    return {name: summary[name] for name in ("bbox_AP", "segm_AP")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/beside_torchvision"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=CONFIG.iterations)
    options = parser.parse_args()
    data, validation = (
        CocoDataset(options.data / "annotations" / f"instances_{part}.json", options.data / "images")
        for part in ("train", "val")
    )
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in options.seeds:
        config = replace(CONFIG, seed=seed, iterations=options.iterations)
        for name, train in (("trimask", ours), ("torchvision", theirs)):
            begun = start(
                options.weights, data.class_names, data.category_ids, seed=seed,
                config=presets.mobilenet(data.class_names, data.category_ids), options=Options(activation="relu"),
            )  # fmt: skip
            model = train(begun, data, config, options.out / f"{name}-{seed}")
            found.append({"seed": seed, "trained by": name, **figures(model, validation)})
            print(found[-1], flush=True)
            (options.out / "figures.json").write_text(json.dumps(found, indent=1))
