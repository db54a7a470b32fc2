"""Transformer blocks compiled by torch.compile while they train (`train.compile`).

Blocks are compiled where they stand, so that parameters keep their names, and blocks that are alike share one compiled
pass. It is made for one shape, full batches: which code runs then depends on the step alone, never on what ran before,
and a run that goes on takes the same one. Everything else (an epoch's smaller last batch, validation) runs uncompiled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.choices import Compile
from train.errors import InputError

logger = logging.getLogger(__name__)

# Compiled passes that blocks of one class may need: as many as stochastic depth has rates, or a model stages.
_PASSES = 256
# Steps of a run from which on `auto` compiles: to begin takes half a minute, a step is to save 20 ms.
AUTO_STEPS = 2000


class CompiledBlocks:
    """Blocks that run compiled when told to."""

    def __init__(self, blocks: Sequence[nn.Module] = ()) -> None:
        self._calls: dict[nn.Module, Any] = {}
        for block in blocks:
            # Padded matrices would be chosen by timing, and round otherwise.
            block.compile(dynamic=False, options={"shape_padding": False})
            self._calls[block] = block._compiled_call_impl

    def use(self, wanted: bool) -> None:
        for block, call in self._calls.items():
            block._compiled_call_impl = call if wanted else None


@contextlib.contextmanager
def compiled_blocks(module: nn.Module, wanted: bool) -> Iterator[CompiledBlocks]:
    """The blocks of `module`, or none unless `wanted`; afterwards they are as before.

    Raises InputError for a model without blocks, and where nothing can be compiled.
    """
    if not wanted:
        yield CompiledBlocks()
        return
    found = transformer_blocks(module)
    if not found:
        raise InputError("train.compile is on, and the model has no transformer blocks to compile; set it to off")
    require_compiler(next(module.parameters()).device)
    import torch._dynamo.config  # takes a second

    blocks = CompiledBlocks(found)
    limits: dict[str, Any] = {
        "recompile_limit": _PASSES,
        "accumulated_recompile_limit": 16 * _PASSES,
        "fail_on_recompile_limit_hit": True,  # rather than running uncompiled from there on
    }
    try:
        with torch._dynamo.config.patch(**limits):
            yield blocks
    finally:
        blocks.use(False)


def resolve_compile(wanted: Compile, model: nn.Module, device: torch.device, steps: int) -> Compile:
    """`auto` → "on" in runs of many steps on a GPU, where there are blocks and what it takes; others as they are."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda" or steps < AUTO_STEPS or not transformer_blocks(model):
        return "off"
    if lacks := _lacks(device):
        logger.warning("training is not compiled, which makes it slower: %s", lacks)
        return "off"
    return "on"


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules whose class is called a block, as timm does, but for those inside another one."""
    if "Block" in type(module).__name__:
        return [module]
    return [block for child in module.children() for block in transformer_blocks(child)]


def require_compiler(device: torch.device) -> None:
    """Raise InputError where there is nothing that torch.compile could compile with."""
    if lacks := _lacks(device):
        raise InputError(f"train.compile is on, and {lacks}; install it, or set train.compile to off")


def _lacks(device: torch.device) -> str:
    """What torch.compile would need and does not find; "" for nothing."""
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "cl"))
    if not any(map(shutil.which, (os.environ.get(variable, ""), *names))):
        return f"no C compiler ({', '.join(names)}, or one that {variable} names) is on the path"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's header files are not installed"
    return ""
