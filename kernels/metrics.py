"""METRICS: one declaration a metric.  <- the seam for a new metric

Tests, benchmarks, the store's columns, the table and the report's headings all iterate `METRICS`.

Published codes measure the same words differently. The names without a suffix renormalise each row over the patches
and give NaN where there is no value; the other conventions carry their name as a suffix:

    distance_px       the ViT authors: pixels, not renormalised, so that mass on the prefix shortens the distance
    distance_walmer   Walmer et al.: renormalised, unit square. Its side is the longer side of the grid from first to
                      last patch centre, so that on g×g patches neighbours are 1/(g−1) apart. Oblong grids and
                      patches keep their shape. px = side · walmer
    distance_seed1    not renormalised, over √2·g grid steps (the image diagonal on any grid)
    entropy_seed1     −ΣP ln(P + 1e-12), not renormalised
    morans_i_seed1    of each query's mean over keys, which only the prefix mass changes; 0 where Σz² ≤ 1e-8

`distance_px` and the `seed1` metrics have a value on every valid row, 0 on one wholly on the prefix.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from kernels import reference
from kernels.layout import TokenLayout

Implementation = Callable[..., Any] | str


class MetricError(ValueError):
    """A metric's declaration or code is not what was expected; the message names the metric and says what to do."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What a metric is, everywhere it appears.

    Args:
        name: the same in every backend, the store, the table and the report.
        unit: "1", "nat", "image diagonals", …
        inputs: "rows" (the map alone), "regions" (the map and patch coverage of regions) or
            "pair" (the same row in two conditions).
        reference: the definition, `(p, layout) -> values` on float64 post-softmax rows
            p [batch, query, key], all tokens included (`layout.patches(p)` cuts the patches out). Values are
            [batch, patch query] (averaged over the defined queries unless reduce="none") or [batch].
            "regions" metrics take `(p, layout, regions)`, regions [batch, region, patch] -> [batch, region].
            "pair" metrics take `(p, other, layout)`, the same rows in two conditions -> as without a pair.
        implementations: backend name -> callable, or "module:function" loaded on first use. What a callable is
            given is the backend's own affair. A metric without an entry for a backend is computed from
            `reference` on tiles, and the result says so.
        bounds: layout -> (least, greatest) value the metric can take.
        undefined: which rows have no value, and why ("" if none).
        source: where the formula comes from.
        title: heading in tables and figures; the name if empty.
        null: number of patches -> the value expected without any association; None where there is no such value.
        axis_label: what stands beside the axis of a figure; empty: the unit, or the title where there is none.
        core: measured where nothing else is asked for.
        is_prefix_share: it is the share of attention on prefix tokens, where a high one is warned of.

    Raises:
        MetricError: a name that cannot be a file's, other inputs, a unit that is no text, or no callable reference.
    """

    name: str
    unit: str
    inputs: Literal["rows", "regions", "pair"]
    reference: Callable[..., Any]
    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    bounds: Callable[[TokenLayout], tuple[float, float]] = lambda layout: (-np.inf, np.inf)
    undefined: str = ""
    source: str = ""
    title: str = ""
    null: Callable[[int], float | None] = lambda num_patches: None
    axis_label: str = ""
    core: bool = False
    is_prefix_share: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", self.name):
            raise MetricError(
                f"a metric's name is {self.name!r}; expected a letter, then up to 63 letters, digits and _ . -"
            )
        if self.inputs not in ("rows", "regions", "pair"):
            raise MetricError(f"metric {self.name!r}: inputs is {self.inputs!r}; expected 'rows', 'regions' or 'pair'")
        if not isinstance(self.unit, str):
            raise MetricError(f"metric {self.name!r}: unit is {self.unit!r}; expected text, '1' if it has none")
        if not callable(self.reference):
            raise MetricError(f"metric {self.name!r}: reference is {self.reference!r}; expected a callable")

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of its values in store, table and report."""
        return ("image", "layer", "head", "region") if self.inputs == "regions" else ("image", "layer", "head")

    def implementation(self, backend: str) -> Callable[..., Any] | None:
        """This backend's callable, or None when only `reference` exists for it.

        Raises:
            MetricError: a user's metric names one that cannot be imported.
        """
        target = self.implementations.get(backend)
        if isinstance(target, str):
            module, _, name = target.partition(":")
            # torch.compile follows a look-up but not an import.
            if module in sys.modules:
                loaded: Callable[..., Any] = getattr(sys.modules[module], name)
                return loaded
            return _imported(self, backend, module, name)
        return target


