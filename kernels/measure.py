"""`measure_attention`, `measure_qk`, `measure_pair`: metrics of maps, of their factors, and of two conditions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kernels import arrays, inputs
from kernels.backends import BACKENDS, BackendSpec, resolve
from kernels.errors import BackendUnavailableError, MetricError
from kernels.inputs import Factors, MapPair, Maps
from kernels.layout import TokenLayout
from kernels.metrics import METRICS, MetricSpec, load_metrics
from kernels.tiles import BACKEND as REFERENCE

CORE_METRICS = tuple(name for name, spec in METRICS.items() if spec.core)
PAIR_METRICS = tuple(name for name, spec in METRICS.items() if spec.inputs == "pair")

Invalid = Literal["raise", "mask"]
Reduce = Literal["mean", "none"]


@dataclass(eq=False, repr=False, slots=True)
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
        invalid_rows: number of each map's rows that are not post-softmax attention, an array of the leading axes.
        invalid_patches: that of patch queries among them.
        valid: which rows are post-softmax attention, bool [..., query], prefix queries included.
        masked: number of rows left out because they are not (only with invalid="mask").
        from_reference: names of the metrics this backend computed from their `reference` alone.
    """

    _values: dict[str, Any]
    backend: str
    undefined_rows: dict[str, Any]
    invalid_rows: Any
    invalid_patches: Any
    valid: Any
    from_reference: tuple[str, ...]
    together: tuple[Any, Any] | None = None  # see `kernels.backends.Means`

    @property
    def undefined(self) -> dict[str, int]:
        return {name: int(counts.sum()) for name, counts in self.undefined_rows.items()}

    @property
    def masked(self) -> int:
        return int(self.invalid_rows.sum())

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.items())
        return f"Measurement({columns}; backend={self.backend!r}, undefined={self.undefined})"


def measure_attention(
    attention: Any,
    layout: TokenLayout,
    metrics: Sequence[str | MetricSpec] = CORE_METRICS,
    backend: str = "auto",
    invalid: Invalid = "raise",
    reduce: Reduce = "mean",
    regions: Any = None,
    precision: str | None = None,
) -> Measurement:
    """Metrics of post-softmax attention.

    Args:
        attention: NumPy array or torch tensor, float16, bfloat16, float32 or float64, [..., query, key], prefix
            tokens included; any strides. The leading axes are usually [image, head].
        layout: where the prefix tokens and patches lie.
        metrics: names of `METRICS`, "module:name" of a user's `MetricSpec`, or `MetricSpec` objects.
        backend: a name of `BACKENDS`, or "auto", see `kernels.resolve`: numba on a CPU, triton or torch on a GPU.
        invalid: "raise", or "mask": rows that are no post-softmax attention give NaN, are left out and counted.
            On a GPU "raise" waits for the result in order to look at it; "mask" returns while it is being computed.
        reduce: "mean" averages row metrics over the patch queries that have a value, in float64; "none" keeps
            [..., patch query].
        regions: coverage of each patch by each region, 0 to 1, [..., region, patch], for metrics that take
            regions. Its leading axes match the attention's without the last one (head): [image, region, patch]
            for [image, head, query, key]. A region of NaN has no value.
        precision: "float16", "bfloat16", …: what the values were rounded to, where neither the array (as what
            `store.AttentionStore.read` gives) nor its dtype says it; it decides how far a row's sum may be off 1.

    Returns:
        A `Measurement`: name -> [...], NumPy for NumPy, torch for torch on the same device. A value with no
        defined row is NaN.

    Raises:
        InvalidAttentionError: NaN, infinite or negative values, or rows whose sum is off 1 by more than 1e-2
            (bfloat16), 2e-3 (float16) or 1e-4 (float32, float64), unless invalid="mask".
        ValueError: a shape that does not fit the layout, an unknown metric, backend or option.
        TypeError: not an array of one of the four dtypes.
        BackendUnavailableError: the backend asked for cannot run on this input.
    """
    specs = _specs(metrics, regions)
    attention = inputs.attention_array(attention, "attention", layout)
    chosen = _choose(backend, specs, attention)
    regions = inputs.regions_array(regions, tuple(attention.shape[:-2]), layout)
    maps = Maps(attention, layout, regions, inputs.rounded_to(precision, attention))
    return _run(chosen, specs, maps, invalid, reduce)


