"""Files of a data set on disk: walked in class folders or read off a list, and never outside the root."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from train.errors import InputError
from train.images import UndecodableError, decode_image
from train.splits import SPLIT_FOLDERS

__all__ = [
    "CLASS_FOLDERS",
    "Entry",
    "Status",
    "check_class_names",
    "class_files",
    "examine",
    "files_below",
    "inside",
    "list_lines",
    "split_folders",
]

logger = logging.getLogger(__name__)

CLASS_FOLDERS = "expected class folders with images in them, as in root/cat/1.jpg and root/dog/2.jpg"

# What storage devices and operating systems put beside pictures: thumbnails, deleted and earlier copies. In lower case.
_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),  # Synology, QNAP
    *("lost+found", "$recycle.bin", "system volume information", "__macosx"),
}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that the data set names, before anything is known of its content.

    Args:
        path: where it lies.
        id: its path relative to the root, with `/`.
        class_name: the class it is labelled with.
        split: of a split that is given; "" where it is drawn.
    """

    path: Path
    id: str
    class_name: str
    split: str


@dataclass(frozen=True, slots=True)
class Status:
    """What decoding a file found: "ok" or a reason, and the sha256 of its bytes."""

    text: str
    sha256: str


def split_folders(root: Path) -> list[tuple[Path, str]]:
    """(folder, split) of train, val (valid, validation) and test under `root`.

    Raises:
        InputError: none of them, or two names of one split.
    """
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


def class_files(base: Path, root: Path, split: str = "") -> list[Entry]:
    """Every file of every class folder under `base`, in order; files under sub-folders belong to the class.

    Hidden folders and those of the system, at any depth, are neither classes nor parts of one; the log counts their
    files.

    Raises:
        InputError: `base` is empty or holds no folder, or a link leaves `root`.
    """
    entries = sorted(base.iterdir())
    if not entries:
        raise InputError(f"folder {base} is empty; {CLASS_FOLDERS}")
    aside = [entry for entry in entries if entry.is_dir() and _reason_of_folder(entry.name)]
    folders = [entry for entry in entries if entry.is_dir() and not _reason_of_folder(entry.name)]
    if not folders:
        raise InputError(f"folder {base} holds {len(entries)} file(s) but no class folders; {CLASS_FOLDERS}")
    loose = [entry for entry in entries if not entry.is_dir() and not _reason_of_file(entry.name)]
    if loose:
        logger.warning("%d file(s) directly in %s belong to no class, for example %s", len(loose), base, loose[0].name)
    files = []
    for folder in folders:
        inside(folder, root)
        found = [inside(file, root) for file in files_below(folder, aside)]
        files += [Entry(file, file.relative_to(root).as_posix(), folder.name, split) for file in found]
        if not found:
            logger.warning("class folder %s is empty and is left out", folder)
    count = sum(len(leaves) for folder in aside for _, _, leaves in os.walk(folder))
    if count:
        logger.warning(
            "%d file(s) in hidden folders and folders of the system are no part of the data set, for example in %s",
            count,
            aside[0].relative_to(root).as_posix(),
        )
    return files


def files_below(folder: Path, aside: list[Path] | None = None) -> Iterator[Path]:
    """Every file below `folder`, in order, but for hidden folders and those of the system, which go into `aside`."""
    # os.walk does not follow links to folders, so a circle of them cannot trap it.
    for path, names, leaves in os.walk(folder):
        if aside is not None:
            aside += [Path(path) / name for name in sorted(names) if _reason_of_folder(name)]
        names[:] = sorted(name for name in names if not _reason_of_folder(name))
        yield from (Path(path) / leaf for leaf in sorted(leaves))


def _reason_of_folder(name: str) -> str:
    """Why nothing in a folder of this name is an image of the data set; "" for any other name."""
    return "in a hidden folder" if name.startswith(".") else f"in {name}" if name.lower() in _SYSTEM_FOLDERS else ""


def _reason_of_file(name: str) -> str:
    """Why a file of this name is no image of the data set; "" for any other name."""
    if name.startswith("."):
        return "hidden (._) file" if name.startswith("._") else "hidden file"
    return "file of the system" if name.lower() in _SYSTEM_FILES else ""


def check_class_names(names: Iterable[str]) -> None:
    """Two classes must not have one name in two spellings that look the same.

    Raises:
        InputError: names that differ only by Unicode's normal form ("é" as one character or as two), as copies over
            another system leave them; names that differ only by case are said in the log.
    """
    forms: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        forms[unicodedata.normalize("NFC", name)].append(name)
    for form, same in forms.items():
        if len(same) > 1:
            spelled = " and ".join(ascii(name) for name in same)
            raise InputError(
                f"class folders {spelled} are both shown as {form}: one name in two Unicode forms; give them one name"
            )
    cases: dict[str, list[str]] = defaultdict(list)
    for form in forms:
        cases[form.casefold()].append(form)
    for same in cases.values():
        if len(same) > 1:
            logger.warning("classes %s differ only by case; they are taken for different classes", " and ".join(same))


def inside(path: Path, root: Path) -> Path:
    """`path` itself, unless it is a link that leaves `root`.

    Raises:
        InputError: it does.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise InputError(f"{path} is a link to {path.resolve()}, outside the folder {root}; expected files inside it")
    return path


def list_lines(path: Path, content: bytes) -> list[str]:
    """The relative paths that a split list names, one a line; with or without a final newline, LF or CRLF.

    Raises:
        InputError: not UTF-8, or a path that is absolute, leaves the root with `..`, or has no class folder.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8 ({error.reason}); expected one path a line") from error
    names = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name = PurePosixPath(line)
        # A backslash is a letter here and a way out on another system.
        if name.is_absolute() or ".." in name.parts or "\\" in line or "\0" in line:
            raise InputError(f"{path} line {number} is {line!r}, which leaves the folder; expected class/file.jpg")
        if len(name.parts) < 2:
            raise InputError(f"{path} line {number} is {line!r}; expected class/file.jpg")
        names.append(name.as_posix())
    return names


def examine(entries: Sequence[Entry], workers: int = 0) -> list[Status]:
    """Decode every file once; `workers` threads (0: one a processor, at most 16)."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        results: Iterable[Status] = pool.map(_examine, entries)
        return list(tqdm(results, total=len(entries), desc="decoding", unit=" files", disable=None, delay=1))


def _examine(entry: Entry) -> Status:
    try:
        content = entry.path.read_bytes()
    except FileNotFoundError:
        return Status("missing", "")
    except OSError as error:
        return Status(f"unreadable ({error.strerror})", "")
    sha256 = hashlib.sha256(content).hexdigest()
    *folders, name = PurePosixPath(entry.id).parts
    reason = next(filter(None, [*map(_reason_of_folder, folders), _reason_of_file(name)]), "")
    if reason:
        return Status(reason, sha256)
    try:
        decode_image(content)
    except UndecodableError as error:
        return Status(str(error), sha256)
    return Status("ok", sha256)
