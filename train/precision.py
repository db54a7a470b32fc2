"""What holds while a model trains: the precision of its forward pass, deterministic algorithms, threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from train.choices import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`auto` → "bf16" where the device multiplies it in hardware, else "fp32"; others as they are."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux: no way to ask that every torch ≥ 2.10 has
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def forward_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions in float32 as they say: on a GPU torch rounds their factors to ten bits (TF32), unlike all others.

    A vision transformer's only one makes its patches' tokens, so this costs no time.
    """
    cudnn = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set for convolutions alone, by somebody who means it
        yield
        return
    try:
        cudnn.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32 = before


@contextlib.contextmanager
def training_mode(
    model: nn.Module, device: torch.device, *, precision: str, deterministic: bool, threads: int = 0
) -> Iterator[None]:
    """What holds during training alone and is put back after it.

    In bf16 on a CPU attention runs in separate operations: forward and backward are 2.4 times as fast as with the fused
    kernel at 65 tokens and 1.4 times at 197 (ViT-S/16); in fp32 the two are alike. Everywhere: deterministic algorithms
    on request, `threads` of torch's (0: as many as it has), and the caller's random state untouched. (Flushing denormal
    numbers to zero made no difference to the speed, and would depend on which threads exist when it is set.)

    On a GPU torch has one thread on the host, which does little but launch and copy: threads that wait for each other's
    part of a copy spin, and hold up those of the probe's solver and whoever else wants their processors.
    """
    separate = device.type == "cpu" and precision == "bf16"
    fused = [module for module in model.modules() if separate and getattr(module, "fused_attn", False) is True]
    before, had_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), float32_convolutions():
        try:
            for module in fused:
                cast(Any, module).fused_attn = False
            torch.set_num_threads(1 if device.type == "cuda" else threads or had_threads)
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            for module in fused:
                cast(Any, module).fused_attn = True
            torch.set_num_threads(had_threads)
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