def measure_qk(
    query: Any,
    key: Any,
    layout: TokenLayout,
    metrics: Sequence[str | MetricSpec] = CORE_METRICS,
    scale: float | None = None,
    bias: Any = None,
    backend: str = "auto",
    invalid: Invalid = "raise",
    reduce: Reduce = "mean",
    regions: Any = None,
) -> Measurement:
    """Metrics of softmax(scale · q·kᵀ + bias), without writing the maps to main memory.

    Args:
        query, key: NumPy or torch, [..., token, head_dim], same shape and dtype, after any rotary embedding and
            normalisation; any strides.
        scale: factor of q·k; None is head_dim ** -0.5.
        bias: additive (float) or boolean (True = attend), broadcastable to [..., query, key].
        layout, metrics, backend, invalid, reduce, regions: as in `measure_attention`.

    Returns:
        As `measure_attention`. A query whose patch keys are all hidden has no value in the renormalised
        metrics (NaN, left out, counted in `undefined`).

    Raises:
        InvalidAttentionError: logits that are NaN or infinite, or a query with no key to attend to, unless
            invalid="mask".
        ValueError, TypeError, BackendUnavailableError: as `measure_attention`.
    """
    specs = _specs(metrics, regions)
    query, key = inputs.float_array(query, "query"), inputs.float_array(key, "key")
    inputs.check_alike("query", query, "key", key)
    if query.ndim < 2 or query.shape != key.shape or query.shape[-2] != layout.num_tokens or query.shape[-1] < 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected both "
            f"[..., {layout.num_tokens}, head_dim] for {layout}"
        )
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number")
    leading = tuple(query.shape[:-2])
    bias = inputs.bias_array(bias, leading, layout, query)
    chosen = _choose(backend, specs, query, key, bias)
    regions = inputs.regions_array(regions, leading, layout)
    return _run(chosen, specs, Factors(query, key, layout, regions, scale, bias), invalid, reduce)


def measure_pair(
    attention: Any,
    other: Any,
    layout: TokenLayout,
    metrics: Sequence[str | MetricSpec] = PAIR_METRICS,
    backend: str = "auto",
    invalid: Invalid = "raise",
    reduce: Reduce = "mean",
    precision: str | None = None,
) -> Measurement:
    """Pair metrics: how the same rows of post-softmax attention differ between two conditions.

    Args:
        attention, other: the maps in the first and in the second condition, same kind, shape and dtype, as in
            `measure_attention`: the same images, heads and tokens in the same places.
        layout, backend, reduce: as in `measure_attention`.
        metrics: names of `METRICS` whose inputs are "pair", "module:name" of a user's, or `MetricSpec` objects.
        invalid: "raise", or "mask": rows invalid in either condition give NaN, are left out and counted once.
        precision: as in `measure_attention`; without it, rows may be off as far as those of the coarser array.

    Returns:
        As `measure_attention`. A row undefined in either condition is undefined.

    Raises:
        InvalidAttentionError: as `measure_attention`; the message says in which of the two.
        ValueError: shapes that differ or do not fit the layout, an unknown metric, a metric of one condition.
        TypeError: not two arrays of one kind and one of the four dtypes.
        BackendUnavailableError: the backend asked for cannot run on this input.
    """
    specs = _specs(metrics, pair=True)
    attention = inputs.attention_array(attention, "attention", layout)
    other = inputs.attention_array(other, "other", layout)
    inputs.check_alike("attention", attention, "other", other)
    if attention.shape != other.shape:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)} and other {tuple(other.shape)}; expected the same maps "
            "in two conditions"
        )
    pair = MapPair(attention, layout, None, inputs.rounded_to(precision, attention, other), other)
    return _run(_choose(backend, specs, attention, other), specs, pair, invalid, reduce)


def _run(
    chosen: BackendSpec, specs: Sequence[MetricSpec], given: Maps | Factors, invalid: Invalid, reduce: Reduce
) -> Measurement:
    """One pass of the backend for the metrics it has code for, one over tiles for the others; then the means."""
    if invalid not in ("raise", "mask"):
        raise ValueError(f'invalid is {invalid!r}; expected "raise" or "mask"')
    if reduce not in ("mean", "none"):
        raise ValueError(f'reduce is {reduce!r}; expected "mean" or "none"')
    backend = chosen.load()
    coded = [spec for spec in specs if backend.implementation(spec) is not None]
    others = [spec for spec in specs if spec not in coded]
    if reduce == "mean" and not others and (short := backend.measure_means(given, specs)) is not None:
        means, of_rows = short
        _check_rows(given, of_rows, invalid)
        of_means, without = ({name: pair[i] for name, pair in means.reduced.items()} for i in range(2))
        invalid_rows, invalid_patches = means.invalid, means.invalid_patches
        return Measurement(of_means, chosen.name, without, invalid_rows, invalid_patches, of_rows, (), means.together)
    values: dict[str, Any] = {}
    valid: Any = None
    for runner, part in ((backend, coded), (REFERENCE, others)):
        if part:
            result = runner.measure(given, part)
            valid = result.valid if valid is None else valid
            for name, rows in result.values.items():
                values[name] = rows if type(rows) is type(valid) else arrays.as_kind(rows, valid)
    _check_rows(given, valid, invalid)
    prefix = given.layout.num_prefix_tokens
    per_query = {spec.name: values[spec.name] for spec in specs if spec.inputs != "regions"}
    per_query = {name: found for name, found in per_query.items() if found.ndim == valid.ndim}
    reduced: dict[str, tuple[Any, Any]] = {}  # value, and rows without one
    counts: tuple[Any, Any] | None = None
    if reduce == "mean":
        for runner, part in ((backend, coded), (REFERENCE, others)):
            if part:
                of_part = {spec.name: per_query[spec.name] for spec in part if spec.name in per_query}
                means = runner.means_of_rows(of_part, valid, prefix)
                reduced |= means.reduced
                counts = counts or (means.invalid, means.invalid_patches)
    patches_valid = valid[..., prefix:]
    for name, found in values.items():
        if name not in per_query:
            reduced[name] = _values_of_maps(found, patches_valid)
        elif name not in reduced:
            reduced[name] = found, _missing(found, patches_valid).sum(-1)
    invalid_rows, invalid_patches = counts or arrays.invalid_rows(valid, prefix)

    parts = [{spec.name: reduced[spec.name][i] for spec in specs} for i in range(2)]
    counted = [invalid_rows, invalid_patches, valid]
    if not (arrays.is_torch(valid) and arrays.is_torch(given.like)):
        parts = [{name: arrays.as_kind(of, given.like) for name, of in part.items()} for part in parts]
        counted = [arrays.as_kind(of, given.like) for of in counted]
    values, undefined = parts
    from_reference = tuple(spec.name for spec in others)
    return Measurement(values, chosen.name, undefined, counted[0], counted[1], counted[2], from_reference)


