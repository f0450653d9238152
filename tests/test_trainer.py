"""The training loop: a run is a function of its configuration, whatever interrupts it."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from runs import ALONE, SIX, TINY, assert_same, begin, drawn, final, lines, trainer
from trimask.engine.model.checkpoints import load_model
from trimask.engine.pictures.reading import PictureError
from trimask.engine.training.augment import Augment
from trimask.engine.training.config import AugmentConfig
from trimask.engine.training.data import CocoDataset, Example
from trimask.engine.training.distributed import processes

VARIANTS: dict[str, dict[str, Any]] = {
    "SGD, three lines of metrics": {},
    "AdamW, in two parts, averaged": {"optimizer": "adamw", "accumulate": 2, "ema": 0.9, "learning_rate": 1e-3},
    "live norms, clipped, without channels last": {"norms": "live", "clip_norm": 1.0, "channels_last": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return drawn(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Signals mean afterwards what they meant before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def stop_at(wanted: int) -> Any:
    def watch(iteration: int, line: Any) -> None:
        if iteration == wanted and line is None:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_an_interrupted_run_ends_as_a_straight_one(tmp_path: Path, data: CocoDataset, changes: dict[str, Any]) -> None:
    config = replace(SIX, **changes)
    straight = trainer(tmp_path / "straight", data, config)
    outcome = straight.run()
    assert (outcome.reason, outcome.interrupted, outcome.iteration) == ("finished", False, 6)
    first = trainer(tmp_path / "parts", data, config, watch=stop_at(2))
    outcome = first.run()
    assert (outcome.reason, outcome.interrupted, outcome.iteration) == ("SIGTERM", True, 3)
    second = trainer(tmp_path / "parts", data, replace(config, workers=1), start=begin(seed=9), resume=True)
    assert second.run().reason == "finished"
    assert_same(final(straight), final(second))
    assert_same(straight.average.model.state_dict(), second.average.model.state_dict())
    assert lines(tmp_path / "straight") == lines(tmp_path / "parts")
    assert [line["iteration"] for line in lines(tmp_path / "parts")] == [2, 4, 6]
    moved = [name for name, x in begin().model.state_dict().items() if not torch.equal(x, final(straight)[name])]
    assert "backbone.stem.conv.weight" in moved
    assert any("running_mean" in name for name in moved) == (config.norms == "live")
    saved = load_model(tmp_path / "parts" / "last.safetensors").state_dict()
    kept = {name: x for name, x in second.average.model.state_dict().items() if "num_batches" not in name}
    assert_same({name: saved[name] for name in kept}, kept)


def test_tensorboard_has_the_metrics_of_an_interrupted_run_once(tmp_path: Path, data: CocoDataset) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(tmp_path, data, replace(SIX, log_every=1), watch=stop_at(3)).run()
    # Files are read by their names, which begin with the second: the second run is not in the same one.
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.0000000001.earlier"))
    trainer(tmp_path, data, replace(SIX, log_every=1), start=begin(seed=9), resume=True).run()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "mask", "learning_rate"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert len(events.Scalars(name)) == len(found)
        assert found == {line["iteration"]: pytest.approx(line[name]) for line in lines(tmp_path)}


def test_a_run_that_ended_does_nothing_more(tmp_path: Path, data: CocoDataset) -> None:
    config = replace(SIX, iterations=1)
    first = trainer(tmp_path, data, config)
    first.run()
    before = (tmp_path / "metrics.jsonl").read_text()
    again = trainer(tmp_path, data, config, start=begin(seed=9), resume=True)
    assert again.run().reason == "finished"
    assert_same(final(first), final(again))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_evaluations_decide_what_is_kept_and_when_to_stop(tmp_path: Path, data: CocoDataset) -> None:
    config = replace(SIX, learning_rate=0.0, log_every=1, evaluate_every=1, patience=1, samples=2)
    outcome = trainer(tmp_path, data, config, validation=data).run()
    assert (outcome.reason, outcome.interrupted, outcome.iteration) == ("no better for 1 evaluations", False, 2)
    found = lines(tmp_path)
    assert [sorted({"loss", "segm_AP"} & set(line)) for line in found] == [["loss"], ["segm_AP"]] * 2
    assert found[-1] == {"iteration": 2, **outcome.summary}
    assert {"bbox_AP", "segm_AP", "segm_AP50", "bbox_AR100"} <= set(outcome.summary)
    assert outcome.best == (outcome.summary["segm_AP"], 1)
    assert found[1] == {**found[3], "iteration": 1}
    for name in ("curves.png", "samples/000001.jpg", "samples/000002.jpg"):
        with Image.open(tmp_path / name) as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100
    assert load_model(tmp_path / "best.safetensors").config == TINY
    again = trainer(tmp_path, data, config, validation=data, resume=True).run()
    assert (again.reason, again.iteration, again.best, again.summary) == (
        outcome.reason,
        2,
        outcome.best,
        outcome.summary,
    )
    more = trainer(tmp_path, data, replace(config, iterations=6, patience=0), validation=data, resume=True)
    assert more.iteration == 2
    assert more._end() == ""


def test_another_judge_seeks_the_best_anew(tmp_path: Path, data: CocoDataset) -> None:
    config = replace(SIX, iterations=2, evaluate_every=1)
    first = trainer(tmp_path / "run", data, config, validation=data).run()
    assert first.best is not None
    other = drawn(tmp_path / "other", seed=9)
    for options in ({"validation": other}, {"validation": data, "config": replace(config, best="bbox_AP50")}):
        run = trainer(tmp_path / "run", data, resume=True, **{"config": config, **options})
        assert run.notes == ["evaluated on other pictures or by another figure than before: the best is sought anew"]
        outcome = run.run()
        assert outcome.best == (outcome.summary[run.config.best], 2)
        assert trainer(tmp_path / "run", data, resume=True, **{"config": config, **options}).notes == []


def test_the_best_outlasts_a_resume_without_validation_and_a_state_of_before(tmp_path: Path, data: CocoDataset) -> None:
    config = replace(SIX, iterations=2, evaluate_every=1)
    first = trainer(tmp_path, data, config, validation=data).run()
    without = trainer(tmp_path, data, replace(config, evaluate_every=0), resume=True)
    assert without.run().best == first.best
    without._save()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for _ in range(2):
        again = trainer(tmp_path, data, config, validation=data, resume=True)
        assert (again._best, again.notes) == (first.best, [])
        state.pop("judge", None)  # as an earlier version left it
        torch.save(state, tmp_path / "state.pt")


def test_a_figure_of_objects_that_are_not_there_is_refused(tmp_path: Path, data: CocoDataset) -> None:
    config = replace(SIX, best="segm_APl")  # the drawn objects are small
    with pytest.raises(
        ValueError, match=r"best: expected a figure of objects in .*\.json, got segm_APl, of none there"
    ):
        trainer(tmp_path / "run", data, config, validation=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["cut", "size"])
def test_a_bad_picture_to_evaluate_on_is_told_before_the_first_update(tmp_path: Path, fault: str) -> None:
    data, held_out = drawn(tmp_path / "a"), drawn(tmp_path / "b", seed=1)
    path = held_out.records[2].path
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:300])
    else:
        Image.new("RGB", (7, 9)).save(path)
    run = trainer(tmp_path / "run", data, validation=held_out)
    with pytest.raises(PictureError, match=path.name):
        run.run()
    assert run.iteration == 0


def test_boxes_decide_where_there_are_no_masks(tmp_path: Path, data: CocoDataset) -> None:
    boxes = CocoDataset(data.annotations, data.records[0].path.parent, boxes_only=True)
    config = replace(SIX, iterations=1, best="segm_AP50", save_every=1)
    outcome = trainer(tmp_path, boxes, config, start=begin(replace(TINY, mask_head=None)), validation=boxes).run()
    assert outcome.best == (outcome.summary["bbox_AP50"], 1)
    assert not any(name.startswith("segm") for name in outcome.summary)
    (line, _) = lines(tmp_path)
    assert "mask" not in line
    assert line["loss"] == pytest.approx(sum(line[name] for name in ("rpn_cls", "rpn_box", "cls", "box")))


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bfloat16"}, {"precision": "float16"}, {"polygons": True}, {"deterministic": True}],
    ids=str,
)
def test_other_ways_to_train_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = drawn(tmp_path / "data", kinds=("polygon",), crowd=False)
    run = trainer(tmp_path / "out", data, replace(SIX, iterations=2, log_every=1, **changes))
    before = final(run)
    assert run.run().reason == "finished"
    assert not torch.are_deterministic_algorithms_enabled()
    assert any(not torch.equal(x, before[name]) for name, x in final(run).items())
    for line in lines(tmp_path / "out"):
        assert all(math.isfinite(value) for name, value in line.items() if name != "gradient_norm")
    if run.scaler.is_enabled():
        state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
        assert state["scaler"] == run.scaler.state_dict()
        assert state["scaler"]["scale"] > 0


def test_what_is_frozen_stays(tmp_path: Path, data: CocoDataset) -> None:
    start = begin()
    before = {name: x.clone() for name, x in start.model.state_dict().items()}
    run = trainer(tmp_path, data, replace(SIX, iterations=2, norms="live", frozen_stages=2, warmup=0), start=start)
    run.run()
    moved = {name for name, x in final(run).items() if not torch.equal(x, before[name])}
    still = set(before) - moved
    assert {name for name in still if name.startswith("backbone.")} == {
        name for name in before if name.startswith(("backbone.stem", "backbone.stages.0"))
    }
    assert any(name.startswith("backbone.stages.1") and "running_var" in name for name in moved)


def spoil(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    """The example of that number, from 0, is not a number."""
    augment, calls = Augment.__call__, iter(range(1000))

    def spoilt(self: Augment, *arguments: Any) -> Example:
        example = augment(self, *arguments)
        if next(calls) == wanted:
            example.picture = np.full(example.picture.shape, np.nan, np.float32)
        return example

    monkeypatch.setattr(Augment, "__call__", spoilt)


def test_a_loss_that_is_no_number_stops_and_names_the_pictures(
    tmp_path: Path, data: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = trainer(tmp_path / "two", data, replace(SIX, schedule="constant", iterations=2))
    two.run()
    config = replace(SIX, schedule="constant", iterations=4)
    run = trainer(tmp_path / "out", data, config)
    with monkeypatch.context() as patch:
        spoil(patch, 5)
        with pytest.raises(FloatingPointError) as caught:
            run.run()
    text = str(caught.value)
    assert text.startswith("iteration 2: expected finite losses, got rpn_cls nan")
    assert text.count(".png") == 2
    assert_same(final(run), final(two))
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["iteration"] == 3
    assert_same(state["model"], final(two))
    again = trainer(tmp_path / "out", data, config, resume=True)
    assert again.run().reason == "finished"
    assert [line["iteration"] for line in lines(tmp_path / "out")] == [2, 4]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_skips_the_update(tmp_path: Path, data: CocoDataset, optimizer: str) -> None:
    config = replace(SIX, iterations=2, log_every=1, clip_norm=1.0, warmup=0)
    config = replace(config, optimizer=optimizer, learning_rate=1e-3, weight_decay=0.1)
    seen: list[dict[str, Tensor]] = []
    run = trainer(tmp_path, data, config, watch=lambda iteration, line: None if line else seen.append(final(run)))
    before, gradients = final(run), iter((math.inf, 1.0))
    run.model.fpn.get_parameter(next(name for name, _ in run.model.fpn.named_parameters())).register_hook(
        lambda gradient: gradient * next(gradients)
    )
    run.run()
    assert_same(before, seen[0])
    assert any(not torch.equal(x, before[name]) for name, x in seen[1].items())
    first, second = lines(tmp_path)
    assert first["gradient_norm"] is None
    assert second["gradient_norm"] > 0


def test_a_loss_that_is_no_number_leaves_an_earlier_state(
    tmp_path: Path, data: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, data, replace(SIX, save_every=1))
    spoil(monkeypatch, 5)
    with pytest.raises(FloatingPointError, match="what was saved last is in"):
        run.run()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["iteration"] == 2


def test_an_evaluation_that_fails_loses_nothing(
    tmp_path: Path, data: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    expected = trainer(straight, data, validation=data)
    expected.run()
    with monkeypatch.context() as patch:
        patch.setattr("trimask.engine.training.trainer.detect", lambda *_: (_ for _ in ()).throw(OSError("a picture")))
        with pytest.raises(OSError, match="a picture"):
            trainer(parts, data, validation=data).run()
    assert (parts / "last.safetensors").is_file()
    again = trainer(parts, data, validation=data, resume=True)
    assert again.run().reason == "finished"
    assert_same(final(again), final(expected))
    assert lines(parts) == lines(straight)
    assert (parts / "best.safetensors").is_file()


def test_the_validation_has_ids_of_its_own(tmp_path: Path, data: CocoDataset) -> None:
    content = json.loads(data.annotations.read_text())
    for entry in (*content["categories"], *content["annotations"]):
        name = "category_id" if "category_id" in entry else "id"
        entry[name] = 100 - entry[name]
    (path := tmp_path / "other.json").write_text(json.dumps(content))
    other = CocoDataset(path, data.records[0].path.parent, like=data)
    runs = [trainer(tmp_path / name, data, validation=x) for name, x in (("a", data), ("b", other))]
    assert runs[0].run().summary == runs[1].run().summary
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patch reaches forked workers alone")
def test_a_dead_worker_is_reported(tmp_path: Path, data: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CocoDataset, "__getitem__", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"a worker process of the loader died before iteration 0: .*fewer workers"):
        trainer(tmp_path, data, replace(SIX, workers=1)).run()


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path, data: CocoDataset) -> None:
    trainer(tmp_path, data, replace(SIX, iterations=1)).run()
    with pytest.raises(FileExistsError, match="expected a folder without a run, found one; resume it or name another"):
        trainer(tmp_path, data, replace(SIX, iterations=1))
    other = replace(SIX, iterations=1, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"got other train\.learning_rate: 0\.01 before, 0\.5 now$"):
        trainer(tmp_path, data, other, resume=True)
    with pytest.raises(ValueError, match=r"got other augment\.flip: .*; model\.detection"):
        trainer(
            tmp_path,
            data,
            replace(SIX, iterations=1),
            augment=AugmentConfig(crop=0.3),
            start=begin(replace(TINY, detection=replace(TINY.detection, max_detections=7))),
            resume=True,
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start": begin(replace(TINY, class_names=("a", "b", "c")))}, "data: expected the model's classes"),
        ({"start": begin(replace(TINY, mask_head=None))}, "data: expected masks for a model with a mask head"),
        ({"config": replace(SIX, batch=3), "processes": replace(ALONE, count=2)}, "batch: expected a multiple of"),
        (
            {"config": replace(SIX, norms="synchronised"), "processes": replace(ALONE, count=2)},
            "norms: expected frozen or live ones on a CPU",
        ),
    ],
    ids=["classes", "masks", "batch", "norms"],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, data: CocoDataset, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, data, **options)


def changed(data: CocoDataset, path: Path, change: Callable[[dict[str, Any]], Any]) -> CocoDataset:
    content = json.loads(data.annotations.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return CocoDataset(path, data.records[0].path.parent)


def test_masks_are_not_learned_from_boxes_alone(tmp_path: Path, data: CocoDataset) -> None:
    boxes = changed(
        data, tmp_path / "boxes.json", lambda content: [x.update(segmentation=[]) for x in content["annotations"]]
    )
    with pytest.raises(ValueError, match=r"boxes\.json: expected masks to learn, got boxes alone: .*--no-masks"):
        trainer(tmp_path / "a", boxes)
    assert not (tmp_path / "a").exists()
    boxes.boxes_only = True
    trainer(tmp_path / "b", boxes, start=begin(replace(TINY, mask_head=None)))


def test_data_that_teaches_nothing_is_refused_at_once(tmp_path: Path, data: CocoDataset) -> None:
    crowds = changed(
        data, tmp_path / "crowds.json", lambda content: [x.update(iscrowd=1) for x in content["annotations"]]
    )
    with pytest.raises(ValueError, match=r"crowds\.json: expected objects to learn, got none but 12 marked as crowds"):
        trainer(tmp_path / "out", crowds)
    nowhere = CocoDataset(data.annotations, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"annotations\.json: expected its pictures, found none such as .*nowhere"):
        trainer(tmp_path / "out", nowhere)


def test_a_validation_that_cannot_be_evaluated_is_refused_at_once(tmp_path: Path, data: CocoDataset) -> None:
    boxes = changed(data, tmp_path / "boxes.json", lambda content: content["annotations"][2].update(segmentation=[]))
    with pytest.raises(ValueError, match=r"boxes\.json: annotation \d+: expected a segmentation, got none"):
        trainer(tmp_path / "out", data, validation=boxes)
    lacking = changed(
        data, tmp_path / "lacking.json", lambda content: content["images"][1].update(file_name="gone.png")
    )
    told = r"lacking\.json: expected all its pictures, 1 are missing, such as .*gone\.png"
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path / "out", data, validation=lacking)


def test_data_and_validation_have_masks_where_the_model_has(tmp_path: Path, data: CocoDataset) -> None:
    boxes = CocoDataset(data.annotations, data.records[0].path.parent, boxes_only=True)
    with pytest.raises(ValueError, match="validation: expected masks for a model with a mask head"):
        trainer(tmp_path / "masks", data, validation=boxes)
    with pytest.raises(ValueError, match=r"validation: expected masks .*, and boxes only for one without"):
        trainer(tmp_path / "boxes", boxes, start=begin(replace(TINY, mask_head=None)), validation=data)


def test_patience_is_with_evaluations() -> None:
    with pytest.raises(ValueError, match=r"patience: expected 0 unless evaluate_every is set, .*, got 3"):
        replace(SIX, patience=3)


def test_norms_that_learn_need_an_epsilon(tmp_path: Path, data: CocoDataset) -> None:
    bare = replace(TINY, backbone=replace(TINY.backbone, norm_eps=0.0))
    with pytest.raises(ValueError, match="norm_eps: expected more than 0 for norms that learn"):
        trainer(tmp_path, data, replace(SIX, norms="live"), start=begin(bare))
    trainer(tmp_path, data, start=begin(bare))


def test_the_classes_of_the_validation_fit(tmp_path: Path, data: CocoDataset) -> None:
    other = CocoDataset(data.annotations, data.records[0].path.parent, category_ids=(7, 3, 90))
    with pytest.raises(ValueError, match="validation: expected the model's classes"):
        trainer(tmp_path, data, validation=other)


def test_a_group_that_the_caller_has_joined_is_used_and_left_open() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        with processes("cpu") as group:
            assert (group.rank, group.count) == (1, 3)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
    with processes("cpu") as group:
        assert (group.rank, group.count) == (0, 1)


@pytest.mark.parametrize(
    ("joined", "local", "given", "expected"),
    [(True, None, "cuda", 3), (True, "5", "cuda:2", 2), (False, "5", "cuda", 5), (False, None, "cuda:2", 2)],
)
def test_which_gpu(monkeypatch: pytest.MonkeyPatch, joined: bool, local: str | None, given: str, expected: int) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    if joined:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with processes(given) as group:
            assert group.device == torch.device("cuda", expected) == chosen[0]
    finally:
        if joined:
            torch.distributed.destroy_process_group()
