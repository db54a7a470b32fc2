"""Data sets on disk → one manifest and three splits: class folders, MIT Indoor-67, 100 Sports, and their quirks."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from train.choices import SplitRule
from train.data.cache import CachedImages, ImageCache
from train.data.images import DataSplits, FolderImages, Preprocessing
from train.data.listing import (
    CLASS_FOLDERS,
    Entry,
    Status,
    check_class_names,
    class_files,
    examine,
    inside,
    list_lines,
    split_folders,
)
from train.data.manifest import SPLIT_FOLDERS, SPLITS, Manifest, Record, copies_together, stratified_split
from train.errors import InputError, require_known
from train.files import id_of, require_file, what_lies_at

logger = logging.getLogger(__name__)

OFFICIAL_LISTS = {"TrainImages.txt": "train", "TestImages.txt": "test"}
# Share of the official training list, class by class, on which the best epoch is chosen: the lists have no such part.
OFFICIAL_VALIDATION = 0.15

_INDOOR67 = (
    "get indoorCVPR_09.tar, TrainImages.txt and TestImages.txt from https://web.mit.edu/torralba/www/indoor.html and "
    "lay them out as root/Images/<class>/<image>.jpg, root/TrainImages.txt and root/TestImages.txt"
)
_SPORTS100 = (
    "get the archive from https://www.kaggle.com/datasets/gpiosenka/sports-classification and unpack it, so that "
    "root/train, root/valid and root/test hold a folder for each sport"
)


@dataclass(frozen=True)
class _Source:
    """What a data set names: files, the folder that ids are relative to, and hashes of the lists that were read."""

    root: Path
    entries: Sequence[Entry]
    lists: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    """A layout on disk."""

    read: Callable[[Path, str, bool], _Source]  # root, rule, whether links are followed → what is there
    rules: tuple[SplitRule, ...]  # the ways it can be split; the first is its own
    advice: str  # where to get it and how to lay it out


def build_manifest(
    root: str | Path,
    *,
    kind: str = "folder",
    split: SplitRule = "auto",
    seed: int = 42,
    follow_links: bool = False,
    workers: int = 0,
) -> Manifest:
    """Read a data set, decoding every file once.

    Unreadable files keep their record, with the reason as status; nothing is put in their place. Files with the
    same bytes go to the same split, where the split is drawn here. Raises InputError: no such folder, another layout, a
    rule that the layout does not have, no readable image, a class too small to split, a link that leaves the folder and
    is not to be followed, a list that is empty, leaves the folder or names an image twice.

    Args:
        root: `folder`: class folders, or train, val (valid, validation) and test folders with class folders in each;
            `indoor67`: Images/ with class folders, TrainImages.txt, TestImages.txt; `sports100`: train, valid, test.
        split: `stratified`: 70/15/15 within each class; `official`: Indoor-67's lists, 15 % of each class of the
            training list as validation; `folders`: as they lie; `all`: everything into test; `auto`: the first of
            the layout's own (folder and indoor67 stratified, sports100 folders).
        seed: of a split that is drawn.
        follow_links: take what links lead to, wherever it lies; without, a link may not leave the folder. The folder
            itself may be a link. Links to a folder that they lie in are never followed.
        workers: decoding threads; 0: one per CPU of this process, at most 16.
    """
    return list_files(root, kind=kind, split=split, seed=seed, follow_links=follow_links).decoded(workers)


@dataclass(frozen=True)
class Listing:
    """The files that a data set names, none of them opened."""

    source: _Source
    kind: str
    rule: str  # how it is split
    seed: int  # of a split that is drawn

    def undecoded(self) -> Manifest:
        """The manifest if every file were a readable picture of its own; InputError: a class too small to split."""
        return self._manifest([Status("ok", entry.id) for entry in self.source.entries])

    def decoded(self, workers: int = 0) -> Manifest:
        manifest = self._manifest(examine(self.source.entries, workers))
        _log(manifest)
        return manifest

    def _manifest(self, statuses: Sequence[Status]) -> Manifest:
        """Labels, splits and records of files whose status is known."""
        readable = [entry for entry, status in zip(self.source.entries, statuses, strict=True) if status.text == "ok"]
        if not readable:
            counts = Counter(status.text for status in statuses).most_common()
            reasons = ", ".join(f"{number} {reason}" for reason, number in counts[:5])
            if len(counts) > 5:
                reasons += f", {sum(number for _, number in counts[5:])} for other reasons"
            raise InputError(
                f"folder {self.source.root} holds no readable image among {len(statuses)} file(s) ({reasons}); "
                f"{KINDS[self.kind].advice}"
            )
        class_names = tuple(sorted({entry.class_name for entry in readable}))
        for name in sorted({entry.class_name for entry in self.source.entries} - set(class_names)):
            logger.warning("class folder %r holds no readable image and is left out", name)
        hashes = {entry.id: status.sha256 for entry, status in zip(self.source.entries, statuses, strict=True)}
        drawn: dict[str, str] = {}
        if self.rule == "stratified":
            drawn = _draw(readable, hashes, seed=self.seed, test=0.15)
        elif self.rule == "official":
            drawn = _draw([e for e in readable if e.split == "train"], hashes, seed=self.seed, test=0.0)
        labels = {name: label for label, name in enumerate(class_names)}
        records = []
        for entry, status in zip(self.source.entries, statuses, strict=True):
            split = drawn.get(entry.id, entry.split) if status.text == "ok" else entry.split
            label = labels.get(entry.class_name, -1)
            records.append(Record(entry.id, label, entry.class_name, split, status.text, status.sha256))
        records.sort(key=lambda record: record.id)
        return Manifest(self.kind, str(self.source.root), class_names, tuple(records), self.rule, self.source.lists)


def list_files(
    root: str | Path,
    *,
    kind: str = "folder",
    split: SplitRule = "auto",
    seed: int = 42,
    follow_links: bool = False,
) -> Listing:
    """The files of a data set; arguments and errors as of `build_manifest`, but for those of the pictures."""
    require_known("kind of data set", kind, KINDS)
    layout = KINDS[kind]
    advice = f"; {layout.advice}"
    if not str(root):
        raise InputError(f"data.root is empty; give the folder with --data.root DIR{advice}")
    folder = Path(root)
    reason = what_lies_at(folder)
    if reason != "is a folder":
        raise InputError(f"{folder} {reason or 'is a file'}; give the folder with --data.root DIR{advice}")
    rule = layout.rules[0] if split == "auto" else split
    if rule not in layout.rules:
        raise InputError(f"data.split {rule} is no split of {kind}; expected one of {', '.join(layout.rules)}")
    source = layout.read(Path(os.path.realpath(folder)), rule, follow_links)
    if not source.entries:
        raise InputError(f"folder {folder} holds class folders but no file in them{advice}")
    check_class_names(entry.class_name for entry in source.entries)
    return Listing(source, kind, rule, seed)


def _draw(entries: Sequence[Entry], hashes: Mapping[str, str], *, seed: int, test: float) -> dict[str, str]:
    """id → split, class by class; copies of a file follow the first of them."""
    classes: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        classes[entry.class_name].append(entry.id)
    drawn = stratified_split(classes, seed=seed, validation=OFFICIAL_VALIDATION, test=test)
    return copies_together(drawn, hashes)


def _read_folder(root: Path, rule: str, follow_links: bool) -> _Source:
    if rule == "folders":
        bases = split_folders(root, follow_links=follow_links)
        if not bases:
            raise InputError(
                f"folder {root} holds none of train, val (valid, validation) and test; expected them with class "
                "folders in each, or use --data.split stratified or all"
            )
        return _Source(root, _split_files(root, bases, follow_links))
    entries = class_files(root, root, "test" if rule == "all" else "", follow_links=follow_links)
    names = sorted({entry.class_name for entry in entries})
    if len(names) > 1 and all(name.lower() in SPLIT_FOLDERS for name in names):
        raise InputError(
            f"folder {root} holds {', '.join(names)}, which are splits and no classes; use --data.split folders"
        )
    return _Source(root, entries)


def _split_files(root: Path, folders: Sequence[tuple[Path, str]], follow_links: bool) -> list[Entry]:
    files = (class_files(base, root, split, follow_links=follow_links) for base, split in folders)
    return [entry for entries in files for entry in entries]


def _read_indoor67(root: Path, rule: str, follow_links: bool) -> _Source:
    """All images below Images/, or those that the official lists name; ids are as in the lists."""
    images = root / "Images"
    if not images.is_dir():
        hint = f"; {root.parent} is the root" if root.name == "Images" else ""
        raise InputError(f"folder {root} holds no folder Images{hint}; {_INDOOR67}")
    images = Path(os.path.realpath(inside(images, root, follow_links=follow_links)))
    if rule != "official":
        split = "test" if rule == "all" else ""
        return _Source(images, class_files(images, images, split, follow_links=follow_links))
    entries: list[Entry] = []
    lists: dict[str, str] = {}
    place: dict[str, str] = {}
    for list_name, split in OFFICIAL_LISTS.items():
        path = root / list_name
        if not os.path.lexists(path):
            raise InputError(f"folder {root} holds no {list_name}, the official split; {_INDOOR67}")
        require_file(path, "list", "expected a text file with one path a line")
        content = path.read_bytes()
        lists[list_name] = hashlib.sha256(content).hexdigest()
        for name in list_lines(path, content):
            if name in place:
                raise InputError(
                    f"{path} names {id_of(name)[:200]}, which {place[name]} names already; get the lists again"
                )
            place[name] = list_name
            for parent in reversed((images / name).relative_to(images).parents):
                inside(images / parent, images, follow_links=follow_links)
            identity = id_of(name)
            file = inside(images / name, images, follow_links=follow_links)
            entries.append(Entry(file, identity, identity.split("/")[0], split))
    return _Source(images, entries, lists)


def _read_sports100(root: Path, rule: str, follow_links: bool) -> _Source:
    """train, valid and test; `sports.csv`, where it is there, is compared with them and not trusted."""
    bases = split_folders(root, follow_links=follow_links)
    if not bases:
        raise InputError(f"folder {root} holds no folders train, valid and test; {_SPORTS100}")
    missing = set(SPLITS) - {split for _, split in bases}
    if rule == "folders" and missing:
        raise InputError(
            f"folder {root} holds no folder of the {' and the '.join(sorted(missing))} split; {_SPORTS100}"
        )
    assigned = [(base, {"folders": split, "all": "test"}.get(rule, "")) for base, split in bases]
    entries = _split_files(root, assigned, follow_links)
    return _Source(root, entries, _compare_with_csv(root / "sports.csv", entries))


def _compare_with_csv(path: Path, entries: Sequence[Entry]) -> dict[str, str]:
    """Say where the table and the folders differ; its hash, or nothing without a table."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        table = {row["filepaths"]: row["labels"] for row in rows if row["filepaths"]}
    except (UnicodeDecodeError, KeyError, csv.Error) as error:
        reason = f"no column {error.args[0]}" if isinstance(error, KeyError) else error
        logger.warning("%s cannot be read as a table with filepaths and labels (%s); the folders decide", path, reason)
        return {}
    labels = {entry.id: entry.class_name for entry in entries}
    for what, names in (
        ("that it names and that are not there", table.keys() - labels.keys()),
        ("that are there and that it does not name", labels.keys() - table.keys()),
        ("that it labels otherwise than their folder", {n for n in labels if table.get(n, labels[n]) != labels[n]}),
    ):
        if names:
            logger.warning("%s: %d file(s) %s, for example %s; the folders decide", path, len(names), what, min(names))
    return {path.name: hashlib.sha256(content).hexdigest()}


