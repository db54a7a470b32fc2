"""What this program did not write stays: sample maps, ledgers, stores and files of others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import store_cases as case
import zarr

from engine.folder import require_places
from engine.samples import is_samples, require_samples_place
from store import AttentionStore, AttentionWriter, StoreError
from store.places import storage_at
from store.removal import named, own_zarr, put, remove, unfinished
from store.schema import DamagedStoreError, OtherRunError, ledger_name, samples_name
from store.verify import verify
from train.errors import InputError


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def foreign_zarr(folder: Path) -> Path:
    """Somebody's own Zarr group with an array `mine`."""
    root = zarr.open_group(folder, mode="w-")
    root.create_array("mine", shape=(3,), dtype="f4")[:] = np.arange(3)
    return folder


# ----------------------------------------------------------------------------------------------------- the one function


def test_only_what_bears_a_mark_is_removed(tmp_path: Path) -> None:
    mark = own_zarr("vit-attention-x/1", r"zarr\.json|a/(?:zarr\.json|c/0)")
    ours = tmp_path / "ours"
    zarr.open_group(ours, mode="w-", attributes={"schema": "vit-attention-x/1"}).create_array(
        "a", shape=(1,), dtype="u1"
    )
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="did not write it, or not all of it"):
        remove(ours, mark)
    assert (ours / "notes.txt").read_text() == "mine"
    (ours / "notes.txt").unlink()
    remove(ours, mark)
    assert not ours.exists()
    theirs = foreign_zarr(tmp_path / "theirs")
    before = tree(theirs)
    with pytest.raises(StoreError, match="theirs is in the way"):
        remove(theirs, mark)
    assert tree(theirs) == before
    remove(tmp_path / "nothing", mark)


def test_links_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError):
        remove(tmp_path / "link", named(".*"))
    for name in ("pipe", "target"):
        partial = unfinished(tmp_path / name)
        partial.write_text("new")
        with pytest.raises(StoreError, match="no file that this program wrote"):
            put(partial, tmp_path / name, named("other"))
    assert (tmp_path / "target").read_text() == "mine"
    put(partial, tmp_path / "target", named("target"))
    assert (tmp_path / "target").read_text() == "new"


# ------------------------------------------------------------------------------------------------- where stores may lie


def test_a_capture_has_sample_maps_of_its_own_name() -> None:
    assert [samples_name(name) for name in ("a.zarr", "samples.zarr")] == ["a.samples.zarr", "samples.samples.zarr"]


@pytest.mark.parametrize("name", ["maps", ".zarr", "..zarr", "maps.h5"])
def test_a_new_store_ends_in_zarr(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"expected one that ends in \.zarr"):
        require_places(tmp_path / name)


def test_a_place_that_is_taken_is_refused_before_the_work(tmp_path: Path) -> None:
    case.capture(tmp_path / "run.zarr", case.make_schema())
    (tmp_path / "file.zarr").write_text("mine")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "elsewhere")
    foreign_zarr(tmp_path / "a.samples.zarr")
    (tmp_path / "b.ledger").mkdir()
    (tmp_path / "b.ledger" / "accounts.txt").write_text("mine")
    case.capture(tmp_path / "c.samples.zarr", case.make_schema())
    (tmp_path / "d.samples.zarr").write_text("mine")
    before = tree(tmp_path)
    for name, message in (
        ("file.zarr", "file.zarr exists but has no ledger"),
        ("link.zarr", "is a link"),
        ("run.zarr/inner.zarr", "lies inside .*run.zarr"),
        ("run.ledger/inner.zarr", "lies inside .*run.ledger"),
        ("a.zarr", "a.samples.zarr is in the way"),
        ("b.zarr", "accounts.txt is in the way"),
        ("c.zarr", "c.samples.zarr is in the way"),
        ("d.zarr", "d.samples.zarr is in the way"),
    ):
        with pytest.raises(InputError, match=message):
            require_places(tmp_path / name)
    require_places(tmp_path / "run.zarr")
    require_places(tmp_path / "new.zarr")
    assert tree(tmp_path) == before


