"""Several processes that do one piece of work, started by torchrun: batches of images are divided among them.

In training, order, augmentation and schedule are those of one process: a step's images are divided among the workers
and their gradients summed, weighted by the number of images. The weights differ from those of one process by the
rounding of another order of summation, and are the same in all workers.

What the workers tell each other is JSON, and goes by way of the CPU; gradients go where they are.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import distributed, nn

from train.errors import InputError, WorkerLostError, brief
from train.processes import let_speak, several_processes, speaks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

# A worker may have to wait while the first one decodes a data set; torchrun ends all when one fails.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Workers:
    """This process among those that work together; the first one writes what is not divided."""

    rank: int = 0
    count: int = 1
    # Where they keep what all of them see; None for a single process.
    store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, indices: np.ndarray) -> np.ndarray:
        """This worker's part of a step's images; empty where there are more workers than images."""
        return np.array_split(indices, self.count)[self.rank]

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Put the sums over all workers into `values`, wherever they are."""
        if self.count > 1:
            with _collective():
                distributed.all_reduce(values)
        return values

    def deal(self, items: Sequence[T]) -> list[T]:
        """This worker's own of a list of things to do, dealt out in turn; empty where there are too few."""
        return list(items[self.rank :: self.count])

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
        with _collective():
            distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def share_weights(self, module: nn.Module) -> None:
        """Give every worker the first one's parameters and buffers; the module is still on the CPU."""
        if self.count == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            content = tensor.detach().reshape(-1).contiguous()
            with _collective():
                distributed.broadcast(content.view(torch.uint8), src=0)
            tensor.data.copy_(content.view(tensor.shape))

    def tell(self, value: T) -> T:
        """The first worker's JSON value, in all of them; the others give any of its type."""
        if self.count == 1:
            return value
        content = _bytes(value if self.first else None)
        size = torch.tensor([len(content)])
        with _collective():
            distributed.broadcast(size, src=0)
            if not self.first:
                content = torch.empty(int(size), dtype=torch.uint8)
            distributed.broadcast(content, src=0)
        received: T = json.loads(content.numpy().tobytes())
        return received

    def gather(self, value: T) -> list[T]:
        """Every worker's JSON value, by rank, in all of them."""
        if self.count == 1:
            return [value]
        content = _bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _collective():
            distributed.all_gather(sizes, torch.tensor([len(content)]))
            longest = int(max(sizes))
            rooms = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.count)]
            distributed.all_gather(rooms, nn.functional.pad(content, (0, longest - len(content))))
        return [json.loads(room[: int(size)].numpy().tobytes()) for room, size in zip(rooms, sizes, strict=True)]

    def wait(self) -> None:
        """Until all workers are here."""
        self.add_up(torch.zeros(1))


class Tally:
    """A number that all workers add to, by a `name` that is the same in all of them, and no other tally's."""

    def __init__(self, workers: Workers, name: str) -> None:
        self._store = workers.store
        self._name = name
        self._here = 0

    def add(self, amount: int) -> int:
        """Add this worker's part; what all of them have added so far. Waits for nobody."""
        self._here += amount
        return self._here if self._store is None else self._store.add(self._name, amount)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Workers]:
    """The workers that torchrun started, their group joined for the length of a `with` block.

    A process that was started alone is alone. On "cuda" each process takes the GPU of its local rank. Of several that
    fail inside, the first one says it (`train.processes.speaks`), and those that it leaves alone end with its code.
    WorkerLostError: another process has ended.
    """
    if not several_processes():
        yield SINGLE
        return
    if device == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise InputError(
                f"torchrun started {here} processes on a machine of {gpus} GPUs; give each a GPU of its own"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    store.set_timeout(_PATIENCE)
    # torchrun may start them again (--max-restarts); what those before have left in its store is not theirs.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=PrefixStore(f"group {attempt}", store),
        rank=rank,
        world_size=count,
        timeout=_PATIENCE,
    )
    kept = PrefixStore(f"workers {attempt}", store)
    workers = Workers(rank, count, kept)
    failed = Tally(workers, "failed")
    try:
        yield workers
    except Exception as error:
        try:
            let_speak(failed.add(1) == 1)
            if speaks():
                kept.set("exit code", str(getattr(error, "exit_code", 1)))
            elif isinstance(error, WorkerLostError):  # torchrun reports the process that it sees end first
                error.exit_code = int(kept.get("exit code"))
        except RuntimeError:  # what torchrun itself keeps is gone: nobody else will say it
            let_speak(True)
        raise
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """What all workers do together; when one of them is gone, that is said as it is."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError(
            f"another process of this run ended before its work was done ({brief(error)}); run the same "
            "command again, it goes on from what was finished"
        ) from error


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, allow_nan=False), "utf-8"), dtype=torch.uint8)


SINGLE = Workers()
