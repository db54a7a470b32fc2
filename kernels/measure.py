"""`measure_attention`, `measure_qk`, `measure_pair`: metrics of maps, of their factors, and of two conditions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from kernels import arrays, checks
from kernels.arrays import Values
from kernels.backends import BackendSpec, BackendUnavailableError, resolve
from kernels.layout import TokenLayout
from kernels.metrics import METRICS, Measurement, MetricSpec, load_metric

CORE_METRICS = tuple(name for name, spec in METRICS.items() if spec.core)
PAIR_METRICS = tuple(name for name, spec in METRICS.items() if spec.inputs == "pair")

Invalid = Literal["raise", "mask"]
Reduce = Literal["mean", "none"]


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
        backend: a name of `BACKENDS`; "auto" takes numba on a CPU (torch if a gradient is wanted), torch elsewhere.
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
    _check_options(invalid, reduce)
    attention = _attention(attention, "attention", layout)
    chosen = _choose(backend, (attention,))
    regions = _check_regions(regions, tuple(attention.shape[:-2]), layout)
    rounded = checks.rounded_to(precision, attention)
    tolerance = checks.ROW_SUM_TOLERANCE[rounded]
    return _run(
        chosen,
        specs,
        lambda module, group: module.measure_attention(attention, layout, group, regions, tolerance),
        lambda valid: checks.explain_attention(attention, valid, rounded),
        like=attention,
        layout=layout,
        invalid=invalid,
        reduce=reduce,
    )


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
    _check_options(invalid, reduce)
    query, key = _float_array(query, "query"), _float_array(key, "key")
    if arrays.is_torch(query) != arrays.is_torch(key) or query.dtype != key.dtype:
        raise TypeError(f"query is {_kind(query)} and key is {_kind(key)}; expected the same kind and dtype")
    if arrays.is_torch(query) and query.device != key.device:
        raise ValueError(f"query is on {query.device} and key on {key.device}; expected one device")
    if query.ndim < 2 or query.shape != key.shape or query.shape[-2] != layout.num_tokens or query.shape[-1] < 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected both "
            f"[..., {layout.num_tokens}, head_dim] for {layout}"
        )
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number")
    leading = tuple(query.shape[:-2])
    bias = _check_bias(bias, leading, layout, query)
    chosen = _choose(backend, (query, key) if bias is None else (query, key, bias))
    regions = _check_regions(regions, leading, layout)
    return _run(
        chosen,
        specs,
        lambda module, group: module.measure_qk(query, key, layout, group, regions, scale, bias),
        lambda valid: checks.explain_qk(query, key, bias, valid),
        like=query,
        layout=layout,
        invalid=invalid,
        reduce=reduce,
    )


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
    specs = _load(metrics)
    for spec in specs:
        if spec.inputs != "pair":
            raise ValueError(f"metric {spec.name!r} is of one attention, not of a pair; use measure_attention")
    _check_options(invalid, reduce)
    attention, other = _attention(attention, "attention", layout), _attention(other, "other", layout)
    if arrays.is_torch(attention) != arrays.is_torch(other) or attention.dtype != other.dtype:
        raise TypeError(f"attention is {_kind(attention)} and other is {_kind(other)}; expected one kind and dtype")
    if attention.shape != other.shape:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)} and other {tuple(other.shape)}; expected the same maps "
            "in two conditions"
        )
    if arrays.is_torch(attention) and attention.device != other.device:
        raise ValueError(f"attention is on {attention.device} and other on {other.device}; expected one device")
    rounded = checks.rounded_to(precision, attention, other)
    tolerance = checks.ROW_SUM_TOLERANCE[rounded]
    return _run(
        _choose(backend, (attention, other)),
        specs,
        lambda module, group: module.measure_pair(attention, other, layout, group, tolerance),
        lambda valid: checks.explain_pair(attention, other, valid, rounded),
        like=attention,
        layout=layout,
        invalid=invalid,
        reduce=reduce,
    )


def _run(
    backend: BackendSpec,
    specs: tuple[MetricSpec, ...],
    measure: Callable[[Any, tuple[MetricSpec, ...]], Values],
    explain: Callable[[np.ndarray], checks.InvalidAttentionError],
    *,
    like: Any,
    layout: TokenLayout,
    invalid: Invalid,
    reduce: Reduce,
) -> Measurement:
    """One pass of the backend for the metrics it has code for, one over tiles for the others; then the means."""
    module = backend.load()
    own = tuple(s for s in specs if backend.name == "reference" or s.implementation(backend.name) is not None)
    others = tuple(s for s in specs if s not in own)
    values: dict[str, Any] = {}
    valid: Any = None
    if own:
        result = measure(module, own)
        values, valid = dict(result.values), result.valid
    if others:
        result = measure(importlib.import_module("kernels.tiles"), others)
        on_host = valid is None or not arrays.is_torch(valid)
        for name, tile in result.values.items():
            values[name] = tile if on_host else arrays.from_host(tile, like)
        if valid is None:
            valid = result.valid
    # A look at the device, which waits for it: only the caller who wants the error here and now pays for it.
    if invalid == "raise" and not bool(valid.all()):
        raise explain(np.asarray(valid.cpu()) if arrays.is_torch(valid) else valid)

    own_mean = getattr(module, "mean_of_rows", None)  # in one launch or loop, where a backend has one
    reduced: dict[str, Any] = {}
    undefined: dict[str, Any] = {}
    for spec in specs:
        is_rows = spec.inputs != "regions" and values[spec.name].ndim == valid.ndim
        row_valid = valid[..., layout.num_prefix_tokens :]
        if own_mean is not None and is_rows and reduce == "mean" and spec in own:
            value, count = own_mean(values[spec.name], row_valid)
        elif not arrays.is_torch(valid):
            value, count = _finish_numpy(values[spec.name], row_valid, is_rows, reduce)
        else:
            value, count = _finish_torch(values[spec.name], row_valid, is_rows, reduce)
        reduced[spec.name] = value if arrays.is_torch(value) else arrays.from_host(value, like)
        undefined[spec.name] = count if arrays.is_torch(count) else arrays.from_host(count, like)
    return Measurement(
        reduced,
        backend=backend.name,
        undefined_rows=undefined,
        valid=valid if arrays.is_torch(valid) else arrays.from_host(valid, like),
        from_reference=tuple(spec.name for spec in others),
    )


def _finish_numpy(
    values: np.ndarray, valid: np.ndarray, is_rows: bool, reduce: Reduce
) -> tuple[np.ndarray, np.ndarray]:
    """(values or their mean over defined rows, undefined rows [*leading]); valid is [*leading, patch query]."""
    if is_rows and reduce == "mean":
        return arrays.mean_of_defined(values, valid)
    missing = np.isnan(values)
    if is_rows:
        return values, np.asarray((missing & valid).sum(axis=-1), dtype=np.int64)
    if missing.ndim == valid.ndim:
        missing = missing.sum(axis=-1)
    return np.asarray(values, dtype=np.float64), np.asarray(missing * valid.any(axis=-1), dtype=np.int64)


def _finish_torch(values: Any, valid: Any, is_rows: bool, reduce: Reduce) -> tuple[Any, Any]:
    """`_finish_numpy` in torch, on the values' device and differentiable."""
    import torch

    defined = ~values.isnan()
    if not is_rows:
        missing = ~defined if defined.ndim == valid.ndim - 1 else (~defined).sum(dim=-1)
        return values.double(), missing.long() * valid.any(dim=-1)
    undefined = (~defined & valid).sum(dim=-1)
    if reduce == "none":
        return values, undefined
    count = defined.sum(dim=-1)
    total = torch.where(defined, values, 0.0).sum(dim=-1, dtype=torch.float64)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan), undefined