def test_a_store_without_the_ending_keeps_its_ledger(tmp_path: Path) -> None:
    """Stores named without .zarr were possible once, and share the ledger's name with one that has it."""
    case.capture(tmp_path / "made.zarr", case.make_schema())
    for end in (".zarr", ".ledger"):
        (tmp_path / f"made{end}").rename(tmp_path / f"run{end.replace('.zarr', '')}")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match="is the ledger of the store run"):
        AttentionWriter.open(tmp_path / "run.zarr", case.make_schema(), **case.fixed())
    assert tree(tmp_path) == before
    assert AttentionStore.open(tmp_path / "run").complete
    with AttentionWriter.open(tmp_path / "run", case.make_schema(), **case.fixed()) as writer:
        assert not writer.missing


def test_a_ledger_left_over_is_used_again(tmp_path: Path) -> None:
    case.capture(tmp_path / "run.zarr", case.make_schema())
    remove(tmp_path / "run.zarr", lambda path: True)
    case.capture(tmp_path / "run.zarr", case.make_schema())
    assert verify(tmp_path / "run.zarr") == []


def test_sample_maps_of_another_store_are_kept(tmp_path: Path) -> None:
    (tmp_path / "samples.zarr").mkdir()
    (tmp_path / "samples.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"samples\.zarr is in the way"):
        require_samples_place(storage_at(tmp_path / "samples.zarr"))
    assert not is_samples(tmp_path / "samples.zarr")
    require_places(tmp_path / "a.zarr")


# ------------------------------------------------------------------------------------------ what a study captures again


def open_again(path: Path, **changes: object) -> None:
    schema = case.make_schema(**changes)
    with AttentionWriter.open(path, schema, **case.fixed(schema)):
        pass


def test_a_store_of_another_run_or_damaged_beyond_repair_is_known_from_one_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema())
    with pytest.raises(OtherRunError, match=r"another model\.name"):
        open_again(path, model={"name": "other"})
    (path / "logits" / "zarr.json").write_bytes(b"{")
    open_again(path)  # rebuilt
    assert verify(path) == []
    remove(tmp_path / "run.ledger", lambda path: True)
    with pytest.raises(DamagedStoreError, match="has no ledger"):
        open_again(path)
    AttentionWriter.discard(path)
    case.capture(path, case.make_schema())
    assert verify(path) == []


@pytest.mark.parametrize("file", ["images/label/c.0", "zarr.json", "attention/layer_00/c.0.0.0.0"])
def test_a_permission_is_no_damage(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema())
    before = tree(tmp_path)
    read = Path.read_bytes
    opened = open

    def refused(self: Path) -> bytes:
        if self == path / file:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    def refused_open(name: object, *args: object, **options: object) -> object:
        if name == path / file:
            raise PermissionError(13, "Permission denied", str(name))
        return opened(name, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr("builtins.open", refused_open)
    with pytest.raises(StoreError, match="cannot be opened for writing") as error:
        open_again(path)
    assert not isinstance(error.value, OtherRunError | DamagedStoreError)
    monkeypatch.undo()
    assert {name: content for name, content in tree(tmp_path).items() if name != "run.ledger/lock"} == {
        name: content for name, content in before.items() if name != "run.ledger/lock"
    }


def test_a_store_with_something_else_in_it_is_not_discarded(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema())
    (path / "notes.txt").write_text("mine")
    before = tree(path)
    with pytest.raises(StoreError, match=r"notes\.txt is in the way"):
        AttentionWriter.discard(path)
    assert tree(path) == before
    theirs = foreign_zarr(tmp_path / "theirs.zarr")
    with pytest.raises(StoreError, match="nothing says that it is"):
        AttentionWriter.discard(theirs)
    assert (theirs / "mine").is_dir()
    (path / "notes.txt").unlink()
    AttentionWriter.discard(path)
    assert not path.exists()
    assert not tree(tmp_path / ledger_name(path.name)).keys() - {"lock"}
