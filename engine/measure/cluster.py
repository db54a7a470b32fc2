"""`measure --scheduler`: batches measured by the workers of a Dask cluster; this process alone writes.

Workers open the store by its path, so they share a file system with this process. A batch's number goes to a worker
and its values come back: a few kilobytes per image. A worker that dies costs the batches it was measuring, which Dask
gives to another; values are those of a local run, since a batch is measured by one thread either way.

Dask's protocol trusts its cluster: whoever reaches the scheduler can run code on every worker and answer this process
with pickled objects. Keep it on a private network, or use `tls://`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from engine import __version__
from engine.config import load_metrics
from engine.measure.units import BatchValues, StoredMeasurement
from kernels import BACKENDS, BackendUnavailableError, MetricError
from store import AttentionStore, StoreError
from train.errors import InputError

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 10  # to reach the scheduler, and for its first worker
PATIENCE_SECONDS = 60  # without any worker, before a measurement gives up
BATCHES_PER_THREAD = 2  # with the scheduler: one measured, one waiting


class ClusterError(RuntimeError):
    """The cluster failed under a measurement; what was committed before is intact."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Job:
    """A measurement as it travels: names and paths, which a worker looks up on its own side."""

    id: str  # of this run; a worker opens the stores again for another
    code_version: str  # of this package, which workers must have
    stores: tuple[tuple[str, str], ...]  # absolute path or URL, and digest: of the store, and of the other for pairs
    metrics: tuple[tuple[str, str, str], ...]  # of each its name, how the user named it, and its `definition`
    backend: str  # of `kernels.BACKENDS`


@contextlib.contextmanager
def connected(scheduler: str, measurement: StoredMeasurement, named: Mapping[str, str]) -> Iterator[DaskCluster]:
    """A cluster whose workers have been asked whether they can do it; `named` is how the user named each metric.

    Raises:
        InputError: Dask is not installed here, the scheduler cannot be reached or has no workers, or a worker has
            another version of this package, another store at the path, or not the user's metric.
    """
    stores = [store for store in (measurement.store, measurement.other) if store is not None]
    job = Job(
        id=uuid.uuid4().hex,
        code_version=__version__,
        stores=tuple((str(store.path), store.digest) for store in stores),
        metrics=tuple((name, named[name], spec.definition()) for name, spec in measurement.metrics.items()),
        backend=measurement.backend,
    )
    with _client(scheduler) as client:  # closed, it withdraws its tasks
        _check_workers(client, scheduler, job)
        yield DaskCluster(client, scheduler, job)


@dataclass(frozen=True, slots=True)
class DaskCluster:
    """Workers that measure a job."""

    client: Any
    scheduler: str
    job: Job

    def batches(self, names: Mapping[int, Sequence[str]]) -> Iterator[tuple[int, BatchValues]]:
        """Measure batches as `StoredMeasurement.batches`, but in the order in which they get ready.

        ClusterError: the scheduler went away, workers die again and again over one batch, or none is there.
        """
        client, scheduler, job = self.client, self.scheduler, self.job
        distributed = _distributed()
        waiting = iter(names)
        pending: dict[Any, int] = {}
        try:
            while True:
                room = BATCHES_PER_THREAD * sum(client.nthreads().values()) - len(pending)
                for batch in islice(waiting, max(room, 0 if pending else 1)):
                    key = f"measure-{job.id}-{batch}"
                    pending[client.submit(_measure, job, batch, tuple(names[batch]), key=key)] = batch
                if not pending:
                    return
                for future in _any_done(client, scheduler, list(pending)):
                    yield pending.pop(future), future.result()
        except distributed.KilledWorker as error:
            raise ClusterError(
                f"every worker of {scheduler} that measured {error.task} died, the last at "
                f"{error.last_worker.address}; look at their logs (memory?), then run the same command again to go on"
            ) from error
        except (distributed.CancelledError, OSError) as error:
            raise ClusterError(
                f"the scheduler at {scheduler} went away; what was committed is kept, run the same command again to "
                "go on"
            ) from error


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise InputError(
            f"measure.scheduler needs Dask ({error}); install it: pip install 'vit-attention-engine[dask]'"
        ) from error
    return distributed


