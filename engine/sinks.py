"""Streams a data set's attention through two sinks, alone or together, in one forward pass.

`metrics` measures on the spot and never builds the map in main memory; `store` keeps the map. Both write the same
kind of store, one commit a batch, so a run that was killed goes on at the first batch that is missing.
"""

from __future__ import annotations

import ctypes
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine import __version__
from engine.batch_sinks import BatchSinks, discover_factors, one_bias
from engine.capture import AttentionTap, CaptureError, discover_sites, evaluating
from engine.progress import ImageProgress
from engine.transfer import HostCopies, HostCopy
from kernels import MetricSpec, TokenLayout, load_metric, resolve
from store import AttentionStore, AttentionWriter, FactorSchema, LayerSchema, StoreError, StoreSchema
from store.arrays import attention_arrays
from store.encodings import resolve_encoding
from store.schema import ledger_path
from train.data import ImageSet
from train.errors import InputError

__all__ = ["Capture", "capture_to_store", "load_metrics", "metric_parameters", "metrics_of_one_capture"]

# A layer whose mean prefix mass passes this keeps so little on its patches that 16 bits cost 7e-4 nat and 0.1 of I.
PREFIX_MASS_WARNING = 0.9


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What to capture and how; the same for every model of a study.

    Args:
        sinks: "metrics", "store" or both.
        metrics: what the `metrics` sink measures: names, `module:name` or MetricSpec objects.
        encoding: how the `store` sink keeps maps.
        batch_size: images a forward pass, and a shard.
        layers, heads: those to capture; empty: all.
        backend: of the `metrics` sink.
        device: where the model runs.
    """

    sinks: tuple[str, ...] = ("metrics",)
    metrics: tuple[str | MetricSpec, ...] = ("distance", "entropy", "morans_i")
    encoding: str = "fp16"
    batch_size: int = 32
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    backend: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.sinks:
            raise InputError("capture.sinks is empty; expected metrics, store or both")
        if "metrics" in self.sinks and not self.metrics:
            raise InputError("the metrics sink was asked for without any metric; name some in measure.metrics")


def capture_to_store(
    model: torch.nn.Module,
    images: ImageSet,
    path: Path,
    capture: Capture,
    *,
    model_info: Mapping[str, Any],
    dataset_info: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    manifest: Mapping[str, Any] | None = None,
    label: str = "capture",
    replace: bool = False,
) -> AttentionStore:
    """Stream a data set's attention into a store, resuming at the first batch that is not committed.

    Images are decoded one batch ahead. A layer's attention is encoded and written while the next layers are computed;
    the writer holds back the forward pass when more than a few layers wait, so memory does not grow with the data set.

    Args:
        model: see `AttentionTap`.
        images: readable images in row order; a file that cannot be read any more raises and is not substituted.
        path: the store, `something.zarr`; its ledger stands beside it.
        capture: what to capture.
        model_info, dataset_info, preprocessing: provenance, kept in the store's attributes.
        manifest: every file of the data set with its status, kept in the store.
        label: name in the progress bar.
        replace: a store of another run (or a damaged one) at `path` is deleted first instead of refused.

    Returns:
        The complete store, open for reading.

    Raises:
        CaptureError: no measurable attention, or a metric this data set cannot have.
        StoreError: the store there belongs to another run, or cannot be written.
    """
    device = torch.device(capture.device)
    first = images.batch([0]).to(device)
    sites, skipped, num_classes = discover_sites(model, first, capture.layers or None, capture.heads or None)
    for name, reason in skipped:
        tqdm.write(f"{label}: {name} is left out: {reason}")
    factors: dict[int, FactorSchema] = {}
    biases: dict[int, torch.Tensor] = {}
    if "store" in capture.sinks and resolve_encoding(capture.encoding).keeps_factors:
        some = images.batch(list(range(min(2, len(images))))).to(device)
        factors, biases = discover_factors(model, some, capture.layers, capture.heads)
    regions = {site.layout: images.regions(site.layout) for site in sites}
    specs = metrics_of_one_capture(capture.metrics) if "metrics" in capture.sinks else []
    needing = [spec.name for spec in specs if spec.inputs == "regions"]
    if needing and any(region is None for region in regions.values()):
        raise CaptureError(f"{needing[0]} needs images with regions, and this data set has none; leave it out")
    backend = resolve(capture.backend, device.type).name
    if specs and backend == "numba":
        _announce_compilation()
    schema = StoreSchema(
        layers=tuple(
            LayerSchema(
                layer=site.layer,
                site=site.name,
                heads=site.heads,
                layout=site.layout.to_dict(),
                factors=factors.get(site.layer),
            )
            for site in sites
        ),
        image_ids=tuple(images.ids),
        batch_size=capture.batch_size,
        encoding=capture.encoding if "store" in capture.sinks else "",
        metrics={spec.name: metric_parameters(spec, backend) for spec in specs},
        model=dict(model_info),
        preprocessing=dict(preprocessing),
        dataset=dict(dataset_info),
        precision=str(first.dtype).removeprefix("torch."),
        num_classes=num_classes,
        regions=tuple(images.region_names),
        region_metrics=tuple(needing),
        head_ids=sites[0].head_ids,
        code_version=__version__,
        extra={"skipped": [list(item) for item in skipped]},
    )

    def open_writer() -> AttentionWriter:
        return AttentionWriter.open(
            path,
            schema,
            labels=images.labels,
            class_names=images.class_names,
            manifest=None if manifest is None else dict(manifest),
            regions=next(iter(regions.values())),
            biases=biases,
        )

    try:
        opened = open_writer()
    except StoreError as error:
        if not (replace and _is_other(path, schema)):
            raise
        tqdm.write(f"{path.name}: begun anew, since what was there cannot be continued ({error})")
        shutil.rmtree(path)
        shutil.rmtree(ledger_path(path), ignore_errors=True)
        opened = open_writer()
    with opened as writer:
        _run_batches(model, images, capture, writer, specs, regions, biases, label)
        writer.finish()
    return AttentionStore.open(path)


def _announce_compilation() -> None:
    """Say why the first batch takes longer: kernels compile once a machine, and load once a process."""
    from kernels.numba_cpu import is_compiled

    if not is_compiled():
        tqdm.write("loading the compiled kernels; the first time on a machine they are compiled, in about 15 s")


def _is_other(path: Path, schema: StoreSchema) -> bool:
    """Whether a store of another run lies at `path`, or one too damaged to be opened; False for anything else."""
    if not ledger_path(path).is_dir():
        return False
    try:
        return AttentionStore.open(path).schema != schema
    except StoreError:
        return True


def load_metrics(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names.

    Raises:
        InputError: no such metric.
    """
    try:
        return [metric if isinstance(metric, MetricSpec) else load_metric(metric) for metric in metrics]
    except ValueError as error:
        raise InputError(str(error)) from error


