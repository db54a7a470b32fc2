"""Streams a data set's attention through two sinks, alone or together, in one forward pass.

`metrics` measures on the spot and never builds the map in main memory; `store` keeps the map. Both write the same
kind of store, one commit a batch, so a run that was killed goes on at the first batch that is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine import __version__
from engine.capture import AttentionSite, AttentionTap, CaptureError, attention_map, discover_sites, evaluating
from kernels import Measurement, MetricSpec, TokenLayout, load_metric, measure_qk, resolve
from store import AttentionStore, AttentionWriter, LayerSchema, StoreError, StoreSchema
from store.schema import ledger_path
from train.data import ImageSet
from train.errors import InputError

__all__ = ["Capture", "capture_to_store", "metric_parameters", "metrics_of_one_capture", "stack_layers"]

# A layer whose mean prefix mass passes this keeps so little on its patches that 16 bits cost 7e-4 nat and 0.1 of I.
PREFIX_MASS_WARNING = 0.9


class _BatchSinks:
    """Collects what one batch's forward pass leaves for the writer: metric values, maps, or both."""

    def __init__(self, capture: Capture, regions: Mapping[TokenLayout, np.ndarray | None]) -> None:
        self._capture = capture
        self._regions = regions
        self.measurements: list[Measurement] = []
        self.attention: dict[int, torch.Tensor] = {}
        self.prefix_mass: dict[int, float] = {}

    def __call__(
        self, site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        capture = self._capture
        if "metrics" in capture.sinks:
            regions = self._regions[site.layout]
            self.measurements.append(
                measure_qk(
                    query,
                    key,
                    site.layout,
                    metrics=capture.metrics,
                    scale=scale,
                    bias=bias,
                    backend=capture.backend,
                    regions=None if regions is None else torch.from_numpy(regions).to(query.device),
                )
            )
        if "store" in capture.sinks:
            maps = attention_map(query, key, scale, bias)
            self.prefix_mass[site.layer] = float(site.layout.prefix(maps).sum(dim=-1).mean())
            self.attention[site.layer] = maps.to(torch.float16).cpu()

    def metric_values(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Values [image, layer, head(, region)] and undefined-row counts [image, layer, head] of the batch.

        Layers with fewer heads than the widest are filled with NaN and −1.
        """
        names = list(self.measurements[0]) if self.measurements else []
        values = {name: stack_layers([m[name] for m in self.measurements], np.nan) for name in names}
        counts = {name: stack_layers([m.undefined_rows[name] for m in self.measurements], -1) for name in names}
        return values, counts


def stack_layers(layers: Sequence[Any], fill: float) -> np.ndarray:
    """Arrays [image, head, ...] of several layers as one [image, layer, head, ...]."""
    arrays = [torch.as_tensor(layer).cpu().numpy() for layer in layers]
    heads = max(array.shape[1] for array in arrays)
    padded = [
        np.pad(array, [(0, 0), (0, heads - array.shape[1])] + [(0, 0)] * (array.ndim - 2), constant_values=fill)
        for array in arrays
    ]
    return np.stack(padded, axis=1)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What to capture and how; the same for every model of a study.

    Args:
        sinks: "metrics", "store" or both.
        metrics: what the `metrics` sink measures: names, `module:name` or MetricSpec objects.
        encoding: how the `store` sink keeps maps.
        batch_size: images a forward pass, and a shard.
        layers: layers to capture; empty: all.
        backend: of the `metrics` sink.
        device: where the model runs.
    """

    sinks: tuple[str, ...] = ("metrics",)
    metrics: tuple[str | MetricSpec, ...] = ("distance", "entropy", "morans_i")
    encoding: str = "fp16"
    batch_size: int = 32
    layers: tuple[int, ...] = ()
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

    Batches are decoded one ahead and written one behind the forward pass, each by one thread, so memory holds three
    batches whatever the data set's size.

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
    sites, skipped, num_classes = discover_sites(model, first, capture.layers or None)
    for name, reason in skipped:
        tqdm.write(f"{label}: {name} is left out: {reason}")
    regions = {site.layout: images.regions(site.layout) for site in sites}
    specs = metrics_of_one_capture(capture.metrics)
    if "metrics" in capture.sinks:
        needing = [spec.name for spec in specs if spec.inputs == "regions"]
        if needing and any(region is None for region in regions.values()):
            raise CaptureError(f"{needing[0]} needs images with regions, and this data set has none; leave it out")
    backend = resolve(capture.backend, device.type).name
    if "metrics" in capture.sinks and backend == "numba":
        _announce_compilation()
    schema = StoreSchema(
        layers=tuple(
            LayerSchema(layer=site.layer, site=site.name, heads=site.heads, layout=site.layout.to_dict())
            for site in sites
        ),
        image_ids=tuple(images.ids),
        batch_size=capture.batch_size,
        encoding=capture.encoding if "store" in capture.sinks else "",
        metrics={spec.name: metric_parameters(spec, backend) for spec in specs} if "metrics" in capture.sinks else {},
        model=dict(model_info),
        preprocessing=dict(preprocessing),
        dataset=dict(dataset_info),
        precision=str(first.dtype).removeprefix("torch."),
        num_classes=num_classes,
        regions=tuple(images.region_names),
        region_metrics=tuple(spec.name for spec in specs if spec.inputs == "regions")
        if "metrics" in capture.sinks
        else (),
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
        batches = [batch for batch in range(schema.num_batches) if batch not in writer.committed]
        _run_batches(model, images, capture, schema, writer, batches, regions, label)
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


def metrics_of_one_capture(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names, all of which can be computed from one capture.

    Raises:
        InputError: no such metric, or one that compares two captures.
    """
    specs = []
    for metric in metrics:
        try:
            spec = metric if isinstance(metric, MetricSpec) else load_metric(metric)
        except ValueError as error:
            raise InputError(str(error)) from error
        if spec.inputs == "pair":
            raise InputError(f"{spec.name} compares two captures, and measure.metrics are those of one; leave it out")
        specs.append(spec)
    return specs


def metric_parameters(spec: MetricSpec, backend: str) -> dict[str, Any]:
    """What identifies a metric's numbers in a store: its unit, the backend and the code that made them."""
    return {"unit": spec.unit, "backend": backend, "code_version": __version__}


def _run_batches(
    model: torch.nn.Module,
    images: ImageSet,
    capture: Capture,
    schema: StoreSchema,
    writer: AttentionWriter,
    batches: Sequence[int],
    regions: Mapping[TokenLayout, np.ndarray | None],
    label: str,
) -> None:
    """Forward passes over the batches that are missing, decoding one ahead and writing one behind."""
    device = torch.device(capture.device)

    def rows_of(batch: int) -> list[int]:
        rows = schema.batch_rows(batch)
        return list(range(rows.start, rows.stop))

    prefix_mass: dict[int, list[float]] = {}
    with (
        ThreadPoolExecutor(1, "decode") as decoder,
        ThreadPoolExecutor(1, "write") as writing,
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=schema.num_images, desc=label, unit="image", disable=None) as progress,
    ):
        progress.update(schema.num_images - sum(len(rows_of(batch)) for batch in batches))
        ahead: Future[torch.Tensor] | None = None
        behind: Future[None] | None = None
        for position, batch in enumerate(batches):
            rows = rows_of(batch)
            pixels = ahead.result() if ahead is not None else images.batch(rows)
            if position + 1 < len(batches):
                ahead = decoder.submit(images.batch, rows_of(batches[position + 1]))
            of_batch = {layout: None if r is None else r[rows] for layout, r in regions.items()}
            sinks = _BatchSinks(capture, of_batch)
            with AttentionTap(model, sinks, layers=capture.layers or None):
                logits = model(pixels.to(device, non_blocking=True))
            for layer, mass in sinks.prefix_mass.items():
                prefix_mass.setdefault(layer, []).append(mass)
            values, counts = sinks.metric_values()
            if behind is not None:
                behind.result()  # one batch in flight: back-pressure, and a failed write stops the run here
            behind = writing.submit(
                writer.write_batch,
                batch,
                attention=sinks.attention,
                metrics=values,
                undefined=counts,
                logits=logits.float().cpu().numpy(),
            )
            progress.update(len(rows))
        if behind is not None:
            behind.result()
    for layer, masses in sorted(prefix_mass.items()):
        if np.mean(masses) > PREFIX_MASS_WARNING:
            tqdm.write(
                f"{label}: layer {layer} gives {np.mean(masses):.2f} of its attention to prefix tokens, and "
                f"{schema.encoding} keeps the little that patches get too coarsely for Moran's I (errors up to 0.1): "
                "use the metrics sink"
            )
