"""`trimask benchmark`: what is wrong or got slower ends with status 1, noise with 0. No timing is asserted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimask.benchmarks import bench_weights, harness, machine, measuring, runtimes, tables
from trimask.benchmarks.bench_weights import Work
from trimask.benchmarks.changes import judge
from trimask.benchmarks.fresh import in_its_own_process
from trimask.benchmarks.harness import Row, Samplers, compare
from trimask.benchmarks.matching import Found
from trimask.benchmarks.networks import random_detectron2, random_mmdetection
from trimask.benchmarks.peers import PEERS, peer
from trimask.benchmarks.peers import detectron2 as detectron2_peer
from trimask.benchmarks.peers import mmdetection as mmdetection_peer
from trimask.benchmarks.peers import torchvision as torchvision_peer
from trimask.benchmarks.results import Results, read_results, write_json
from trimask.cli import main
from trimask.engine.model.checkpoints import load_model
from trimask.engine.model.config import ResNetConfig
from trimask.engine.model.mask_rcnn import MaskRCNN
from trimask.engine.model.presets import detectron2, detectron2_c4, detectron2_dc5, mmdet, mmdet_c4, torchvision_v1
from trimask.kernels.paste_rule import PasteRule

PATH = os.pathsep.join(filter(None, sys.path))  # where the package is, also for another process
HERE = {"machine": "m", "cores": 2, "gpu": None, "versions": {"torch": "2"}}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # the command sets them: give them back
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class FakeClock:
    """Each call says itself how many seconds it takes."""

    device, bandwidth = "cpu", None

    def samplers(self, calls: Any) -> Samplers:
        return Samplers(lambda: calls[0]().seconds, {})


def taking(seconds: Callable[[], float] | float) -> Callable[[], SimpleNamespace]:
    return lambda: SimpleNamespace(seconds=seconds() if callable(seconds) else seconds)


def noisy(seconds: float, seed: int = 0, spread: float = 0.3) -> Callable[[], SimpleNamespace]:
    rng = np.random.default_rng(seed)
    return taking(lambda: seconds * float(rng.uniform(1 - spread, 1 + spread)))


def rows_of(rounds: int = 9, case: str = "c", **functions: Any) -> list[Row]:
    return compare("op", case, functions, lambda a, b: "", rounds=rounds, threads=1, clock=FakeClock())


def results(*rows: Row, **environment: Any) -> Results:
    return Results({**HERE, **environment}, None, list(rows))


def test_a_slowed_implementation_is_told_by_its_ratio() -> None:
    old = results(*rows_of(torchvision=noisy(2.0, 1), trimask=noisy(1.0, 2)))
    slow = results(*rows_of(torchvision=noisy(2.0, 3), trimask=noisy(2.0, 4)))
    (found,) = judge(old, slow, 0.2).slower
    assert (found.row.implementation, found.rule, found.peer) == ("trimask", "interval", "torchvision")
    assert 0.35 < found.speed < 0.7
    assert judge(old, slow, 0.2).worse
    fast_machine = results(*rows_of(torchvision=noisy(1.0, 3), trimask=noisy(1.0, 4)))
    (found,) = judge(old, fast_machine, 0.2).slower  # in no more time than before
    assert 0.35 < found.speed < 0.7
    back = judge(slow, old, 0.2)
    assert not back.worse
    assert [one.beyond_noise for one in back.judged] == [True]


def test_noise_and_a_machine_in_another_state_are_not_told() -> None:
    for seed in range(100):
        old = results(*rows_of(torchvision=noisy(2.0, seed), trimask=noisy(1.0, seed + 1000)))
        busy = results(*rows_of(torchvision=noisy(6.0, seed + 2000), trimask=noisy(3.0, seed + 3000)))
        found = judge(old, busy, 0.2)
        assert not found.worse, seed
        assert found.drift is not None
        assert 2 < found.drift < 4.5


def test_another_peer_than_torchvision_is_a_yardstick_too() -> None:
    old = results(*rows_of(pycocotools=noisy(2.0, 1), trimask=noisy(1.0, 2)))
    busy = results(*rows_of(pycocotools=noisy(6.0, 3), trimask=noisy(3.0, 4)))
    slow = results(*rows_of(pycocotools=noisy(2.0, 3), trimask=noisy(5.0, 4)))
    assert not judge(old, busy, 0.2).worse
    (found,) = judge(old, slow, 0.2).slower
    assert (found.rule, found.peer) == ("spread", "pycocotools")


def test_without_a_peer_the_drift_of_the_others_counts() -> None:
    other = {"case": "other", "torchvision": noisy(1.0, 5)}
    old = results(*rows_of(trimask=noisy(1.0, 1)), *rows_of(**other))
    busy = results(*rows_of(trimask=noisy(3.0, 2)), *rows_of(case="other", torchvision=noisy(3.0, 6)))
    slow = results(*rows_of(trimask=noisy(3.0, 2)), *rows_of(**other))
    assert not judge(old, busy, 0.2).worse
    (found,) = judge(old, slow, 0.2).slower
    assert (found.rule, found.peer) == ("alone", "")
    assert judge(results(*old.rows[:1]), results(*busy.rows[:1]), 0.2).worse  # nothing tells that the machine is busy


def test_a_change_within_the_margin_is_noise_however_sure() -> None:
    old, new = (results(*rows_of(torchvision=taking(2.0), trimask=taking(x))) for x in (1.0, 1.15))
    assert not judge(old, new, 0.2).worse
    assert judge(old, new, 0.1).worse


def test_few_rounds_are_not_judged() -> None:
    old, slow = (results(*rows_of(5, torchvision=taking(2.0), trimask=taking(x))) for x in (1.0, 9.0))
    found = judge(old, slow, 0.2)
    assert not found.worse
    assert [row.implementation for row in found.unjudged] == ["trimask"]
    assert found.judged == []


def test_several_threads_on_a_busy_machine_are_not_judged() -> None:
    old, slow = (rows_of(torchvision=taking(2.0), trimask=taking(x)) for x in (1.0, 9.0))
    several = [[replace(row, threads=2) for row in rows] for rows in (old, slow)]
    assert judge(results(*several[0], load=2.0), results(*several[1], load=2.0), 0.2).worse
    for loads in ((4.9, 0.5), (0.5, 4.9)):
        found = judge(*(results(*rows, load=load) for rows, load in zip(several, loads, strict=True)), 0.2)
        assert not found.worse
        assert len(found.unjudged) == 1
        assert "a load of 4.9 on 2 cores" in found.warnings[0]
    assert judge(results(*old, load=4.9), results(*slow), 0.2).worse  # one thread waits for nobody


def test_what_is_in_one_run_only_or_has_lost_its_time() -> None:
    a, b = rows_of(a=taking(1.0), trimask=taking(1.0)), rows_of(case="d", trimask=taking(1.0))
    wrong = replace(a[1], p20_ms=None, p50_ms=None, p80_ms=None, correct=False)
    found = judge(results(*a), results(a[0], wrong, *b), 0.2)
    assert (found.lost, found.only_old, found.only_new, found.worse) == ([wrong], [], b, True)
    absent = replace(wrong, correct=None, note="not installed")
    found = judge(results(*a, *b), results(a[0], absent), 0.2)
    assert (found.lost, found.only_old, found.only_new, found.worse) == ([absent], b, [], False)


def test_what_cannot_be_compared_is_refused() -> None:
    (row,) = rows_of(trimask=taking(1.0))
    for fact in ({"machine": "n"}, {"gpu": "H100"}, {"cores": 4}):
        with pytest.raises(ValueError, match=f"compare: expected results of the same {next(iter(fact))}, got"):
            judge(results(row), results(row, **fact), 0.2)
    for other in ({"device": "cuda"}, {"dtype": "bfloat16"}, {"threads": 2}):
        with pytest.raises(ValueError, match="compare: expected results of the same device, dtype and threads, got op"):
            judge(results(row), results(replace(row, **other)), 0.2)
    with pytest.raises(ValueError, match="expected each row once, got twice op: c: trimask"):
        judge(results(row, row), results(row), 0.2)
    both = results(row, replace(row, dtype="bfloat16"))
    assert judge(results(row), both, 0.2).only_new == both.rows[1:]  # a row more is no other setting
    assert judge(results(row), results(row, versions={"torch": "3"}), 0.2).warnings == ["torch: 2 then, 3 now"]


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    file = tmp_path / "old.json"
    rows = rows_of(torchvision=noisy(2.0, 1, 0.1), trimask=noisy(1.0, 2, 0.1))
    write_json(file, rows, {"environment": machine.environment(), "ceilings": None})
    return file


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ceilings, and no model: what is measured is up to the test."""
    monkeypatch.setattr(measuring, "with_ceilings", lambda device, quick, facts: facts.update(ceilings=None))
    monkeypatch.setattr(bench_weights, "run", lambda work, say: iter(()))