KINDS: dict[str, _Kind] = {
    "folder": _Kind(_read_folder, ("stratified", "folders", "all"), CLASS_FOLDERS),
    "indoor67": _Kind(_read_indoor67, ("stratified", "official", "all"), _INDOOR67),
    "sports100": _Kind(_read_sports100, ("folders", "stratified", "all"), _SPORTS100),
}


def _log(manifest: Manifest) -> None:
    count = Counter(record.split for record in manifest.records if record.status == "ok")
    logger.info(
        "%s: %d readable images in %d classes, split %s (%s)",
        manifest.root,
        sum(count.values()),
        len(manifest.class_names),
        manifest.rule,
        ", ".join(f"{name} {number}" for name, number in sorted(count.items())),
    )
    for reason, number in manifest.dropped.items():
        first = next(record.id for record in manifest.records if record.status == reason)
        logger.warning("%d file(s) left out of every condition: %s (first: %s)", number, reason, first)
    leaks = manifest.leaks()
    if leaks:
        logger.warning("%d image(s) lie in more than one split, for example %s", len(leaks), " and ".join(leaks[0]))


def prepare_folder(manifest: Manifest, *, preprocessing: Preprocessing, cache: str | Path | None = None) -> DataSplits:
    """Three splits; `cache`: a folder for decoded pictures (`train.data.cache`), None: decoded whenever asked for."""
    base = Path(manifest.root)

    def pictures(records: Sequence[Record]) -> FolderImages:
        return FolderImages(base, records, manifest.class_names, preprocessing)

    train, validation, test = (pictures(manifest.split(name)) for name in SPLITS)
    if cache is None:
        return DataSplits(train, validation, test, manifest)
    decoded = ImageCache(cache, pictures([record for record in manifest.records if record.status == "ok"]))
    cached = [CachedImages(decoded, images) for images in (train, validation, test)]
    return DataSplits(cached[0], cached[1], cached[2], manifest)
