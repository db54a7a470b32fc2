"""Names that no terminal shows, links, pipes and folders without end: the files of a data set as they lie on disks."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest

from tests.miniatures import encoded, picture, write_indoor67, write_sports100
from tests.test_train_datasets import SMALL, statuses
from train.data.datasets import build_manifest, prepare_folder
from train.data.listing import files_below
from train.data.manifest import Manifest
from train.errors import InputError, brief, printable
from train.files import id_of, path_of, require_file

ODD_NAMES = {
    b"caf\xe9.jpg": r"caf\xe9.jpg",
    rb"caf\xe9.jpg": r"caf\x5cxe9.jpg",
    rb"a\x5cxe9.jpg": r"a\x5cx5cxe9.jpg",
    b"a\\b.jpg": "a\\b.jpg",
    b"two\nlines\t.jpg": r"two\x0alines\x09.jpg",
    b"\x1b[31mred.jpg": r"\x1b[31mred.jpg",
    b"nel\xc2\x85.jpg": r"nel\xc2\x85.jpg",
    "gpj.\u202etxt.jpg".encode(): r"gpj.\xe2\x80\xaetxt.jpg",
    "line\u2028break.jpg".encode(): r"line\xe2\x80\xa8break.jpg",
    b"half \xf0\x9f\x98.jpg": r"half \xf0\x9f\x98.jpg",
    b"surrogate\xed\xa0\x80.jpg": r"surrogate\xed\xa0\x80.jpg",
    "👨\u200d👩\u200d👧.jpg".encode(): "👨\u200d👩\u200d👧.jpg",
    "cafe\u0301.jpg".encode(): "cafe\u0301.jpg",
    "no\u00a0break.jpg".encode(): "no\u00a0break.jpg",
    b"=1+1,\"'<script>.jpg": "=1+1,\"'<script>.jpg",
    b"-rf .jpg. ": "-rf .jpg. ",
    b"n" * 251 + b".jpg": "n" * 251 + ".jpg",
}


@pytest.mark.parametrize(("name", "identity"), ODD_NAMES.items())
def test_an_id_is_text_and_leads_back_to_the_file(name: bytes, identity: str) -> None:
    path = Path(os.fsdecode(b"cat/" + name))
    assert id_of(path) == f"cat/{identity}"
    assert path_of(id_of(path)) == path
    assert len(identity.splitlines()) == 1
    assert printable(path).isprintable()
    identity.encode()


def test_an_id_is_the_same_on_every_system() -> None:
    assert id_of(PureWindowsPath(r"cat\.hidden\a.jpg")) == "cat/.hidden/a.jpg" == id_of(Path("cat/.hidden/a.jpg"))


def test_pictures_of_any_name_are_used_and_paired(tmp_path: Path) -> None:
    """The id is unlike the ids of all other files, and the picture behind it is the file's own."""
    folder = tmp_path / os.fsdecode(b"photos/h\xf4tel")
    folder.mkdir(parents=True)
    content = {name: encoded(picture(0, number), "PNG") for number, name in enumerate(ODD_NAMES)}
    for name, data in content.items():
        (folder / os.fsdecode(name)).write_bytes(data)
    manifest = build_manifest(tmp_path / "photos", split="all")
    assert manifest.class_names == (r"h\xf4tel",)
    assert {record.id: record.status for record in manifest.records} == {
        rf"h\xf4tel/{identity}": "ok" for identity in ODD_NAMES.values()
    }
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    images = prepare_folder(manifest, preprocessing=SMALL).test
    plain = tmp_path / "plain" / "hotel"
    plain.mkdir(parents=True)
    order = {record.sha256: number for number, record in enumerate(manifest.records)}
    for data in content.values():
        (plain / f"{order[hashlib.sha256(data).hexdigest()]:02d}.png").write_bytes(data)
    same = prepare_folder(build_manifest(tmp_path / "plain", split="all"), preprocessing=SMALL).test
    assert np.array_equal(images.pixels(range(len(images))), same.pixels(range(len(same))))


def class_folders(root: Path, *names: str, count: int = 3) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(encoded(picture(label, number, 16), "PNG"))
    return root


def ids(manifest: Manifest) -> list[str]:
    return [record.id for record in manifest.records if record.status == "ok"]


def test_a_subset_made_of_links_is_followed_on_request(tmp_path: Path) -> None:
    everything = class_folders(tmp_path / "all", "ant", "bee", "cow")
    root = tmp_path / "subset"
    (root / "files").mkdir(parents=True)
    for name in ("ant", "cow"):
        (root / name).symlink_to(everything / name)
    (root / "files" / "1.png").symlink_to(everything / "bee" / "1.png")
    with pytest.raises(InputError, match=r"ant is a link to .*all/ant, outside the folder .*--data\.follow_links true"):
        build_manifest(root, split="all")
    manifest = build_manifest(root, split="all", follow_links=True)
    assert ids(manifest) == [*(f"{name}/{n}.png" for name in ("ant", "cow") for n in range(3)), "files/1.png"]
    images = prepare_folder(build_manifest(root, split="all", follow_links=True), preprocessing=SMALL).test
    other = prepare_folder(build_manifest(everything, split="all"), preprocessing=SMALL).test
    assert np.array_equal(
        images.pixels([images.ids.index("files/1.png")]), other.pixels([other.ids.index("bee/1.png")])
    )
    assert {path.relative_to(root).as_posix() for path in files_below(root, follow_links=True)} == set(ids(manifest))
    (tmp_path / "link").symlink_to(everything)
    assert build_manifest(tmp_path / "link", split="all") == build_manifest(everything, split="all")


