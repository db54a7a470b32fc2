"""Tensors between host and device without waiting for the device, which has work to do meanwhile.

A copy from ordinary memory to a GPU waits for everything that was launched before it, and so does looking at a number;
copies from and to pinned memory take their place in a queue. On a CPU there is nothing to wait for, and the same calls
hand the memory over as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Copies of one kind that may be on their way at once: enough for the link to the host to be busy while the next layers
# are computed, and few enough that what waits stays a fraction of a batch.
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A contiguous tensor on its way to the host; `copied` is None where it is there already."""

    host: torch.Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> torch.Tensor:
        """The tensor, when it has arrived. May be called from another thread."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host


def pinned(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Host memory from which a copy to `device` is asynchronous (`.to(device, non_blocking=True)`)."""
    return values.pin_memory() if torch.device(device).type == "cuda" else values


def uploaded(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Host values on the device. Pinned memory is not used again before its copy has run: torch sees to that."""
    return pinned(values, device).to(device, non_blocking=True)


def downloaded(values: torch.Tensor) -> HostCopy:
    """Start to bring a few numbers to the host, behind all that was launched before."""
    return _copied(values) if values.is_cuda else HostCopy(values)


def _copied(values: torch.Tensor) -> HostCopy:
    """A copy on the present stream."""
    host = _on_its_way(values)
    copied = torch.cuda.Event()
    copied.record()
    return HostCopy(host, copied)


def _on_its_way(values: torch.Tensor) -> torch.Tensor:
    """A buffer of its own from torch's cache of pinned memory, to which the present stream copies.

    torch gives a buffer out again only after the caller dropped it and the copy has run, so it may be kept for long.
    """
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


@dataclass(frozen=True, slots=True)
class HostStacks:
    """Tensors on their way to the host, those of one dtype and shape as one."""

    hosts: list[torch.Tensor]
    places: list[tuple[int, int]]  # of each tensor: which of `hosts`, and where in it
    copied: torch.cuda.Event

    def wait(self) -> list[torch.Tensor]:
        """The tensors, when all have arrived. May be called from another thread."""
        self.copied.synchronize()
        parts = [stack.unbind() for stack in self.hosts]
        return [parts[stack][place] for stack, place in self.places]


@dataclass(frozen=True, slots=True)
class HostTensors:
    """Tensors that are on the host already."""

    hosts: list[torch.Tensor]

    def wait(self) -> list[torch.Tensor]:
        return self.hosts


class HostCopies:
    """Copies from one device to the host, on a stream of their own.

    A copy waits for the work that makes its tensor and for nothing else, and the forward pass does not wait for it. A
    tensor that is being copied may be dropped: its memory is given back when the copy has run, not before.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Tensors of one kind that are worth keeping on their way; on a CPU each has arrived at once.
        self.depth = 0 if self._stream is None else _DEPTH

    def start(self, values: torch.Tensor, precision: torch.dtype | None = None, *, shared: bool = False) -> HostCopy:
        """Start to bring `values` of any strides, which nobody may write to afterwards, to the host; contiguous there.

        On a GPU they are narrowed to `precision`; on a CPU they keep their own, since whoever stores them narrows them
        chunk by chunk. Memory that is `shared` with the model is copied on a CPU: a view would keep the whole of it.
        """
        if values.device.type != self.device.type:
            raise ValueError(f"values are on {values.device}, expected {self.device}")
        values = values.detach()
        if self._stream is None:
            return HostCopy(values.clone(memory_format=torch.contiguous_format) if shared else values.contiguous())
        # Waits on the device, not here, and for what was launched so far: not for the layers that follow.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            # Narrowed on the device, so that half as much crosses. The narrow tensor is this stream's own: freed at
            # once, its memory goes to later work of this stream alone, which comes after the copy.
            narrow = values if precision is None else values.to(precision)
            arriving = _copied(narrow)
            # The values belong to the model's stream, which would reuse their memory as soon as they are dropped.
            values.record_stream(self._stream)
        return arriving

    def start_all(self, tensors: Sequence[torch.Tensor]) -> HostStacks | HostTensors:
        """Start to bring many small tensors in a few copies: on a GPU those of one dtype and shape go as one."""
        if self._stream is None:
            return HostTensors([values.detach().contiguous() for values in tensors])
        groups: dict[tuple[torch.dtype, torch.Size], tuple[int, list[torch.Tensor]]] = {}
        places = []
        for values in tensors:
            stack, group = groups.setdefault((values.dtype, values.shape), (len(groups), []))
            places.append((stack, len(group)))
            group.append(values)
        stacks = [torch.stack(group).detach() for _, group in groups.values()]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            hosts = [_on_its_way(values) for values in stacks]
            copied = torch.cuda.Event()
            copied.record()
        for values in stacks:
            values.record_stream(self._stream)
        return HostStacks(hosts, places, copied)
