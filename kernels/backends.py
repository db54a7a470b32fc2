"""BACKENDS: the places a metric can be computed, and how one is chosen.  <- the seam for a new backend

A backend is asked for by name and then either runs or raises `BackendUnavailableError`; it is never
substituted. `auto` chooses by device, dtype and metrics, for all of a pass, and the choice is recorded in every result.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kernels.arrays import FLOAT_DTYPES, Values, invalid_rows, is_torch, mean_of_rows
from kernels.errors import BackendUnavailableError, MetricError, OptionError
from kernels.inputs import Factors, MapPair, Maps
from kernels.metrics import MetricSpec


@dataclass(frozen=True, slots=True)
class Reading:
    """A metric's code in a backend whose pass fills in named planes."""

    planes: tuple[str, ...]  # those that the pass must fill in for it
    read: Callable[[Any], Any]  # what the pass gave -> the metric's values, maps flattened

    def __call__(self, result: Any) -> Any:
        return self.read(result)


@dataclass(frozen=True, slots=True)
class Means:
    """What remains of the rows of maps: everything is [*leading]."""

    reduced: dict[str, tuple[Any, Any]]  # metric name -> (mean, valid patch queries that have no value)
    invalid: Any  # rows that are no attention
    invalid_patches: Any  # patch queries among them
    # All of it in two tensors: means [metric, *leading], counts [metric …, invalid, invalid patches, *leading].
    together: tuple[Any, Any] | None = None


class Backend(Protocol):
    """What a backend's module offers as `BACKEND`. Metrics it has no code for are never asked of it.

    Attributes:
        name: as in `BACKENDS`.
        implementations: name of one of `METRICS` -> this backend's code for it, which the backend alone calls.
        dtypes: those of the data that it reads.
        differentiable: whether gradients flow through its results.
        side_by_side: whether calls of several threads run at once, having no threads of their own below them.
        lanes: values in the vector registers that it uses, where rounding depends on that; else 0.
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    differentiable: bool = False
    side_by_side: bool = False

    @property
    def lanes(self) -> int:
        return 0

    def implementation(self, spec: MetricSpec) -> Callable[..., Any] | None:
        """This backend's code for a metric, or None; MetricError if a user's names one that cannot be imported."""
        return self.implementations.get(spec.name) if spec.is_builtin else spec.implementation(self.name)

    def check(self) -> None:
        """Look at what measurements depend on besides their arguments; OptionError if a setting is wrong."""
        return None

    def notice(self) -> str:
        """A sentence on why the first measurement of this process takes longer; "" if it does not."""
        return ""

    def measure(self, given: Maps | Factors, specs: Sequence[MetricSpec]) -> Values:
        """One pass over whatever is given."""
        if isinstance(given, Factors):
            return self.measure_qk(given, specs)
        return self.measure_pair(given, specs) if isinstance(given, MapPair) else self.measure_attention(given, specs)

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        """One pass over stored maps."""
        raise BackendUnavailableError(
            f"backend {self.name!r} measures query and key, not stored attention; choose another one for "
            "measure_attention"
        )

    def measure_qk(self, factors: Factors, specs: Sequence[MetricSpec]) -> Values:
        """One pass from query and key."""
        raise BackendUnavailableError(
            f"backend {self.name!r} measures stored attention, not query and key; choose another one for measure_qk"
        )

    def measure_pair(self, pair: MapPair, specs: Sequence[MetricSpec]) -> Values:
        """One pass over the same maps in two conditions."""
        raise BackendUnavailableError(
            f"backend {self.name!r} measures one attention, not a pair; choose another one for measure_pair"
        )

    def mean_of_rows(self, values: Any, valid: Any) -> tuple[Any, Any]:
        """(mean [*leading] of the patch queries that have a value, valid ones that have none) of [*leading, query]."""
        return mean_of_rows(values, valid)

    def means_of_rows(self, values: Mapping[str, Any], valid: Any, prefix: int) -> Means:
        """`mean_of_rows` of each metric's values, and `invalid_rows` of valid [*leading, query], prefix included."""
        means = {name: self.mean_of_rows(of_rows, valid[..., prefix:]) for name, of_rows in values.items()}
        return Means(means, *invalid_rows(valid, prefix))

    def measure_means(self, given: Maps | Factors, specs: Sequence[MetricSpec]) -> tuple[Means, Any] | None:
        """What `measure` and `means_of_rows` give, and valid [*leading, query], if there is a shorter way to it."""
        return None

    def needs(self, specs: Sequence[MetricSpec], planes: Sequence[str]) -> int:
        """Bits, in the order of all planes, of those that the pass must fill in; MetricError for other code."""
        needs = 0
        for spec in specs:
            code = self.implementation(spec)
            if not isinstance(code, Reading):
                raise MetricError(
                    f"metric {spec.name!r}: its implementation for {self.name} is a {type(code).__name__}; expected a "
                    "kernels.backends.Reading, or none: the reference is enough"
                )
            for plane in code.planes:
                needs |= 1 << planes.index(plane)
        return needs

    def values(self, result: Any, valid: Any, given: Maps | Factors, specs: Sequence[MetricSpec]) -> Values:
        """The metrics of what a pass gave, and which rows are valid, in the input's shape and kind."""
        return shaped({spec.name: self.compute(spec, result) for spec in specs}, valid, given)

    def compute(self, spec: MetricSpec, result: Any) -> Any:
        """What this backend's code for a metric makes of a pass."""
        code = self.implementation(spec)
        assert code is not None  # metrics that it has no code for are never asked of it
        return code(result)