def _load(metrics: Sequence[str | MetricSpec]) -> tuple[MetricSpec, ...]:
    if isinstance(metrics, str | MetricSpec):
        metrics = (metrics,)
    specs = tuple(m if isinstance(m, MetricSpec) else load_metric(m) for m in metrics)
    if not specs:
        raise ValueError("metrics is empty; name at least one metric")
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"metrics name one metric twice: {', '.join(names)}")
    return specs


def _specs(metrics: Sequence[str | MetricSpec], regions: Any) -> tuple[MetricSpec, ...]:
    specs = _load(metrics)
    for spec in specs:
        if spec.inputs == "pair":
            raise ValueError(
                f"metric {spec.name!r} compares two conditions; one attention cannot give it: use measure_pair"
            )
        if spec.inputs == "regions" and regions is None:
            raise ValueError(f"metric {spec.name!r} needs regions [..., region, patch]; none were given")
    return specs


def _check_options(invalid: str, reduce: str) -> None:
    if invalid not in ("raise", "mask"):
        raise ValueError(f'invalid is {invalid!r}; expected "raise" or "mask"')
    if reduce not in ("mean", "none"):
        raise ValueError(f'reduce is {reduce!r}; expected "mean" or "none"')


def _kind(array: Any) -> str:
    return f"{'torch' if arrays.is_torch(array) else 'NumPy'} {arrays.dtype_name(array)}"


