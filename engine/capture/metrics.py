"""The metrics that a configuration names, and what identifies their numbers in a store."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engine import __version__
from engine.config import load_metrics
from kernels import (
    BACKENDS,
    METRICS,
    MetricError,
    MetricSpec,
    TokenLayout,
    measure_attention,
    measure_pair,
    resolve,
)
from kernels.cpu.threads import num_threads
from store import AttentionStore
from train.errors import InputError


def chosen_backend(name: str, device: str) -> str:
    """The backend that will measure data on a device, never "auto".

    Raises:
        InputError: no such backend, or NUMBA_NUM_THREADS is no number of threads.
        BackendUnavailableError: it does not read data there.
    """
    try:
        chosen = resolve(name, device).name
        if chosen == "numba":
            num_threads()
    except ValueError as error:
        raise InputError(str(error)) from error
    return chosen


def check_metrics(specs: Sequence[MetricSpec], layouts: Iterable[TokenLayout], regions: int, backend: str) -> None:
    """Try every metric on two maps of each layout: what it lacks there is found at once, not after hours.

    Args:
        regions: how many regions an image has; 0: none.
        backend: that will measure, never "auto".

    Raises:
        InputError: a metric that these maps do not have, as that of a class token that is not there.
        MetricError: a user's own one gives something else than one value a map.
        BackendUnavailableError: the backend cannot run here.
    """
    BACKENDS[backend].load()
    for spec in specs:
        if spec.inputs == "regions" and not regions:
            raise InputError(f"{spec.name} needs images with regions, and this data set has none; leave it out")
        spec.implementation(backend)
    generator = np.random.default_rng(0)
    for layout in dict.fromkeys(layouts):
        maps = generator.random((1, 2, layout.num_tokens, layout.num_tokens))  # [image, head, query, key]
        maps /= maps.sum(axis=-1, keepdims=True)
        covered = np.ones((1, regions, layout.num_patches)) if regions else None
        for spec in specs:
            try:
                if spec.inputs == "pair":
                    measure_pair(maps, maps, layout, [spec], "reference")
                else:
                    measure_attention(maps, layout, [spec], "reference", regions=covered)
            except MetricError as error:
                if METRICS.get(spec.name) is not spec:
                    raise
                raise InputError(f"{spec.name} cannot be measured here: {error.__cause__}; leave it out") from error


def metric_parameters(spec: MetricSpec, backend: str, other: AttentionStore | None = None) -> dict[str, Any]:
    """What identifies a metric's numbers in a store: its unit, the backend and the code that made them.

    Of a user's metric, the code is that of its reference's module, too: changed, it is measured anew.

    Args:
        other: the store that a pair metric compares with; its name and its capture's hash are among them.
    """
    parameters: dict[str, Any] = {"unit": spec.unit, "backend": backend, "code_version": __version__}
    if METRICS.get(spec.name) is not spec:
        parameters["definition"] = definition(spec)
    if spec.inputs != "pair" or other is None:
        return parameters
    return parameters | {"against": {"store": other.path.name, "capture": other.digest}}


def definitions(metrics: Sequence[str]) -> dict[str, str]:
    """`definition` of the users' metrics among these; those of kernels have the code version."""
    return {spec.name: definition(spec) for spec in load_metrics(metrics) if METRICS.get(spec.name) is not spec}


def definition(spec: MetricSpec) -> str:
    """SHA-256 of the place of a metric's reference and of its module's source; of its byte code where there is none."""
    code: Any = spec.reference
    while isinstance(code, functools.partial):
        code = code.func
    code = code if inspect.isroutine(code) else type(code)
    compiled = getattr(code, "__code__", None)
    place = f"{code.__module__}:{code.__qualname__}:{0 if compiled is None else compiled.co_firstlineno}"
    try:
        text = inspect.getsource(inspect.getmodule(code) or code)
    except (OSError, TypeError):  # typed in, or compiled
        text = "" if compiled is None else compiled.co_code.hex()
    return hashlib.sha256(f"{place}\n{text}".encode()).hexdigest()
