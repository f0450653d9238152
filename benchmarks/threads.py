"""How many threads the maths libraries use, said before they are loaded. Needs no torch."""

import os

__all__ = ["VARIABLES", "available", "limit_threads"]

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def available() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(count: int) -> None:
    """OpenMP, MKL and the OpenBLAS under numpy read these once, when they are loaded: call it before torch is."""
    for variable in VARIABLES:
        os.environ[variable] = str(count)
