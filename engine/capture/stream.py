"""Streams a data set's attention through two sinks, alone or together, in one forward pass.

`metrics` measures on the spot and never builds the map in main memory; `store` keeps the map. Both write the same
kind of store, one commit per batch, so a run that was killed goes on at the first batch that is missing. Several
processes divide the missing batches: each is captured and committed by one, so the bytes are those of one process.

A batch is launched (`BatchPass` gets every site's attention from the tap and gives it to the sinks), its results are
copied to the host while the next batch runs, and then they are handed to the store's writer and committed.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import __version__
from engine.capture.attention_call import AttentionSite, SiteAttention
from engine.capture.discovery import Discovery, discover
from engine.capture.families import CaptureError
from engine.capture.metrics import metric_parameters
from engine.capture.prefix_mass import heads_on_prefix
from engine.capture.sinks import BatchResults, FactorsSink, MapsSink, MetricsSink, Sink
from engine.capture.tap import AttentionTap, evaluating, logits_of
from engine.config import metrics_of_one_capture
from engine.progress import ImageProgress, say
from kernels import BACKENDS, CORE_METRICS, MetricSpec, check_metrics, resolve
from store import AttentionStore, AttentionWriter, StoreSchema
from store.arrays import attention_arrays
from store.encodings import resolve_encoding
from store.schema import DamagedStoreError, OtherRunError
from store.storage import Location
from train.data import ImageSet
from train.parallel import Tally, Workers
from train.transfer import HostCopies


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What to capture and how; the same for every model of a study."""

    sinks: tuple[str, ...] = ("metrics",)  # "metrics", "store" or both
    # What the `metrics` sink measures: names, `module:name` or MetricSpec objects.
    metrics: tuple[str | MetricSpec, ...] = CORE_METRICS
    encoding: str = "fp16"  # how the `store` sink keeps maps
    batch_size: int = 32  # images per forward pass, and per shard
    layers: tuple[int, ...] = ()  # numbers of those to capture; empty: all
    heads: tuple[int, ...] = ()
    backend: str = "auto"  # of the `metrics` sink
    device: str = "cpu"  # where the model runs

    @property
    def stored_encoding(self) -> str:
        """How attention is kept; "" where it is not."""
        return self.encoding if "store" in self.sinks else ""

    @property
    def keeps_factors(self) -> bool:
        """Whether query and key are kept, in place of maps."""
        return bool(self.stored_encoding) and resolve_encoding(self.encoding).keeps_factors

    def schema(
        self,
        found: Discovery,
        specs: Sequence[MetricSpec],
        backend: str,
        ids: Iterable[str],
        regions: Iterable[str],
        **provenance: dict[str, Any],
    ) -> StoreSchema:
        """Of the store that it leaves: of what was found, metrics by a backend, images and their regions by name."""
        return StoreSchema(
            layers=found.layers,
            image_ids=tuple(ids),
            batch_size=self.batch_size,
            encoding=self.stored_encoding,
            metrics={spec.name: metric_parameters(spec, backend) for spec in specs},
            precision=found.precision,
            num_classes=found.num_classes,
            regions=tuple(regions),
            region_metrics=tuple(spec.name for spec in specs if spec.inputs == "regions"),
            head_ids=found.head_ids,
            code_version=__version__,
            extra={"skipped": [list(item) for item in found.skipped]},
            **provenance,
        )


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
    workers: Workers | None = None,
) -> AttentionStore:
    """Stream a data set's attention into a store, resuming at the first batch that is not committed.

    Images are decoded one batch ahead. A layer's attention is encoded and written while the next layers are computed;
    the writer holds back the forward pass when more than a few layers wait, so memory does not grow with the data set.

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
        workers: the processes that divide the batches, see `train.parallel.joined`; all of them call this, the first
            one makes the store and finishes it. None: this process alone.

    Returns:
        The complete store, open for reading.

    Raises:
        CaptureError: no measurable attention, or a layer or head that is not there.
        MetricError: no such metric, or one that this data set cannot have.
        InputError: a metric that compares two captures.
        BackendUnavailableError: the backend cannot run here, or does not measure on the model's device.
        StoreError: the store there belongs to another run, or cannot be written.
    """
    workers = workers or Workers()
    device = torch.device(capture.device)
    few = images.batch(list(range(min(2 if capture.keeps_factors else 1, len(images))))).to(device)
    found = discover(model, few, layers=capture.layers, heads=capture.heads, keeps_factors=capture.keeps_factors)
    for name, reason in found.skipped:
        say(f"{label}: {name} is left out: {reason}")
    specs = metrics_of_one_capture(capture.metrics) if "metrics" in capture.sinks else []
    backend = resolve(capture.backend, device.type, dtypes=found.dtypes, specs=specs).name
    check_metrics(specs, [site.layout for site in found.sites], len(images.region_names), backend)
    if specs and (notice := BACKENDS[backend].load().notice()):
        say(notice)
    provenance = {"model": dict(model_info), "preprocessing": dict(preprocessing), "dataset": dict(dataset_info)}
    schema = capture.schema(found, specs, backend, images.ids, images.region_names, **provenance)
    regions = _regions(images, found.sites)
    constants: dict[str, Any] = {
        "labels": images.labels,
        "class_names": images.class_names,
        "manifest": None if manifest is None else dict(manifest),
        "regions": regions[found.sites[0].layer],  # the store's format has one array, on the first layer's grid
        "biases": found.biases,
    }
    if workers.first:
        writer = _open_first(path, schema, constants, replace)
        if workers.count > 1:
            writer.share()
        missing = workers.tell((writer.run, writer.missing))[1]
    else:
        run, missing = workers.tell(("", []))
        writer = AttentionWriter.open(path, schema, **constants, join=run)
    with writer:
        CaptureRun(
            model=model,
            images=images,
            capture=capture,
            writer=writer,
            found=found,
            specs=specs,
            backend=backend,
            regions=regions,
            workers=workers,
            label=label,
        ).run(missing)
        if workers.first:
            writer.finish()
    workers.wait()  # nobody holds the store any more
    return AttentionStore.open(path)


