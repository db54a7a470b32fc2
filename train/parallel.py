"""Several processes that train one model, one part of every batch each (started by torchrun).

Order, augmentation and schedule are those of one process: a step's images are divided among the workers and
their gradients summed, weighted by the number of images. The weights differ from those of one process by the
rounding of another order of summation, and are the same in all workers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import distributed, nn

__all__ = ["SINGLE", "Workers", "joined"]


@dataclass(frozen=True)
class Workers:
    """This process among those that train together.

    Args:
        rank: its place, from 0; the first one writes.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Workers:
        """Those of the process group that torchrun's processes joined; this one alone without a group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return SINGLE
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, indices: np.ndarray) -> np.ndarray:
        """This worker's part of a step's images; empty where there are more workers than images."""
        return np.array_split(indices, self.count)[self.rank]

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Put the sums over all workers into `values`, which is on the device they train on."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum of all workers' gradients into each of them; a missing gradient counts as zero."""
        if self.count == 1:
            return
        trained = list(parameters)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def tell(self, answer: bool) -> bool:
        """The first worker's answer, in all of them."""
        if self.count == 1:
            return answer
        tensor = torch.tensor([float(answer)], device=_device())
        distributed.broadcast(tensor, src=0)
        return bool(tensor.item())

    def wait(self) -> None:
        """Until all workers are here."""
        if self.count > 1:
            distributed.barrier()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Workers]:
    """The workers that torchrun started, their group joined for the length of a `with` block.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, a GPU each).
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A worker may have to wait while the first one decodes a data set; torchrun ends all when one fails.
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield Workers.current()
    finally:
        distributed.destroy_process_group()


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


SINGLE = Workers()
