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


# (target, case, kernel): half of a pointer, stored and loaded once by a thread, outside of every loop; and what is
# launched on Hopper alone.
SPILLING = {
    ("sm_120", "RoIAlign, fp64, adaptive", "_roi_align_kernel"),
    ("gfx1100", "RoIAlign, separable, fp16, 7 x 7, adaptive", "_roi_align_separable_kernel"),
    ("gfx1100", "RoIAlign, separable, bf16, 14 x 14, 2 samples", "_roi_align_separable_kernel"),
}


def test_nothing_spills(kernels: dict[str, list[Kernel]]) -> None:
    """On Turing, with half the threads a multiprocessor, nothing is promised."""
    _require_the_version_of_the_table()
    spilling = {(target, k.case, k.kernel) for target, found in kernels.items() for k in found if k.spills}
    assert {entry for entry in spilling if entry[0] != "sm_75"} == SPILLING


def test_rounding_is_ieee_where_it_is_promised(kernels: dict[str, list[Kernel]]) -> None:
    found = [kernel for target in TARGETS if target.startswith("sm_") for kernel in kernels[target]]
    assert {(k.case, k.kernel): k.inexact for k in found if not k.fused and k.inexact} == {}


@pytest.mark.parametrize(
    ("case", "kernel", "access", "bits"),
    [
        ("RoIAlign, ", "_roi_align_kernel", "load_bits", 128),
        ("RoIAlign, ", "_roi_align_kernel", "store_bits", 128),
        ("RoIAlign, ", "_roi_align_separable_kernel", "store_bits", 128),
        ("RoIAlign, ", "_turning_kernel", "load_bits", 128),
        ("RoIAlign, ", "_turning_kernel", "store_bits", 128),
        ("Paste", "_paste_kernel", "store_bits", 128),
        ("Proposals", "_proposals_kernel", "store_bits", 128),
        ("Bias", "_add_bias_kernel", "load_bits", 128),
        ("Bias", "_add_bias_kernel", "store_bits", 128),
        ("Bias", "_pool_kernel", "load_bits", 128),
    ],
)
def test_memory_is_read_and_written_by_vectors(
    kernels: dict[str, list[Kernel]], case: str, kernel: str, access: str, bits: int
) -> None:
    for target in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        found = [k for k in kernels[target] if k.case.startswith(case) and k.kernel == kernel]
        assert found
        assert [(k.case, getattr(k, access)) for k in found if getattr(k, access) < bits] == []


def _require_the_version_of_the_table() -> str:
    import triton

    version, text = read_table()
    if version != triton.__version__:
        pytest.skip(f"the table was written with triton {version}, and this is {triton.__version__}")
    return text


def test_the_table_is_true(kernels: dict[str, list[Kernel]]) -> None:
    assert _require_the_version_of_the_table() == table(kernels)