def _regions(images: ImageSet, sites: Sequence[AttentionSite]) -> dict[int, np.ndarray | None]:
    """Layer -> coverage of all images' regions on the layer's grid; layers of one grid share the array."""
    coverage = {layout: images.regions(layout) for layout in dict.fromkeys(site.layout for site in sites)}
    return {site.layer: coverage[site.layout] for site in sites}


def _open_first(path: Location, schema: StoreSchema, constants: Mapping[str, Any], replace: bool) -> AttentionWriter:
    try:
        return AttentionWriter.open(path, schema, **constants)
    except (OtherRunError, DamagedStoreError) as error:
        if not replace:
            raise
        reason = str(error).partition(";")[0]  # what to do about it is done here
        say(f"{path.name}: captured from the beginning, since what was there cannot be continued ({reason})")
        AttentionWriter.discard(path)
        return AttentionWriter.open(path, schema, **constants)


class BatchPass:
    """One batch: its attention goes from the tap to the sinks while the model runs, and its results wait here."""

    def __init__(self, batch: int, sinks: Sequence[Sink], copies: HostCopies) -> None:
        self.batch, self._sinks, self._copies = batch, sinks, copies
        # (layer, its rows), and how many of those the first sink calls no attention.
        self._rows: list[tuple[int, int]] = []
        self._invalid: list[torch.Tensor] = []

    def on_attention(
        self, site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        """What the tap calls at each site."""
        attention = SiteAttention(site, query, key, scale, bias)
        invalid = [sink.take(attention) for sink in self._sinks]
        self._rows.append((site.layer, query.shape[:-1].numel()))
        self._invalid.append(invalid[0])

    def launched(self, logits: torch.Tensor | None) -> None:
        """The forward pass is launched: its results start on their way to the host; a model may have no logits."""
        parts = [self._invalid, [] if logits is None else [logits], *(sink.launched() for sink in self._sinks)]
        self._lengths = [len(part) for part in parts]
        self._arriving = self._copies.start_all([tensor for part in parts for tensor in part])

    def finish(self) -> BatchResults:
        """Wait for the results, and for attention that has not been handed to the writer."""
        arrived = iter(self._arriving.wait())
        counts, logits, *of_sinks = ([*itertools.islice(arrived, length)] for length in self._lengths)
        results = BatchResults(logits[0].float().numpy() if logits else None)
        for sink, tensors in zip(self._sinks, of_sinks, strict=True):
            sink.finish(results, tensors)
        sums = [count.sum() for count in counts]
        invalid = torch.stack(sums).tolist() if sums else []
        results.invalid_rows = [(layer, found, of) for (layer, of), found in zip(self._rows, invalid, strict=True)]
        return results


@dataclass(kw_only=True)
class CaptureRun:
    """Forward passes over this process's share of the missing batches, images decoded one batch ahead.

    `regions` is, for each layer, the coverage of all images' regions on its grid; the rest is as in `capture_to_store`.
    """

    model: torch.nn.Module
    images: ImageSet
    capture: Capture
    writer: AttentionWriter
    found: Discovery
    specs: Sequence[MetricSpec]
    backend: str
    regions: Mapping[int, np.ndarray | None]
    workers: Workers
    label: str

    def __post_init__(self) -> None:
        self._schema = self.writer.schema
        # With its number: another thread has another current GPU.
        self._device = torch.empty(0, device=self.capture.device).device
        self._copies = HostCopies(self._device)
        layers, heads = self.capture.layers or None, self.capture.heads or None
        self._tap = AttentionTap(self.model, lambda *call: None, layers=layers, heads=heads)
        self._captured = Tally(self.workers, f"captured of {self.writer.run}")
        self._prefix_mass: list[tuple[int, int, int, float]] = []  # layer, head, batch, mean
        self._invalid_rows: list[tuple[int, int]] = []  # layer, rows that are no attention

    def run(self, missing: Sequence[int]) -> None:
        """Capture the missing batches; when it returns, all processes have committed theirs."""
        schema = self._schema
        image_bytes = sum(array.row_bytes for array in attention_arrays(schema))
        done = schema.num_images - sum(len(self._rows(batch)) for batch in missing)
        batches = self.workers.deal(missing)
        with (
            ThreadPoolExecutor(1, "decode", initializer=_use_device, initargs=(self._device,)) as decoder,
            evaluating(self.model),
            torch.inference_mode(),
            self._tap.prepared(),
            ImageProgress(self.label, schema.num_images, done, image_bytes) as progress,
        ):
            decoded = deque(decoder.submit(self._decode, batch) for batch in batches[:1])
            launched: deque[BatchPass] = deque()
            for position, batch in enumerate(batches):
                pixels = decoded.popleft().result()
                if position + 1 < len(batches):
                    decoded.append(decoder.submit(self._decode, batches[position + 1]))
                launched.append(self._launch(batch, pixels))
                # A GPU computes this batch while the one before is waited for and committed.
                while len(launched) > min(self._copies.depth, 1):
                    self._commit(launched.popleft(), progress)
            while launched:
                self._commit(launched.popleft(), progress)
            self.writer.flush()
            by_worker = self.workers.gather((self._prefix_mass, self._invalid_rows))
            progress.reach(self._captured.add(0))
        _warn_of_prefix_mass(sorted(entry for masses, _ in by_worker for entry in masses), schema, self.label)
        _warn_of_invalid_rows(sorted(entry for _, invalid in by_worker for entry in invalid), schema, self.label)

    def _rows(self, batch: int) -> range:
        rows = self._schema.batch_rows(batch)
        return range(rows.start, rows.stop)

    def _decode(self, batch: int) -> torch.Tensor:
        return self.images.batch(list(self._rows(batch)), self._device)

    def _sinks(self, batch: int) -> list[Sink]:
        sinks: list[Sink] = []
        if self.specs:
            rows = self._schema.batch_rows(batch)
            regions = {layer: None if all_ is None else all_[rows] for layer, all_ in self.regions.items()}
            sinks.append(MetricsSink(self.specs, self.backend, regions))
        if self.capture.keeps_factors:
            sinks.append(FactorsSink(self.writer, batch, self._copies, self.found))
        elif self._schema.encoding:
            sinks.append(MapsSink(self.writer, batch, self._copies, self._schema.encoding))
        return sinks

    def _launch(self, batch: int, pixels: torch.Tensor) -> BatchPass:
        launched = BatchPass(batch, self._sinks(batch), self._copies)
        self._tap.on_attention = launched.on_attention
        with self._tap:
            output = self.model(pixels)
        launched.launched(logits_of(output) if self._schema.num_classes else None)
        return launched

    def _commit(self, launched: BatchPass, progress: ImageProgress) -> None:
        batch, results = launched.batch, launched.finish()
        if all(invalid == total for _, invalid, total in results.invalid_rows):
            raise CaptureError(
                f"no row of batch {batch} is post-softmax attention, in any layer: query and key are NaN or infinite; "
                "look for NaN in the model's weights and in the images"
            )
        self._invalid_rows.extend((layer, invalid) for layer, invalid, _ in results.invalid_rows if invalid)
        self.writer.commit(batch, results.values, results.undefined, results.logits)
        self._prefix_mass.extend((*head, batch, mass) for head, mass in results.prefix_mass.items())
        progress.reach(self._captured.add(len(self._rows(batch))))
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Give back what the C library keeps of freed blocks: memory crept up by 10-13 % from 64 to 640 images."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's alone
        trim(0)


def _use_device(device: torch.device) -> None:
    """A thread chooses its own GPU: without this, the decoder of every process would open the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _warn_of_prefix_mass(entries: Sequence[tuple[int, int, int, float]], schema: StoreSchema, label: str) -> None:
    """Say which heads leave too little on the patches for 16 bits; entries: (layer, head, batch, mean mass), sorted."""
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


def _warn_of_invalid_rows(entries: Sequence[tuple[int, int]], schema: StoreSchema, label: str) -> None:
    """Say which layers had rows that are no attention; entries are (layer, rows), in order."""
    names = {layer.layer: layer.site for layer in schema.layers}
    for layer, of_layer in itertools.groupby(entries, key=lambda entry: entry[0]):
        total = sum(rows for _, rows in of_layer)
        say(
            f"{label}: {total:,} rows of layer {layer} ({names[layer]}) are no post-softmax attention (NaN or infinite "
            "logits); every metric leaves them out and counts them with the rows that have no value"
        )
