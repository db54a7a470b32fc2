"""`run.jsonl`: what was done, from which inputs, with which result; a stage whose inputs did not change is skipped.

It is also the one record of what each stage left: whoever reads another stage's files asks it whether they are still
what that stage wrote. One JSON object per line, appended and synced, each with a checksum of itself: a line that a kill
tore or a fault changed is named and counts as not written, so its stage is done again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.config import STUDY
from engine.progress import PROGRAM, say
from store.disk import writing
from train.errors import DamagedFileError, InputError
from train.whole_files import write_atomically

if TYPE_CHECKING:
    from train.parallel import Workers  # which loads torch

SEAL = "sha256"  # the key of a line that holds the hash of the others
_MARKS = (b'"event": "', b'"stage": "')  # a journal that is damaged still holds these texts
_KEYS = {"event", "stage", "key", "time", "outputs"}  # of every line


def digest(value: Any) -> str:
    """sha256 of a JSON value, in which dataclasses are objects, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_path(path: Path) -> str:
    """sha256 over a file's bytes, or over the names and bytes of every file in a folder; "" when it is not there.

    A captured store is represented by `store.verify.content_digest`.
    """
    if path.is_file():
        state = path.stat()
        return _file_digest(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if not path.is_dir():
        return ""
    if path.suffix == ".zarr" and path.with_suffix(".ledger").is_dir():
        from store.verify import content_digest

        return content_digest(path)
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{digest_path(file)}\0".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=100_000)
def _file_digest(path: Path, *state: int) -> str:
    """sha256 of a file; a file whose inode, size and times are those of the last time is not read twice."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Journal:
    """The stages of one outputs folder, recorded in `path`: made when the first stage ends, read when first asked.

    Of several processes that go through the stages together, the first one decides what is done already and keeps the
    journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = True  # whether the file holds sound lines only
        self._left_out: set[Path] = set()

    @functools.cached_property
    def _records(self) -> list[dict[str, Any]]:
        """The sound lines, in order."""
        if not self.path.is_file():
            if os.path.lexists(self.path):
                raise InputError(f"{self.path} is a folder, a device or a link to nowhere; move it away")
            return []
        content = self.path.read_bytes()
        records, damaged = [], []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                sound = record.pop(SEAL) == digest(record) and record.keys() >= _KEYS
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                sound = False
            if sound:
                records.append(record)
            else:
                damaged.append(str(number))
        self._whole = not damaged and content.endswith(b"\n")
        if damaged:
            say(
                f"{self.path}: line {', '.join(damaged)} is damaged, torn by a kill or of an earlier version, and "
                "counts as not written; a study does what it recorded again"
            )
        return records

    @property
    def is_ours(self) -> bool:
        """Whether a file lies there that this program wrote, sound or damaged."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return all(mark in content for mark in _MARKS)

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], Mapping[str, Any] | None],
        *,
        reads: Sequence[Path] = (),
        workers: Workers | None = None,
        shared: bool = False,
    ) -> str:
        """Run `work` unless it was done before with the same inputs and its outputs are as it left them.

        `inputs` are JSON values that decide the result besides the program's version: configuration keys, hashes of
        files. `outputs` are files and folders that `work` leaves; what it returns is kept in the record. `reads` are
        files that other stages left: when one of them leaves something else, these outputs are not to be used any more.
        Of the workers (None: this process alone) the first one does it and the others wait; `shared`: all do it.

        Returns:
            a hash of the outputs, an input for the stages that follow.
        """
        inputs = {**inputs, "version": __version__}
        first = workers is None or workers.first
        before = self.done(name, inputs, outputs) if first else None
        if workers is not None:
            before = workers.tell(before)
        if before is not None:
            say(f"{name}: done already")
            return before
        after = ""
        if first or shared:
            began = time.perf_counter()
            note = work() or {}
            seconds = time.perf_counter() - began
        if first:
            found = {source: self._recorded(source) for source in map(self._name, reads)}
            sources = {source: recorded[source][0] for source, recorded in found.items() if source in recorded}
            after = self._record("done", name, inputs, outputs, reads=sources, seconds=round(seconds, 3), **note)
            say(f"{name}: {seconds:.1f} s")
        return after if workers is None else workers.tell(after)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file that is no stage's own, whole, and record it; nothing where it lies there so already."""
        name, inputs = self._name(path), {"content": hashlib.sha256(content).hexdigest()}
        if self.done(name, inputs, [path]) is None:
            write_atomically(path, content)
            self._record("written", name, inputs, [path])

    def precedes(self, path: Path, stage: str) -> bool:
        """Whether a file, as it is now, was first recorded before any stage whose name begins so."""
        name, sha256 = self._name(path), digest_path(path)
        for record in self._records:
            if record["outputs"].get(name) == sha256:
                return True
            if record["stage"].startswith(stage):
                return False
        return False

    def fail(self, name: str, reason: str) -> None:
        """Record that a stage failed: what it left before counts as nobody's, until it is done again."""
        self._record("failed", name, {"failed": reason}, [], reason=reason)

    def failed(self) -> dict[str, str]:
        """Stage → reason of the stages that failed and were not done since."""
        return {name: record["reason"] for name, record in self._newest().items() if record["event"] == "failed"}

    def done(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path]) -> str | None:
        """The hash of the outputs, if the stage was done with these inputs and they are as it left them."""
        last = self._newest().get(name)
        if last is None or last["key"] != digest(inputs):
            return None
        for path, maker, same in self._sources(name):
            if not same:
                say(f"{name}: stage {maker} left another {path} since, so it is done again")
                return None
        found = self._found(outputs)
        changed = [path for path, sha256 in last["outputs"].items() if found.get(path) != sha256]
        if changed:
            say(f"{name}: {changed[0]} {_fault(found.get(changed[0]))}, so it is done again")
        return digest(found) if found == last["outputs"] and all(found.values()) else None

    def stage_seconds(self) -> dict[str, float]:
        """How long each stage took when it was last done, in the order in which they were first done."""
        return {record["stage"]: float(record["seconds"]) for record in self._records if record["event"] == "done"}

    def exists(self) -> bool:
        """Whether the folder was made by a study."""
        return self.path.is_file()

    def usable(self, path: Path) -> bool:
        """Whether a file or folder may be read: what a stage left and is as it left it.

        What no stage recorded is left out, and said once. A folder without a journal was not made by a study: there,
        whatever exists may be read.

        Raises:
            DamagedFileError: something of it is missing, or is not what its stage wrote; what to do is said.
            InputError: what its stage read was made again since, with another result; or a pipe or the like lies there.
        """
        if not self.exists():
            for file in (path, *path.rglob("*")):
                if os.path.lexists(file) and not (file.is_file() or file.is_dir()):  # a pipe's end may never come
                    raise InputError(f"{file} is a device or a link to nowhere; move it away")
            return path.exists()
        recorded = self._recorded(self._name(path))
        for name, (sha256, stage) in recorded.items():
            if (found := digest_path(self.path.parent / name)) != sha256:
                raise DamagedFileError(
                    f"{self.path.parent / name} {_fault(found)} (stage {stage}); {self._remedy(stage)}"
                )
        for stage in {stage for _, stage in recorded.values()}:
            self._require_current(stage)
        if not recorded and path.exists() and path not in self._left_out:
            self._left_out.add(path)
            say(f"{path} is left out: {self.path.name} has no record of it")
        return bool(recorded)

    def require(self, path: Path) -> None:
        """As `usable`, for a file without which nothing can be said: it is an error too that no stage recorded it."""
        name = self._name(path)
        if self.exists() and not self._recorded(name):
            raise InputError(f"{path}: {self.path} has no record of it; {self._remedy(name)}")
        self.usable(path)

    def _require_current(self, stage: str) -> None:
        """Whether what a stage read, and what that was made from, is what was there when it was done."""
        for path, maker, same in self._sources(stage):
            if not same:
                raise InputError(
                    f"{self.path.parent}: stage {stage} was done with another {path} than stage {maker} left since; "
                    f"{self._remedy(stage)}"
                )
            if maker != stage:
                self._require_current(maker)

    def _sources(self, stage: str) -> Iterator[tuple[str, str, bool]]:
        """What a stage read when it was last done, which stage left it last, and whether it is the same still."""
        for path, sha256 in self._newest().get(stage, {}).get("reads", {}).items():
            now, maker = self._recorded(path).get(path, (sha256, stage))
            yield path, maker, now == sha256

    def _recorded(self, name: str) -> dict[str, tuple[str, str]]:
        """Name → (hash, stage) of what has this name or lies in it, by the newest record of each stage."""
        return {
            output: (sha256, stage)
            for stage, record in self._newest().items()
            for output, sha256 in record["outputs"].items()
            if output == name or output.startswith(f"{name}/")
        }

    def _remedy(self, stage: str) -> str:
        outputs = self.path.parent
        if stage == STUDY.name:
            if not (outputs / stage).is_file():
                return "run the study again with its configuration: --config FILE"
            return f"to go on with it as it is now, give it on purpose: --config {outputs / stage}"
        command = "relevance" if stage == "relevance" else "stats"
        return f"make it again: {PROGRAM} {command} --outputs {outputs}"

    def _newest(self) -> dict[str, dict[str, Any]]:
        """Stage → its newest record, the newest last: of two stages that leave one file the later one counts."""
        newest: dict[str, dict[str, Any]] = {}
        for record in self._records:
            newest.pop(record["stage"], None)
            newest[record["stage"]] = record
        return newest

    def _found(self, outputs: Sequence[Path]) -> dict[str, str]:
        return {self._name(path): digest_path(path) for path in outputs}

    def _name(self, path: Path) -> str:
        base = self.path.parent
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()

    def _record(self, event: str, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path], **more: Any) -> str:
        """Append a line, synced; damaged lines are dropped on the way. Returns the hash of the outputs."""
        record = {
            "event": event,
            "stage": name,
            "key": digest(inputs),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "outputs": self._found(outputs),
            **more,
        }
        self._records.append(record)
        if self._whole and self.path.is_file():  # the first line appears whole: a file without one says nothing
            with writing(self.path), open(self.path, "ab") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        else:
            write_atomically(self.path, b"".join(map(_line, self._records)))
            self._whole = True
        return digest(record["outputs"])


def _line(record: Mapping[str, Any]) -> bytes:
    sealed = {**record, SEAL: digest(record)}
    return (json.dumps(sealed, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _fault(found: str | None) -> str:
    return "is not as it was written: edited, damaged or put in its place" if found else "is missing"
