"""Tensors between host and device without waiting for the device, which has work to do meanwhile.

A copy from ordinary memory to a GPU waits for everything that was launched before it, and so does looking at a number;
copies from and to pinned memory take their place in the queue. On a CPU there is nothing to wait for, and the same
calls hand the memory over as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def pinned(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Host memory from which a copy to `device` is asynchronous (`.to(device, non_blocking=True)`)."""
    return values.pin_memory() if torch.device(device).type == "cuda" else values


def uploaded(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Host values on the device. Pinned memory is not used again before its copy has run: torch sees to that."""
    return pinned(values, device).to(device, non_blocking=True)


def downloaded(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start to bring a few numbers [n] to the host; the function returned waits for them."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return [float(value) for value in host.tolist()]

    return wait