def shaped(values: dict[str, Any], valid: Any, given: Maps | Factors) -> Values:
    """Values of flattened maps with the leading axes of the input, and of its kind where that is NumPy."""
    values = {name: flat.reshape((*given.leading, *flat.shape[1:])) for name, flat in values.items()}
    valid = valid.reshape((*given.leading, given.layout.num_tokens))
    if is_torch(valid) and not is_torch(given.like):
        return Values({name: value.numpy() for name, value in values.items()}, valid.numpy())
    return Values(values, valid)


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """One place to compute metrics.

    Args:
        name: what a user writes in `backend=`.
        module: imported on first use; its `BACKEND` is the `Backend`.
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

    def load(self) -> Backend:
        """Import the backend's module; BackendUnavailableError if an import it needs is missing."""
        try:
            backend: Backend = importlib.import_module(self.module).BACKEND
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend {self.name!r} cannot run: {error}; install what is missing or choose another backend"
            ) from error
        return backend


BACKENDS: dict[str, BackendSpec] = {
    spec.name: spec
    for spec in (
        BackendSpec("reference", "kernels.tiles", ("cpu",), "float64 NumPy, the definitions; slow"),
        BackendSpec("numba", "kernels.cpu.backend", ("cpu",), "compiled CPU loops, one pass; default without a GPU"),
        BackendSpec(
            "torch", "kernels.torch_ops", ("cpu", "cuda"), "vectorised torch, any device; default on a GPU otherwise"
        ),
        BackendSpec(
            "sdpa", "kernels.sdpa", ("cpu", "cuda"), "torch's fused attention, from factors: entropy, prefix mass"
        ),
        BackendSpec(
            "triton",
            "kernels.cuda.triton_gpu",
            ("cuda",),
            "fused CUDA kernels, from maps or factors; default on a GPU for the metrics that it has",
            "TRITON_INTERPRET",
        ),
        BackendSpec(
            "numba_cuda", "kernels.cuda.numba_cuda", ("cuda",), "CUDA kernel for stored maps", "NUMBA_ENABLE_CUDASIM"
        ),
    )
}


def resolve(
    backend: str,
    device: str,
    gradient: bool = False,
    dtypes: Iterable[str] = (),
    specs: Iterable[MetricSpec] = (),
) -> BackendSpec:
    """The backend that will run on data of this device type.

    Args:
        backend: a name of `BACKENDS`, or "auto": numba for "cpu"; elsewhere triton, if it has been checked on this kind
            of GPU, reads all these dtypes and has code for every metric; else, and where a gradient is wanted, torch.
        device: torch device type of the data, "cpu" for NumPy.
        gradient: whether one is wanted.
        dtypes: names of those of the data, of all layers that will be measured.
        specs: the metrics, all of them: one backend measures them in one pass.

    Raises:
        OptionError: no backend of that name.
        BackendUnavailableError: the backend does not read data on that device.
    """
    if backend == "auto":
        backend = "torch" if gradient else "numba" if device == "cpu" else _on_a_gpu(device, dtypes, specs)
    if backend not in BACKENDS:
        raise OptionError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    spec = BACKENDS[backend]
    if device not in spec.readable_devices:
        raise BackendUnavailableError(
            f"backend {backend!r} reads data on {' or '.join(spec.devices)}, but the attention is on {device!r}; "
            "move it there first or choose another backend"
        )
    return spec


def _on_a_gpu(device: str, dtypes: Iterable[str], specs: Iterable[MetricSpec]) -> str:
    """triton or torch: the kernels have run on sm_90 alone, and what triton lacks would be computed on the host."""
    torch = sys.modules.get("torch")
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # Triton compiles its launchers
    is_another = torch and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
    if device not in BACKENDS["triton"].devices or is_another or not has_compiler:
        return "torch"
    try:
        triton = BACKENDS["triton"].load()
    except BackendUnavailableError:
        return "torch"
    fits = set(dtypes) <= set(triton.dtypes) and all(triton.implementation(spec) is not None for spec in specs)
    return "triton" if fits else "torch"
