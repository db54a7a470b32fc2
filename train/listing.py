"""Files of a data set on disk: walked in class folders or read off a list, and never outside the root."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
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
    "class_files",
    "examine",
    "inside",
    "list_lines",
    "split_folders",
]

logger = logging.getLogger(__name__)

CLASS_FOLDERS = "expected class folders with images in them, as in root/cat/1.jpg and root/dog/2.jpg"


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

    Raises:
        InputError: `base` is empty or holds no folder, or a link leaves `root`.
    """
    entries = sorted(base.iterdir())
    if not entries:
        raise InputError(f"folder {base} is empty; {CLASS_FOLDERS}")
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise InputError(f"folder {base} holds {len(entries)} file(s) but no class folders; {CLASS_FOLDERS}")
    loose = [entry for entry in entries if not entry.is_dir() and not entry.name.startswith(".")]
    if loose:
        logger.warning("%d file(s) directly in %s belong to no class, for example %s", len(loose), base, loose[0].name)
    files = []
    for folder in folders:
        inside(folder, root)
        # os.walk does not follow links to folders, so a circle of them cannot trap it.
        for path, names, leaves in os.walk(folder):
            names.sort()
            for leaf in sorted(leaves):
                file = inside(Path(path) / leaf, root)
                files.append(Entry(file, file.relative_to(root).as_posix(), folder.name, split))
    return files


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


def examine(paths: Sequence[Path], workers: int = 0) -> list[Status]:
    """Decode every file once; `workers` threads (0: one a processor, at most 16)."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        results: Iterable[Status] = pool.map(_examine, paths)
        return list(tqdm(results, total=len(paths), desc="decoding", unit=" files", disable=None, delay=1))


def _examine(path: Path) -> Status:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Status("missing", "")
    except OSError as error:
        return Status(f"unreadable ({error.strerror})", "")
    sha256 = hashlib.sha256(content).hexdigest()
    if path.name.startswith(".") or path.parent.name.startswith("."):
        return Status("hidden (._) file" if path.name.startswith("._") else "hidden file", sha256)
    try:
        decode_image(content)
    except UndecodableError as error:
        return Status(str(error), sha256)
    return Status("ok", sha256)
