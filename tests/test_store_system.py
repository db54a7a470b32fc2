"""Locks, folders and processes on this system, and on one that has nothing of POSIX."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import store_cases as case

from store import AttentionStore
from store.system import lock_file
from store.verify import verify

# What Windows lacks is taken away; msvcrt's lock of a byte is played by flock, which this program does not see.
AS_ON_WINDOWS = """
import errno
import fcntl
import os
import select
import shutil
import sys
import types


def locking(descriptor, mode, count):
    assert mode == 2 and count == 1
    assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 20
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def no_folders(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder")
    return real_open(path, *arguments, **options)


def not_while_it_is_open(function):
    def called(path, *arguments, **options):
        folder = "/proc/self/fd"  # where there is none, nothing is refused
        files = [f"{folder}/{name}" for name in os.listdir(folder)] if os.path.isdir(folder) else []
        for target in (path, *arguments):
            for file in files:
                try:
                    opened = os.path.samestat(os.stat(file), os.stat(target))
                except OSError:
                    continue
                if opened and os.path.isfile(target):
                    raise PermissionError(errno.EACCES, "open in a process", str(target))
        return function(path, *arguments, **options)

    return called


real_open, real_fsync = os.open, os.fsync


def written_files_alone(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise PermissionError(errno.EACCES, "open for reading alone")
    real_fsync(descriptor)


import numba, torch, zarr  # have imported what they want
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
sys.modules["fcntl"] = sys.modules["resource"] = None
os.environ["USERNAME"] = "somebody"  # Windows always says who
os.open, os.fsync, shutil._use_fd_functions = no_folders, written_files_alone, False
os.unlink, os.remove, os.replace = (not_while_it_is_open(call) for call in (os.unlink, os.remove, os.replace))
for module, names in ((os, "fork sched_getaffinity O_DIRECTORY register_at_fork killpg getuid"), (select, "poll")):
    for name in names.split():
        delattr(module, name)
"""


def run_as_on_windows(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parent)
    program = f"{AS_ON_WINDOWS}\nsys.path.insert(0, {tests!r})\n{code}"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


def test_a_store_is_written_read_and_measured_without_posix(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    code = """
import store_cases as case
from pathlib import Path
from store import AttentionWriter, StoreError

path = Path(sys.argv[1])
schema = case.make_schema(metrics={}, region_metrics=())
case.capture(path, schema)
with AttentionWriter.open(path, schema, **case.fixed(schema)) as writer:
    for refused in (lambda: AttentionWriter.open(path, schema, **case.fixed(schema)), writer.share):
        try:
            refused()
        except StoreError as error:
            print(error)
case.check_values(path)
from engine.run import main
for command in (["measure", "--metrics", "entropy", "--store"], ["export", "--hdf5", f"{path}.h5", "--store"]):
    assert main([*command, str(path)]) == 0
assert main(["import", "--hdf5", f"{path}.h5", "--store", f"{path.parent / 'again.zarr'}"]) == 0
assert main(["verify", str(path)]) == 0
AttentionWriter.discard(path.parent / "again.zarr")
print(*sorted(file.name for file in path.parent.iterdir()))
import importlib, pkgutil
import engine, train
for package in (engine, train):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
    done = run_as_on_windows(code, str(path))
    assert done.returncode == 0, done.stderr
    assert "is locked: process" in done.stdout
    assert "\nrun.ledger run.zarr run.zarr.h5\n" in done.stdout
    assert "this system cannot share the lock of a file between processes; let one process write alone" in done.stdout
    assert AttentionStore.open(path).metric_names == ("entropy",)
    assert verify(path) == []
    same = case.file_bytes(path / "attention")
    case.capture(tmp_path / "here.zarr", case.make_schema(metrics={}, region_metrics=()))
    assert same == case.file_bytes(tmp_path / "here.zarr" / "attention")


def test_a_lock_is_for_one_or_for_those_who_share_it(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a+") as one, open(tmp_path / "lock", "a+") as other:
        lock_file(one)
        for shared in (False, True):
            with pytest.raises(BlockingIOError):
                lock_file(other, shared=shared)
        lock_file(one, shared=True)
        lock_file(other, shared=True)
        with pytest.raises(BlockingIOError):
            lock_file(other)


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path) -> None:
    taken = threading.Event()

    def wait() -> None:
        with open(tmp_path / "lock", "a+") as file:
            lock_file(file, wait=True)
            taken.set()

    with open(tmp_path / "lock", "a+") as holder:
        lock_file(holder)
        thread = threading.Thread(target=wait)
        thread.start()
        assert not taken.wait(0.1)
    thread.join(10)
    assert taken.is_set()
