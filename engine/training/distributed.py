"""The processes of a run: one alone, or those that ``torchrun`` starts."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "processes"]

PATIENCE = timedelta(hours=12)  # with one who evaluates alone; of a process that died torchrun tells the others
_kept: list[Any] = []  # groups, for good: if a model's reducer lets go of one last, torch may wait for itself there


@dataclass(frozen=True)
class Processes:
    """This process among all: ``rank`` of ``count``, and the device that it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, x: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.count > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.count
        return x

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values of the first."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, in the order of the ranks, for every one of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(device: str | torch.device) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started, if it has, or those that the caller has joined already."""
    joined = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(device)
    if device.type == "cuda":
        own = device.index if device.index is not None else torch.cuda.current_device()
        device = torch.device("cuda", own if joined else int(os.environ.get("LOCAL_RANK", own)))
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(0, 1, device)
        return
    if joined:
        yield Processes(dist.get_rank(), count, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    _kept.append(dist.group.WORLD)
    try:
        yield Processes(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()