def _attention(array: Any, name: str, layout: TokenLayout) -> Any:
    array, tokens = _float_array(array, name), layout.num_tokens
    if array.ndim < 2 or tuple(array.shape[-2:]) != (tokens, tokens):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; expected [..., {tokens}, {tokens}] for {layout}")
    return array


def _float_array(array: Any, name: str) -> Any:
    if not (isinstance(array, np.ndarray) or arrays.is_torch(array)):
        raise TypeError(f"{name} is a {type(array).__name__}; expected a NumPy array or a torch tensor")
    if arrays.dtype_name(array) not in arrays.FLOAT_DTYPES:
        raise TypeError(f"{name} is {arrays.dtype_name(array)}; expected one of {', '.join(arrays.FLOAT_DTYPES)}")
    return array


def _choose(backend: str, inputs: tuple[Any, ...]) -> BackendSpec:
    """The backend for these inputs; one that would cut autograd's graph is neither chosen nor accepted."""
    device = arrays.device_type(inputs[0])
    gradient = any(arrays.wants_grad(array) for array in inputs)
    chosen = resolve("torch" if backend == "auto" and gradient else backend, device)
    if gradient and chosen.name != "torch":
        raise BackendUnavailableError(
            f"backend {chosen.name!r} has no gradient but the input requires one; choose torch, or detach() the input"
        )
    return chosen


def _check_bias(bias: Any, leading: tuple[int, ...], layout: TokenLayout, like: Any) -> Any:
    """bias broadcast (a view) to [*leading, query, key]; None stays None."""
    if bias is None:
        return None
    if not (isinstance(bias, np.ndarray) or arrays.is_torch(bias)) or arrays.is_torch(bias) != arrays.is_torch(like):
        raise TypeError(f"bias is a {type(bias).__name__}; expected the kind of array that query is")
    if arrays.dtype_name(bias) not in (*arrays.FLOAT_DTYPES, "bool"):
        raise TypeError(f"bias is {arrays.dtype_name(bias)}; expected bool (True = attend) or a float dtype")
    if arrays.is_torch(bias) and bias.device != like.device:
        raise ValueError(f"bias is on {bias.device} and query on {like.device}; expected one device")
    shape = (*leading, layout.num_tokens, layout.num_tokens)
    try:
        return bias.expand(shape) if arrays.is_torch(bias) else np.broadcast_to(bias, shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected one that broadcasts to {shape}") from error


def _check_regions(regions: Any, leading: tuple[int, ...], layout: TokenLayout) -> np.ndarray | None:
    """regions as float64 NumPy, broadcast (a view) to [*leading, region, patch]."""
    if regions is None:
        return None
    coverage = arrays.to_float64(regions)
    if coverage.ndim < 2 or coverage.shape[-1] != layout.num_patches or coverage.shape[-2] == 0:
        raise ValueError(
            f"regions has shape {coverage.shape}; expected [..., region, {layout.num_patches}] for {layout}"
        )
    if ((coverage < 0) | (coverage > 1)).any():
        raise ValueError(
            f"regions holds values from {np.nanmin(coverage):.3g} to {np.nanmax(coverage):.3g}; "
            "expected each patch's covered share, 0 to 1"
        )
    # One axis of size 1 stands for the heads, which share an image's regions.
    per_head = coverage if not leading else coverage[..., np.newaxis, :, :]
    shape = (*leading, *coverage.shape[-2:])
    try:
        return np.broadcast_to(per_head, shape)
    except ValueError as error:
        raise ValueError(
            f"regions has shape {coverage.shape}; expected its leading axes to match {leading[:-1]}, "
            f"those of the attention {leading} without head"
        ) from error
