"""`measure --scheduler`: a Dask cluster of two processes on this machine gives the bytes of a local run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import store_cases as case

import engine.measure.cluster
from engine import __version__
from engine.run import main
from kernels import MetricSpec
from store import AttentionStore
from store.verify import verify

KILL_ONCE = "VIT_ATTENTION_TEST_KILL_ONCE"  # a file; the worker that finds it removes it and dies


def _dies(p: np.ndarray, layout: Any) -> np.ndarray:
    flag = Path(os.environ[KILL_ONCE])
    if flag.exists() and multiprocessing.parent_process() is not None:  # the command tries a metric here first
        flag.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return np.asarray(layout.patches(p).max(axis=-1))


def _always_dies(p: np.ndarray, layout: Any) -> np.ndarray:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.asarray(layout.patches(p).max(axis=-1))


dying_once = MetricSpec(name="dying_once", unit="1", inputs="rows", reference=_dies)
always_dying = MetricSpec(name="always_dying", unit="1", inputs="rows", reference=_always_dies)


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("flag") / "kill"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KILL_ONCE, str(path))
        patch.syspath_prepend(str(Path(__file__).parent))  # which worker processes inherit
        yield path


@pytest.fixture(scope="module")
def scheduler(flag: Path) -> Iterator[str]:
    """Two worker processes, each under a nanny that replaces it when it dies."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0", memory_limit=0
    ) as cluster:
        yield cluster.scheduler_address


def store_of(path: Path, encoding: str = "fp16") -> Path:
    case.capture(path, case.make_schema(encoding, metrics={}, region_metrics=()))
    return path


def measure(path: Path, metrics: str, *flags: str) -> int:
    return main(["measure", "--store", str(path), "--metrics", metrics, *flags])


def refused(path: Path, metrics: str, scheduler: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a measurement is refused, having changed nothing."""
    before = case.file_bytes(path)
    assert measure(path, metrics, "--scheduler", scheduler) == 2
    assert case.file_bytes(path) == before
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("encoding", ["fp16", "qk"])
def test_a_cluster_gives_the_bytes_of_a_local_run(tmp_path: Path, scheduler: str, encoding: str) -> None:
    metrics, pair = "distance,entropy,morans_i,region_mass", ("--against", str(store_of(tmp_path / "other.zarr")))
    for name, flags in (("local", ()), ("cluster", ("--scheduler", scheduler))):
        path = store_of(tmp_path / name / "run.zarr", encoding)
        assert measure(path, metrics, *flags) == 0
        assert measure(path, "js_divergence", *pair, *flags) == 0
        assert verify(path) == []
    local, cluster = (case.file_bytes(tmp_path / name / "run.zarr" / "metrics") for name in ("local", "cluster"))
    assert cluster == local


def test_a_worker_that_dies_costs_nothing(tmp_path: Path, scheduler: str, flag: Path) -> None:
    local, path = store_of(tmp_path / "local.zarr"), store_of(tmp_path / "run.zarr")
    name = "test_measure_cluster:dying_once"
    assert measure(local, name) == 0
    flag.touch()
    assert measure(path, name, "--scheduler", scheduler) == 0
    assert not flag.exists()  # one did die
    assert case.file_bytes(path / "metrics") == case.file_bytes(local / "metrics")


def test_what_a_worker_lacks_is_one_sentence(
    tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_of(tmp_path / "run.zarr")
    (tmp_path / "only_here.py").write_text(
        "from kernels import MetricSpec\n"
        "metric = MetricSpec(name='mine', unit='1', inputs='rows', reference=lambda p, layout: p.max(axis=(-2, -1)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    error = refused(path, "only_here:metric", scheduler, capsys)
    assert "cannot take part: metric 'only_here:metric': module 'only_here' cannot be imported" in error
    with monkeypatch.context() as other:
        other.setattr(engine.measure.cluster, "__version__", "9.9.9")
        error = refused(path, "distance", scheduler, capsys)
    assert f"vit-attention-engine is {__version__} there and 9.9.9 here; install one version" in error
    with monkeypatch.context() as other:
        other.setattr(AttentionStore, "digest", "another")
        assert "run.zarr is another capture there; expected a file system" in refused(path, "gini", scheduler, capsys)


def test_no_scheduler_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_of(tmp_path / "run.zarr")
    monkeypatch.setattr(engine.measure.cluster, "CONNECT_SECONDS", 1)
    nobody = "tcp://127.0.0.1:9"
    assert f"error: no Dask scheduler answers at {nobody} within 1 s" in refused(path, "gini", nobody, capsys)
    for address in ("nowhere", "tcp:/x", "127.0.0.1:9", "tcp://host"):
        assert f"measure.scheduler is {address!r}; expected tcp://HOST:PORT" in refused(path, "gini", address, capsys)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        assert "something listens there and never answers" in refused(path, "gini", address, capsys)
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=":0"
    ) as empty:
        assert "has no workers; start some with `dask worker" in refused(path, "gini", empty.scheduler_address, capsys)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install 'vit-attention-engine[dask]'" in refused(path, "gini", "tcp://127.0.0.1:9", capsys)


@pytest.mark.slow
def test_workers_that_die_over_one_batch_end_the_measurement(
    tmp_path: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_of(tmp_path / "run.zarr")
    assert measure(path, "test_measure_cluster:always_dying", "--scheduler", scheduler) == 1
    assert "died, the last at tcp://127.0.0.1" in capsys.readouterr().err
    assert verify(path) == []
    assert measure(path, "distance", "--scheduler", scheduler) == 0


@pytest.mark.slow
def test_a_scheduler_that_goes_away_ends_the_measurement(
    tmp_path: Path, flag: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is closed when the first batch is there; what was committed stays, and the rest is measured here."""
    path = store_of(tmp_path / "run.zarr")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0", memory_limit=0
    ) as cluster:
        measured = engine.measure.cluster._any_done

        def close_after_the_first(*arguments: Any) -> list[Any]:
            done = measured(*arguments)
            cluster.close()
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.measure.cluster, "_any_done", close_after_the_first)
            assert measure(path, "distance", "--scheduler", cluster.scheduler_address) == 1
    assert "went away" in capsys.readouterr().err
    assert verify(path) == []
    assert measure(path, "distance") == 0
