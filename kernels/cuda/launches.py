"""Launching a Triton kernel at little cost to the host.

For each call Triton works out anew which of its compiled kernels the arguments need: 25 to 100 µs. That depends on
dtypes and alignment of the tensors and on the other arguments alone, by which the kernel is found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton  # type: ignore[import-untyped]
from torch import Tensor

# What a call depends on -> the compiled kernel, and its constants in the order of its parameters.
_COMPILED: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
_MOST = 1024  # that are kept: a capture needs a few


def launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """`kernel[grid](*arguments, **constants)`, on the current device and stream.

    Args:
        kernel: whose constants all stand behind its other parameters.
        arguments: the first of them a tensor.
        constants: these and options of the compiler.
    """
    if not isinstance(kernel, triton.JITFunction):  # run by Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    given = tuple([(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in arguments])
    key = id(kernel), arguments[0].device, given, tuple(constants.items())
    found = _COMPILED.get(key)
    if found is not None:
        compiled, known = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *known)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:  # a hook of Triton's may keep it from compiling
        if len(_COMPILED) >= _MOST:
            _COMPILED.clear()
        _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
