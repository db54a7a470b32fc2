"""Streams a data set's attention through two sinks, alone or together, in one forward pass.

`metrics` measures on the spot and never builds the map in main memory; `store` keeps the map. Both write the same
kind of store, one commit a batch, so a run that was killed goes on at the first batch that is missing. Several
processes divide the missing batches: each is captured and committed by one, so the bytes are those of one process.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from engine import __version__
from engine.capture.batch_sinks import BatchSinks, discover_factors, one_bias, stored_layers
from engine.capture.families import CaptureError
from engine.capture.metrics import metric_parameters
from engine.capture.prefix_mass import heads_on_prefix
from engine.capture.tap import AttentionTap, discover_sites, evaluating
from engine.config import metrics_of_one_capture
from engine.progress import ImageProgress, say
from kernels import BACKENDS, CORE_METRICS, MetricSpec, TokenLayout, check_metrics, resolve
from store import AttentionStore, AttentionWriter, FactorSchema, StoreSchema
from store.arrays import attention_arrays
from store.encodings import resolve_encoding
from store.schema import DamagedStoreError, OtherRunError
from store.storage import Location
from train.data import ImageSet
from train.errors import InputError
from train.parallel import Tally, Workers
from train.transfer import HostCopies, HostCopy


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
    metrics: tuple[str | MetricSpec, ...] = CORE_METRICS
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
    path: Location,
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
    The processes joined by `train.parallel.joined` all call this; the first one makes the store and finishes it.

    Args:
        model: see `AttentionTap`.
        images: readable images in row order; a file that cannot be read any more raises and is not substituted.
        path: the store, `something.zarr`, or its URL; its ledger stands beside it.
        capture: what to capture.
        model_info, dataset_info, preprocessing: provenance, kept in the store's attributes.
        manifest: every file of the data set with its status, kept in the store.
        label: name in the progress bar.
        replace: a store of another run, or one of ours with metadata that cannot be rebuilt, is removed first instead
            of refused; one that cannot be read is refused all the same.

    Returns:
        The complete store, open for reading.

    Raises:
        CaptureError: no measurable attention, or a metric this data set cannot have.
        StoreError: the store there belongs to another run, or cannot be written.
    """
    device = torch.device(capture.device)
    first = images.batch([0]).to(device)
    sites, skipped, num_classes, precision = discover_sites(model, first, capture.layers or None, capture.heads or None)
    for name, reason in skipped:
        say(f"{label}: {name} is left out: {reason}")
    factors: dict[int, FactorSchema] = {}
    biases: dict[int, torch.Tensor] = {}
    if "store" in capture.sinks and resolve_encoding(capture.encoding).keeps_factors:
        some = images.batch(list(range(min(2, len(images))))).to(device)
        factors, biases = discover_factors(model, some, capture.layers, capture.heads)
    regions = {site.layout: images.regions(site.layout) for site in sites}
    specs = metrics_of_one_capture(capture.metrics) if "metrics" in capture.sinks else []
    needing = [spec.name for spec in specs if spec.inputs == "regions"]
    backend = resolve(capture.backend, device.type).name
    check_metrics(specs, [site.layout for site in sites], len(images.region_names), backend)
    if specs and (notice := BACKENDS[backend].load().notice()):
        say(notice)
    schema = StoreSchema(
        layers=stored_layers(sites, factors),
        image_ids=tuple(images.ids),
        batch_size=capture.batch_size,
        encoding=capture.encoding if "store" in capture.sinks else "",
        metrics={spec.name: metric_parameters(spec, backend) for spec in specs},
        model=dict(model_info),
        preprocessing=dict(preprocessing),
        dataset=dict(dataset_info),
        precision=precision,
        num_classes=num_classes,
        regions=tuple(images.region_names),
        region_metrics=tuple(needing),
        head_ids=sites[0].head_ids,
        code_version=__version__,
        extra={"skipped": [list(item) for item in skipped]},
    )

    def open_writer(join: str = "") -> AttentionWriter:
        return AttentionWriter.open(
            path,
            schema,
            labels=images.labels,
            class_names=images.class_names,
            manifest=None if manifest is None else dict(manifest),
            regions=next(iter(regions.values())),
            biases=biases,
            join=join,
        )

    def open_first() -> AttentionWriter:
        try:
            return open_writer()
        except (OtherRunError, DamagedStoreError) as error:
            if not replace:
                raise
            found = str(error).partition(";")[0]  # what to do about it is done here
            say(f"{path.name}: captured from the beginning, since what was there cannot be continued ({found})")
            AttentionWriter.discard(path)
            return open_writer()

    workers = Workers.current()
    if workers.first:
        writer = open_first()
        if workers.count > 1:
            writer.share()
        missing = workers.tell((writer.run, writer.missing))[1]
    else:
        run, missing = workers.tell(("", []))
        writer = open_writer(join=run)
    with writer:
        _run_batches(model, images, capture, writer, missing, specs, regions, biases, label)
        if workers.first:
            writer.finish()
    workers.wait()  # nobody holds the store any more
    return AttentionStore.open(path)


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
    missing: Sequence[int],
    specs: Sequence[MetricSpec],
    regions: Mapping[TokenLayout, np.ndarray | None],
    biases: Mapping[int, torch.Tensor],
    label: str,
) -> None:
    """Forward passes over this process's share of the missing batches, images decoded one batch ahead.

    When it returns, all processes have committed theirs.
    """
    device = torch.empty(0, device=capture.device).device  # with its number: another thread has another current GPU
    schema = writer.schema
    image_bytes = sum(array.row_bytes for array in attention_arrays(schema))

    def rows_of(batch: int) -> list[int]:
        rows = schema.batch_rows(batch)
        return list(range(rows.start, rows.stop))

    def decode(batch: int) -> torch.Tensor:
        return images.batch(rows_of(batch), device)

    def run(batch: int, pixels: torch.Tensor) -> tuple[BatchSinks, HostCopy]:
        """The forward pass of a batch, launched; its metrics and logits are on their way to the host."""
        of_batch = {layout: None if r is None else r[rows_of(batch)] for layout, r in regions.items()}
        add_attention = partial(_add_attention, writer, biases, batch)
        sinks = BatchSinks(schema, specs, capture.backend, of_batch, add_attention, copies)
        with AttentionTap(model, sinks, layers=capture.layers or None, heads=capture.heads or None):
            logits = model(pixels)
        sinks.finish()
        return sinks, copies.start(logits.float())

    def commit(batch: int, sinks: BatchSinks, logits: HostCopy) -> None:
        sinks.pass_on()
        rows = sinks.masked_rows()
        if rows and all(masked == of for _, masked, of in rows):
            raise CaptureError(
                f"no row of batch {batch} is post-softmax attention, in any layer: query and key are NaN or infinite; "
                "look for NaN in the model's weights and in the images"
            )
        masked_rows.extend((layer, masked) for layer, masked, _ in rows if masked)
        values, counts = sinks.metric_values()
        writer.commit(batch, values, counts, logits().numpy() if schema.num_classes else None)
        prefix_mass.extend((*head, batch, mass) for head, mass in sinks.prefix_mass().items())
        progress.reach(captured.add(len(rows_of(batch))))
        _return_freed_memory()

    workers = Workers.current()
    batches = workers.deal(missing)
    captured = Tally(workers, f"captured of {writer.run}")
    prefix_mass: list[tuple[int, int, int, float]] = []  # layer, head, batch, mean
    masked_rows: list[tuple[int, int]] = []  # layer, rows that are no attention
    copies = HostCopies(device)
    done = schema.num_images - sum(len(rows_of(batch)) for batch in missing)
    with (
        ThreadPoolExecutor(1, "decode", initializer=_use_device, initargs=(device,)) as decoder,
        evaluating(model),
        torch.inference_mode(),
        ImageProgress(label, schema.num_images, done, image_bytes) as progress,
    ):
        ahead: Future[torch.Tensor] | None = None
        launched: deque[tuple[int, BatchSinks, HostCopy]] = deque()
        for position, batch in enumerate(batches):
            pixels = ahead.result() if ahead is not None else decode(batch)
            if position + 1 < len(batches):
                ahead = decoder.submit(decode, batches[position + 1])
            launched.append((batch, *run(batch, pixels)))
            # A GPU computes this batch while the one before is waited for and committed.
            while len(launched) > min(copies.depth, 1):
                commit(*launched.popleft())
        while launched:
            commit(*launched.popleft())
        writer.flush()
        by_worker = workers.gather((prefix_mass, masked_rows))
        progress.reach(captured.add(0))
    _warn_of_prefix_mass(sorted(entry for masses, _ in by_worker for entry in masses), schema, label)
    _warn_of_masked_rows(sorted(entry for _, masked in by_worker for entry in masked), schema, label)


