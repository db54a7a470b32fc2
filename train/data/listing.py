"""Files of a data set on disk: walked in class folders or read off a list, and never outside the root."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from store.system import available_cpus
from train.data.decoding import UndecodableError, decoded_image, picture_bytes
from train.data.manifest import SPLIT_FOLDERS
from train.errors import InputError
from train.files import id_of

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
    """A file that the data set names; `id` is relative to the root, `split` is "" where it is drawn."""

    path: Path
    id: str
    class_name: str
    split: str


@dataclass(frozen=True, slots=True)
class Status:
    """What decoding a file found: "ok" or a reason, and the sha256 of its bytes."""

    text: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Aside:
    """Folders that a walk leaves out: hidden or of the system, links to a folder around them, other links."""

    hidden: list[Path] = field(default_factory=list)
    circles: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)

    def takes(self, folder: os.DirEntry[str], *around: Path) -> bool:
        """Whether a folder is hidden or of the system, or a link to one `around` it, and is taken note of here."""
        path = Path(folder)
        if _reason_of_folder(folder.name):
            self.hidden.append(path)
        elif folder.is_symlink() and any(_is_around(path, place) for place in around):
            self.circles.append(path)
        else:
            return False
        return True

    def log(self, root: Path) -> None:
        for paths, number, what in (
            (self.hidden, sum(map(_count, self.hidden)), "file(s) in hidden folders and folders of the system are"),
            (self.circles, len(self.circles), "link(s) to a folder that they lie in themselves are"),
            (self.links, len(self.links), "link(s) to folders, which --data.follow_links true follows, are"),
        ):
            if number:
                example = id_of(paths[0].relative_to(root))
                logger.warning("%d %s no part of the data set, for example in %s", number, what, example)


def split_folders(root: Path, *, follow_links: bool = False) -> list[tuple[Path, str]]:
    """(folder, split) of train, val (valid, validation) and test under `root`, as far as they are there."""
    aside = Aside()
    named = [entry for entry in _entries(root) if entry.name.lower() in SPLIT_FOLDERS and _is_folder(entry)]
    folders = [inside(Path(entry), root, follow_links=follow_links) for entry in named if not aside.takes(entry, root)]
    aside.log(root)
    splits = [(folder, SPLIT_FOLDERS[folder.name.lower()]) for folder in folders]
    twice = [name for name, number in Counter(name for _, name in splits).items() if number > 1]
    if twice:
        names = " and ".join(entry.name for entry, name in splits if name == twice[0])
        raise InputError(f"folder {root} holds {names}, which are both the {twice[0]} split; expected one of them")
    return splits


def class_files(base: Path, root: Path, split: str = "", *, follow_links: bool = False) -> list[Entry]:
    """Every file of every class folder under `base`, of a data set in `root`; files in sub-folders belong to the class.

    Hidden folders and those of the system, at any depth, are neither classes nor parts of one; the log counts them.
    With `follow_links` links may lead out of `root`, and links in class folders are followed.
    """
    entries = _entries(base)
    if not entries:
        raise InputError(f"folder {base} is empty; {CLASS_FOLDERS}")
    aside = Aside()
    kept = [entry for entry in entries if _is_folder(entry) and not aside.takes(entry, base)]
    folders = [inside(Path(entry), root, follow_links=follow_links) for entry in kept]
    leaves = [entry for entry in entries if not _is_folder(entry)]
    lost = [entry for entry in leaves if entry.is_symlink() and not os.path.exists(entry)]
    if lost:
        logger.warning("%d link(s) directly in %s lead nowhere, for example %s", len(lost), base, lost[0].name)
    loose = [entry for entry in leaves if not _reason_of_file(entry.name) and entry not in lost]
    if loose:
        logger.warning("%d file(s) directly in %s belong to no class, for example %s", len(loose), base, loose[0].name)
    if not folders:
        links = f", {len(lost)} of them links that lead nowhere," if lost else ""
        raise InputError(f"folder {base} holds {len(leaves)} file(s){links} but no class folders; {CLASS_FOLDERS}")
    files = []
    for folder in folders:
        inner = list(files_below(folder, follow_links=follow_links, aside=aside))
        for file in inner:
            inside(file, root, follow_links=follow_links)
            files.append(Entry(file, id_of(file.relative_to(root)), id_of(folder.name), split))
        if not inner:
            logger.warning("class folder %s is empty and is left out", folder)
    aside.log(root)
    return files


def files_below(folder: Path, *, follow_links: bool = False, aside: Aside | None = None) -> Iterator[Path]:
    """Every file below `folder`, which may be a link, but for hidden folders and those of the system: see `aside`.

    With `follow_links`, each folder is read once, under its own name where that lies below `folder`, and no link leads
    back to a folder around it. Raises InputError: a folder cannot be read.
    """
    aside = aside or Aside()
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], deque[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.popleft()
        if follow_links:
            state = here.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
        below = []
        for entry in _entries(here):
            path = Path(entry)
            if not _is_folder(entry):
                yield path
            elif aside.takes(entry, here, folder):
                continue
            elif not entry.is_symlink():
                below.append(path)
            else:
                (links if follow_links else aside.links).append(path)
        waiting += reversed(below)


def _is_around(link: Path, folder: Path) -> bool:
    """Whether a link leads to a folder around `folder`, or to `folder`: its files would be found without end."""
    target = Path(os.path.realpath(link))
    return any(Path(place).is_relative_to(target) for place in (os.path.realpath(folder), os.path.abspath(folder)))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in the order of names."""
    try:
        with os.scandir(folder) as listing:
            return sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"folder {folder} cannot be read ({error.strerror}); expected a folder that this user may read, and that "
            "nothing else changes"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _count(folder: Path) -> int:
    """Number of files below a folder that is left out, as far as it can be read; a link is left out with no file."""
    number, waiting = 0, [] if folder.is_symlink() else [str(folder)]
    while waiting:  # os.walk of Python 3.11 calls itself, which folders in each other may be too many for
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        number += len(entries) - len(folders)
        waiting += folders
    return number


