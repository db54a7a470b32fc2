"""What this program did not write stays: sample maps, ledgers, stores and files of others."""

from __future__ import annotations

import ast
import os
import re
import string
from pathlib import Path

import numpy as np
import pytest
import store_cases as case
import xarray
import zarr

from engine.capture.samples import is_samples, require_samples_place
from engine.relevance.explained import Explained, write_samples
from engine.study.journal import Journal
from engine.study.one_capture import require_places
from engine.study.outputs import OutputsFolder
from store import AttentionStore, AttentionWriter, StoreError
from store.hdf5 import write_table as hdf5_table
from store.places import storage_at
from store.removal import named, own_zarr, put, remove, unfinished
from store.schema import DamagedStoreError, OtherRunError, ledger_name, samples_name
from store.verify import verify
from train.checkpoint import save_checkpoint
from train.errors import InputError
from train.whole_files import replace_files


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
        ("file.zarr", "file.zarr is there and no store of this program"),
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
    with pytest.raises(
        InputError, match=r"store .*inner\.zarr cannot be made: .*file.zarr is a file; expected a folder"
    ):
        require_places(tmp_path / "file.zarr" / "inner.zarr")
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


# ------------------------------------------------------------------------------------------------------ outputs folders


def test_an_outputs_folder_that_is_not_ours_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("# mine")
    with pytest.raises(InputError, match=r"study\.toml is there, and no run of this program wrote it"):
        OutputsFolder(tmp_path, "", Journal(tmp_path / "run.jsonl")).__enter__()
    assert tree(tmp_path) == {"study.toml": b"# mine"}
    ours = tmp_path / "ours"
    for study in ("a = 1", "b = 1"):
        with OutputsFolder(ours, study, Journal(ours / "run.jsonl")) as place:
            place.begin()
            assert (ours / "study.toml").read_text() == study


@pytest.mark.parametrize("mark", [".lock", "run.jsonl"])
def test_a_lock_or_a_log_of_another_program_makes_no_folder_ours(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text('{"loss": 0.5}\n')
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "controls.json").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="is there, and no run of this program wrote it"):
        OutputsFolder(tmp_path, "", Journal(tmp_path / "run.jsonl")).__enter__()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [".lock", "run.jsonl"])
def test_a_folder_in_the_place_of_a_file_of_an_outputs_folder_is_named(tmp_path: Path, name: str) -> None:
    with OutputsFolder(tmp_path, "", Journal(tmp_path / "run.jsonl")) as place:
        place.begin()
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name} is a folder, a device or a link to nowhere; move it away"):
        OutputsFolder(tmp_path, "", Journal(tmp_path / "run.jsonl")).__enter__()


@pytest.mark.parametrize(
    "other",
    [
        '[model]\nname = "b"\n[data]\nkind = "folder"',
        '[data]\nkind = "digits"',
        '[model]\nname = "a"\n[data]\nkind = "folder"\n[conditions.base]\nrecipe = "checkpoint"',
    ],
)
def test_a_study_of_another_model_or_other_data_does_not_replace_one(tmp_path: Path, other: str) -> None:
    """The embedded study, started in the folder of a study of hours, trained over its checkpoints."""
    study = '[model]\nname = "a"\n[data]\nkind = "folder"\n[conditions.base]\nrecipe = "probe"\n'
    journal = Journal(tmp_path / "run.jsonl")
    for begun in (other, study):
        with OutputsFolder(tmp_path, begun, journal) as place:
            place.begin()
            journal.stage("data", {"study": begun}, [tmp_path / "study.toml"], lambda: None)
    journal.stage("train", {}, [tmp_path / "study.toml"], lambda: None)
    before = tree(tmp_path)
    with pytest.raises(
        InputError,
        match=r"holds a study with (model\.name a|data\.kind folder|conditions\.base\.recipe probe), .*--config ",
    ):
        OutputsFolder(tmp_path, other, journal).__enter__()
    assert tree(tmp_path) == before
    with OutputsFolder(tmp_path, f"{study}[conditions.more]\nrecipe = 'full'\n", journal):
        pass


def test_a_folder_of_pictures_keeps_what_others_put_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "mine.svg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds mine\.svg, which this program did not write; move the folder away"):
        replace_files(folder, [("a.svg", b"1"), ("mine.svg", b"5")])
    assert tree(folder) == {"mine.svg": b"mine"}
    replace_files(folder, [("a.svg", b"1"), ("b.svg", b"2")])
    replace_files(folder, [("b.svg", b"3"), ("c.svg", b"4")])
    found = tree(folder)
    assert found.pop(".written.json")
    assert found == {"b.svg": b"3", "c.svg": b"4", "mine.svg": b"mine"}
    with pytest.raises(InputError, match=r"holds mine\.svg, which this program did not write; move the folder away"):
        replace_files(folder, [("mine.svg", b"5")])
    assert (folder / "mine.svg").read_bytes() == b"mine"
    (folder / ".written.json").write_bytes(b'{"files": ["mine.svg"]}')  # no list of ours
    replace_files(folder, [("b.svg", b"6")])
    assert (folder / "mine.svg").read_bytes() == b"mine"
    assert ".written.json is damaged; files with the names of those written now are replaced" in caplog.text