def test_a_slow_down_planted_in_a_file_is_caught(
    old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(old_file.read_text())
    same = tmp_path / "new.json"
    same.write_text(json.dumps(content))
    assert main(["benchmark", "--read", str(same), "--compare", str(old_file)]) == 0
    assert "0 of 1 slower than in" in capsys.readouterr().out
    row = content["rows"][1]
    for name in ("ratio_to_torchvision", "ratio_low", "ratio_high"):
        row[name] /= 2
    for name in ("p20_ms", "p50_ms", "p80_ms"):
        row[name] *= 2
    same.write_text(json.dumps(content))
    assert main(["benchmark", "--read", str(same), "--compare", str(old_file)]) == 1
    printed = capsys.readouterr().out
    assert "SLOWER  op: c: trimask" in printed
    assert "0.50x" in printed
    assert "by rule 'interval'" in printed
    assert "1 of 1 slower than in" in printed
    assert main(["benchmark", "--read", str(same)]) == 0


@pytest.mark.usefixtures("quiet")
def test_a_slowed_kernel_is_caught_by_the_next_run(
    old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slowness = 1.0

    def ops(clock: Any, threads: int, quick: bool) -> Iterator[list[Row]]:
        yield rows_of(torchvision=noisy(2.0, 3), trimask=noisy(slowness, 4))

    monkeypatch.setattr(measuring, "ops", ops)
    arguments = ["benchmark", "--threads", "1", "--device", "cpu", "--compare", str(old_file)]
    new = tmp_path / "new.json"
    assert main([*arguments, "--json", str(new)]) == 0
    assert len(read_results(new).rows) == 2
    slowness = 3.0
    assert main(arguments) == 1
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.usefixtures("quiet")
def test_a_wrong_kernel_is_called_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def ops(clock: Any, threads: int, quick: bool) -> Iterator[list[Row]]:
        functions = {"torchvision": lambda: [0, 1], "trimask": lambda: [1, 0]}
        yield compare("nms", "c", functions, lambda a, b: "" if a == b else "other indices", rounds=2, threads=threads)

    monkeypatch.setattr(measuring, "ops", ops)
    file = tmp_path / "results.json"
    assert main(["benchmark", "--threads", "1", "--device", "cpu", "--json", str(file)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trimask "))
    assert "WRONG" in line
    assert "other indices" in line
    assert main(["benchmark", "--read", str(file)]) == 1


@pytest.mark.usefixtures("quiet")
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    old_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ops(*_: Any) -> Iterator[list[Row]]:
        pytest.fail("measured")
        yield []

    monkeypatch.setattr(measuring, "ops", ops)
    assert main(["benchmark", "--threads", "2", "--device", "cpu", "--compare", str(old_file)]) == 1
    assert "compare: expected results with 2 threads, got them with 1" in capsys.readouterr().err
    old_file.write_text(old_file.read_text().replace('"schema": 1', '"schema": 9'))
    assert main(["benchmark", "--threads", "1", "--device", "cpu", "--compare", str(old_file)]) == 1
    assert f"{old_file}: schema: expected 1, got 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "nothere.jpg"], "expected a picture, found no file at 'nothere.jpg'"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--batches", "0"], "batches: expected at least 1 each, got 0"),
        (["--margin", "80"], "margin: expected more than 0 and less than 50 percent, got 80"),
        (["--read", "x.json", "--quick"], "read: expected neither weights nor --json nor --quick"),
        (["--report", "--compare", "x.json"], "report: expected neither weights nor --read"),
        (["--read", "no-such.json"], "no-such.json"),
        (["no-such-weights", "--device", "cpu", "--threads", "1", "--quick"], "no-such-weights"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["640", "0x10", "4x", "axb"])
def test_bad_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--sizes", size])
    assert stopped.value.code == 2
    assert "expected height x width, such as 480x640" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet")
def test_a_page_of_this_run_and_of_other_files(
    old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "ops", lambda *_: iter([rows_of(torchvision=taking(2.0), trimask=taking(1.0))]))
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    assert main(["benchmark", "--threads", "1", "--device", "cpu", "--html", str(page)]) == 0
    assert "<html" in page.read_text()
    assert len(read_results(page.with_suffix(".json")).rows) == 2  # the page is of a file
    assert main(["benchmark", "--report", str(old_file), "--html", str(other)]) == 0
    assert "<html" in other.read_text()
    assert "table" not in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "documents", lambda: [Path("README.md")])
    monkeypatch.setattr(tables, "rewrite", lambda: [Path("README.md")])
    assert main(["benchmark", "--report"]) == 0
    assert capsys.readouterr().out == "wrote benchmark.html\nrewrote the tables of README.md\n"
    monkeypatch.setattr(tables, "documents", list)  # of an installed package
    assert main(["benchmark", "--report"]) == 0
    assert capsys.readouterr().out == "wrote benchmark.html\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model on small pictures, in two rounds."""

    def load(weights: str) -> MaskRCNN:
        model = load_model(weights)
        resize = replace(model.config.input.resize, min_size=128, max_size=192)
        model.config = replace(model.config, input=replace(model.config.input, resize=resize))
        return model

    monkeypatch.setattr(bench_weights, "load_model", load)
    monkeypatch.setattr(bench_weights, "_QUICK_ROUNDS", 2)
    monkeypatch.setattr(bench_weights, "in_its_own_process", lambda *_, **__: {"first_ms": 7.0, "peak_bytes": 8})


@pytest.mark.usefixtures("small")
def test_programs_that_are_missing_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_weights, "peer", lambda name: None)
    monkeypatch.setattr(bench_weights, "optional", lambda name: None)
    monkeypatch.setattr(bench_weights, "_export", lambda *_: "not exported: no onnx")
    (rows,) = bench_weights.run(Work(sizes=((96, 128),), device="cpu", quick=True), lambda text: None)
    notes = {row.implementation: row.note for row in rows}
    assert notes == {
        "torchvision": "not installed",
        "Detectron2": "not installed",
        "MMDetection": "not installed",
        "trimask": "nothing to compare with",
        "torchvision, backbone compiled": "not installed",
        "trimask, compiled": "not measured: a quick run compiles nothing",
        "trimask, onnxruntime": "not installed",
        "trimask, openvino": "not installed",
    }
    (ours,) = (row for row in rows if row.p50_ms is not None)
    assert (ours.case, ours.variable) == ("people, 96 x 128, batch 1", {"batch": 1, "height": 96, "width": 128})