def _client(scheduler: str) -> Any:
    """Connect, within bounds: Dask's own timeout does not hold where something listens and never answers."""
    distributed = _distributed()
    for name in ("distributed.client", "distributed.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a lost connection is said once, by what is raised
    connecting: Future[Any] = Future()

    def connect() -> None:
        try:
            client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
            connecting.set_result(client)
        except Exception as error:  # raised by `result`, whatever it is
            connecting.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        return connecting.result(CONNECT_SECONDS + 2)
    except (OSError, ValueError, TypeError) as error:
        found = str(error) or "something listens there and never answers"
        raise InputError(
            f"no Dask scheduler answers at {scheduler} within {CONNECT_SECONDS} s ({found}); expected tcp://HOST:PORT "
            "of a running `dask scheduler`"
        ) from error


def _any_done(client: Any, scheduler: str, pending: Sequence[Any]) -> list[Any]:
    """The futures that are ready, at least one; ClusterError when there has been no worker for a while."""
    distributed = _distributed()
    seen = time.monotonic()
    while True:
        with contextlib.suppress(TimeoutError), client.as_current():
            return list(distributed.wait(pending, timeout=5, return_when="FIRST_COMPLETED").done)
        if client.nthreads():
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE_SECONDS:
            raise ClusterError(
                f"{scheduler} has had no worker for {PATIENCE_SECONDS} s; what was committed is kept, start workers "
                "and run the same command again to go on"
            )


def _check_workers(client: Any, scheduler: str, job: Job) -> None:
    """Raises InputError where a worker has not this version of the package, the stores or the metrics, or none is."""
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise InputError(
            f"{scheduler} has no workers; start some with `dask worker {scheduler}` where this package is installed"
        ) from error
    loops = set()
    for address, found in client.run(_describe, job, on_error="return").items():
        if isinstance(found, Exception):
            raise InputError(
                f"worker {address} cannot take part: {type(found).__name__}: {found}; install vit-attention-engine "
                f"{__version__} there"
            )
        if found["problem"]:
            raise InputError(f"worker {address} cannot take part: {found['problem']}")
        loops.add(found["lanes"])
    if len(loops) > 1:
        _log.warning(
            "%s: its workers' CPUs have vectors of %s lanes; values agree within rounding, not bit for bit",
            scheduler,
            " and ".join(map(str, sorted(loops))),
        )


# ------------------------------------------------------------------------------------------------------- on the workers


def _describe(job: Job) -> dict[str, Any]:
    """Why this worker cannot do the job ("" if it can), and the lanes of the vectors that its kernels use."""
    try:
        backend = BACKENDS[_opened(job).backend].load()
    except (InputError, StoreError, MetricError, BackendUnavailableError) as error:
        return {"problem": str(error), "lanes": 0}
    return {"problem": "", "lanes": backend.lanes}


def _measure(job: Job, batch: int, names: Sequence[str]) -> BatchValues:
    return _opened(job).batch(batch, names)


@lru_cache(maxsize=1)
def _opened(job: Job) -> StoredMeasurement:
    """The job's stores and metrics as this process finds them; a worker that joins late is checked by it, too."""
    if job.code_version != __version__:
        raise InputError(
            f"vit-attention-engine is {__version__} there and {job.code_version} here; install one version on both "
            "sides"
        )
    specs = {}
    for name, named, expected in job.metrics:
        specs[name] = load_metrics([named])[0]
        if specs[name].definition() != expected:
            raise InputError(f"the module that defines metric {named!r} is another there; copy it from here")
    stores = [AttentionStore.open(path) for path, _ in job.stores]
    for store, (_, digest) in zip(stores, job.stores, strict=True):
        if store.digest != digest:
            raise InputError(f"{store.path} is another capture there; expected a file system that both sides share")
    return StoredMeasurement(stores[0], stores[1] if len(stores) > 1 else None, specs, job.backend)
