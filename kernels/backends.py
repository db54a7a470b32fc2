"""BACKENDS: the places a metric can be computed, and how one is chosen.  <- the seam for a new backend

A backend is asked for by name and then either runs or raises `BackendUnavailableError`; it is never
substituted. `auto` chooses by the input's device, and the choice is recorded in every result.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run here; the message says why."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """One place to compute metrics.

    Args:
        name: what a user writes in `backend=`.
        module: imported on first use; its `measure_attention` and `measure_qk` are the passes (as in `kernels.tiles`).
        devices: torch device types (NumPy input counts as "cpu") whose data it reads in place.
        note: one line for `--help` and the docs.
        emulator: environment variable under which the backend's compiler runs kernels on the CPU, for tests; it must
            be set before the backend is first used, and opens "cpu".
    """

    name: str
    module: str
    devices: tuple[str, ...]
    note: str
    emulator: str = ""

    @property
    def readable_devices(self) -> tuple[str, ...]:
        """`devices`, and "cpu" under the emulator."""
        emulated = bool(self.emulator) and os.environ.get(self.emulator, "0") not in ("", "0")
        return (*self.devices, "cpu") if emulated else self.devices

    def load(self) -> ModuleType:
        """Import the backend's module.

        Raises:
            BackendUnavailableError: an import it needs is missing.
        """
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend {self.name!r} cannot run: {error}; install what is missing or choose another backend"
            ) from error


BACKENDS: dict[str, BackendSpec] = {
    spec.name: spec
    for spec in (
        BackendSpec("reference", "kernels.tiles", ("cpu",), "float64 NumPy, the definitions; slow"),
        BackendSpec(
            "numba", "kernels.cpu.backend", ("cpu",), "compiled CPU loops, one pass; the default without a GPU"
        ),
        BackendSpec("torch", "kernels.torch_ops", ("cpu", "cuda"), "vectorised torch, any device"),
        BackendSpec(
            "triton",
            "kernels.cuda.triton_gpu",
            ("cuda",),
            "fused CUDA kernels, from maps or from query and key",
            emulator="TRITON_INTERPRET",
        ),
        BackendSpec(
            "numba_cuda",
            "kernels.cuda.numba_cuda",
            ("cuda",),
            "CUDA kernel for stored maps",
            emulator="NUMBA_ENABLE_CUDASIM",
        ),
    )
}


def resolve(backend: str, device: str) -> BackendSpec:
    """The backend that will run on data of this device type.

    Args:
        backend: a name of `BACKENDS`, or "auto": numba for "cpu", torch otherwise.
        device: torch device type of the data, "cpu" for NumPy.

    Raises:
        ValueError: no backend of that name.
        BackendUnavailableError: the backend does not read data on that device.
    """
    if backend == "auto":
        backend = "numba" if device == "cpu" else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    spec = BACKENDS[backend]
    if device not in spec.readable_devices:
        raise BackendUnavailableError(
            f"backend {backend!r} reads data on {' or '.join(spec.devices)}, but the attention is on {device!r}; "
            "move it there first or choose another backend"
        )
    return spec