def _warn_of_prefix_mass(entries: Sequence[tuple[int, int, int, float]], schema: StoreSchema, label: str) -> None:
    """Say which heads leave too little on the patches for 16 bits.

    Args:
        entries: (layer, head, batch, mean mass), sorted; NaN for a batch in which the head has no sound row.
    """
    masses: dict[str, float] = {}
    sound = (entry for entry in entries if not np.isnan(entry[-1]))
    for (layer, head), of_head in itertools.groupby(sound, key=lambda entry: entry[:2]):
        batches = list(of_head)
        rows = [schema.batch_rows(batch) for _, _, batch, _ in batches]
        name = f"layer {layer}, head {schema.head_ids[head] if schema.head_ids else head}"
        masses[name] = float(np.average([mass for *_, mass in batches], weights=[r.stop - r.start for r in rows]))
    found = heads_on_prefix(masses)
    if found:
        say(
            f"{label}: {found}; {schema.encoding} keeps the little that patches get there too coarsely for Moran's I "
            "(errors up to 0.1): use the metrics sink"
        )


def _warn_of_masked_rows(entries: Sequence[tuple[int, int]], schema: StoreSchema, label: str) -> None:
    """Say which layers had rows that are no attention; entries are (layer, rows), in order."""
    names = {layer.layer: layer.site for layer in schema.layers}
    for layer, of_layer in itertools.groupby(entries, key=lambda entry: entry[0]):
        total = sum(rows for _, rows in of_layer)
        say(
            f"{label}: {total:,} rows of layer {layer} ({names[layer]}) are no post-softmax attention (NaN or infinite "
            "logits); every metric leaves them out and counts them with the rows that have no value"
        )


def _use_device(device: torch.device) -> None:
    """A thread chooses its own GPU: without this, the decoder of every process would open the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
