"""`run.jsonl`: what was done, from which inputs, with which result; a stage whose inputs did not change is skipped.

One JSON object a line, appended and synced. A line torn by a kill is the last one, and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.progress import say
from train.parallel import Workers

__all__ = ["Journal", "digest", "digest_path"]


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_path(path: Path) -> str:
    """sha256 over a file's bytes, or over the names and bytes of every file in a folder; "" when it is not there.

    A captured store is represented by its ledger (which holds the hashes of its shards) and by the names and sizes of
    its files: reading all maps again at every start would take longer than the stage that they save.
    """
    if path.is_file():
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    if not path.is_dir():
        return ""
    ledger = path.with_suffix(".ledger")
    total = hashlib.sha256()
    if path.suffix == ".zarr" and ledger.is_dir():
        # Metrics computed after the capture have a folder of their own in the ledger; they are not its output.
        later = tuple(f"{found.relative_to(ledger).as_posix()}/" for found in ledger.glob("metrics/*/*"))
        for record in sorted(ledger.rglob("*.json")):
            name = record.relative_to(ledger).as_posix()
            if not name.startswith(later):
                total.update(f"{name}\0{digest_path(record)}\0".encode())
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path).as_posix()
            if not name.startswith(later):
                total.update(f"{name}\0{file.stat().st_size}\0".encode())
        return total.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{digest_path(file)}\0".encode())
    return total.hexdigest()


class Journal:
    """The stages of one outputs folder.

    Where torchrun started several processes, all of them go through the stages together: the first one decides what is
    done already and keeps the journal.

    Args:
        path: the `run.jsonl`; made when the first stage ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the torn last line of a killed run: its stage is simply done again
                if record.get("event") == "done":
                    self._last[record["stage"]] = record

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], Mapping[str, Any] | None],
        *,
        shared: bool = False,
    ) -> str:
        """Run `work` unless it was done before with the same inputs and its outputs are as it left them.

        Args:
            name: of the stage, with what it is about: "train finetuned seed 42".
            inputs: JSON values that decide the result: configuration keys, hashes of files, code version.
            outputs: files and folders that `work` leaves.
            work: does it; what it returns is kept in the record.
            shared: several processes do it together; otherwise the first one does, and the others wait.

        Returns:
            a hash of the outputs, an input for the stages that follow.
        """
        workers = Workers.current()
        before = workers.tell(self.done(name, inputs, outputs) if workers.first else None)
        if before is not None:
            say(f"{name}: done already")
            return before
        left = None
        if workers.first:
            left = self._do(name, inputs, outputs, work)
        elif shared:
            work()
        return str(workers.tell(left))

    def _do(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], Mapping[str, Any] | None],
    ) -> str:
        """Run `work` and keep the record of it."""
        began = time.perf_counter()
        note = work()
        left = {self._name(path, self.path.parent): digest_path(path) for path in outputs}
        seconds = time.perf_counter() - began
        record = {
            "event": "done",
            "stage": name,
            "key": digest(inputs),
            "seconds": round(seconds, 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "outputs": left,
            **(note or {}),
        }
        self._append(record)
        self._last[name] = record
        say(f"{name}: {seconds:.1f} s")
        return digest(left)

    def done(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path]) -> str | None:
        """The hash of the outputs, if the stage was done with these inputs and they are as it left them."""
        last = self._last.get(name)
        if last is None or last["key"] != digest(inputs):
            return None
        found = {self._name(path, self.path.parent): digest_path(path) for path in outputs}
        return digest(found) if found == last["outputs"] and all(found.values()) else None

    def seconds(self, name: str) -> float | None:
        """How long the stage took when it was last done."""
        record = self._last.get(name)
        return None if record is None else float(record["seconds"])

    @staticmethod
    def _name(path: Path, base: Path) -> str:
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # A kill can leave a line without its end; the next record must not be glued to it.
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line)
            file.flush()
            os.fsync(file.fileno())