@pytest.mark.usefixtures("small")
def test_the_bundled_model_beside_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    work = Work(sizes=((128, 160),), batches=(2,), device="cpu", backends=("torch",), quick=True)
    (rows,) = bench_weights.run(work, lambda text: None)
    absent = [rows.pop(1), rows.pop(1)]
    assert [(row.implementation, row.p50_ms) for row in absent] == [("Detectron2", None), ("MMDetection", None)]
    assert [row.implementation for row in rows] == ["torchvision", "trimask"]
    assert all(row.correct and row.ratio_to_torchvision for row in rows), rows
    assert all((row.first_ms, row.peak_bytes) == (7.0, 8) for row in rows)

    right = bench_weights.detecting

    def moved(*arguments: Any) -> Callable[[], list[Found]]:
        return lambda: [one._replace(boxes=one.boxes + 4) for one in right(*arguments)()]

    monkeypatch.setattr(bench_weights, "detecting", moved)
    (rows,) = bench_weights.run(work, lambda text: None)
    assert [row.correct for row in rows] == [True, None, None, False]
    assert rows[3].p50_ms is None


def test_each_program_has_its_first_call_and_memory_in_a_process_of_its_own() -> None:
    pytest.importorskip("torchvision")
    work = Work(device="cpu")
    for maker in (("trimask_call",), ("peer_call", "torchvision")):
        fields = in_its_own_process(*bench_weights._alone(maker[0], work, *maker[1:]), (64, 96), 1, [], threads=1)
        assert set(fields) == {"first_ms", "peak_bytes"}, fields
        assert fields["first_ms"] > 0


