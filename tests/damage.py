"""Damage to what commands leave behind, and the verdict on what the next commands make of it.

    python -m tests.damage SUBJECT [--flips N] [--files N] [--units] [--seed N] [--kind TEXT]

A subject is a folder that commands have filled. A trial damages one file of it and runs what a user would run next.
Each of these commands must either refuse, in a sentence that names the file, or leave the outputs of the undamaged run,
byte for byte; and after the commands that made the folder have run once more, it is what it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.damage_steps import Step, still_clock

# --- a folder, and what it was ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A folder that commands have filled.

    Args:
        home: the folder; all that is compared lies in it.
        kinds: regular expression of a path below `home` -> kind of the file; the first that matches counts.
        remake: the commands that made it; run again, they must heal it. None: it is a user's own.
        before: kind -> what is run between the damage and `remake`, one list a trial, in turn.
        older: files of an earlier run in this folder, by name.
        foreign: files of another run elsewhere, by name.
        units: regular expression of paths, whose group names a unit of files that belong together -> kind.
        forget: kind -> names of folders that are deleted before every second trial, so that they are made of damage.
        finished: what `remake` leads to; None: to what is there already.
    """

    home: Path
    kinds: Mapping[str, str]
    remake: Sequence[Step]
    before: Mapping[str, Sequence[Sequence[Step]]] = field(default_factory=dict)
    older: Mapping[str, bytes] = field(default_factory=dict)
    foreign: Mapping[str, bytes] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    forget: Mapping[str, Sequence[str]] = field(default_factory=dict)
    finished: Mapping[str, bytes] | None = None

    @cached_property
    def sound(self) -> dict[str, bytes]:
        """Every file of the undamaged folder, by name."""
        return contents(self.home)

    @property
    def right(self) -> Mapping[str, bytes]:
        """Every file as it must be in the end, by name."""
        return self.sound if self.finished is None else self.finished

    def by_kind(self) -> dict[str, list[str]]:
        """kind -> its files; those of no bytes are locks."""
        found: dict[str, list[str]] = {}
        for name in self.sound:
            if not is_lock(name):
                found.setdefault(kind_of(name, self.kinds), []).append(name)
        return found

    def changed(self) -> list[str]:
        """Names of the files that are not as an undamaged run leaves them."""
        found = contents(self.home)
        names = [name for name in {*found, *self.right} if not is_lock(name)]
        return sorted(name for name in names if not alike(name, found.get(name), self.right.get(name)))

    def restore(self) -> None:
        """Every file as the undamaged run left it."""
        for name in contents(self.home):
            if name not in self.sound:
                (self.home / name).unlink()
        for name, content in self.sound.items():
            path = self.home / name
            if not path.is_file() or path.read_bytes() != content:
                put(path, content)
        for folder in sorted((p for p in self.home.rglob("*") if p.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


def kind_of(name: str, kinds: Mapping[str, str]) -> str:
    """The kind of a file; every file must have one, so that a new kind is damaged, too."""
    for pattern, kind in kinds.items():
        if re.fullmatch(pattern, name):
            return kind
    raise LookupError(f"{name} is of no kind that tests/damage_subjects.py knows; give it a rule there")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def put(path: Path, content: bytes) -> None:
    """Change a file as a failing disk does: its times stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = path.stat() if path.exists() else None
    path.write_bytes(content)
    if times is not None:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def is_lock(name: str) -> bool:
    return Path(name).name in (".lock", "lock") or name.endswith(".lock")


def alike(name: str, found: bytes | None, sound: bytes | None) -> bool:
    """Whether a file says what it did; what no two runs share is no part of that."""
    if found is None or sound is None or found == sound:
        return found == sound
    leaf = name.rpartition("/")[2]
    if leaf == "run.jsonl":
        return stages(found) == stages(sound)
    if leaf == "trials.jsonl":  # studies of other settings may be there, too
        return trials(found).items() >= trials(sound).items()
    return False


def stages(journal: bytes) -> dict[str, Any]:
    """The last record of each stage that makes files, without its times; each command has a check of its own."""
    last = {}
    for line in journal.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if record["outputs"]:
                last[record["stage"]] = {"key": record["key"], "outputs": record["outputs"]}
    return last


def trials(content: bytes) -> dict[str, str]:
    """What Optuna reads in its file: name of a study -> the outcome of its trials; nothing of a damaged file."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.jsonl"
        path.write_bytes(content)
        try:
            storage = JournalStorage(JournalFileBackend(str(path)))
            return {
                study.study_name: repr(
                    [
                        (trial.state, trial.value, trial.params, trial.intermediate_values)
                        for trial in storage.get_all_trials(study._study_id)
                    ]
                )
                for study in storage.get_all_studies()
            }
        except Exception:
            return {}


# --- damage -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Files that are replaced by other bytes (None: deleted), what that is called, and how often the kind was tried."""

    kind: str
    what: str
    files: Mapping[str, bytes | None]
    turn: int

    def apply(self, home: Path) -> None:
        for name, content in self.files.items():
            if content is None:
                (home / name).unlink(missing_ok=True)
            else:
                put(home / name, content)


def flips(subject: Subject, count: int, seed: int, only: str = "") -> Iterator[Damage]:
    """One flipped bit each: kinds in turn, a file of the kind and a bit of it by chance."""
    rng = random.Random(seed)
    kinds = {kind: names for kind, names in subject.by_kind().items() if only in kind}
    for index in range(count):
        kind = list(kinds)[index % len(kinds)]
        name = rng.choice(kinds[kind])
        content = bytearray(subject.sound[name])
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        what = f"bit {bit % 8} of byte {bit // 8} of {len(content)} of {name}"
        yield Damage(kind, what, {name: bytes(content)}, index // len(kinds))


def replacements(subject: Subject, count: int, seed: int, only: str = "") -> Iterator[Damage]:
    """Whole files that are another's, an older one, cut, empty or gone: kinds in turn."""
    rng = random.Random(seed)
    kinds = {kind: names for kind, names in subject.by_kind().items() if only in kind}
    hows = ("swapped", "foreign", "older", "cut", "emptied", "deleted")
    turns = [(kind, how) for how in hows for kind in kinds]
    made: Counter[str] = Counter()
    while made.total() < count:
        before = made.total()
        for kind, how in turns:
            if made.total() == count:
                return
            name = rng.choice(kinds[kind])
            content = subject.sound[name]
            files: dict[str, bytes | None] = {}
            if how == "swapped":
                others = [other for other in kinds[kind] if subject.sound[other] != content]
                if others:
                    other = rng.choice(others)
                    files = {name: subject.sound[other], other: content}
            elif how in ("foreign", "older"):
                source = subject.foreign if how == "foreign" else subject.older
                if name in source and source[name] != content:
                    files = {name: source[name]}
            else:
                files = {name: {"cut": content[: len(content) // 2], "emptied": b"", "deleted": None}[how]}
            if files:
                yield Damage(kind, f"{how}: {' and '.join(files)}", files, made[kind])
                made[kind] += 1
        if made.total() == before:
            return


def exchanged_units(subject: Subject) -> Iterator[Damage]:
    """Files that belong together, all of them another run's or an earlier one's: each fits the others."""
    for pattern, kind in subject.units.items():
        for how, source in (("foreign", subject.foreign), ("older", subject.older)):
            found = {name: re.fullmatch(pattern, name) for name in {**subject.sound, **source} if not is_lock(name)}
            units = sorted({match[1] for match in found.values() if match})
            for turn, unit in enumerate(units):
                names = [name for name, match in found.items() if match and match[1] == unit]
                files = {name: source.get(name) for name in names if source.get(name) != subject.sound.get(name)}
                if files:
                    yield Damage(kind, f"{how}: all of {unit or 'the folder'} ({len(files)} files)", files, turn)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How a trial ended: "named", "healed" or "harmless"; "failed" with the reason."""

    damage: Damage
    ending: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.damage.kind}: {self.damage.what}: {self.reason or self.ending}"


def try_damage(subject: Subject, damage: Damage) -> Verdict:
    """Damage the folder, run what a user would, and put it right again."""
    try:
        return _try(subject, damage)
    finally:
        subject.restore()


def _try(subject: Subject, damage: Damage) -> Verdict:
    def failed(reason: str) -> Verdict:
        return Verdict(damage, "failed", reason)

    forgotten = subject.forget.get(damage.kind, ()) if damage.turn % 2 else ()
    for name in forgotten:
        shutil.rmtree(subject.home / name)
    absent = {name for name in subject.sound if name.startswith(tuple(f"{folder}/" for folder in forgotten))}
    damage.apply(subject.home)
    ways = subject.before.get(damage.kind) or [[]]
    steps = [(step, False) for step in ways[damage.turn % len(ways)]] + [(step, True) for step in subject.remake]
    refused = named = False
    for number, (step, makes) in enumerate(steps):
        code, said = step()
        if code is None:
            return failed(f"step {number}: {brief(said)}")
        if code:
            if not names(said, damage):
                return failed(f"step {number} refused (exit code {code}) without the file's name: {brief(said)}")
            named = True
            if makes:  # the advice is to delete what is damaged, and the same command makes it again
                refused = True
                for _ in damage.files:
                    if not code:
                        break
                    delete(subject, damage, said)
                    code, said = step()
                if code != 0:
                    return failed(f"step {number} is stuck, with the damaged file deleted: {brief(said)}")
        if code == 0 and is_sound(said) and any(content is not None for content in damage.files.values()):
            return failed("verify calls it sound")
        if not makes and code == 0:
            # A file that is not there yet, or no longer, gives nobody a wrong value.
            wrong = {name for name in subject.changed() if (subject.home / name).exists()} - set(damage.files) - absent
            if wrong and not names(said, damage):  # what is left out is said
                return failed(f"step {number} said nothing, and these differ: {', '.join(sorted(wrong)[:4])}")
    if not subject.remake:  # nobody but its owner can make it again; a reader that refused nothing got what was there
        return Verdict(damage, "named" if named else "harmless")
    left = subject.changed()
    if left and named and set(left) <= set(damage.files):
        # Nothing that was run needed the file, and all that read it refuse it by name: deleted, it is made again.
        refused = True
        delete(subject, damage)
        for step in subject.remake:
            code, said = step()
            if code != 0:
                return failed(f"stuck, with the damaged file deleted: {brief(said)}")
        left = subject.changed()
    if left:
        return failed(f"not healed: {', '.join(left[:4])}")
    return Verdict(damage, "named" if refused else "healed")


def is_sound(said: str) -> bool:
    """Whether `verify` found nothing; what is not there may be what was not yet captured or measured."""
    lines = said.splitlines()
    return bool(lines) and all(line.endswith(" is sound") for line in lines)


def delete(subject: Subject, damage: Damage, said: str = "") -> None:
    """Delete the damaged files that are named, or all; a folder whose own record is damaged goes as a whole."""
    for name in [name for name in damage.files if name in said] or damage.files:
        path = subject.home / name
        path.unlink(missing_ok=True)
        if damage.kind == "ledger metadata":
            shutil.rmtree(path.parent, ignore_errors=True)
            shutil.rmtree(path.parent.with_suffix(".zarr"), ignore_errors=True)
        if damage.kind in ("sample metadata", "table metadata"):  # nothing else says whose the folder is
            shutil.rmtree(next(folder for folder in path.parents if folder.suffix == ".zarr"), ignore_errors=True)
        if damage.kind == "record of a folder of pictures":
            shutil.rmtree(path.parent, ignore_errors=True)


def names(said: str, damage: Damage) -> bool:
    """Whether what was said names a damaged file or, where several files are one unit, the unit."""
    return any(text in said for name in damage.files for text in names_of(name, damage.kind))


def names_of(name: str, kind: str) -> list[str]:
    """What a file may be called."""
    parts = name.split("/")
    folder, leaf = "/".join(parts[:-1]), parts[-1]
    called = ["/".join(parts[-2:])]
    if leaf != "zarr.json" and not re.fullmatch(r"c\.[.\d]+|\d+", leaf):
        called.append(leaf)
    stores = [part for part in parts if part.endswith((".zarr", ".ledger"))]
    if kind.startswith(("sample", "table")):
        called += stores  # made again as a whole
    elif kind in ("relevance picture", "relevance sample csv", "figure", "record of a folder of pictures"):
        called.append(folder)  # its files are at odds with each other
    elif kind == "journal" or kind.startswith("unit"):
        called.append("is not as it was written")  # of a file that it is at odds with, or of one of several
    elif stores:
        inside = folder.partition(f"{stores[0]}/")[2]
        if shard := re.fullmatch(r"c\.(\d+)[.\d]*", leaf):
            called.append(f"{inside}, batch {shard[1]}")
        if record := re.fullmatch(r"batch_0*(\d+)\.json", leaf):  # or the files that it is at odds with
            called += [f"batch {record[1]}", f"/c.{record[1]}."]
        if kind == "ledger metadata":  # without it a store is none
            called += [stores[0], stores[0].replace(".ledger", ".zarr")]
        if kind == "ledger metadata of a metric":  # without it there is no such metric
            called.append(f"no metric {parts[-3]!r}")
    return called


def brief(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    place = [line.strip() for line in lines if line.lstrip().startswith("File ") and "site-packages" not in line]
    return " | ".join([*place[-1:], *lines[-2:]])[-600:]


def table(verdicts: Sequence[Verdict]) -> str:
    """kind × (trials, named, healed, harmless, failed), as Markdown."""
    lines = ["| kind of file | trials | named | healed | harmless | failed |", "|---|---|---|---|---|---|"]
    counts: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        counts.setdefault(verdict.damage.kind, Counter())[verdict.ending] += 1
    counts["all"] = sum(counts.values(), Counter())
    for kind, count in counts.items():
        cells = [sum(count.values()), *(count[ending] for ending in ("named", "healed", "harmless", "failed"))]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def try_all(subject: Subject, damages: Iterator[Damage]) -> list[Verdict]:
    with still_clock():
        return [try_damage(subject, damage) for damage in damages]


def _main() -> None:
    from tests.damage_subjects import SUBJECTS

    parser = argparse.ArgumentParser()
    parser.add_argument("subject", choices=sorted(SUBJECTS))
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--units", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with still_clock():
            subject = SUBJECTS[given.subject](Path(folder))
        for damages in (
            flips(subject, given.flips, given.seed, given.kind),
            replacements(subject, given.files, given.seed, given.kind),
            (damage for damage in exchanged_units(subject) if given.units and given.kind in damage.kind),
        ):
            verdicts = try_all(subject, damages)
            print(table(verdicts))
            for verdict in verdicts:
                if verdict.ending == "failed":
                    print(f"- {verdict}")


if __name__ == "__main__":
    _main()