@pytest.mark.parametrize("kind", ["folder", "indoor67", "indoor67 lists", "sports100"])
def test_no_kind_leaves_the_folder_unless_asked_to(tmp_path: Path, kind: str) -> None:
    """The folder that holds the classes may be a link itself: train, or Images."""
    layout = "sports100" if kind == "folder" else kind.split()[0]
    split = {"folder": "folders", "sports100": "folders", "indoor67": "stratified"}.get(kind, "official")
    (write_indoor67 if layout == "indoor67" else write_sports100)(tmp_path / "whole")
    name = "Images" if layout == "indoor67" else "valid"
    root = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", root)
    shutil.rmtree(root / name)
    (root / name).symlink_to(tmp_path / "whole" / name)
    of = {"kind": kind.split()[0], "split": split}
    with pytest.raises(InputError, match=rf"{name} is a link to .*, outside the folder .*--data\.follow_links true"):
        build_manifest(root, **of)  # type: ignore[arg-type]
    followed = build_manifest(root, **of, follow_links=True)  # type: ignore[arg-type]
    assert followed.records == build_manifest(tmp_path / "whole", **of).records  # type: ignore[arg-type]


def test_the_folder_itself_may_have_any_name(tmp_path: Path) -> None:
    """The command line takes text in UTF-8 alone, and a link to such a folder."""
    root = class_folders(tmp_path / os.fsdecode(b"caf\xe9\n"), "ant", "bee")
    (tmp_path / "plain").symlink_to(root)
    manifest = build_manifest(tmp_path / "plain", split="all")
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    assert len(prepare_folder(manifest, preprocessing=SMALL).test.pixels(range(6))) == 6


def circles(root: Path) -> None:
    """Links that lead to themselves, to each other, nowhere, and to folders that they lie in."""
    (root / "self").symlink_to("self")
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    (root / "gone").symlink_to(root / "nowhere")
    (root / "everything").symlink_to(root)
    (root / ".everything").symlink_to("/")
    (root / "ant" / "self.png").symlink_to("self.png")
    (root / "ant" / "gone.png").symlink_to("nowhere.png")
    (root / "ant" / "around").symlink_to(root)
    (root / "ant" / "again").symlink_to(".")
    (root / "ant" / "deep").mkdir()
    (root / "ant" / "deep" / "up").symlink_to(root / "ant")
    (root / "ant" / "deep" / "5.png").write_bytes(encoded(picture(0, 5, 16), "PNG"))


@pytest.mark.parametrize("follow_links", [False, True])
def test_circles_of_links_end_and_nothing_is_counted_twice(
    tmp_path: Path, follow_links: bool, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path / "data", "ant", "bee")
    circles(root)
    (root / "bee" / "more").symlink_to(root / "ant" / "deep")
    manifest = build_manifest(root, split="all", follow_links=follow_links)
    pictures = [*(f"{name}/{n}.png" for name in ("ant", "bee") for n in range(3)), "ant/deep/5.png"]
    assert ids(manifest) == sorted(pictures + ["bee/more/5.png"] * follow_links)
    assert statuses(manifest) == {
        "ant/gone.png": "missing",
        "ant/self.png": "unreadable (Too many levels of symbolic links)",
    }
    assert f"4 link(s) directly in {root} lead nowhere, for example a" in caplog.text
    circular = 5 if follow_links else 4  # bee/more leads to ant/deep, where up leads to ant
    assert f"{circular} link(s) to a folder that they lie in themselves are no part of the data set" in caplog.text
    assert "hidden folders" not in caplog.text  # nor are the files counted that a hidden link leads to
    followed = "1 link(s) to folders, which --data.follow_links true follows, are no part of the data set"
    assert (followed in caplog.text) != follow_links


def test_a_circle_over_a_folder_elsewhere_ends(tmp_path: Path) -> None:
    elsewhere = class_folders(tmp_path / "elsewhere", "ant", "bee")
    root = tmp_path / "data"
    root.mkdir()
    (root / "ant").symlink_to(elsewhere / "ant")
    (root / "cow").symlink_to(elsewhere / "bee")
    for name in ("ant", "bee"):
        (elsewhere / name / "to data").symlink_to(root)
        (elsewhere / name / "to all").symlink_to(elsewhere)
        (elsewhere / name / "to bee").symlink_to(elsewhere / "bee")
    manifest = build_manifest(root, split="all", follow_links=True)
    own = [f"{name}/{n}.png" for name in ("ant", "cow") for n in range(3)]
    assert ids(manifest) == sorted(own + [f"ant/to bee/{n}.png" for n in range(3)])


