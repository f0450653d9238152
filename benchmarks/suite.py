"""``pytest benchmarks``: the quick cases under pytest-benchmark, every implementation beside its peers.

An output is checked before it is timed. What cannot take part is skipped and says why. Options are pytest-benchmark's
own: ``--benchmark-json``, ``--benchmark-compare``. It has no interleaving and no ceilings: figures that are published
come from ``python -m trimask.benchmarks``.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

# Absolute: pytest imports this file by its path, perhaps from a checkout that is installed under another name.
from trimask.benchmarks import bench_models, bench_ops, bench_training
from trimask.benchmarks.comparison import Comparison

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")

Make = Callable[[], Comparison]
_SECONDS = 0.3  # for an implementation, where that is more than the fewest rounds
_FEWEST = 3  # rounds

MAKERS: dict[str, Make] = {}
for _subject, _name, _, _make in bench_ops.plan(quick=True):
    MAKERS[f"{_subject}: {_name}"] = _make
MAKERS["models: bundled model"] = partial(bench_models.comparison, bench_models.QUICK)
MAKERS["training: bundled model"] = partial(bench_training.comparison, bench_training.QUICK)


@cache
def _comparison(name: str) -> Comparison:
    return MAKERS[name]()


@cache
def _expected(name: str) -> Any:
    """What the first implementation gives that is there."""
    one = _comparison(name)
    return next(call() for call in one.implementations.values() if callable(call))


def _cases() -> Iterator[Any]:
    for name in MAKERS:
        one = _comparison(name)
        for implementation in (*one.implementations, *one.absent):
            yield pytest.param(name, implementation, id=f"{name}, {implementation}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.benchmark(max_time=_SECONDS, min_rounds=_FEWEST)
@pytest.mark.parametrize(("name", "implementation"), [*_cases()])
def test_speed(name: str, implementation: str, benchmark: Any) -> None:
    one = _comparison(name)
    call = one.implementations.get(implementation)
    if not callable(call):
        pytest.skip(one.absent.get(implementation, "not installed"))
    got = call()
    differs = one.differing(implementation)(_expected(name), got)
    assert differs == "", f"{implementation}: {differs}"
    benchmark.group = name
    benchmark.extra_info["implementation"] = implementation
    benchmark(call)
