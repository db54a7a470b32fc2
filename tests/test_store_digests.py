"""The ledger decides: files of elsewhere or of another day, values of maps that changed, readers beside a writer."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_cases as case
from obstore.store import MemoryStore

from store import AttentionStore, AttentionWriter, StoreError
from store.ledger import Ledger, _serialise
from store.local import LocalStorage
from store.objects import ObjectStorage
from store.schema import metric_path
from store.storage import StoreUrl
from store.verify import content_digest, info, verify

ENCODINGS = ("fp16", "bf16", "qk")
LATER_A = metric_path("later_a", case.LATER["later_a"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A complete store with metrics computed later."""
    case.capture(tmp_path / "run.zarr")
    case.measure(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def capture_other(path: Path, encoding: str = "fp16") -> Path:
    """The same schema over other numbers: every image has what the one before it has in the case."""
    with pytest.MonkeyPatch.context() as changed:
        for name in ("maps", "metric", "counts"):
            of = getattr(case, name)
            changed.setattr(case, name, lambda *args, of=of: np.roll(of(*args), 1, axis=0))
        of_factors, of_logits = case.factors, case.logits
        changed.setattr(case, "factors", lambda layer, rows: _rolled(of_factors(layer, slice(None)), rows))
        changed.setattr(case, "logits", lambda: np.roll(of_logits(), 1, axis=0))
        path.parent.mkdir(parents=True, exist_ok=True)
        case.capture(path, case.make_schema(encoding))
        case.measure(path)
    return path


def _rolled(factors: Any, rows: slice) -> Any:
    query, key, bias = (np.asarray(getattr(factors, name)) for name in ("query", "key", "bias"))
    bias = np.roll(bias, 1, axis=0)[rows] if len(bias) > 1 else bias
    return case.Factors(
        query=np.roll(query, 1, axis=0)[rows], key=np.roll(key, 1, axis=0)[rows], scale=factors.scale, bias=bias
    )


def heal(path: Path, batch: int = 1) -> None:
    """Lose a shard, and write its batch again with other bytes, as another machine would."""
    (path / f"attention/layer_00/c.{batch}.0.0.0").unlink()
    of = case.maps
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(case, "maps", lambda layer: np.roll(of(layer), 1, axis=-1))
        assert case.capture(path) == [batch]


# ------------------------------------------------------------------------------------------ files of elsewhere, readers


def reads(store: AttentionStore) -> dict[str, Callable[[], Any]]:
    """Every way to read batch 1 of layer 1, whole and in part, by what it reads."""
    found = {
        "attention": lambda: store.read(1),
        "one image": lambda: store.read(1, [5]),
        "one head": lambda: store.read(1, slice(4, 8), [0]),
        "here": lambda: store.read_here(1, slice(4, 6)),
        "logits": lambda: store.read_logits([6]),
        "value": lambda: store.read_metric("entropy", [5]),
        "counts": lambda: store.read_undefined("entropy", slice(4, 8)),
        "later value": lambda: store.read_metric("later_a", [7]),
        "later counts": lambda: store.read_undefined("later_a"),
    }
    return found


def files(store: AttentionStore) -> dict[str, str]:
    """What `reads` reads -> a file of batch 1 that it comes from."""
    entropy = metric_path("entropy", store.schema.metrics["entropy"])
    part = "/key" if store.schema.encoding == "qk" else ""
    shard = f"attention/layer_01{part}/c.1.0.0.0"
    return dict.fromkeys(("attention", "one image", "one head", "here"), shard) | {
        "logits": "logits/c.1.0",
        "value": f"{entropy}/value/c.1.0.0",
        "counts": f"{entropy}/undefined/c.1.0.0",
        "later value": f"{LATER_A}/value/c.1.0.0",
        "later counts": f"{LATER_A}/undefined/c.1.0.0",
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sound_file_of_elsewhere_is_read_by_nobody(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another store, of another batch, of another layer or part: each is whole, with every CRC in it right."""
    path, other = tmp_path / "run.zarr", capture_other(tmp_path / "other/run.zarr", encoding)
    case.capture(path, case.make_schema(encoding))
    case.measure(path)
    names = files(AttentionStore.open(path))
    for what, file in names.items():
        kept = (path / file).read_bytes()
        donors = [other / file, path / re.sub(r"c\.1", "c.0", file)]
        donors += [path / file.replace("key", "query")] if "key" in file else []
        donors += [path / file.replace("later_a", "later_b").replace(LATER_A.rpartition("/")[2], hashed("later_b"))]
        for donor in [each for each in donors if each.read_bytes() != kept]:
            shutil.copyfile(donor, path / file)
            with pytest.raises(StoreError, match=re.escape(file)):
                reads(AttentionStore.open(path))[what]()
            assert [damage.unit for damage in verify(path)] == [f"run.zarr/{file}"], donor
            with monkeypatch.context() as changed:  # of equal size, as files of incompressible data are
                changed.setattr("store.rows.size_problem", lambda size, entry: "")
                with pytest.raises(StoreError, match=rf"{re.escape(file)} is damaged \(its SHA-256 is not the one"):
                    reads(AttentionStore.open(path))[what]()
        (path / file).write_bytes(kept)
    for read in reads(AttentionStore.open(path)).values():
        read()


def hashed(name: str) -> str:
    return metric_path(name, case.LATER[name]).rpartition("/")[2]


def test_a_file_is_compared_once_and_again_when_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema(batch_size=8))
    other = tmp_path / "other/run.zarr"
    monkeypatch.setattr("store.rows.size_problem", lambda size, entry: "")
    looked: list[int] = []
    of_ranges = LocalStorage.read_ranges
    monkeypatch.setattr(LocalStorage, "read_ranges", lambda *args: looked.append(len(args[2])) or of_ranges(*args))
    store = AttentionStore.open(path)
    for _ in range(2):
        store.read(0, [1])
        store.read(0, slice(0, 8))
    assert looked == [1]  # the other chunk's checksum, once
    with monkeypatch.context() as changed:
        of = case.maps
        changed.setattr(case, "maps", lambda layer: of(layer)[::-1])
        case.capture(other, case.make_schema(batch_size=8))
    shutil.copyfile(other / "attention/layer_00/c.0.0.0.0", path / "attention/layer_00/c.0.0.0.0")
    with pytest.raises(StoreError, match="its SHA-256 is not the one in the ledger"):
        store.read(0, [1])


def test_an_object_of_elsewhere_is_read_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(MemoryStore(), StoreUrl("s3://bucket/run.zarr"))
    case.capture(storage, case.make_schema(batch_size=8))  # type: ignore[arg-type]
    monkeypatch.setattr("store.rows.size_problem", lambda size, entry: "")
    file = "attention/layer_00/c.0.0.0.0"
    store = AttentionStore.open(storage)
    store.read(0, [1])
    storage.replace(file, storage.read("attention/layer_00/c.1.0.0.0"))
    for opened in (store, AttentionStore.open(storage)):
        with pytest.raises(StoreError, match="its SHA-256 is not the one in the ledger"):
            opened.read(0, [1])


# -------------------------------------------------------------------------------- swaps, copies and roll-backs of files


def test_no_file_of_another_run_passes_for_one_of_this(path: Path) -> None:
    """Each file of store and ledger, by itself, from another run over the same images: named, or the same bytes."""
    other = capture_other(path.parent / "other/run.zarr")
    for folder in ("run.zarr", "run.ledger"):
        for file in sorted((path.parent / folder).rglob("*")):
            name = file.relative_to(path.parent)
            if not file.is_file() or file.name == "lock":
                continue
            kept, foreign = file.read_bytes(), (other.parent / name).read_bytes()
            file.write_bytes(foreign)
            named = [damage.unit for damage in verify(path)]
            # The record of the metadata is what all the others are compared with: they are named in its place.
            expected = "run.zarr/zarr.json" if str(name) == "run.ledger/metadata.json" else str(name)
            assert kept == foreign or expected in named, name
            file.write_bytes(kept)


def test_a_foreign_record_with_its_files_is_named(path: Path) -> None:
    """Whole batches, whole metrics, the manifest: sound in themselves, but of another capture."""
    other = capture_other(path.parent / "other/run.zarr")
    ledger = Ledger(LocalStorage(other))
    for name in ledger.names():
        if name == "metadata":
            continue
        kept = {}
        for file in [f"run.ledger/{name}.json", *(f"run.zarr/{each}" for each in ledger.read(name).get("files", {}))]:
            kept[file] = (path.parent / file).read_bytes()
            shutil.copyfile(other.parent / file, path.parent / file)
        damages = [str(damage) for damage in verify(path)]
        assert f"run.ledger/{name}.json is damaged (it is of another capture)" in damages, name
        for file, content in kept.items():
            (path.parent / file).write_bytes(content)
    assert verify(path) == []


def test_another_runs_ledger_is_refused(path: Path) -> None:
    other = capture_other(path.parent / "other/run.zarr")
    ledger = path.with_suffix(".ledger")
    ledger.rename(path.parent / "kept.ledger")
    shutil.copytree(other.with_suffix(".ledger"), ledger)
    assert verify(path)
    with pytest.raises(StoreError, match=r"zarr\.json its content changed"):
        AttentionStore.open(path)
    shutil.rmtree(ledger)
    for use in (lambda: AttentionStore.open(path), lambda: case.capture(path), lambda: case.measure(path)):
        with pytest.raises(
            StoreError, match=r"has no ledger at .*takes its ledger along, as .* put it there, or delete the store"
        ):
            use()


def test_the_digest_of_a_capture_follows_its_content(path: Path) -> None:
    """What a study asks at its start: a file of equal size, whole in itself, is another content."""
    before = content_digest(path)
    shutil.rmtree(path.with_suffix(".ledger") / "metrics")
    assert content_digest(path) == before  # metrics computed later are not the capture's
    case.measure(path)
    assert content_digest(path) == before
    entropy = metric_path("entropy", {"backend": "numba"})
    for file in ("attention/layer_00/c.1.0.0.0", "logits/c.1.0", f"{entropy}/value/c.1.0.0", "zarr.json"):
        kept = (path / file).read_bytes()
        other = path / re.sub(r"c\.1", "c.0", file)
        foreign = other.read_bytes() if other != path / file else kept.replace(b"vit_test", b"vit_best")
        (path / file).write_bytes(foreign)
        assert content_digest(path) != before, file
        (path / file).write_bytes(kept)
    assert content_digest(path) == before
    heal(path)
    assert content_digest(path) != before


# ------------------------------------------------------------------------------------------------ a reader and a writer


class Watched(LocalStorage):
    """A folder, and its ledger, in which something happens just before one of the operations on either.

    Args:
        path: of the folder.
        at: number of the operation.
        act: what happens.
        done: names of the operations so far.
    """

    def __init__(self, path: Path, at: int, act: Callable[[], Any], done: list[str] | None = None) -> None:
        super().__init__(path)
        self.at, self.act = at, act
        self.done: list[str] = [] if done is None else done

    def beside(self, name: str) -> Watched:
        return Watched(self.path.with_name(name), self.at, self.act, self.done)

    def _step(self, name: str) -> None:
        self.done.append(name)
        if len(self.done) == self.at:
            self.act()

    def sizes(self, folder: str = "") -> dict[str, int]:
        self._step("sizes")
        found = super().sizes(folder)
        self._step("listed")
        return found

    def read(self, file: str) -> bytes:
        self._step("read")
        return super().read(file)

    def exists(self, file: str) -> bool:
        self._step("exists")
        return super().exists(file)


def half_written(path: Path) -> None:
    """Two batches of three captured, one of them measured."""
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 0)
    case.measure(path)
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 1)


def captured(path: Path) -> None:
    case.capture(path)
    case.measure(path)


@pytest.mark.parametrize(
    ("before", "act"),
    [
        (half_written, case.measure),
        (half_written, case.capture),
        (half_written, lambda path: (case.capture(path), case.measure(path))),
        (captured, lambda path: (heal(path), case.measure(path))),
    ],
    ids=["measure", "capture", "both", "heal"],
)
def test_what_is_committed_during_a_check_is_no_damage(
    tmp_path: Path, before: Callable[[Path], None], act: Callable[[Path], Any]
) -> None:
    """Before and after each listing of a check, and between some of its reads, another process goes on."""
    before(tmp_path / "0" / "run.zarr")
    unwatched = Watched(tmp_path / "0" / "run.zarr", 0, list)
    assert verify(unwatched) == []
    count = len(unwatched.done)
    listings = {step for step, name in enumerate(unwatched.done, 1) if name in ("sizes", "listed")}
    for step in listings | {count // 4, count // 2, 3 * count // 4}:
        path = tmp_path / str(step) / "run.zarr"
        shutil.copytree(tmp_path / "0", path.parent)
        watched = Watched(path, step, lambda path=path: act(path))  # type: ignore[misc]
        assert verify(watched) == [], step
        assert len(watched.done) >= step
        assert verify(path) == []


# ------------------------------------------------------------------------------- whole files, many of them, and healing


def check_exchanged_files(folder: Path, encoding: str, count: int, seed: int) -> None:
    """Swap, copy, lose or roll back whole files: named by `verify`, or the same values; healed by the same commands.

    Files come from the same store, from another run over the same images, and from this one an hour ago.
    """
    rng = random.Random(seed)
    schema = case.make_schema(encoding)
    path, other = folder / "run.zarr", capture_other(folder / "other" / "run.zarr", encoding)
    case.capture(path, schema)
    case.measure(path)
    before = {name: content for name, content in case.file_bytes(folder).items() if name.startswith("run.")}
    names = [name for name in before if not name.endswith("lock")]
    for _ in range(count):
        one, two = rng.sample(names, 2)
        kind = rng.choice(("swap", "copy", "foreign", "foreign pair", "older"))
        if kind == "swap":
            changed = {one: before[two], two: before[one]}
        elif kind == "copy":
            changed = {one: before[two]}
        elif kind == "older":  # a ledger of the time before some batch, or before the end
            since = rng.choice((r"batch_00000[12]", r"batch_000002|complete", r"complete", r"later_b"))
            changed = {name: None for name in names if "ledger" in name and re.search(since, name)}
        else:
            changed = {name: (other.parent / name).read_bytes() for name in ((one, two) if "pair" in kind else (one,))}
        for name, content in changed.items():
            (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()
        where = f"{kind}: {sorted(changed)}"
        harmless = kind == "older" or all(before[name] == content for name, content in changed.items())
        assert harmless or verify(path), where
        with contextlib.suppress(StoreError):  # what a reader gives is right, or it gives nothing
            check_whatever_is_read(path)
        if not {"run.ledger/metadata.json", "run.zarr/zarr.json"} & changed.keys():
            case.capture(path, schema)
            case.measure(path)
            assert verify(path) == [], where
            after = {name: (folder / name).read_bytes() for name in names}
            assert {name for name in names if after[name] != before[name]} == set(), where
        for name in names:
            (folder / name).write_bytes(before[name])


def check_whatever_is_read(path: Path) -> None:
    store = AttentionStore.open(path)
    rows = np.flatnonzero(store.committed_images)
    for read, right in (
        (lambda: store.read(1, rows), lambda: case.expected(store.schema.encoding, 1)),
        (lambda: store.read_logits(rows), case.logits),
        (lambda: store.read_metric("entropy", rows)[0], lambda: case.metric("entropy")),
        (lambda: store.read_metric("later_a", rows)[0], lambda: case.metric("later_a")),
        (lambda: store.read_undefined("later_b", rows), lambda: case.counts("later_b")),
    ):
        with contextlib.suppress(StoreError):
            np.testing.assert_allclose(read(), right()[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoding", ["fp16", "qk"])
def test_exchanged_files_are_named_and_healed(tmp_path: Path, encoding: str) -> None:
    check_exchanged_files(tmp_path, encoding, 5, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_200_exchanged_files_are_named_and_healed(tmp_path: Path, encoding: str) -> None:
    check_exchanged_files(tmp_path, encoding, 200, seed=1)


def test_a_ledger_of_an_earlier_version_is_no_damage_and_is_not_read(path: Path) -> None:
    """Before records held the capture that they are of; nothing of such a store is withdrawn or written."""
    ledger = path.with_suffix(".ledger")
    for file in ledger.rglob("*.json"):
        name = file.relative_to(ledger).as_posix().removesuffix(".json")
        record = json.loads(file.read_bytes())["record"]
        if name == "metadata":
            record = {key: record[key] for key in ("attrs", "files")}
        file.write_bytes(_serialise(name, record, ""))
    before = case.file_bytes(ledger)
    for attempt in (AttentionStore.open, verify, info, case.capture, case.measure):
        with pytest.raises(StoreError, match="is sound and of an earlier version"):
            attempt(path)
    assert case.file_bytes(ledger) == before
