"""The benchmarks of whole models are honest: wrong detections get no time. No timing is asserted."""

import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from trimask.benchmarks import (
    bench_gpu,
    bench_models,
    bench_training,
    bench_weights,
    compiling,
    fresh,
    gpu_models,
    samples,
    usage,
)
from trimask.benchmarks.device import Bench, precision
from trimask.benchmarks.harness import Row, WallClock
from trimask.benchmarks.installed import optional
from trimask.benchmarks.matching import BFLOAT16, Found, differences, disagreement, summary
from trimask.benchmarks.peers import PEERS, peer
from trimask.engine.model.checkpoints import load_model

BENCH = Bench(WallClock(), quick=True)


def found(np_rng: np.random.Generator, count: int = 8) -> Found:
    corner = 100 * np_rng.random((count, 2), np.float32)
    boxes = np.concatenate([corner, corner + 10 + 20 * np_rng.random((count, 2), np.float32)], 1)
    scores = np.sort(0.3 + 0.6 * np_rng.random(count, np.float32))[::-1].copy()
    return Found(boxes, scores, np_rng.integers(0, 3, count), np_rng.random((count, 20, 20)) > 0.5)


def test_the_same_set_in_another_order_agrees(np_rng: np.random.Generator) -> None:
    one = found(np_rng)
    order = np_rng.permutation(len(one.scores))
    other = Found(*(field[order] for field in one))
    assert disagreement([one], [other]) == ""
    assert summary([one], [other]) == (0.0, 1.0)


@pytest.mark.parametrize("change", ["boxes", "scores", "labels", "masks", "fewer"])
def test_one_detection_that_differs_is_seen(change: str, np_rng: np.random.Generator) -> None:
    one = found(np_rng)
    other = Found(*(field.copy() for field in one))
    if change == "boxes":
        other.boxes[3] += 2
    elif change == "scores":
        other.scores[3] += 2e-3
    elif change == "labels":
        other.labels[3] += 1
    elif change == "masks":
        other.masks[3, :4] ^= True
    else:
        other = Found(*(field[1:] for field in one))
    wrong = 1 if change == "fewer" else 2  # each side has one without an equal
    assert disagreement([one], [other]) == f"{wrong} detections of 8 have no equal"


def test_rounding_at_a_cut_is_excused_and_nothing_is_no_agreement(np_rng: np.random.Generator) -> None:
    one = found(np_rng)
    one.scores[-1] = 0.0505
    assert disagreement([one], [Found(*(field[:-1] for field in one))]) == ""
    nothing = Found(*(field[:0] for field in one))
    assert disagreement([nothing], [nothing]) == "no detection to compare"
    assert disagreement([one], []) == "0 pictures instead of 1"
    assert disagreement([one], [one._replace(masks=None)]) == "masks on one side alone"
    assert summary([nothing], [nothing]) == (0.0, 1.0)
    assert summary([one], [nothing]) == (0.0, 0.0)


def test_lower_precision_is_judged_by_scores_and_by_what_is_found_again(np_rng: np.random.Generator) -> None:
    one = found(np_rng, 20)
    near = one._replace(scores=one.scores + 0.05)
    assert disagreement([one], [near], BFLOAT16) == ""
    assert "apart" in disagreement([one], [near._replace(scores=one.scores + 0.1)], BFLOAT16)
    one = one._replace(labels=np.arange(20))  # no detection passes for another
    far = one.boxes.copy()
    far[:5] += 500
    assert disagreement([one], [one._replace(boxes=far)], BFLOAT16) == "scores 0.0000 apart, 75% found again"


def test_the_cells_of_each_precision_are_those_of_the_grid() -> None:
    found = [case.keywords["point"] for dtype in gpu_models.DTYPES for case in [*gpu_models.cells(False, dtype)][:-1]]
    assert sorted(map(str, found)) == sorted(str(point) for point in gpu_models.grid(False) if not point.tuned)
    assert len(found) == len(set(found))


def test_the_grid_has_every_cell_once_and_the_corners_first() -> None:
    points = gpu_models.grid(quick=False)
    assert len(points) == len(set(points)) == 2 * 2 * 4 * 3 * 4 + 2  # two more are tuned
    assert points[:2] == [gpu_models.Point(), gpu_models.Point(batch=8)]
    assert points[0] == gpu_models.Point(50, "float16", (800, 1344), 1, masks=True)
    assert {point.depth for point in points[: gpu_models.CORNERS]} == {50, 101}
    assert {point.size for point in points[: gpu_models.CORNERS]} == set(gpu_models.SIZES)