def _imported(spec: MetricSpec, backend: str, module: str, name: str) -> Callable[..., Any]:
    try:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        if spec.name in METRICS:
            raise  # a library that is missing, which the backend reports
        raise MetricError(
            f"metric {spec.name!r}: {module}:{name}, its implementation for {backend}, cannot be imported ({error}); "
            "mend it, or leave it out: the reference is enough"
        ) from error
    return loaded


class Measurement(Mapping[str, Any]):
    """Metric name -> values, with what is needed to trust them.

    Values have the attention's leading axes ([image, head] for [image, head, query, key] input); a "regions"
    metric has a region axis behind them; `reduce="none"` leaves the query axis on row metrics.

    Values and counts are on the device of the input, and none is looked at before somebody asks: `undefined` and
    `masked` wait for the device.

    Attributes:
        backend: the backend that ran (never "auto").
        undefined: metric name -> number of rows left out of the means because the metric has no value there.
        undefined_rows: metric name -> the same count for each value, an array of the values' leading axes.
        valid: which rows are post-softmax attention, bool [..., query], prefix queries included.
        masked: number of rows left out because they are not (only with invalid="mask").
        from_reference: names of the metrics this backend computed from their `reference` alone.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        backend: str,
        undefined_rows: Mapping[str, Any],
        valid: Any,
        from_reference: tuple[str, ...] = (),
    ) -> None:
        self._values = dict(values)
        self.backend = backend
        self.undefined_rows = dict(undefined_rows)
        self.valid = valid
        self.from_reference = from_reference

    @property
    def undefined(self) -> dict[str, int]:
        return {name: int(counts.sum()) for name, counts in self.undefined_rows.items()}

    @property
    def masked(self) -> int:
        return int((~self.valid).sum())

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.items())
        return f"Measurement({columns}; backend={self.backend!r}, undefined={self.undefined})"


@functools.lru_cache(maxsize=64)
def _lattice_spectrum(grid_rows: int, grid_cols: int) -> tuple[float, float, float, float]:
    """Least and greatest eigenvalue of the rook weights W and of the Laplacian D − W, both without the constant.

    For z ⟂ 1 the ratios zᵀWz / zᵀz and zᵀ(D − W)z / zᵀz lie between these and reach them.
    """
    n = grid_rows * grid_cols
    index = np.arange(n).reshape(grid_rows, grid_cols)
    weights = np.zeros((n, n))
    for one, other in ((index[:-1], index[1:]), (index[:, :-1], index[:, 1:])):
        weights[one.ravel(), other.ravel()] = weights[other.ravel(), one.ravel()] = 1.0
    laplacian = np.diag(weights.sum(axis=1)) - weights
    # An orthonormal basis whose first vector is the constant one; the others span the centred maps.
    basis = np.linalg.qr(np.column_stack((np.ones(n), np.eye(n)[:, 1:])))[0][:, 1:]
    w, lap = (np.linalg.eigvalsh(basis.T @ matrix @ basis) for matrix in (weights, laplacian))
    return float(w[0]), float(w[-1]), float(lap[0]), float(lap[-1])


def _distance_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, float(layout.distances().max())  # from all mass on the query itself to corner against corner


def _distance_px_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, _distance_bounds(layout)[1] * layout.diagonal_px


def _distance_walmer_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, _distance_px_bounds(layout)[1] / reference.extent_px(layout)


def _entropy_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, float(np.log(layout.num_patches))


def _morans_i_bounds(layout: TokenLayout) -> tuple[float, float]:
    least, greatest, _, _ = _lattice_spectrum(layout.grid_rows, layout.grid_cols)
    factor = layout.num_patches / (2 * layout.num_edges)
    return factor * least, factor * greatest


def _morans_i_null(num_patches: int) -> float:
    """E[I] of a map whose values lie at random."""
    return -1.0 / (num_patches - 1)


def _entropy_seed1_bounds(layout: TokenLayout) -> tuple[float, float]:
    """A row of mass s ≤ 1 has at most s ln(N/s), greatest at s = 1, or at N/e where that is less (N = 2)."""
    mass = min(1.0, layout.num_patches / math.e)
    return -float(np.log1p(reference.SEED1_LOG_OFFSET)), float(mass * np.log(layout.num_patches / mass))


def _morans_i_seed1_bounds(layout: TokenLayout) -> tuple[float, float]:
    least, greatest = _morans_i_bounds(layout)
    return min(least, 0.0), max(greatest, 0.0)


def _gearys_c_bounds(layout: TokenLayout) -> tuple[float, float]:
    _, _, least, greatest = _lattice_spectrum(layout.grid_rows, layout.grid_cols)
    factor = (layout.num_patches - 1) / (2 * layout.num_edges)
    return factor * least, factor * greatest


def _gini_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, 1.0 - 1.0 / layout.num_patches


def _sink_share_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 1.0 / layout.num_patches, 1.0


def _unit_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, 1.0


def _js_bounds(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, float(np.log(2.0))


def _in(*backends: str, name: str) -> dict[str, Implementation]:
    """A metric's function has the metric's name in every backend's module."""
    return {backend: f"{_MODULES[backend]}:{name}" for backend in backends}