def test_pipes_sockets_and_devices_are_tagged_without_being_opened(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", "ant", "bee")
    os.mkfifo(root / "ant" / "pipe.png")
    (root / "ant" / "endless.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root / "bee")  # the name of a socket is short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
        tagged = {"ant/pipe.png", "ant/endless.png", "bee/socket.png"}
        manifest = build_manifest(root, split="all", follow_links=True)
    assert len(ids(manifest)) == 6
    assert statuses(manifest) == dict.fromkeys(tagged, "not a file")


def test_the_file_that_a_list_names_may_be_anything(tmp_path: Path) -> None:
    write_indoor67(tmp_path)
    for name in ("0000", "0001"):
        (tmp_path / "Images" / "bar" / f"bar_{name}.jpg").unlink()
    os.mkfifo(tmp_path / "Images" / "bar" / "bar_0000.jpg")
    (tmp_path / "Images" / "bar" / "bar_0001.jpg").mkdir()
    found = statuses(build_manifest(tmp_path, kind="indoor67", split="official"))
    assert found["bar/bar_0000.jpg"] == found["bar/bar_0001.jpg"] == "not a file"
    (tmp_path / "TestImages.txt").unlink()
    os.mkfifo(tmp_path / "TestImages.txt")
    with pytest.raises(InputError, match=r"list .*TestImages\.txt is a named pipe; expected a text file"):
        build_manifest(tmp_path, kind="indoor67", split="official")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_list_is_said_to_be_empty(tmp_path: Path, content: bytes) -> None:
    write_indoor67(tmp_path)
    (tmp_path / "TestImages.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"TestImages\.txt names no image; expected one path a line"):
        build_manifest(tmp_path, kind="indoor67", split="official")


def test_a_missing_split_of_sports100_is_named(tmp_path: Path) -> None:
    write_sports100(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(InputError, match=r"holds no folder of the validation split; get the archive"):
        build_manifest(tmp_path, kind="sports100")
    assert build_manifest(tmp_path, kind="sports100", split="stratified").split("validation")
    (tmp_path / "valid").mkdir()
    with pytest.raises(InputError, match="valid is empty; expected class folders"):
        build_manifest(tmp_path, kind="sports100")


@pytest.mark.parametrize("top", ["ant", ".hidden"])
def test_a_thousand_folders_in_each_other_are_read_to_the_last(
    tmp_path: Path, top: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path / "data", "ant", "bee")
    (root / top).mkdir(exist_ok=True)
    monkeypatch.chdir(root / top)
    for _ in range(1000):
        os.mkdir("d")
        os.chdir("d")
    shutil.copy(root / "bee" / "0.png", "0.png")
    try:
        manifest = build_manifest(root, split="all")
    finally:
        os.unlink("0.png")
        for _ in range(1000):  # what removes a folder with all in it is not made for so many levels
            os.chdir("..")
            os.rmdir("d")
    assert len(ids(manifest)) == (7 if top == "ant" else 6)
    assert ("1 file(s) in hidden folders" in caplog.text) == (top == ".hidden")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is left out without a word because its folder has other rights, or is gone by now."""
    root = class_folders(tmp_path / "data", "ant", "bee")
    (root / "bee" / "locked").mkdir()
    scandir = os.scandir

    def locked(path: str | Path) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"folder .*bee/locked cannot be read \(Permission denied\)"):
        build_manifest(root, split="all")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "does not exist"),
        ("folder", "is a folder"),
        ("pipe", "is a named pipe"),
        ("device", "is a device"),
        ("broken link", "is a link that leads nowhere"),
        ("link to itself", r"cannot be read \(Too many levels of symbolic links\)"),
        ("long", r"cannot be read \(File name too long\)"),
    ],
)
def test_what_is_no_file_is_said_and_not_opened(tmp_path: Path, kind: str, reason: str) -> None:
    path = tmp_path / ("x" * 256 if kind == "long" else "a")
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "broken link": lambda: path.symlink_to("b"),
        "link to itself": lambda: path.symlink_to("a"),
    }
    make.get(kind, lambda: None)()
    with pytest.raises(InputError, match=rf"^list .* {reason}; expected one$"):
        require_file(path, "list", "expected one")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("No end.\nAnd more."), "No end"),
        (RuntimeError("Error(s) in loading A:\n\tsize mismatch\n\tand more"), "Error(s) in loading A: size mismatch"),
        (KeyError("a\x1b"), r"KeyError 'a\x1b'"),
        (AssertionError(), "AssertionError"),
        (OSError("\x1b[2J"), r"\x1b[2J"),
    ],
)
def test_what_an_error_says_becomes_part_of_a_sentence(error: Exception, words: str) -> None:
    assert brief(error) == words
