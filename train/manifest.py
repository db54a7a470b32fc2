"""The manifest: every file of a data set with its label, split and status, decided once by decoding it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from train.checkpoint import write_atomically
from train.errors import DamagedFileError, InputError
from train.images import UndecodableError, decode_image
from train.splits import SPLIT_FOLDERS, stratified_split

__all__ = ["Manifest", "Record", "build_manifest"]

logger = logging.getLogger(__name__)

SCHEMA = "vit-manifest/1"
_LAYOUT = "expected class folders with images in them, as in root/cat/1.jpg and root/dog/2.jpg"


@dataclass(frozen=True, slots=True)
class Record:
    """One file.

    Args:
        id: path relative to the root, with `/` (digits: task/split/index).
        label: index into the manifest's class names.
        split: "train", "validation" or "test"; "" for a dropped file of a stratified split.
        status: "ok", or why the file is left out of every condition.
        sha256: of the file's bytes.
    """

    id: str
    label: int
    class_name: str
    split: str
    status: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The records of a data set in the order of their ids.

    Args:
        kind: "folder" or "digits".
        root: the folder; "" for composed scenes.
        class_names: in label order.
    """

    kind: str
    root: str
    class_names: tuple[str, ...]
    records: tuple[Record, ...]

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
        return [
            tuple(record.id for record in records)
            for records in same.values()
            if len({record.split for record in records}) > 1
        ]

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        document = {
            "schema": SCHEMA,
            "kind": self.kind,
            "root": self.root,
            "sha256": self.sha256,
            "class_names": list(self.class_names),
            "dropped": self.dropped,
            "records": [asdict(record) for record in self.records],
        }
        write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote.

        Raises:
            InputError: no such file.
            DamagedFileError: not a manifest, or its records are not the ones its sha256 is of.
        """
        if not path.is_file():
            raise InputError(f"manifest {path} does not exist")
        try:
            document = json.loads(path.read_bytes())
            manifest = cls(
                kind=document["kind"],
                root=document["root"],
                class_names=tuple(document["class_names"]),
                records=tuple(Record(**record) for record in document["records"]),
            )
            expected = document["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{path} is not a manifest ({error}); delete it to have it built again") from error
        if manifest.sha256 != expected:
            raise DamagedFileError(f"manifest {path} is damaged: its records do not match its sha256; delete it")
        return manifest


def build_manifest(
    root: str | Path,
    *,
    split: Literal["stratified", "folders", "all"] = "stratified",
    seed: int = 42,
    workers: int = 0,
) -> Manifest:
    """Read a folder of class folders, decoding every file once.

    Unreadable files keep their record, with the reason as status; nothing is put in their place.

    Args:
        root: class folders (`stratified`, `all`), or train, val (valid, validation) and test folders
            with class folders in each (`folders`).
        split: `stratified` 70/15/15 within each class; `folders` as they lie; `all` into test.
        seed: of the stratified split.
        workers: decoding threads; 0: one a processor, at most 16.

    Raises:
        InputError: no such folder, a file instead of one, empty, no class folders, no readable image, a
            class too small to split, a link that leaves the folder.
    """
    if not str(root):
        raise InputError("data.root is empty; give the folder of class folders with --data.root DIR")
    folder = Path(root)
    if not folder.exists():
        raise InputError(f"folder {folder} does not exist; give the folder of class folders with --data.root DIR")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; {_LAYOUT}")
    folder = folder.resolve()
    found = _split_folders(folder) if split == "folders" else [(folder, "")]
    files: list[tuple[Path, str, str]] = []  # path, class name, split
    for base, split_name in found:
        files += [(path, name, split_name) for path, name in _class_files(base, folder)]
    if not files:
        raise InputError(f"folder {folder} holds class folders but no file in them; {_LAYOUT}")
    statuses = _statuses([path for path, _, _ in files], workers)

    readable: dict[str, list[str]] = defaultdict(list)
    for (path, name, _), (status, _) in zip(files, statuses, strict=True):
        if status == "ok":
            readable[name].append(path.relative_to(folder).as_posix())
    if not readable:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(s for s, _ in statuses).most_common())
        raise InputError(f"folder {folder} holds no readable image among {len(files)} file(s) ({reasons}); {_LAYOUT}")
    class_names = tuple(sorted(readable))
    for name in sorted({name for _, name, _ in files} - set(class_names)):
        logger.warning("class folder %r holds no readable image and is left out", name)
    assigned = stratified_split(readable, seed=seed) if split == "stratified" else {}

    records = []
    for (path, name, split_name), (status, sha256) in zip(files, statuses, strict=True):
        identity = path.relative_to(folder).as_posix()
        if split == "stratified":
            split_name = assigned.get(identity, "")
        elif split == "all":
            split_name = "test"
        label = class_names.index(name) if name in readable else -1
        records.append(Record(identity, label, name, split_name, status, sha256))
    manifest = Manifest("folder", str(folder), class_names, tuple(sorted(records, key=lambda record: record.id)))
    _log(manifest)
    return manifest


def _log(manifest: Manifest) -> None:
    count = Counter(record.split for record in manifest.records if record.status == "ok")
    logger.info(
        "%s: %d readable images in %d classes (%s)",
        manifest.root,
        sum(count.values()),
        len(manifest.class_names),
        ", ".join(f"{name} {number}" for name, number in sorted(count.items())),
    )
    for reason, number in manifest.dropped.items():
        logger.warning("%d file(s) left out of every condition: %s", number, reason)
    leaks = manifest.leaks()
    if leaks:
        logger.warning("%d image(s) lie in more than one split, for example %s", len(leaks), " and ".join(leaks[0]))


def _split_folders(root: Path) -> list[tuple[Path, str]]:
    found = [
        (entry, SPLIT_FOLDERS[entry.name.lower()])
        for entry in sorted(root.iterdir())
        if entry.is_dir() and entry.name.lower() in SPLIT_FOLDERS
    ]
    twice = [name for name, number in Counter(name for _, name in found).items() if number > 1]
    if twice:
        names = " and ".join(entry.name for entry, name in found if name == twice[0])
        raise InputError(f"folder {root} holds {names}, which are both the {twice[0]} split; expected one of them")
    if not found:
        raise InputError(
            f"folder {root} holds none of train, val (valid, validation) and test; expected them with class folders in "
            "each, or use --data.split stratified or all"
        )
    return found


def _class_files(base: Path, root: Path) -> list[tuple[Path, str]]:
    """(file, class name) of every class folder under `base`, in order; files under sub-folders belong to the class."""
    entries = sorted(base.iterdir())
    if not entries:
        raise InputError(f"folder {base} is empty; {_LAYOUT}")
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise InputError(f"folder {base} holds {len(entries)} file(s) but no class folders; {_LAYOUT}")
    loose = [entry for entry in entries if not entry.is_dir() and not entry.name.startswith(".")]
    if loose:
        logger.warning("%d file(s) directly in %s belong to no class, for example %s", len(loose), base, loose[0].name)
    files = []
    for folder in folders:
        _refuse_escape(folder, root)
        # os.walk does not follow links to folders, so a circle of them cannot trap it.
        for path, names, leaves in os.walk(folder):
            names.sort()
            for leaf in sorted(leaves):
                file = Path(path) / leaf
                _refuse_escape(file, root)
                files.append((file, folder.name))
    return files


def _refuse_escape(path: Path, root: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise InputError(f"{path} is a link to {path.resolve()}, outside the folder {root}; expected files inside it")


def _statuses(paths: Sequence[Path], workers: int) -> list[tuple[str, str]]:
    """(status, sha256) of each file."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        results: Iterable[tuple[str, str]] = pool.map(_status, paths)
        return list(tqdm(results, total=len(paths), desc="decoding", unit=" files", disable=None, delay=1))


def _status(path: Path) -> tuple[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"unreadable ({error.strerror})", ""
    sha256 = hashlib.sha256(content).hexdigest()
    if path.name.startswith(".") or path.parent.name.startswith("."):
        return "hidden (._) file" if path.name.startswith("._") else "hidden file", sha256
    try:
        decode_image(content)
    except UndecodableError as error:
        return str(error), sha256
    return "ok", sha256