_MODULES = {
    "numba": "kernels.cpu.backend",
    "torch": "kernels.torch_ops",
    "triton": "kernels.cuda.rows",
    "numba_cuda": "kernels.cuda.rows",
}
_CPU_AND_CUDA = ("numba", "torch", "triton", "numba_cuda")


_NO_MASS = "row whose patches sum to 0"
_NO_ROW = "map without a row that has mass on the patches"
_CONSTANT = f"constant row; {_NO_MASS}"
_MORAN = "Moran 1950, doi:10.1093/biomet/37.1-2.17"
_SHANNON = "Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x"
_DISTANCE = "Dosovitskiy et al. 2021, arXiv:2010.11929 (there in pixels and not renormalised)"
_WALMER = "Walmer et al. 2023, arXiv:2212.03862"
_SEED1 = "the thesis code whose figures the seed1 metrics reproduce"

METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        MetricSpec(
            name="distance",
            unit="image diagonals",
            inputs="rows",
            reference=reference.distance,
            implementations=_in(*_CPU_AND_CUDA, name="distance"),
            bounds=_distance_bounds,
            undefined=_NO_MASS,
            source=_DISTANCE,
            core=True,
            title="Attention distance",
        ),
        MetricSpec(
            name="distance_px",
            unit="px",
            inputs="rows",
            reference=reference.distance_px,
            implementations=_in("numba", "torch", name="distance_px"),
            bounds=_distance_px_bounds,
            source="Dosovitskiy et al. 2021, arXiv:2010.11929",
            title="Attention distance, not renormalised",
        ),
        MetricSpec(
            name="distance_walmer",
            unit="grid sides",
            inputs="rows",
            reference=reference.distance_walmer,
            implementations=_in("numba", "torch", name="distance_walmer"),
            bounds=_distance_walmer_bounds,
            undefined=_NO_MASS,
            source=_WALMER,
            title="Attention distance (Walmer)",
        ),
        MetricSpec(
            name="distance_seed1",
            unit="image diagonals",
            inputs="rows",
            reference=reference.distance_seed1,
            implementations=_in("numba", "torch", name="distance_seed1"),
            bounds=_distance_bounds,
            source=_SEED1,
            title="Attention distance (seed1)",
        ),
        MetricSpec(
            name="entropy",
            unit="nat",
            inputs="rows",
            reference=reference.entropy,
            implementations=_in(*_CPU_AND_CUDA, name="entropy"),
            bounds=_entropy_bounds,
            undefined=_NO_MASS,
            source=_SHANNON,
            core=True,
            title="Attention entropy",
        ),
        MetricSpec(
            name="entropy_normalized",
            unit="1",
            inputs="rows",
            reference=reference.entropy_normalized,
            implementations=_in(*_CPU_AND_CUDA, name="entropy_normalized"),
            bounds=_unit_bounds,
            undefined=_NO_MASS,
            source=_SHANNON,
            title="Normalised entropy",
        ),
        MetricSpec(
            name="entropy_seed1",
            unit="nat",
            inputs="rows",
            reference=reference.entropy_seed1,
            implementations=_in("numba", "torch", name="entropy_seed1"),
            bounds=_entropy_seed1_bounds,
            source=_SEED1,
            title="Attention entropy (seed1)",
        ),
        MetricSpec(
            name="morans_i",
            unit="1",
            inputs="rows",
            reference=reference.morans_i,
            implementations=_in(*_CPU_AND_CUDA, name="morans_i"),
            bounds=_morans_i_bounds,
            undefined=_CONSTANT,
            source=_MORAN,
            null=_morans_i_null,
            core=True,
            title="Moran's I",
        ),
        MetricSpec(
            name="morans_i_received",
            unit="1",
            inputs="rows",
            reference=reference.morans_i_received,
            implementations=_in("numba", "torch", name="morans_i_received"),
            bounds=_morans_i_bounds,
            undefined=f"received map constant to 1e-5 of its mean; {_NO_ROW}",
            source=_MORAN,
            null=_morans_i_null,
            title="Moran's I of received attention",
        ),
        MetricSpec(
            name="sink_share",
            unit="1",
            inputs="rows",
            reference=reference.sink_share,
            implementations=_in("numba", "torch", name="sink_share"),
            bounds=_sink_share_bounds,
            undefined=_NO_ROW,
            source="the patches of high norm of Darcet et al. 2023, arXiv:2309.16588, as a share of attention",
            title="Largest share of one patch",
        ),
        MetricSpec(
            name="morans_i_seed1",
            unit="1",
            inputs="rows",
            reference=reference.morans_i_seed1,
            implementations=_in("numba", "torch", name="morans_i_seed1"),
            bounds=_morans_i_seed1_bounds,
            undefined="map with an invalid patch query",
            source=_SEED1,
            title="Moran's I of the mean over keys (seed1)",
        ),
        MetricSpec(
            name="gearys_c",
            unit="1",
            inputs="rows",
            reference=reference.gearys_c,
            implementations=_in(*_CPU_AND_CUDA, name="gearys_c"),
            bounds=_gearys_c_bounds,
            undefined=_CONSTANT,
            source="Geary 1954, doi:10.2307/2986645",
            title="Geary's C",
        ),
        MetricSpec(
            name="gini",
            unit="1",
            inputs="rows",
            reference=reference.gini,
            implementations=_in("numba", "torch", name="gini"),
            bounds=_gini_bounds,
            undefined=_NO_MASS,
            source="Gini 1912; in this form Sen 1973, doi:10.1093/0198281935.001.0001",
            title="Gini coefficient",
        ),
        MetricSpec(
            name="prefix_mass",
            unit="1",
            inputs="rows",
            reference=reference.prefix_mass,
            implementations=_in(*_CPU_AND_CUDA, name="prefix_mass"),
            bounds=_unit_bounds,
            is_prefix_share=True,
            title="Mass on prefix tokens",
        ),
        MetricSpec(
            name="cls_entropy",
            unit="nat",
            inputs="rows",
            reference=reference.cls_entropy,
            implementations=_in(*_CPU_AND_CUDA, name="cls_entropy"),
            bounds=_entropy_bounds,
            undefined=_NO_MASS,
            source=_SHANNON,
            title="Entropy of the class token's row",
        ),
        MetricSpec(
            name="cls_morans_i",
            unit="1",
            inputs="rows",
            reference=reference.cls_morans_i,
            implementations=_in(*_CPU_AND_CUDA, name="cls_morans_i"),
            bounds=_morans_i_bounds,
            undefined=_CONSTANT,
            source=_MORAN,
            null=_morans_i_null,
            title="Moran's I of the class token's row",
        ),
        MetricSpec(
            name="region_mass",
            unit="1",
            inputs="regions",
            reference=reference.region_mass,
            implementations=_in("numba", "torch", name="region_mass"),
            bounds=_unit_bounds,
            undefined=f"{_NO_MASS}; region without coverage values (NaN)",
            axis_label="share of attention on patches",
            title="Attention on regions",
        ),
        MetricSpec(
            name="js_divergence",
            unit="nat",
            inputs="pair",
            reference=reference.js_divergence,
            implementations=_in("numba", "torch", name="js_divergence"),
            bounds=_js_bounds,
            undefined=f"{_NO_MASS}, in either condition",
            source="Lin 1991, doi:10.1109/18.61115",
            title="Jensen–Shannon divergence",
        ),
    )
}


def load_metric(name: str) -> MetricSpec:
    """The metric of that name: one of `METRICS`, or a user's `module:attribute`.

    Raises:
        ValueError: no such metric.
        MetricError: no such module or attribute, or it is no `MetricSpec`, or has the name of another metric.
    """
    if ":" not in name:
        if name in METRICS:
            return METRICS[name]
        import difflib

        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no metric is called {name!r}{hint} (there are {', '.join(METRICS)}, or give module:name)")
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise MetricError(
            f"metric {name!r} is not of the form module:name, the place of a kernels.MetricSpec in Python"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's, which may do anything
        found = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise MetricError(f"metric {name!r}: module {module_name!r} cannot be imported ({found})") from error
    spec = getattr(module, attribute, None)
    if spec is None:
        raise MetricError(f"metric {name!r}: module {module_name!r} has no {attribute!r}")
    if not isinstance(spec, MetricSpec):
        raise MetricError(f"metric {name!r} is a {type(spec).__name__}; expected a kernels.MetricSpec")
    if METRICS.get(spec.name, spec) is not spec:
        raise MetricError(f"metric {name!r} is called {spec.name!r}, as a metric of kernels is; give it another name")
    return spec
