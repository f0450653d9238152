"""One model in a process of its own: how long the first call takes, and how much memory the process had at most.

Neither can be measured side by side: the second model in a process finds everything loaded, and memory has one peak.
That process loads what the model needs, and torch only where it needs it.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from ..engine.inference.memory import resident_bytes
from .threads import VARIABLES

__all__ = ["in_its_own_process"]

_SECONDS = 600.0
_PACKAGE = str(__package__)


def in_its_own_process(maker: str, *arguments: Any, threads: int) -> dict[str, Any]:
    """Fields of a `Row`, `first_ms` and `peak_bytes`, or a `note` that says why there are none.

    Args:
        maker: "module.function" of the benchmarks, which loads a model and gives a call.
        *arguments: of it, as JSON has them.
        threads: what torch and BLAS may use.
    """
    command = [sys.executable, "-m", f"{_PACKAGE}.fresh", maker, json.dumps(arguments)]
    variables = dict.fromkeys(VARIABLES, str(threads))
    path = os.pathsep.join(filter(None, sys.path))  # where this process found the package
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"note": f"first call: {error.stderr.strip().splitlines()[-1][:200] if error.stderr else error}"}
    except subprocess.TimeoutExpired:
        return {"note": f"first call: not done in {_SECONDS:.0f} s"}


def _measure(maker: str, arguments: list[Any]) -> dict[str, Any]:
    module, _, function = maker.partition(".")
    call = getattr(import_module(f".{module}", _PACKAGE), function)(*arguments)
    start = time.perf_counter()
    call()
    first_ms = 1e3 * (time.perf_counter() - start)
    return {"first_ms": first_ms, "peak_bytes": resident_bytes()}


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    print(json.dumps(_measure(sys.argv[1], json.loads(sys.argv[2]))))
