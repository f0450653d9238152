"""Train in child processes that are killed at random moments and resumed; as a script, so that none has used torch.

Arguments: a folder, how many to kill, the seed of the moments, and those of ``trimask train`` but for ``--out``.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from trimask.cli import main


def started(*arguments: str) -> int:
    """A child that trains."""
    child = os.fork()
    if not child:
        status = 1
        try:
            torch.set_num_threads(1)
            status = main(["train", *arguments])
        finally:
            os._exit(status)
    return child


def finished(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"expected a run that ends well, got status {status}")


def killings(folder: Path, count: int, seed: int, arguments: list[str]) -> None:
    straight, broken = folder / "straight", folder / "broken"
    began = time.monotonic()
    finished(started(*arguments, "--out", str(straight)))
    seconds = time.monotonic() - began
    moments, killed = random.Random(seed), 0
    while killed < count:
        child = started(*arguments, "--resume", "--out", str(broken))
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        if status:
            raise RuntimeError(f"expected a folder to resume from, got status {status}")
        if not same(straight, broken):
            raise RuntimeError("expected the same end as that of an undisturbed run")
        shutil.rmtree(broken)  # it was over: the next ones are killed in another run
    finished(started(*arguments, "--resume", "--out", str(broken)))


def same(first: Path, second: Path) -> bool:
    states = [torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (first, second)]
    return all(torch.equal(x, states[1][name]) for name, x in states[0].items())


if __name__ == "__main__":
    killings(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