def test_the_quick_models_run_and_agree() -> None:
    """On a CPU, where they are good for nothing else."""
    pytest.importorskip("torchvision")
    groups = list(bench_gpu.run(WallClock(), True, ["models", "compiled"]))
    assert [rows[0].subject for rows in groups] == ["models", "models", "models precision", "models compiled"]
    for rows in groups:
        assert not any(row.correct is False for row in rows), rows
        assert all(row.correct for row in rows if row.implementation == "trimask"), rows
    exact, boxes, lower, compiled = groups
    assert [row.dtype for row in exact] == ["float32"] * 2
    (ours,) = (row for row in exact if row.implementation == "trimask")
    assert list(ours.stages_ms or ()) == ["backbone", "proposals", "boxes", "masks", "run lengths"]
    (ours,) = (row for row in boxes if row.implementation == "trimask")
    assert list(ours.stages_ms or ()) == ["backbone", "proposals", "boxes"]
    assert [row.dtype for row in lower] == ["float32", "bfloat16"]
    assert all("found again" in row.note for row in lower)
    assert [row.implementation for row in compiled][2:] == ["torchvision, backbone compiled", "torchvision, compiled"]


def test_wrong_detections_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    right = gpu_models._ours

    def moved(*arguments: Any, **more: Any) -> Any:
        detections, runs = right(*arguments, **more)
        return detections._replace(boxes=detections.boxes + 3), runs

    monkeypatch.setattr(gpu_models, "_ours", moved)
    point = gpu_models.grid(quick=True)[0]
    peer, ours = gpu_models._point(BENCH, replace(point, batch=1), [])
    assert peer.p50_ms is not None
    assert (ours.correct, ours.p50_ms) == (False, None)
    assert "have no equal" in ours.note


def test_without_torchvision_there_is_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "torchvision", None)
    absent, ours = gpu_models._point(BENCH, replace(gpu_models.grid(quick=True)[0], batch=1), [])
    assert (absent.note, ours.note) == ("not installed", "nothing to compare with")
    assert ours.p50_ms is not None
    assert gpu_models._compiled(BENCH, []) == []


def test_what_there_was_no_time_for_is_named() -> None:
    ((row,),) = bench_gpu.run(WallClock(), True, ["models"], seconds=0)
    assert row.note == "not measured: no time was left"
    assert row.case == "3 more, from ResNet-50 FPN, 2 x 64 x 96 in float32 on"
    assert row.correct is None
    assert gpu_models._unmeasured(BENCH, []) == []
    assert not BENCH.late()
    assert Bench(WallClock(), True, time.monotonic() + 10).late()


def test_precision_is_given_back() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    with precision(tf32=False, tuned=True):
        assert (cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32) == (False, True, False)
    assert (cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32) == before


def test_a_compiler_that_fails_or_takes_too_long_is_no_wrong_result() -> None:
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2)})

    def broken(peer: Any) -> None:
        raise RuntimeError("no triton")

    def endless(peer: Any) -> Any:
        return lambda: time.sleep(60)

    for run, seconds, reason in ((broken, math.inf, "RuntimeError: no triton"), (endless, 0.4, "not compiled within")):
        bench = replace(BENCH, deadline=time.monotonic() + seconds)
        for name, call in compiling.compiled_peers(model, run, bench):
            assert name in ("torchvision, backbone compiled", "torchvision, compiled")
            with pytest.raises(NotImplementedError, match=reason):
                call()


def test_launches_are_kernels_and_not_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        is_user_annotation = False

        def __init__(self, name: str, device: str, annotation: bool = False) -> None:
            self.name, self.is_user_annotation = name, annotation
            self.device_type = getattr(torch.autograd.DeviceType, device)

    events = [Event("conv", "CUDA"), Event("nms", "CUDA"), Event("aten::add", "CPU"), Event("Memcpy HtoD", "CUDA")]
    events += [Event("Memset (Device)", "CUDA"), Event("backbone", "CUDA", True)]

    class Profiler:
        def __init__(self, **_: Any) -> None: ...

        def __enter__(self) -> "Profiler":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def events(self) -> list[Event]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert usage._launches(lambda: None, 2) == 1.0


def test_photographs_are_as_many_and_as_large_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for modules in (["skimage.data"], ["skimage.data", "matplotlib.cbook"], []):
        with monkeypatch.context() as patch:
            patch.setattr(samples, "optional", partial(_without, modules))
            pictures = samples.photographs((40, 60), 7)
        assert [picture.shape for picture in pictures] == [(40, 60, 3)] * 7
        assert all(picture.dtype == np.uint8 for picture in pictures)
        assert not np.array_equal(pictures[0], pictures[-1])


def _without(modules: list[str], name: str) -> Any:
    return None if name in modules else optional(name)


