"""What shows of training on a GPU alone: agreement with the CPU, waiting, lower precision, late news of a bad loss."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import SMALL, VARIANTS
from runs import SIX, TINY, assert_same, begin, drawn, final, lines, trainer
from test_losses import ALL, SIZE, SQUARE, objects, picture
from test_trainer import spoil, stop_at
from trimask import MaskRCNN
from trimask.engine.inference.predictor import Predictor
from trimask.engine.model.losses import LossConfig, Targets, losses
from trimask.engine.training.data import CocoDataset
from trimask.engine.training.distributed import Processes
from trimask.engine.training.optimizing import make_optimizer

pytestmark = pytest.mark.gpu

RUNS = ("string", "counts")  # of masks, which take no more than numpy
BOTH = ([SQUARE, (5, 5, 40, 80)], [(60, 10, 120, 90)])
CUDA = {"processes": Processes(0, 1, torch.device("cuda", 0)) if torch.cuda.is_available() else None}
CUDA["predictor"] = lambda model: Predictor(model, device="cuda", score=0.0).predict


def there(targets: Targets) -> Targets:
    return Targets(*(x.cuda() if isinstance(x, Tensor) else x for x in targets))


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_a_cpu(name: str, seed: int) -> None:
    """Every anchor and RoI is in, so that rounding chooses no samples; in float64, so that it chooses no proposals."""
    torch.manual_seed(seed)
    model = MaskRCNN(VARIANTS[name]).train().double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    targets, sizes = objects(*BOTH), SIZE.repeat(2, 1)
    image = picture(targets).double()
    twin = copy.deepcopy(model).cuda()
    expected = losses(model, image, sizes, targets, ALL)
    got = losses(twin, image.cuda(), sizes.cuda(), there(targets), ALL)
    for term, value in expected.items():
        assert float(got[term]) == pytest.approx(float(value), rel=1e-5, abs=1e-7)
    sum(expected.values()).backward()
    sum(got.values()).backward()
    gradients = [(a.grad, b.grad.cpu()) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    largest = max(float(a.abs().max()) for a, _ in gradients)
    for a, b in gradients:
        assert float((a - b).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_step_waits_for_the_device(optimizer: str, precision: str, request: pytest.FixtureRequest) -> None:
    model = MaskRCNN(SMALL).train().cuda().to(memory_format=torch.channels_last)
    update = make_optimizer(model, replace(SIX, optimizer=optimizer, learning_rate=1e-3))
    targets = there(objects(*BOTH))
    image, sizes, seeds = picture(targets), SIZE.repeat(2, 1).cuda(), torch.arange(2).cuda()

    def step() -> None:
        dtype = getattr(torch, precision)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            terms = losses(model, image, sizes, targets, LossConfig(), seeds=seeds)
        sum(terms.values()).backward()
        update.step()
        update.zero_grad()

    for _ in range(2):
        step()  # compiles
    request.getfixturevalue("no_waiting")
    step()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw", "accumulate": 2, "ema": 0.9, "learning_rate": 1e-3},
        {"norms": "live", "clip_norm": 1.0, "channels_last": False},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"deterministic": True},
        {"polygons": True},
    ],
    ids=str,
)
def test_a_run_learns_and_goes_on_after_an_interruption(tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes.get("polygons"):
        pytest.importorskip("pycocotools")
    data = drawn(tmp_path / "data", kinds=("polygon",) if changes.get("polygons") else RUNS, crowd=False)
    config = replace(SIX, warmup=0, log_every=1, **changes)
    straight = trainer(tmp_path / "straight", data, config, **CUDA)
    before = final(straight)
    assert straight.run().reason == "finished"
    assert any(not torch.equal(x, before[name]) for name, x in final(straight).items())
    first = trainer(tmp_path / "parts", data, config, watch=stop_at(2), **CUDA)
    assert first.run().interrupted
    second = trainer(tmp_path / "parts", data, config, start=begin(seed=9), resume=True, **CUDA)
    assert second.run().reason == "finished"
    found = lines(tmp_path / "straight"), lines(tmp_path / "parts")
    assert [line["iteration"] for line in found[1]] == list(range(1, 7))
    for a, b in zip(*found, strict=True):
        assert math.isfinite(a["loss"])
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
    if config.deterministic:
        assert_same(final(straight), final(second))


def learn(rank: int, count: int, norms: str, data: CocoDataset, out: Path) -> None:
    """One update in one of ``count`` processes on one GPU, where NCCL would refuse a second; the first saves it."""
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{out.parent}/{out.name}.meet", rank=rank, world_size=count
        )
    config = replace(SIX, iterations=1, warmup=0, norms=norms)
    found = {"processes": Processes(rank, count, torch.device("cuda", 0)), "predictor": CUDA["predictor"]}
    run = trainer(out, data, config, start=begin(norms_known=False), **found)
    run.run()
    if rank == 0:
        torch.save({name: x.cpu() for name, x in final(run).items()}, out / "final.pt")
    if count > 1:
        torch.distributed.destroy_process_group()


def test_synchronised_norms_see_the_whole_batch(tmp_path: Path) -> None:
    data = drawn(tmp_path / "data", kinds=RUNS, crowd=False)
    learn(0, 1, "live", data, tmp_path / "one")
    for norms in ("synchronised", "live"):
        torch.multiprocessing.spawn(learn, (2, norms, data, tmp_path / norms), nprocs=2)
    one, together, apart = (torch.load(tmp_path / out / "final.pt") for out in ("one", "synchronised", "live"))
    means = [name for name in one if name.endswith("running_mean") and one[name].any()]
    assert means
    for name in means:
        torch.testing.assert_close(together[name], one[name], rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(apart[name], one[name], rtol=1e-2, atol=1e-3) for name in means)


def test_evaluation_and_the_weights_it_keeps(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    data = drawn(tmp_path / "data")
    outcome = trainer(tmp_path / "out", data, replace(SIX, iterations=2), validation=data, **CUDA).run()
    assert outcome.best is not None
    assert (tmp_path / "out" / "best.safetensors").is_file()


def test_a_loss_that_is_no_number_stops_a_few_updates_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = drawn(tmp_path / "data", kinds=RUNS)
    config = replace(SIX, schedule="constant", iterations=6, log_every=6)
    run = trainer(tmp_path / "out", data, config, **CUDA)
    with monkeypatch.context() as patch:
        spoil(patch, 3)  # of the second update
        with pytest.raises(FloatingPointError, match="iteration 1: expected finite losses, got rpn_cls nan") as caught:
            run.run()
    assert str(caught.value).count(".png") == 2
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["iteration"] > 2
    assert all(bool(x.isfinite().all()) for x in state["model"].values())


def test_compiled_it_learns_the_same(tmp_path: Path) -> None:
    data = drawn(tmp_path / "data", kinds=RUNS)
    config = replace(SIX, iterations=2, log_every=1)
    losses_of = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        trainer(out, data, replace(config, compile=compiled), start=begin(TINY), **CUDA).run()
        losses_of.append([line["loss"] for line in lines(out)])
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-2)