def test_a_runtime_has_them_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_weights, "optional", lambda name: object())
    monkeypatch.setattr(bench_weights, "open_runtime", lambda *_: None)
    work = Work(device="cpu", backends=("onnxruntime", "openvino"))
    for program in bench_weights._exported(work, Path("model.onnx")).values():
        assert isinstance(program, bench_weights._Program)
        maker, *settings = program.maker
        assert maker == "runtimes.runtime_call"
        signature(runtimes.runtime_call).bind(*settings, (64, 96), 1, [])
    code = "import sys, trimask.benchmarks.fresh, trimask.benchmarks.runtimes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": PATH}).returncode == 0


@pytest.mark.usefixtures("small")
def test_lower_precision_on_a_cpu_is_beside_float32() -> None:
    pytest.importorskip("torchvision")
    work = Work(sizes=((96, 128),), device="cpu", dtype="bfloat16", backends=("torch",), quick=True)
    (rows,) = bench_weights.run(work, lambda text: None)
    dtypes = {row.implementation: row.dtype for row in rows}
    assert dtypes == {**dict.fromkeys(("torchvision", "Detectron2", "MMDetection"), "float32"), "trimask": "bfloat16"}


def test_an_exported_file_says_why_torch_takes_no_part() -> None:
    programs = bench_weights._programs
    work = Work("model.onnx", device="cpu", backends=("torch", "compiled"))
    found, standard = programs(work, Path(), lambda text: None)
    assert standard is None
    assert set(found.values()) == {"an exported file, which torch does not read"}
    with pytest.raises(ValueError, match="expected no min_size, which the export has fixed"):
        programs(replace(work, options={"min_size": 3}), Path(), lambda text: None)