def metrics_of_one_capture(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names, all of which can be computed from one capture.

    Raises:
        InputError: no such metric, or one that compares two captures.
    """
    specs = load_metrics(metrics)
    for spec in specs:
        if spec.inputs == "pair":
            raise InputError(
                f"{spec.name} compares two captures, and here there is one; leave it out, or measure stored captures "
                "with --against"
            )
    return specs


def metric_parameters(spec: MetricSpec, backend: str, other: AttentionStore | None = None) -> dict[str, Any]:
    """What identifies a metric's numbers in a store: its unit, the backend and the code that made them.

    Args:
        other: the store that a pair metric compares with; its name and its capture's hash are among them.
    """
    parameters = {"unit": spec.unit, "backend": backend, "code_version": __version__}
    if spec.inputs != "pair" or other is None:
        return parameters
    return parameters | {"against": {"store": other.path.name, "capture": other.digest}}


def _add_attention(
    writer: AttentionWriter, biases: Mapping[int, torch.Tensor], batch: int, layer: int, attention: Any
) -> None:
    """Hand a layer to the writer; a bias that was one for all images must have stayed the same."""
    if layer in biases and not torch.equal(one_bias(attention.bias), biases[layer]):
        raise CaptureError(
            f"the bias of layer {layer} changes from batch to batch though not from image to image, which the encoding "
            "qk cannot keep; use fp16 or bf16"
        )
    writer.add_attention(batch, layer, attention)


def _return_freed_memory() -> None:
    """Give the system back what the C library keeps of freed blocks, which come in many sizes from many threads.

    Without it a capture's resident memory crept up by 10-13 % from 64 to 640 images, though nothing was held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _run_batches(
    model: torch.nn.Module,
    images: ImageSet,
    capture: Capture,
    writer: AttentionWriter,
    specs: Sequence[MetricSpec],
    regions: Mapping[TokenLayout, np.ndarray | None],
    biases: Mapping[int, torch.Tensor],
    label: str,
) -> None:
    """Forward passes over the batches that are missing, images decoded one batch ahead."""
    device = torch.empty(0, device=capture.device).device  # with its number: another thread has another current GPU
    schema = writer.schema
    image_bytes = sum(array.row_bytes for array in attention_arrays(schema))

    def rows_of(batch: int) -> list[int]:
        rows = schema.batch_rows(batch)
        return list(range(rows.start, rows.stop))

    def decode(batch: int) -> torch.Tensor:
        return images.batch(rows_of(batch), device)

    def run(batch: int, pixels: torch.Tensor, *, explain: bool = False) -> tuple[BatchSinks, HostCopy]:
        """The forward pass of a batch, launched; its metrics and logits are on their way to the host."""
        of_batch = {layout: None if r is None else r[rows_of(batch)] for layout, r in regions.items()}
        add_attention = partial(_add_attention, writer, biases, batch)
        sinks = BatchSinks(schema, specs, capture.backend, of_batch, add_attention, copies, explain=explain)
        with AttentionTap(model, sinks, layers=capture.layers or None, heads=capture.heads or None):
            logits = model(pixels)
        sinks.finish()
        return sinks, copies.start(logits.float())

    def commit(batch: int, pixels: torch.Tensor, sinks: BatchSinks, logits: HostCopy) -> None:
        sinks.pass_on()
        if invalid := sinks.invalid_layers():
            run(batch, pixels, explain=True)
            raise CaptureError(
                f"{invalid[0]} gave rows that are no attention in one forward pass of batch {batch} and none in the "
                "next; the model or the device does not compute the same twice"
            )
        values, counts = sinks.metric_values()
        writer.commit(batch, values, counts, logits().numpy() if schema.num_classes else None)
        for layer, mass in sinks.prefix_mass().items():
            prefix_mass.setdefault(layer, []).append(mass)
        progress.update(len(rows_of(batch)))
        _return_freed_memory()

    prefix_mass: dict[int, list[float]] = {}
    copies = HostCopies(device)
    batches = writer.missing
    done = schema.num_images - sum(len(rows_of(batch)) for batch in batches)
    with (
        ThreadPoolExecutor(1, "decode") as decoder,
        evaluating(model),
        torch.inference_mode(),
        ImageProgress(label, schema.num_images, done, image_bytes) as progress,
    ):
        ahead: Future[torch.Tensor] | None = None
        launched: deque[tuple[int, torch.Tensor, BatchSinks, HostCopy]] = deque()
        for position, batch in enumerate(batches):
            pixels = ahead.result() if ahead is not None else decode(batch)
            if position + 1 < len(batches):
                ahead = decoder.submit(decode, batches[position + 1])
            launched.append((batch, pixels, *run(batch, pixels)))
            # A GPU computes this batch while the one before is waited for and committed.
            while len(launched) > min(copies.depth, 1):
                commit(*launched.popleft())
        while launched:
            commit(*launched.popleft())
        writer.flush()
    for layer, masses in sorted(prefix_mass.items()):
        if np.mean(masses) > PREFIX_MASS_WARNING:
            tqdm.write(
                f"{label}: layer {layer} gives {np.mean(masses):.2f} of its attention to prefix tokens, and "
                f"{schema.encoding} keeps the little that patches get too coarsely for Moran's I (errors up to 0.1): "
                "use the metrics sink"
            )
