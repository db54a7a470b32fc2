"""Several processes that train one model, one part of every batch each (started by torchrun).

Order, augmentation and schedule are those of one process: a step's images are divided among the workers and
their gradients summed, weighted by the number of images. The weights differ from those of one process by the
rounding of another order of summation, and are the same in all workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn

__all__ = ["SINGLE", "Workers"]


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

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all workers, in float64."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

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

    def wait(self) -> None:
        """Until all workers are here."""
        if self.count > 1:
            distributed.barrier()


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


SINGLE = Workers()