def test_torchvision_runs_what_means_the_same_there() -> None:
    v1 = torchvision_v1(("a",), (1,))
    assert torchvision_peer.unlike(load_model("people").config) == torchvision_peer.unlike(v1) == ""
    assert torchvision_peer.unlike(replace(v1, mask_head=None)) == "mask_head"
    assert torchvision_peer.unlike(replace(v1, anchors=replace(v1.anchors, aspect_ratios=(1.0,)))) == "anchors"
    assert torchvision_peer.unlike(replace(v1, backbone=ResNetConfig(norm_groups=32))) == "backbone"
    assert "paste" in torchvision_peer.unlike(detectron2(("a",), (1,)))


def test_detectron2_runs_what_means_the_same_there() -> None:
    config = detectron2(("a",), (1,))
    few = replace(config, rpn=replace(config.rpn, post_nms=50), detection=replace(config.detection, max_detections=5))
    assert detectron2_peer.unlike(config) == detectron2_peer.unlike(few) == ""
    assert detectron2_peer.unlike(replace(config, paste=PasteRule.TORCHVISION)) == "paste"
    assert detectron2_peer.unlike(replace(config, pool=replace(config.pool, sampling_ratio=2))) == "pool"
    assert detectron2_peer.unlike(replace(config, backbone=ResNetConfig((1, 1, 1, 1)))) == "backbone"
    assert "backbone" in detectron2_peer.unlike(load_model("people").config)
    assert "anchors" in detectron2_peer.unlike(torchvision_v1(("a",), (1,)))
    assert (
        detectron2_peer.unlike(detectron2_c4(("a",), (1,)))
        == detectron2_peer.unlike(detectron2_dc5(("a",), (1,)))
        == ""
    )


def test_mmdetection_runs_what_means_the_same_there() -> None:
    config = mmdet(("a",), (1,))
    caffe = replace(config.input, std=(1.0, 1.0, 1.0))
    assert mmdetection_peer.unlike(config) == mmdetection_peer.unlike(replace(config, input=caffe)) == ""
    assert mmdetection_peer.unlike(detectron2(("a",), (1,))) == "input, pool"
    two = replace(config.anchors, sizes=((32.0, 64.0),) * 5)
    assert mmdetection_peer.unlike(replace(config, anchors=two)) == "anchors"
    assert mmdetection_peer.unlike(mmdet_c4(("a",), (1,))) == ""
    assert mmdetection_peer.unlike(detectron2_dc5(("a",), (1,))) == "fpn"


def test_a_peer_that_cannot_be_imported_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    assert peer("torchvision") is torchvision_peer
    monkeypatch.setitem(PEERS, "torchvision", "torchvision.no_such_part")
    assert peer("torchvision") is None


PEER_WEIGHTS = {"Detectron2": ("detectron2", random_detectron2), "MMDetection": ("mmdet", random_mmdetection)}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", PEER_WEIGHTS)
def test_weights_of_another_peer_beside_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, network = PEER_WEIGHTS[name]
    pytest.importorskip(package)
    source = network()
    monkeypatch.setattr(bench_weights, "load_model", lambda *_, **__: source)
    work = Work(sizes=((96, 128),), device="cpu", backends=("torch",), quick=True)
    (rows,) = bench_weights.run(work, lambda text: None)
    found = {row.implementation: row for row in rows}
    assert "of another kind" in found["torchvision"].note
    assert all(found[one].correct and found[one].p50_ms for one in (name, "trimask")), rows


def test_where_nothing_is_found_nothing_differs() -> None:
    nothing = [Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), None)]
    assert bench_weights._differing(nothing, nothing, None) == ""
    one = [Found(np.ones((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), None)]
    assert bench_weights._differing(nothing, one, None) != ""


def test_the_fake_clock_times_as_the_real_ones_do() -> None:
    row, _ = rows_of(torchvision=taking(2.0), trimask=taking(1.0))
    assert (row.p50_ms, row.rounds) == (2000.0, 9)
    assert isinstance(harness.WallClock().samplers([lambda: None]).main(), float)
