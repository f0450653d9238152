"""What a picture costs in operations, launches, multiplications and memory stays within the committed budgets.

`python -m trimask.benchmarks.budgets --update` writes new ones: a change that costs more says why. No time is measured.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimask.benchmarks import budgets
from trimask.benchmarks.budgets import SUBJECTS, TOLERANCES, exceeded, tolerance_for
from trimask.benchmarks.counting import Counts, counting
from trimask.engine.inference.layers import BiasedConv, has_onednn
from trimask.engine.model import mask_rcnn
from trimask.engine.model.fpn import FPN

VERSION, BUDGETS = budgets.read(budgets.FILE)
on_torch = pytest.mark.skipif(torch.cuda.is_available(), reason="budgets are of machines without a GPU")


@cache
def counted(name: str) -> Counts:
    return SUBJECTS[name]()


@on_torch
@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_costs_more_than_its_budget(name: str) -> None:
    if name == "people, CPU" and not has_onednn(torch.float32):
        pytest.skip("budgets of the CPU are of processors that oneDNN knows")
    if name == "people, CPU" and not budgets.PICTURE.is_file():
        pytest.skip(f"needs {budgets.PICTURE.name} of a checkout")
    assert exceeded(BUDGETS[name], counted(name), tolerance_for(VERSION)) == []


def test_every_budget_has_its_subject() -> None:
    assert set(BUDGETS) == set(SUBJECTS)
    for name, budget in BUDGETS.items():
        assert sum(x.total() for x in budget.operations.values()) > 50, name
        assert 0 < budget.peak_bytes < budget.bytes, name


# The gate sees what is planted.


def again(name: str) -> list[str]:
    return exceeded(BUDGETS[name], SUBJECTS[name](), TOLERANCES[0])


def after(owner: Any, function: str, planted: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen to what a function gives."""
    original = getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda *inputs, **options: planted(original(*inputs, **options)))


@on_torch
def test_a_copy_of_the_smallest_map_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    after(FPN, "forward", lambda maps: [*maps[:4], maps[4].clone()], monkeypatch)
    for name, budget in BUDGETS.items():
        if "FPN, launches" in name or name == "people, launches of a GPU":
            over = again(name)
            total = budget.operations["backbone"].total()
            assert f"backbone: {total + 1} operations instead of {total} (aten.clone +1)" in over


@on_torch
def test_a_copy_into_the_other_layout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    after(mask_rcnn, "pool", lambda pooled: pooled.contiguous(), monkeypatch)
    over = again("people, launches of a GPU")
    assert [line.partition(":")[0] for line in over] == ["boxes", "masks", "bytes"]
    assert "aten.clone +2" in over[0]  # there and back


@on_torch
def test_a_result_that_lives_too_long_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    after(BiasedConv, "forward", lambda x: kept.append(x) or x, monkeypatch)
    (over,) = again("people, launches of a GPU")
    assert over.startswith("peak_bytes: ")


def test_each_amount_has_a_limit() -> None:
    budget = Counts({"masks": Counter(a=100)}, flops=1000, bytes=2000, peak_bytes=500)
    exact, rough = TOLERANCES
    assert exceeded(budget, copy.deepcopy(budget), exact) == []
    assert exceeded(budget, Counts({"masks": Counter(a=99)}, 900, 1900, 400), exact) == []  # less is never too much
    assert exceeded(budget, Counts({"masks": Counter(a=99, b=2)}), exact) == [
        "masks: 101 operations instead of 100 (b +2)"
    ]
    assert exceeded(budget, Counts({"masks": Counter(a=105)}), rough) == []
    assert exceeded(budget, Counts({"masks": Counter(a=106)}), rough)
    assert exceeded(budget, Counts({"new": Counter(a=1)}), rough) == ["new: 1 operations instead of 0 (a +1)"]
    assert exceeded(budget, Counts({}, flops=1100), exact) == ["flops: 1100 instead of 1000 (+10.0%)"]
    assert exceeded(budget, Counts({}, bytes=2010), exact) == ["bytes: 2010 instead of 2000 (+0.5%)"]
    assert exceeded(budget, Counts({}, peak_bytes=510), rough) == []


def test_another_torch_gets_more_room() -> None:
    assert tolerance_for(torch.__version__) == TOLERANCES[0]
    assert tolerance_for("2.1.0") == TOLERANCES[1]


def test_what_counts() -> None:
    x = torch.ones(10, 10)
    with torch.no_grad(), counting() as counts:
        y = x.t()[:5]  # views
        z = torch.empty(7)  # memory alone
        z.fill_(1)
        counts.mark("filled")
        w = y + 1
        del w
        v = x @ x
        counts.mark("added")
        v.relu_()
    assert counts.operations == {
        "filled": Counter({"aten.fill_": 1}),
        "added": Counter({"aten.add": 1, "aten.mm": 1}),
        "rest": Counter({"aten.relu_": 1}),
    }
    assert counts.flops == 2 * 10**3
    assert counts.bytes == 4 * (7 + 50 + 100)
    assert counts.peak_bytes == 4 * (7 + 100)


def test_fused_layers_count_as_what_they_fuse() -> None:
    if not has_onednn(torch.float32):
        pytest.skip("needs oneDNN")
    x, weight = torch.ones(2, 4, 8, 8), torch.ones(6, 2, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 2)
    convolve = torch.ops.mkldnn._convolution_pointwise
    with torch.no_grad(), counting() as counts:
        y = convolve(x, weight, None, *geometry, "none", [], "")
        convolve.binary(x, y, weight, None, *geometry, "add", 1.0, "relu", [], "")
        torch.ops.mkldnn._linear_pointwise(torch.ones(5, 7), torch.ones(3, 7), None, "none", [], "")
    assert counts.flops == 2 * (2 * 2 * 6 * 64 * 2 * 9) + 2 * 5 * 3 * 7


def test_the_command_says_what_is_over_and_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "budgets.json"
    costs = Counts({"all": Counter(a=2)}, 30, 20, 10)
    monkeypatch.setattr(budgets, "FILE", file)
    monkeypatch.setattr(budgets, "SUBJECTS", {"one": lambda: costs})
    assert budgets.main([]) == 1
    assert "OVER one: all: 2 operations instead of 0 (a +2)" in capsys.readouterr().out
    assert budgets.main(["--update"]) == 0
    assert budgets.read(file) == (torch.__version__.partition("+")[0], {"one": costs})
    assert budgets.main([]) == 0
    costs.operations["all"]["b"] += 1
    assert budgets.main([]) == 1
    assert "(b +1)" in capsys.readouterr().out
    assert json.loads(file.read_text())["budgets"]["one"]["operations"] == {"all": {"a": 2}}
