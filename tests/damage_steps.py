"""What is run in a trial of damage: commands in this process, and readers that know what they must get."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from operator import gt
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from engine.run import main
from store import AttentionStore, StoreError
from store.verify import info

SECONDS = 120  # a command that takes longer is stuck

# What a command ended with, and all that it said. None: it ended in a traceback, or used a wrong value in silence.
Ending = tuple[int | None, str]
Step = Callable[[], Ending]


def command(*arguments: str | Path) -> Step:
    """A command line of the engine, run in this process."""
    return lambda: call([str(argument) for argument in arguments])


def call(arguments: Sequence[str]) -> Ending:
    """Run the command line; a traceback has no exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), in_time():
        try:
            return main(arguments), said.getvalue()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
        except Exception:
            return None, said.getvalue() + traceback.format_exc()


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Ends what is stuck, as an error."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stuck for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    others, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # the test's own limit waits meanwhile
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, others)


@contextlib.contextmanager
def still_clock() -> Iterator[None]:
    """Times that are written down are always the same, so that two runs can be compared byte for byte."""
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    clock = SimpleNamespace(now=lambda zone=None: noon)
    import engine.study.journal
    import store.metadata

    with (
        mock.patch.object(engine.study.journal, "time", SimpleNamespace(perf_counter=lambda: 0.0)),
        mock.patch.object(engine.study.journal, "datetime", clock),
        mock.patch.object(store.metadata, "datetime", clock),
    ):
        yield


def done(arguments: Sequence[str | Path]) -> None:
    """Run a command that must do its work."""
    code, said = call([str(argument) for argument in arguments])
    assert code == 0, said


def together(endings: Sequence[Ending]) -> Ending:
    """Several endings as one: the worst."""
    said = "\n".join(text for _, text in endings)
    codes = [code for code, _ in endings]
    return (None, "\n".join(text for code, text in endings if code is None)) if None in codes else (max(codes), said)


# --- what readers get of a store, and of an export --------------------------------------------------------------------


def parts(path: Path) -> dict[str, Callable[[AttentionStore], Any]]:
    """All that can be read of a sound store, by name."""
    store = AttentionStore.open(path)
    found: dict[str, Callable[[AttentionStore], Any]] = {
        "schema": lambda s: repr(s.schema),
        "labels": lambda s: s.labels.tolist(),
        "manifest": lambda s: s.manifest,
    }
    for layer in store.layers if store.schema.encoding else ():
        found[f"layer {layer}"] = lambda s, layer=layer: s.read(layer).tobytes()
    if store.schema.num_classes:
        found["logits"] = lambda s: s.read_logits().tobytes()
    for name in store.metric_names:
        for number, params in enumerate(store.metric_params(name)):
            found[f"{name} {number}"] = lambda s, n=name, p=params: (
                s.read_metric(n, params=p)[0].tobytes(),
                s.read_undefined(n, params=p).tobytes(),
            )
    return found


def reading(path: Path) -> Step:
    """Read everything: each part is as it was, or refused by name."""
    found = parts(path)
    sound = {name: read(AttentionStore.open(path)) for name, read in found.items()}

    def step() -> Ending:
        said = []
        for name, read in found.items():
            try:
                if read(AttentionStore.open(path)) != sound[name]:
                    return None, f"{path.name}: {name} has another value, in silence"
            except StoreError as error:
                said.append(str(error))
            except Exception as error:
                return None, f"{path.name}: {name}: {type(error).__name__}: {error}"
        return (1 if said else 0), "\n".join(said)

    return step


def verifying(paths: Sequence[Path]) -> Step:
    """`verify` of several stores, of which one may be damaged."""
    return lambda: together([call(["verify", str(path)]) for path in paths])


def telling(path: Path) -> Step:
    """`info`: it counts what may be read, which may be less than there was, and says nothing else than before."""

    def figures(found: dict[str, Any]) -> tuple[Any, list[int]]:
        counts = [found["batches"].pop("committed"), *(metric.pop("batches") for metric in found["metrics"])]
        return {key: found[key] for key in found if key not in ("attention", "complete", "damaged")}, counts

    sound, most = figures(json.loads(json.dumps(info(path))))

    def step() -> Ending:
        code, said = call(["info", str(path)])
        if code == 0:
            found, counts = figures(json.loads(said))
            names = [metric["name"] for metric in found["metrics"]]
            metrics = [metric for metric in sound["metrics"] if metric["name"] in names]
            if found != sound | {"metrics": metrics} or (len(counts) == len(most) and any(map(gt, counts, most))):
                return None, "info says something else"
        return code, said

    return step


def exporting(path: Path, target: Path) -> Step:
    """An export to another file, which must hold the sound maps."""
    done(["export", "--store", path, "--hdf5", target])
    sound = target.read_bytes()

    def step() -> Ending:
        code, said = call(["export", "--store", str(path), "--hdf5", str(target)])
        if code == 0 and target.read_bytes() != sound:
            return None, "another export, in silence"
        return code, said

    return step


def importing(path: Path, folder: Path) -> Step:
    """An import of an export, which must give the sound maps."""

    def arguments(name: str) -> list[str]:
        return ["import", "--hdf5", str(path), "--store", str(folder / name / "t.zarr"), "--batch-size", "4"]

    (folder / "imported").mkdir()
    done(arguments("imported"))
    store = AttentionStore.open(folder / "imported" / "t.zarr")
    sound = [store.read(layer).tobytes() for layer in store.layers]
    known = (store.image_ids, store.labels.tolist(), store.layouts, store.sites)

    def step() -> Ending:
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        (folder / "damaged").mkdir()
        code, said = call(arguments("damaged"))
        if code == 0:
            found = AttentionStore.open(folder / "damaged" / "t.zarr")
            if [found.read(layer).tobytes() for layer in found.layers] != sound:
                return None, "other maps were imported, in silence"
            if (found.image_ids, found.labels.tolist(), found.layouts, found.sites) != known:
                return None, "other ids, labels, layouts or sites were imported, in silence"
        return code, said

    return step
