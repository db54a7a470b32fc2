"""The manifest: every file of a data set with its label, split and status; and how splits are drawn, class by class."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from train.errors import DamagedFileError, InputError
from train.files import require_file
from train.whole_files import checked_json, parse_checked_json, write_atomically

SPLITS = ("train", "validation", "test")

# Folder names of a ready-made split, lower case → split.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    "test": "test",
}


def split_counts(count: int, validation: float, test: float) -> tuple[int, int, int]:
    """How many of `count` images go to train, validation, test: from 3 on one at least where a share is not 0."""
    least = 1 if count >= 3 else 0
    n_validation = max(least, round(count * validation)) if validation else 0
    n_test = max(least, round(count * test)) if test else 0
    return count - n_validation - n_test, n_validation, n_test


def stratified_split(
    classes: Mapping[str, Sequence[str]], *, seed: int, validation: float = 0.15, test: float = 0.15
) -> dict[str, str]:
    """id → "train", "validation" or "test"; each class (name → ids of its readable images) is split by the same shares.

    A class's split depends on its own name and members and on the seed, not on the other classes. Raises InputError: a
    class has fewer than three images.
    """
    result: dict[str, str] = {}
    for name in sorted(classes):
        ids = sorted(classes[name])
        if len(ids) < 3:
            raise InputError(
                f"class {name!r} has {len(ids)} image(s), expected at least 3 to split into train, "
                "validation and test; add images, or use --data.split folders (all, where nothing is trained)"
            )
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(ids))
        n_train, n_validation, _ = split_counts(len(ids), validation, test)
        for position, index in enumerate(order):
            place = 0 if position < n_train else 1 if position < n_train + n_validation else 2
            result[ids[index]] = SPLITS[place]
    return result


def copies_together(drawn: Mapping[str, str], hashes: Mapping[str, str]) -> dict[str, str]:
    """id → split, where files with the same bytes all go where the first of them goes; `hashes`: id → sha256."""
    first: dict[str, str] = {}
    return {identity: first.setdefault(hashes[identity], drawn[identity]) for identity in sorted(drawn)}


def redrawn_rule(rule: str, seed: int) -> str:
    """What decided the splits where a seed drew training and validation images; `rule` decided the test images."""
    return f"{rule}, train and validation by seed {seed}"


SCHEMA = "vit-manifest/2"


@dataclass(frozen=True, slots=True)
class Record:
    """One file."""

    id: str  # path relative to the root, as `train.files.id_of` writes it down (digits: task/split[/seed]/index)
    label: int  # index into the manifest's class names
    class_name: str
    split: str  # "train", "validation" or "test"; "" for a dropped file of a split that is drawn
    status: str  # "ok", or why the file is left out of every condition
    sha256: str  # of the file's bytes; "" where there are none to read


@dataclass(frozen=True)
class Manifest:
    """The records of a data set in the order of their ids."""

    kind: str  # "folder", "indoor67", "sports100" or "digits"
    root: str  # the folder that ids are relative to; "" for composed scenes
    class_names: tuple[str, ...]  # in label order
    records: tuple[Record, ...]
    # What decided the splits: "stratified", "official", "folders", "all"; or "source digits 66/17/17". And a seed where
    # one drew training and validation images.
    rule: str
    lists: Mapping[str, str] = field(default_factory=dict)  # name of each split list that was read → its sha256

    @cached_property
    def sha256(self) -> str:
        """Of class names and of every record's id, label, split, status and content: not of where the folder lies."""
        digest = hashlib.sha256(json.dumps([self.kind, self.class_names]).encode())
        for record in self.records:
            fields = [record.id, record.label, record.split, record.status, record.sha256]
            digest.update(json.dumps(fields).encode())
        return digest.hexdigest()

    def split(self, name: str) -> tuple[Record, ...]:
        """The readable records of one split."""
        return tuple(record for record in self.records if record.split == name and record.status == "ok")

    def split_digest(self, name: str) -> str:
        """sha256 of a split as a list: its ids in order, one per line."""
        return hashlib.sha256("".join(f"{record.id}\n" for record in self.split(name)).encode()).hexdigest()

    @property
    def dropped(self) -> dict[str, int]:
        """Reason → number of files left out."""
        return dict(sorted(Counter(record.status for record in self.records if record.status != "ok").items()))

    def leaks(self) -> list[tuple[str, ...]]:
        """Ids of readable files with the same bytes that lie in different splits."""
        same: dict[str, list[Record]] = defaultdict(list)
        for record in self.records:
            if record.status == "ok":
                same[record.sha256].append(record)
        return [tuple(r.id for r in records) for records in same.values() if len({r.split for r in records}) > 1]

    def redrawn(self, seed: int) -> Manifest:
        """With the same test images, and the others drawn into train and validation by a seed.

        Of each class as many go to each as here, but for copies of a file, which stay together. Which ones depends on
        the class's name, its members and the seed, not on how they were split before.
        """
        pool: dict[str, list[Record]] = defaultdict(list)
        for record in sorted(self.split("train") + self.split("validation"), key=lambda record: record.id):
            pool[record.class_name].append(record)
        drawn: dict[str, str] = {}
        for name, members in pool.items():
            held_out = sum(record.split == "validation" for record in members)
            # The last number sets the stream apart from that of `stratified_split`.
            order = np.random.default_rng([seed, zlib.crc32(name.encode()), 1]).permutation(len(members))
            for position, index in enumerate(order):
                drawn[members[index].id] = "validation" if position < held_out else "train"
        drawn = copies_together(drawn, {record.id: record.sha256 for record in self.records})
        records = tuple(replace(record, split=drawn.get(record.id, record.split)) for record in self.records)
        return replace(self, records=records, rule=redrawn_rule(self.rule, seed))

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        document = {
            "schema": SCHEMA,
            "kind": self.kind,
            "root": self.root,
            "sha256": self.sha256,
            "rule": self.rule,
            "lists": dict(self.lists),
            "splits": {name: {"images": len(self.split(name)), "sha256": self.split_digest(name)} for name in SPLITS},
            "class_names": list(self.class_names),
            "dropped": self.dropped,
            "records": [asdict(record) for record in self.records],
        }
        write_atomically(path, checked_json(document))

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote; InputError without a file, DamagedFileError if it is not as it was written."""
        require_file(path, "manifest", "expected the one that a study left there")
        try:
            document = parse_checked_json(path.read_bytes(), SCHEMA)
        except ValueError as error:
            raise DamagedFileError(f"manifest {path} {error}; delete it to have it built again") from error
        records = tuple(Record(**record) for record in document["records"])
        fields = {name: document[name] for name in ("kind", "root", "rule", "lists")}
        return cls(**fields, class_names=tuple(document["class_names"]), records=records)
