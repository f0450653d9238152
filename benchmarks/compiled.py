"""What the Triton kernels become on every architecture, compiled ahead of time: no GPU is needed.

    python -m trimask.benchmarks.compiled            compile, and compare with the table in docs/compiled.md
    python -m trimask.benchmarks.compiled --write    compile, and write that table

The cases call the public ops on CPU tensors. Triton is given a driver that names a device and launches nothing, so that
what is compiled is what the launchers really ask for: signatures, constants, alignments, options.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["TARGETS", "Kernel", "compile_everywhere", "compile_for", "read_table", "table"]

# (backend, architecture, threads of a warp), as Triton names them.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
TABLE = Path(__file__).resolve().parents[1] / "docs" / "compiled.md"


@dataclass(frozen=True)
class Kernel:
    """One kernel of one case on one target.

    Attributes:
        case: What was asked of which op.
        kernel: The kernel's name.
        registers: Per thread; vector registers on AMD.
        spills: Instructions that load or store spilled registers; spilled vector registers on AMD.
        shared: Bytes of shared memory.
        load_bits, store_bits: The widest access to global memory, read from PTX; None on AMD.
        inexact: What its machine code rounds otherwise than IEEE 754 says: approximate divisions and roots, float
            products and sums that may be fused. Read from PTX, so empty on AMD.
        fused: Whether the launcher allows products and sums to be fused.
    """

    case: str
    kernel: str
    registers: int
    spills: int
    shared: int
    load_bits: int | None
    store_bits: int | None
    inexact: list[str]
    fused: bool


def compile_everywhere() -> dict[str, list[Kernel]]:
    """The kernels of all cases by target, each target in a process of its own, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(_in_a_process, TARGETS), strict=True))


def _in_a_process(target: str) -> list[Kernel]:
    environment = {**os.environ, "TRIMASK_KERNELS": "triton", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trimask.benchmarks.compiled", "--target", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{target}: {done.stderr}")
    return [Kernel(**kernel) for kernel in json.loads(done.stdout)]


def compile_for(target: str) -> list[Kernel]:
    """The kernels of all cases on one target, each once; in a process that does not interpret Triton."""
    from .compiled_cases import CASES

    kernels = []
    for case, run in CASES.items():
        with _recording(target) as compiled:
            run()
        if not compiled:
            raise RuntimeError(f"{case}: no kernel was launched")
        unique = {kernel.hash: kernel for kernel in compiled}
        kernels += [_inspect(case, kernel) for kernel in unique.values()]
    return kernels


class _Driver:
    """As much of a device as compiling for it takes."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _recording(target: str) -> Iterator[list[Any]]:
    """Compile what is launched, for a target, into the list; launch nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_Driver(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def _inspect(case: str, compiled: Any) -> Kernel:
    metadata = compiled.metadata
    common = {"case": case, "kernel": metadata.name, "fused": metadata.enable_fp_fusion}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{n}:\s+(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        return Kernel(
            **common,
            registers=registers,
            spills=spills,
            shared=metadata.shared,
            load_bits=None,
            store_bits=None,
            inexact=[],
        )
    registers, spills = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Kernel(
        **common,
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        load_bits=_widest("ld", ptx),
        store_bits=_widest("st", ptx),
        inexact=_inexact(ptx),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled accesses, by the programs that come with Triton."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool, "--dump-resource-usage", file.name)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        # Disassembling takes longer than compiling: only what has memory to spill to.
        code = _output(tool.with_name("nvdisasm"), "-c", file.name) if stack else ""
    return registers, len(re.findall(r"\b(?:LDL|STL)\b", code))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _widest(instruction: str, ptx: str) -> int:
    """Bits a thread of the widest access to global memory."""
    widths = re.findall(rf"\b{instruction}\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in widths), default=0)


def _inexact(ptx: str) -> list[str]:
    approximate = re.findall(r"\b(?:(?:div|sqrt)\.(?:full|approx)|rcp|rsqrt)[a-z.]*\.f32", ptx)
    fusible = re.findall(r"(?<!\.)\b(?:mul|add|sub)\.f(?:32|64)\b", ptx)  # `atom.add.f32` is another matter
    return sorted({*approximate, *fusible})


def table(kernels: dict[str, list[Kernel]]) -> str:
    """The page of docs."""
    import triton

    lines = [
        "# The kernels, compiled",
        "",
        f"Compiled by triton {triton.__version__} without a GPU. Each cell has the registers per thread, then, where "
        "there are any, + spilled accesses (on AMD, spilled registers) and bytes of shared memory. The last two "
        "columns are the widest load from and store to global memory on sm_90, in bits. This page is written by "
        "`python -m trimask.benchmarks.compiled --write`; a test keeps it up to date.",
        "",
        "| op and case | kernel | " + " | ".join(kernels) + " | load | store |",
        "|---|---|" + "---|" * (len(kernels) + 2),
    ]
    for row in zip(*kernels.values(), strict=True):
        hopper = row[list(kernels).index("sm_90")]
        cells = [_cell(kernel) for kernel in row]
        widths = f"{hopper.load_bits or '-'} | {hopper.store_bits or '-'}"
        lines.append(f"| {hopper.case} | `{hopper.kernel}` | {' | '.join(cells)} | {widths} |")
    return "\n".join([*lines, ""])


def _cell(kernel: Kernel) -> str:
    spills = f" + {kernel.spills}" if kernel.spills else ""
    return f"{kernel.registers}{spills}{f', {kernel.shared} B' if kernel.shared else ''}"


def read_table() -> tuple[str, str]:
    """The version of triton that the page was written with, and the page."""
    text = TABLE.read_text()
    found = re.search(r"triton (\S+) with", text)
    assert found
    return found[1], text


def main() -> int:
    """Compile, and write the page or compare with it; 1 where they differ."""
    parser = argparse.ArgumentParser("trimask.benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"write docs/{TABLE.name}")
    options = parser.parse_args()
    if options.target:
        print(json.dumps([asdict(kernel) for kernel in compile_for(options.target)]))
        return 0
    text = table(compile_everywhere())
    if options.write:
        TABLE.write_text(text)
        return 0
    print(text)
    return int(text != TABLE.read_text())


if __name__ == "__main__":
    sys.exit(main())
