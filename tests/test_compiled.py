"""The Triton kernels compiled ahead of time for every architecture: registers, spills, widths, and how they round."""

from importlib.util import find_spec

import pytest

from trimask.benchmarks.compiled import TARGETS, Kernel, compile_everywhere, read_table, table

if not find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Kernel]]:
    return compile_everywhere()


def test_every_case_compiles_for_every_target(kernels: dict[str, list[Kernel]]) -> None:
    cases = {target: [(kernel.case, kernel.kernel) for kernel in found] for target, found in kernels.items()}
    assert set(cases) == set(TARGETS)
    assert all(found == cases["sm_90"] for found in cases.values())


def test_nothing_spills(kernels: dict[str, list[Kernel]]) -> None:
    """On Turing, with half the threads a multiprocessor, nothing is promised."""
    spilling = [(target, k.case, k.kernel, k.spills) for target, found in kernels.items() for k in found if k.spills]
    assert [entry for entry in spilling if entry[0] != "sm_75"] == []


def test_rounding_is_ieee_where_it_is_promised(kernels: dict[str, list[Kernel]]) -> None:
    found = [kernel for target in TARGETS if target.startswith("sm_") for kernel in kernels[target]]
    assert any(kernel.fused for kernel in found) or any(not kernel.fused for kernel in found)
    assert {(k.case, k.kernel): k.inexact for k in found if not k.fused and k.inexact} == {}


def test_the_table_is_true(kernels: dict[str, list[Kernel]]) -> None:
    import triton

    version, text = read_table()
    if version != triton.__version__:
        pytest.skip(f"the table was written with triton {version}, and this is {triton.__version__}")
    assert text == table(kernels)
