"""The trials of a sweep on disk: Optuna's log, every line with a checksum that includes the line before it.

One JSON object per line: `study` (a backbone and rank), `log` (Optuna's own entry), `previous` (the checksum of the
study's line before, "" for its first) and `checksum`. A study's log is the chain of lines that follow one another: a
line that is damaged, lost or out of place ends the chain, so that trials from there on are run again, with the same
outcome, and those of other studies stay.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from store.disk import writing
from train.whole_files import write_atomically

logger = logging.getLogger(__name__)


class TrialsFile(BaseJournalBackend):
    """One study's log within a file that several share; one process writes at a time.

    Args:
        path: of the file; made with the first line. Damaged lines are named and taken out.
        study: whose lines are meant.
    """

    def __init__(self, path: Path, study: str) -> None:
        self.path, self.study = path, study
        self._logs: list[dict[str, Any]] = []
        self._last = ""
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        entries = [_parse(line) for line in lines]
        if damaged := [number for number, entry in enumerate(entries, 1) if entry is None]:
            numbers = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            logger.warning("%s: line %s damaged; the trials that need what it said are run again", path, numbers)
            write_atomically(path, b"".join(line for line, e in zip(lines, entries, strict=True) if e is not None))
        for entry in entries:
            if entry is not None and (entry["study"], entry["previous"]) == (study, self._last):
                self._logs.append(entry["log"])
                self._last = entry["checksum"]

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Optuna's entries from the given number on."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries of Optuna's, durably."""
        with writing(self.path), open(self.path, "ab") as file:
            for log in logs:
                line = _line(self.study, self._last, log)
                file.write(line)
                entry = json.loads(line)  # as a later process will read it
                self._logs.append(entry["log"])
                self._last = entry["checksum"]
            file.flush()
            os.fsync(file.fileno())


def _line(study: str, previous: str, log: dict[str, Any]) -> bytes:
    body = {"study": study, "previous": previous, "log": log}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"checksum": checksum, **body}, sort_keys=True) + "\n").encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, if it is byte for byte what was written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return entry if _line(entry["study"], entry["previous"], entry["log"]) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