def test_a_json_file_beside_a_checkpoint_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"mine": 1}')
    with pytest.raises(StoreError, match=r"a\.json is in the way"):
        save_checkpoint(tmp_path / "a.safetensors", {}, {})
    assert tree(tmp_path) == {"a.json": b'{"mine": 1}'}


def test_a_table_takes_no_other_files_place(tmp_path: Path) -> None:
    table = xarray.Dataset({"x": ("image", np.arange(3.0))}, attrs={"metrics": "[]", "undefined": "{}"})
    (tmp_path / "table.h5").write_bytes(b"mine")
    with pytest.raises(StoreError, match="no file that this program wrote"):
        hdf5_table(table, tmp_path / "table.h5")
    assert tree(tmp_path) == {"table.h5": b"mine"}
    for _ in range(2):
        hdf5_table(table, tmp_path / "own.h5")


# -------------------------------------------------------------------------------------------------------- by the source

PACKAGES = ("engine", "kernels", "store", "train")
REMOVING = {"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "move", "truncate"}


def writes(call: ast.Call) -> str:
    """What a call may take away or overwrite, "" for nothing: a name it removes by, or a mode it writes in."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    module = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if name in REMOVING or (module == "os" and name in ("remove", "replace")):
        return name
    modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    if name in ("open", "File", "open_group", "open_array", "to_zarr") and {"w", "wb", "w+", "w+b", "wt"} & set(modes):
        return name
    return name if name in ("write_text", "write_bytes", "to_csv", "tofile", "savez", "save_file") else ""


def target(call: ast.Call) -> str:
    """Name of the variable that holds what a writing call writes to."""
    first = call.func.value if isinstance(call.func, ast.Attribute) and not call.args else (call.args or [None])[0]
    return first.id if isinstance(first, ast.Name) else ""


def test_nothing_is_removed_or_overwritten_but_by_the_one_module() -> None:
    """Elsewhere a file is begun only as `partial`, under a name that no other program gives, and put in place."""
    root = Path(__file__).resolve().parents[1]
    found = [
        f"{path.relative_to(root)}:{call.lineno} {writes(call)}"
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        if path != root / "store" / "removal.py"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and writes(call) and target(call) != "partial"
    ]
    own = {
        "store/local.py truncate",  # the lock of a ledger, which its holder signs
        "store/hdf5.py truncate",  # the file that is being put together
        "kernels/cpu/cache.py unlink",  # numba's index of our compiled kernels
    }
    assert [entry for entry in found if re.sub(r":\d+", "", entry) not in own] == []


@pytest.mark.parametrize(
    "line",
    [
        "shutil.rmtree(p)",
        "p.unlink()",
        "os.replace(a, b)",
        "open(p, 'w')",
        "h5py.File(p, mode='w')",
        "f.write_text('')",
    ],
)
def test_the_look_at_the_source_is_able_to_fail(line: str) -> None:
    call = ast.parse(line).body[0].value
    assert writes(call)
    assert target(call) != "partial"


def test_pictures_of_samples_have_files_of_their_own_whatever_classes_are_called(tmp_path: Path) -> None:
    """Classes are anything, images too; conditions that differ by a sign do not share a file."""

    class Images:
        ids = ("../../a b\\0.png", "x" * 300)
        class_names = ("../up", "é" * 200, "a" * 300, "a" * 299 + "b")

        def picture(self, row: int) -> np.ndarray:
            return np.zeros((8, 8, 3), np.uint8)

    explained = [
        Explained(row, condition, Images.class_names[target], role, 0.5, np.ones((2, 2), np.float32))
        for row in (0, 1)
        for condition in ("a.b", "a-b", "a_true")
        for role, target in (("true", row), ("other", 2 + row))
    ]
    write_samples(tmp_path / "gradcam_samples", "gradcam", Images(), explained)
    pictures = [name for name in tree(tmp_path / "gradcam_samples") if name.endswith(".png")]
    assert len(pictures) == len(explained) + 2
    assert all(len(name) < 150 and set(name) <= set(string.ascii_letters + string.digits + "._-") for name in pictures)
    assert list(tmp_path.iterdir()) == [tmp_path / "gradcam_samples"]
