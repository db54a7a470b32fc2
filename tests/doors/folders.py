"""Data sets as they lie on disks: names of any bytes, links and circles, pipes and devices, lists of any text."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from store import AttentionStore
from tests import fuzz
from tests.miniatures import encoded, picture
from tests.test_train_datasets import SMALL
from train.data.datasets import build_manifest, prepare_folder
from train.data.manifest import Manifest
from train.errors import InputError, printable
from train.files import path_of

SHARE = 60
_WHOLE = 120  # of so many trials, one is a whole capture

_PIECES = (
    *(b"a", b"cat", b"1", b" ", b".", b"..", b"-", b"=", b"\n", b"\t", b"\r", b"\x1b[31m", b"\x7f", b"\xe9", b"\xff"),
    *(b"\\", b"\\x41", b"\\xe9", b"%s", b"{}", b"<script>", b'"', b"'", b",", b"|", b"`", b"$HOME", b"*", b"?", b":"),
    *("é".encode(), "e\u0301".encode(), "ß".encode(), "🐈\u200d⬛".encode(), "\u202e".encode(), "\u2028".encode()),
    *(
        b"\xc2\x85",
        b"\xc2\xa0",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xf0\x9f",
        b"@eaDir",
        b"._",
        b"CON",
        b"train",
        b"Test",
    ),
)
_ENDINGS = (b".jpg", b".JPG", b".png", b"", b".txt", b".jpg ", b".", b".jpg.lnk")
_SOUND = tuple(encoded(picture(0, number, 8), "PNG") for number in range(12))
_SPLITS = ("train", "valid", "test", "val", "Training", "TEST", "validation")
_KINDS = {"folder": "folder", "indoor67": "indoor67", "sports100": "sports100", "lists": "indoor67", "splits": "folder"}

_Item = TypeVar("_Item")


def trials(folder: Path, count: int, seed: int) -> Iterator[fuzz.Trial]:
    """Each tree is removed before the next one is made."""
    for number in range(count):
        random = fuzz.random_of(seed, number)
        place = folder / str(number) / "one deeper"  # a link to the folder around a data set leads to no other trial
        place.mkdir(parents=True)
        make = _whole_command if number % _WHOLE == SHARE - 1 else _data_set
        yield make(place, _Tree(place, random), random)
        shutil.rmtree(os.fsencode(place.parent))


def _data_set(place: Path, tree: _Tree, random: np.random.Generator) -> fuzz.Trial:
    layout = _one_of(list(_KINDS), random)
    root = tree.root(layout)
    split = _one_of(["auto", "all", "stratified"], random)
    if random.random() < 0.7 and layout in ("lists", "splits"):
        split = {"lists": "official", "splits": "folders"}[layout]
    options: dict[str, Any] = {"kind": _KINDS[layout], "split": split, "follow_links": bool(random.random() < 0.5)}
    return fuzz.Trial(f"{layout} {options}", lambda: _shown(lambda: _check(root, place / "manifest.json", options)))


def _shown(call: Callable[[], None]) -> None:
    """Errors with their message as the command line prints it."""
    try:
        call()
    except InputError as error:
        raise InputError(printable(error)[:900]) from error


def _check(root: Path, file: Path, options: dict[str, Any]) -> None:
    """Every picture has one name that all formats take, and behind the name lies this picture."""
    manifest = build_manifest(root, **options, workers=1)
    ids = [record.id for record in manifest.records]
    assert len(set(ids)) == len(ids)
    for record in manifest.records:
        assert len(record.id.splitlines()) == 1
        assert record.id.encode().decode() == record.id
        path = Path(manifest.root) / path_of(record.id)
        if record.status == "ok":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256
        if not options["follow_links"] and record.sha256:
            assert path.resolve().is_relative_to(root.resolve())
    manifest.save(file)
    assert Manifest.load(file) == manifest
    images = prepare_folder(manifest, preprocessing=SMALL).test
    if len(images):
        assert images.pixels([0, len(images) - 1]).shape == (2, 3, 16, 16)


def _whole_command(place: Path, tree: _Tree, random: np.random.Generator) -> fuzz.Trial:
    """Sound pictures under odd names, through a capture."""
    root = place / "data"
    for _ in range(2):
        tree.folder_of_pictures(root, sound=True)
    store = place / "s.zarr"

    def call() -> None:
        model = ("--model.name", "test_vit", "--model.pretrained", "false", "--model.img_size", "32")
        code = fuzz.command(
            "capture", *model, "--data.root", str(root), "--store", str(store), "--capture.samples", "1"
        )
        assert code == 0
        found = AttentionStore.open(store).image_ids
        assert found == tuple(record.id for record in build_manifest(root, split="all").records)
        assert all((root / path_of(identity)).is_file() for identity in found)

    return fuzz.Trial("capture", call)


def _one_of(items: Sequence[_Item], random: np.random.Generator) -> _Item:
    return items[int(random.integers(0, len(items)))]


def _all_below(folder: Path) -> list[Path]:
    return [Path(at) / name for at, folders, files in os.walk(folder) for name in sorted(folders + files)]


class _Tree:
    """Makes a data set.

    Args:
        place: an empty folder for it, and for what its links lead to.
        random: decides.
    """

    def __init__(self, place: Path, random: np.random.Generator) -> None:
        self._place = place
        self._random = random
        self._oddness = _one_of((0.0, 0.1, 0.4), random)  # with every oddity in every tree, all would be refused
        self._outside = place / "outside"
        self.folder_of_pictures(self._outside, sound=True)

    def root(self, layout: str) -> Path:
        """A data set; returns its root."""
        root = self._place / self._name()
        if self._odd(0.2):
            self._make_odd(root, self._place)
            if not root.is_dir():
                return root
        root.mkdir(exist_ok=True)
        if layout in ("sports100", "splits"):
            for name in _SPLITS if self._odd() else _SPLITS[:3]:
                if not self._odd(0.3):
                    self._classes(root / name, root)
        elif layout == "folder":
            self._classes(root, root)
        else:
            self._classes(root / "Images", root)
            for name in ("TrainImages.txt", "TestImages.txt"):
                self._list(root, name)
        if self._odd():
            self._item(root, root)
        if self._odd():
            (root / "sports.csv").write_bytes(self._text([b"filepaths,labels", b"train/cat/1.jpg,cat"]))
        return root

    def folder_of_pictures(self, base: Path, *, sound: bool = False) -> None:
        """A class folder with a few files; sound: none that is left out for its name."""
        folder = base / (self._name(prefix=b"c") if sound or self._chance(0.5) else f"class{self._below(5)}")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(3 + self._below(3)):
            file = folder / self._name(_ENDINGS, b"%d" % number if sound else b"")
            if not os.path.lexists(file):
                file.write_bytes(_one_of(_SOUND, self._random))

    def _classes(self, base: Path, root: Path) -> None:
        if self._odd(0.3):
            self._make_odd(base, root)
            return
        if os.path.lexists(base) and not base.is_dir():
            return
        base.mkdir(exist_ok=True)
        for _ in range(self._below(4) if self._odd() else 2):
            self.folder_of_pictures(base)
        folders = [path for path in base.iterdir() if path.is_dir()]
        while self._odd():
            self._item(_one_of([base, *folders], self._random), root)

    def _item(self, folder: Path, root: Path) -> None:
        """One more thing in a folder."""
        path = folder / self._name(_ENDINGS)
        if os.path.lexists(path):
            return
        kind = self._below(4)
        if kind == 0:
            self._make_odd(path, root)
        elif kind == 1:
            path.write_bytes(fuzz.changed(_one_of(_SOUND, self._random), self._random) if self._chance(0.5) else b"")
        elif kind == 2:
            path.mkdir()
            for _ in range(self._below(3)):
                self._item(path, root)
        else:
            self.folder_of_pictures(path if self._chance(0.5) else folder)

    def _make_odd(self, path: Path, root: Path) -> None:
        """Something that is neither a plain file nor a plain folder."""
        if os.path.lexists(path):
            return
        kind = self._below(9)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            os.mknod(path, stat.S_IFSOCK | 0o600)
        else:
            targets: dict[int, Sequence[str | Path]] = {
                2: ("/dev/zero", "/dev/null"),
                3: (path.name,),
                4: (self._name(),),
                5: (".", "..", root, self._place),
                6: _all_below(root) or (root,),
                7: _all_below(self._outside),
                8: (self._outside,),
            }
            path.symlink_to(_one_of(targets[kind], self._random))

    def _list(self, root: Path, name: str) -> None:
        if self._odd(0.2):
            self._make_odd(root / name, root)
            return
        images = root / "Images"
        half = [path for path in _all_below(images) if not path.is_dir()][int(name == "TestImages.txt") :: 2]
        lines = [os.fsencode(path.relative_to(images)) for path in half]
        if self._chance(0.8):  # a list is text in UTF-8
            lines = [line for line in lines if line.isascii() and not {*line} & {*b"\\\n\r"}]
        while self._odd():
            other = (
                b"",
                b"/etc/passwd",
                b"../x/1.jpg",
                b"a\\b.jpg",
                b"alone.jpg",
                b"a/b/c.jpg",
                b"a//b.jpg",
                *lines[:1],
            )
            lines.insert(self._below(len(lines) + 1), _one_of(other, self._random))
        (root / name).write_bytes(self._text(lines))

    def _text(self, lines: list[bytes]) -> bytes:
        """Lines as editors of several systems leave them, or changed."""
        content = _one_of((b"\n", b"\r\n"), self._random).join(lines)
        if self._odd():
            content = b"\xef\xbb\xbf" + content
        if self._odd(0.2):
            content = content.decode("latin-1").encode("utf-16")
        return fuzz.changed(content, self._random) if self._odd() else content

    def _name(self, endings: Sequence[bytes] = (b"",), prefix: bytes = b"") -> str:
        """A name of a file, of any bytes that one can have."""
        ending = _one_of(endings, self._random)
        name = prefix + b"".join(_one_of(_PIECES, self._random) for _ in range(1 + self._below(4)))
        if self._odd(0.2):
            name *= 100
        name = name[: 255 - len(ending)] + ending
        return os.fsdecode(name if name not in (b".", b"..") else b"dots")

    def _odd(self, share: float = 1.0) -> bool:
        return self._chance(self._oddness * share)

    def _chance(self, share: float) -> bool:
        return bool(self._random.random() < share)

    def _below(self, number: int) -> int:
        return int(self._random.integers(0, number))