def _reason_of_folder(name: str) -> str:
    """Why nothing in a folder of this name is an image of the data set; "" for any other name."""
    return "in a hidden folder" if name.startswith(".") else f"in {name}" if name.lower() in _SYSTEM_FOLDERS else ""


def _reason_of_file(name: str) -> str:
    """Why a file of this name is no image of the data set; "" for any other name."""
    if name.startswith("."):
        return "hidden (._) file" if name.startswith("._") else "hidden file"
    return "file of the system" if name.lower() in _SYSTEM_FILES else ""


def check_class_names(names: Iterable[str]) -> None:
    """Refuse names that differ by Unicode's normal form alone ("é" as one character or two), as copies over another
    system leave them; names that differ only by case are said in the log.
    """
    forms: dict[str, list[str]] = defaultdict(list)
    cases: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        form = unicodedata.normalize("NFC", name)
        forms[form].append(name)
        cases[form.casefold()].append(form)
    for form, same in forms.items():
        if len(same) > 1:
            spelled = " and ".join(ascii(name) for name in same)
            raise InputError(
                f"class folders {spelled} are both shown as {form}: one name in two Unicode forms; give them one name"
            )
    for same in cases.values():
        if len(same) > 1:
            logger.warning("classes %s differ only by case; they are taken for different classes", " and ".join(same))


def inside(path: Path, root: Path, *, follow_links: bool = False) -> Path:
    """`path` itself; InputError for a link that leaves `root` where links are not to be followed."""
    if not follow_links and path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(root):
            raise InputError(
                f"{path} is a link to {target}, outside the folder {root}; to take what links lead to, give "
                "--data.follow_links true"
            )
    return path


def list_lines(path: Path, content: bytes) -> list[str]:
    """The relative paths that a split list names, one per line; with or without a final newline, LF or CRLF."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8 ({error.reason}); expected one path a line") from error
    names = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        name = PurePosixPath(line)
        problem = None
        if "\\" in line:  # a letter here and a way out on another system
            problem = ", which has a backslash"
        elif name.is_absolute() or ".." in name.parts:
            problem = ", which leaves the folder"
        elif len(name.parts) < 2 or "\0" in line:
            problem = ""
        if problem is not None:
            shown = repr(line if len(line) <= 200 else f"{line[:200]}…")
            raise InputError(f"{path} line {number} is {shown}{problem}; expected class/file.jpg")
        names.append(name.as_posix())
    if not names:
        raise InputError(f"{path} names no image; expected one path a line, as in class/file.jpg")
    return names


def examine(entries: Sequence[Entry], workers: int = 0) -> list[Status]:
    """Decode every file once; `workers` threads (0: one per CPU of this process, at most 16)."""
    with ThreadPoolExecutor(workers or min(16, available_cpus())) as pool:
        results: Iterable[Status] = pool.map(_examine, entries)
        return list(tqdm(results, total=len(entries), desc="decoding", unit=" files", disable=None, delay=1))


def _examine(entry: Entry) -> Status:
    *folders, name = PurePosixPath(entry.id).parts
    reason = next(filter(None, [*map(_reason_of_folder, folders), _reason_of_file(name)]), "")
    sha256 = ""
    try:
        with picture_bytes(entry.path) as content:
            sha256 = hashlib.sha256(content).hexdigest()
            if reason:
                return Status(reason, sha256)
            with decoded_image(content):
                return Status("ok", sha256)
    except FileNotFoundError:
        return Status("missing", "")
    except OSError as error:
        return Status(f"unreadable ({error.strerror})", "")
    except UndecodableError as error:
        return Status(str(error), sha256)