def _check_rows(given: Maps | Factors, valid: Any, invalid: Invalid) -> None:
    """A look at the device, which waits for it: only the caller who wants the error here and now pays for it."""
    if invalid == "raise" and not bool(valid.all()):
        raise given.explain(np.asarray(valid.cpu()) if arrays.is_torch(valid) else valid)


def _missing(values: Any, valid: Any) -> Any:
    return arrays.library(values).isnan(values) & valid


def _values_of_maps(values: Any, valid: Any) -> tuple[Any, Any]:
    """(float64 values [*leading] or [*leading, region], how many of a map's are missing though it has a valid row)."""
    library = arrays.library(values)
    missing = library.isnan(values)
    if missing.ndim == valid.ndim:
        missing = missing.sum(-1)
    doubles = values.double() if arrays.is_torch(values) else np.asarray(values, dtype=np.float64)
    return doubles, library.where(valid.any(-1), missing, 0)


def _specs(
    metrics: str | MetricSpec | Sequence[str | MetricSpec], regions: Any = None, pair: bool = False
) -> list[MetricSpec]:
    """The metrics of these names, each one that one attention and these regions, or a pair of attentions, can give."""
    if isinstance(metrics, str | MetricSpec):
        metrics = (metrics,)
    specs = load_metrics(metrics)
    if not specs:
        raise ValueError("metrics is empty; name at least one metric")
    if len(specs) < len(metrics):
        raise ValueError(f"metrics name one metric twice: {', '.join(map(str, metrics))}")
    for spec in specs:
        if pair and spec.inputs != "pair":
            raise ValueError(f"metric {spec.name!r} is of one attention, not of a pair; use measure_attention")
        if spec.inputs == "pair" and not pair:
            raise ValueError(
                f"metric {spec.name!r} compares two conditions; one attention cannot give it: use measure_pair"
            )
        if spec.inputs == "regions" and regions is None:
            raise ValueError(f"metric {spec.name!r} needs regions [..., region, patch]; none were given")
    return specs


def _choose(backend: str, specs: Sequence[MetricSpec], *inputs: Any) -> BackendSpec:
    """The backend for these inputs; one that would cut autograd's graph is neither chosen nor accepted."""
    gradient = any(arrays.wants_grad(array) for array in inputs)
    chosen = resolve(backend, arrays.device_type(inputs[0]), gradient, [arrays.dtype_name(inputs[0])], specs)
    if gradient and not chosen.load().differentiable:
        raise BackendUnavailableError(
            f"backend {chosen.name!r} has no gradient but the input requires one; choose torch, or detach() the input"
        )
    return chosen


def check_metrics(specs: Sequence[MetricSpec], layouts: Iterable[TokenLayout], regions: int, backend: str) -> None:
    """Try every metric on two maps of each layout: what it lacks there is found at once, not after hours.

    Args:
        regions: how many regions an image has; 0: none.
        backend: that will measure, never "auto".

    Raises:
        MetricError: a metric that these maps do not have, as that of a class token that is not there; a user's own one
            gives something else than one value per map.
        BackendUnavailableError: the backend cannot run here.
        OptionError: a setting of the backend is wrong.
    """
    loaded = BACKENDS[backend].load()
    loaded.check()
    for spec in specs:
        if spec.inputs == "regions" and not regions:
            raise MetricError(f"{spec.name} needs images with regions, and this data set has none; leave it out")
        loaded.implementation(spec)
    generator = np.random.default_rng(0)
    for layout in dict.fromkeys(layouts):
        maps = generator.random((1, 2, layout.num_tokens, layout.num_tokens))  # [image, head, query, key]
        maps /= maps.sum(axis=-1, keepdims=True)
        covered = np.ones((1, regions, layout.num_patches)) if regions else None
        for spec in specs:
            try:
                if spec.inputs == "pair":
                    measure_pair(maps, maps, layout, [spec], REFERENCE.name)
                else:
                    measure_attention(maps, layout, [spec], REFERENCE.name, regions=covered)
            except MetricError as error:
                if not spec.is_builtin:
                    raise
                raise MetricError(f"{spec.name} cannot be measured here: {error.__cause__}; leave it out") from error