def test_a_model_in_its_own_process_tells_its_first_call_and_memory() -> None:
    pytest.importorskip("skimage")
    case = replace(bench_models.CASES[0], step=4)
    fields = fresh.in_its_own_process("bench_models.trimask_call", *case.arguments(), threads=1)
    assert set(fields) == {"first_ms", "peak_bytes"}, fields
    assert fields["first_ms"] > 0
    if sys.platform != "win32":
        assert fields["peak_bytes"] > 50e6
    broken = fresh.in_its_own_process("bench_models.no_such_call", threads=1)
    assert "no_such_call" in broken["note"]


def test_the_quick_models_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("torchvision")
    monkeypatch.setattr(bench_models, "in_its_own_process", lambda *_, **__: {"first_ms": 7.0, "peak_bytes": 8})
    ((*rows, gpu, one, other, compiled),) = bench_models.run(1, quick=True)
    assert [row.implementation for row in rows][:2] == ["torchvision", "trimask"]
    assert all(row.correct and row.p50_ms for row in rows), rows
    assert all((row.first_ms, row.peak_bytes) == (7.0, 8) for row in rows)
    assert (len(rows) == 3) == bench_models.has_bfloat16()
    for row in rows[2:]:
        assert (row.implementation, row.dtype) == ("trimask, bfloat16", "bfloat16")
        assert "from float32's" in row.note
        assert row.ratio_low is not None  # in the same rounds as torchvision's
    assert [gpu.note, {one.implementation, other.implementation}] == ["needs a GPU", {"Detectron2", "MMDetection"}]
    for row in (one, other):
        assert (row.note == "not installed") == (peer(row.implementation) is None)
    assert (compiled.implementation, compiled.p50_ms) == ("torchvision, backbone compiled", None)
    json.dumps([row.__dict__ for row in rows])


def test_no_number_agrees_with_nothing() -> None:
    terms = {name: torch.tensor(1.0) for name in ("cls", "box")}
    for name in terms:
        broken = terms | {name: torch.tensor(math.nan)}
        assert bench_training.relative_disagreement(terms, broken).startswith(f"{name} nan")
    scores = np.linspace(0.9, 0.2, 100, dtype=np.float32)
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (100, 1))
    one = Found(boxes, scores, np.zeros(100, np.int64), None)
    other = one._replace(scores=np.where(np.arange(100) == 7, np.nan, scores), labels=one.labels + 1)
    assert differences(one, one) == 0
    assert differences(one, other) > 150


def test_the_call_of_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that leaves all as it is."""
    pytest.importorskip("torchvision")
    pytest.importorskip("skimage")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    program = bench_weights._peer(bench_weights.Work(device="cpu"), load_model("people"), "torchvision", compiled=True)
    assert isinstance(program, bench_weights._Program)
    pictures = samples.photographs((96, 128), 1)
    expected = bench_weights.peer_call("torchvision", "people", "cpu", "float32", {}, (96, 128), 1, [])()
    assert disagreement(expected, program.make(pictures)(), None) == ""


def test_each_case_has_one_peer_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trimask_call", "peer_call", "_compiled_call"):
        monkeypatch.setattr(bench_models, name, lambda *_: list)
    monkeypatch.setattr(bench_models, "peer", lambda name: object())
    peers = set()
    for case in bench_models.CASES:
        one = bench_models.comparison(case)
        first = next(iter(one.implementations))
        assert all(one.absent[other] == "left out: other weights" for other in PEERS.keys() - {first})
        peers.add((case.model, first))
    assert peers == {("people", "torchvision"), ("101", "torchvision"), *(("50", name) for name in PEERS)}


def test_wrong_boxes_on_a_cpu_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("torchvision")
    right = bench_models.trimask_call

    def moved(*arguments: Any) -> Any:
        call = right(*arguments)
        return lambda: [one._replace(boxes=one.boxes + 4) for one in call()]

    monkeypatch.setattr(bench_models, "trimask_call", moved)
    monkeypatch.setattr(bench_models, "has_bfloat16", lambda: False)
    monkeypatch.setattr(bench_models, "in_its_own_process", lambda *_, **__: {})
    rows: list[Row]
    (rows,) = bench_models.run(1, quick=True)
    assert [row.correct for row in rows][:2] == [True, False]
    assert rows[1].p50_ms is None


def test_a_step_of_training_is_timed_only_where_its_losses_agree() -> None:
    pytest.importorskip("torchvision")
    steps = bench_training.comparison(bench_training.Case("", "people", (64, 96), 2)).implementations
    expected, found = steps["torchvision"](), steps["trimask"]()
    assert bench_training.relative_disagreement(expected, found) == ""
    for name in expected:
        assert name in bench_training.relative_disagreement(expected, {**found, name: 1.02 * found[name]})
    again = steps["trimask"]()
    assert bench_training.relative_disagreement(found, again, 1e-5) == ""  # each call does the same work
