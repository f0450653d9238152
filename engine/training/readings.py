"""What updates gave, read late enough that no device is waited for."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Reading", "Window"]


class Reading(NamedTuple):
    """What an update gave, on its way to the host: losses, the gradient's norm, whether a process was asked to stop."""

    values: Tensor
    ready: Any  # the event of the copy's end; None where values are there
    iteration: int
    paths: list[str]

    @classmethod
    def of(cls, values: Tensor, iteration: int, paths: list[str]) -> "Reading":
        if values.device.type != "cuda":
            return cls(values, None, iteration, paths)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(host, ready, iteration, paths)

    def wait(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()


@dataclass
class Window:
    """Sums of what updates gave."""

    sums: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, values: list[float]) -> None:
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(values), values, strict=True)]
        self.count += 1

    def mean(self) -> list[float]:
        return [x / self.count for x in self.sums]
