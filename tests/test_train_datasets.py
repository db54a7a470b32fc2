"""Indoor-67 and 100 Sports as they lie on people's disks: layout, lists, odd and broken files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.miniatures import ROOMS, SPORTS, bad_files, encoded, odd_files, picture, write_indoor67, write_sports100
from train.choices import DATA_KINDS
from train.data.datasets import KINDS, build_manifest, prepare_folder
from train.data.images import Preprocessing
from train.data.listing import files_below
from train.data.manifest import SPLITS, Manifest
from train.errors import InputError

SMALL = Preprocessing(
    channels=3,
    height_px=16,
    width_px=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
)


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    write_indoor67(tmp_path / "indoor")
    return tmp_path / "indoor"


def statuses(manifest: Manifest) -> dict[str, str]:
    return {record.id: record.status for record in manifest.records if record.status != "ok"}


@pytest.mark.parametrize("rule", ["official", "stratified"])
def test_indoor67_uses_every_sound_file_and_tags_every_other(tmp_path: Path, rule: str) -> None:
    bad = write_indoor67(tmp_path)
    manifest = build_manifest(tmp_path, kind="indoor67", split=rule)  # type: ignore[arg-type]
    assert statuses(manifest) == bad
    assert manifest.class_names == ROOMS
    used = {record.id for split in SPLITS for record in manifest.split(split)}
    assert {f"{ROOMS[1]}/{name}" for name in odd_files(1)} <= used
    assert len(used) == 3 * (14 if rule == "official" else 17) + len(odd_files(1))
    assert manifest.rule == rule
    assert manifest.leaks() == []
    data = prepare_folder(manifest, preprocessing=SMALL)
    for split, images in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        assert images.ids == tuple(record.id for record in manifest.split(split))
        assert images.pixels(range(len(images))).shape == (len(images), 3, 16, 16)
    assert data.train.picture(data.train.ids.index(f"{ROOMS[0]}/{ROOMS[0]}_0001.jpg")).shape == (16, 16, 3)


def test_the_official_split_is_the_lists(rooms: Path) -> None:
    manifest = build_manifest(rooms, kind="indoor67", split="official")
    lists = {name: (rooms / f"{name}Images.txt").read_text().split("\n") for name in ("Train", "Test")}
    assert {r.id for r in manifest.records} == {*lists["Train"], *lists["Test"]}
    assert {r.id for r in manifest.split("test")} == set(lists["Test"]) - set(statuses(manifest))
    own = {r.id for split in ("train", "validation") for r in manifest.split(split)}
    assert own == set(lists["Train"]) - set(statuses(manifest))
    for room in ROOMS:
        count = {s: sum(r.class_name == room for r in manifest.split(s)) for s in SPLITS}
        assert count["validation"] == round(0.15 * (count["train"] + count["validation"]))
    document_path = rooms / "manifest.json"
    manifest.save(document_path)
    document = json.loads(document_path.read_text())
    assert set(document["lists"]) == {"TrainImages.txt", "TestImages.txt"}
    assert all(len(value) == 64 for value in document["lists"].values())
    assert document["splits"]["test"] == {
        "images": len(manifest.split("test")),
        "sha256": manifest.split_digest("test"),
    }
    assert Manifest.load(document_path) == manifest
    again = build_manifest(rooms, kind="indoor67", split="official", seed=43)
    assert again.split_digest("test") == manifest.split_digest("test"), "no seed changes the official test images"
    assert again.split_digest("validation") != manifest.split_digest("validation")


def test_lists_with_other_line_ends_say_the_same(rooms: Path) -> None:
    before = build_manifest(rooms, kind="indoor67", split="official")
    for name in ("TrainImages.txt", "TestImages.txt"):
        content = (rooms / name).read_bytes()
        (rooms / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert build_manifest(rooms, kind="indoor67", split="official").sha256 == before.sha256


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../outside/secret.jpg", r"TrainImages\.txt line 34 is '\.\./outside/secret\.jpg', which leaves the folder"),
        ("bar/../../secret.jpg", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        ("bar\\..\\x.jpg", "which has a backslash; expected class/file"),
        ("alone.jpg", r"line 34 is 'alone\.jpg'; expected class/file\.jpg"),
        (f"bar/{'bar'}_0010.jpg", r"TestImages\.txt names bar/bar_0010\.jpg, which TrainImages\.txt names already"),
    ],
)
def test_lists_that_leave_the_folder_or_overlap_are_refused(rooms: Path, line: str, message: str) -> None:
    path = rooms / "TrainImages.txt"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:33], line, *lines[33:]]))
    with pytest.raises(InputError, match=message):
        build_manifest(rooms, kind="indoor67", split="official")


def test_a_listed_file_that_is_not_there_is_tagged(rooms: Path) -> None:
    (rooms / "Images" / "bar" / "bar_0003.jpg").unlink()
    manifest = build_manifest(rooms, kind="indoor67", split="official")
    assert statuses(manifest)["bar/bar_0003.jpg"] == "missing"


def test_a_list_cannot_reach_out_over_a_link(rooms: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.jpg").write_bytes(encoded(picture(0, 0)))
    (rooms / "Images" / "garage").symlink_to(outside)
    with open(rooms / "TrainImages.txt", "a", encoding="utf-8") as file:
        file.write("\ngarage/x.jpg")
    with pytest.raises(InputError, match=r"is a link to .*, outside the folder"):
        build_manifest(rooms, kind="indoor67", split="official")


def test_copies_of_a_file_stay_in_one_split(rooms: Path) -> None:
    for number in range(12):
        source = rooms / "Images" / "bar" / f"bar_{number:04d}.jpg"
        shutil.copy(source, rooms / "Images" / "bar" / f"copy_{number}.jpg")
        shutil.copy(source, rooms / "Images" / "church_inside" / f"mislabelled_{number}.jpg")
    for seed in range(5):
        manifest = build_manifest(rooms, kind="indoor67", seed=seed)
        assert manifest.leaks() == []
        assert manifest.redrawn(seed).leaks() == []


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("indoor67", "stratified"),
        ("indoor67", "official"),
        ("sports100", "folders"),
        ("sports100", "stratified"),
        ("folder", "folders"),
    ],
)
def test_a_seed_draws_training_and_validation_images_and_no_test_image(tmp_path: Path, kind: str, rule: str) -> None:
    (write_indoor67 if kind == "indoor67" else write_sports100)(tmp_path)
    manifest = build_manifest(tmp_path, kind=kind, split=rule)  # type: ignore[arg-type]
    drawn = [manifest.redrawn(seed) for seed in range(4)]
    for other in drawn:
        assert other.split("test") == manifest.split("test")
        assert statuses(other) == statuses(manifest)
        train, validation = ({record.id for record in other.split(name)} for name in SPLITS[:2])
        assert not train & validation
        assert train | validation == {record.id for name in SPLITS[:2] for record in manifest.split(name)}
        for name in SPLITS[:2]:
            count, before = (Counter(record.class_name for record in m.split(name)) for m in (other, manifest))
            assert count == before
    assert len({one.split_digest("train") for one in (manifest, *drawn)}) == 5
    assert manifest.redrawn(2) == drawn[2]
    assert drawn[2].rule == f"{rule}, train and validation by seed 2"
    assert drawn[0].redrawn(2).sha256 == drawn[2].sha256, "whatever the split was before"


def test_sports100_takes_the_folders_and_compares_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = write_sports100(tmp_path)
    manifest = build_manifest(tmp_path, kind="sports100")
    assert manifest.rule == "folders"
    assert statuses(manifest) == bad
    assert manifest.class_names == SPORTS
    count = {split: len(manifest.split(split)) for split in SPLITS}
    assert count == {"train": 30 + len(odd_files(1)), "validation": 15, "test": 15}
    assert set(manifest.lists) == {"sports.csv"}
    assert "1 file(s) that it names and that are not there, for example train/air hockey/999.jpg" in caplog.text
    unnamed = len(odd_files(1)) + len(bad_files(1))
    assert f"{unnamed} file(s) that are there and that it does not name" in caplog.text
    pooled = build_manifest(tmp_path, kind="sports100", split="stratified")
    assert {r.id for r in pooled.records} == {r.id for r in manifest.records}
    assert len(pooled.split("test")) == 3 + 4 + 3


def test_a_table_that_labels_otherwise_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sports100(tmp_path)
    path = tmp_path / "sports.csv"
    path.write_text(path.read_text().replace("002.jpg,air hockey,test", "002.jpg,giant slalom,test"))
    manifest = build_manifest(tmp_path, kind="sports100")
    record = next(r for r in manifest.records if r.id == "test/air hockey/002.jpg")
    assert record.class_name == "air hockey"
    assert "1 file(s) that it labels otherwise than their folder" in caplog.text
    path.write_bytes(b"\xff\xfe nonsense")
    assert build_manifest(tmp_path, kind="sports100").sha256 == manifest.sha256
    assert "cannot be read as a table" in caplog.text


def test_every_kind_that_can_be_asked_for_is_read(tmp_path: Path) -> None:
    assert {"digits", *KINDS} == {*DATA_KINDS}
    with pytest.raises(InputError, match="unknown kind of data set 'foldr'; expected one of folder, indoor67, sports"):
        build_manifest(tmp_path, kind="foldr")


def test_what_is_not_there_says_where_to_get_it(tmp_path: Path, rooms: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; .*get indoorCVPR_09\.tar.*root/Images/<class>"):
        build_manifest(tmp_path / "nowhere", kind="indoor67")
    with pytest.raises(InputError, match=r"does not exist; .*kaggle\.com/datasets/gpiosenka.*root/valid"):
        build_manifest(tmp_path / "nowhere", kind="sports100")
    with pytest.raises(InputError, match=r"holds no folder Images; .* is the root; get indoorCVPR_09"):
        build_manifest(rooms / "Images", kind="indoor67")
    with pytest.raises(InputError, match="holds no folders train, valid and test; get the archive"):
        build_manifest(rooms, kind="sports100")
    (rooms / "TestImages.txt").unlink()
    with pytest.raises(InputError, match=r"holds no TestImages\.txt, the official split"):
        build_manifest(rooms, kind="indoor67", split="official")
    with pytest.raises(InputError, match="split folders is no split of indoor67; expected one of stratified, official"):
        build_manifest(rooms, kind="indoor67", split="folders")


def test_split_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    write_sports100(tmp_path)
    with pytest.raises(InputError, match="holds test, train, valid, which are splits and no classes"):
        build_manifest(tmp_path, kind="folder")
    assert len(build_manifest(tmp_path, kind="folder", split="folders").class_names) == 3


ASIDE = ("@eaDir/0001.jpg", ".ipynb_checkpoints/deep/er", "#recycle", ".@__thumb", "$RECYCLE.BIN/S-1", "lost+found")


@pytest.mark.parametrize("kind", ["folder", "split folders", "indoor67", "indoor67 lists", "sports100"])
def test_thumbnails_and_hidden_folders_are_no_images_and_no_classes(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the layout, wherever they lie: in the root, between split and class, and deep in a class."""
    layout, root = kind.split()[0], tmp_path / ".data" / "@eaDir"  # how the root is called is the user's choice
    (write_indoor67 if layout == "indoor67" else write_sports100)(root)
    base, split = {
        "folder": (root / "train", "all"),
        "split folders": (root, "folders"),
        "indoor67": (root, "stratified"),
        "indoor67 lists": (root, "official"),
        "sports100": (root, "folders"),
    }[kind]
    kind_of = "folder" if layout == "split" else layout
    before = build_manifest(base, kind=kind_of, split=split)  # type: ignore[arg-type]
    assert "no part of the data set" not in caplog.text
    files = list(files_below(base))
    for folder in [base, *(path for path in base.rglob("*") if path.is_dir())]:
        for number, name in enumerate(ASIDE):
            (folder / name).mkdir(parents=True)
            (folder / name / "SYNOPHOTO_THUMB_XL.jpg").write_bytes(encoded(picture(number, 7)))
    after = build_manifest(base, kind=kind_of, split=split)  # type: ignore[arg-type]
    assert after == before
    assert list(files_below(base)) == files
    if kind == "folder":
        assert f"{4 * len(ASIDE)} file(s) in hidden folders and folders of the system" in caplog.text
    assert ("no part of the data set, for example in" in caplog.text) == (kind != "indoor67 lists")


def test_a_list_that_names_what_lies_aside_keeps_its_record(rooms: Path) -> None:
    names = {
        "bar/@eaDir/0001.jpg/thumb.jpg": "in @eaDir",
        "bar/.hidden/deep/0001.jpg": "in a hidden folder",
        ".trash/0001.jpg": "in a hidden folder",
        "bar/Thumbs.db": "file of the system",
    }
    for name in names:
        (rooms / "Images" / name).parent.mkdir(parents=True, exist_ok=True)
        (rooms / "Images" / name).write_bytes(encoded(picture(0, 0)))
    with open(rooms / "TrainImages.txt", "a", encoding="utf-8") as file:
        file.write("".join(f"\n{name}" for name in names))
    manifest = build_manifest(rooms, kind="indoor67", split="official")
    assert statuses(manifest).items() >= names.items()
    assert manifest.class_names == ROOMS


def test_a_class_without_a_readable_image_is_none_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sports100(tmp_path)
    (tmp_path / "train" / "curling").mkdir()
    (tmp_path / "train" / "diving" / "@eaDir").mkdir(parents=True)
    (tmp_path / "train" / "archery").mkdir()
    (tmp_path / "train" / "archery" / "1.jpg").write_bytes(b"")
    manifest = build_manifest(tmp_path, kind="sports100")
    assert manifest.class_names == SPORTS
    assert [r.label for r in manifest.records if r.class_name == "archery"] == [-1]
    for name in ("curling", "diving"):
        assert f"train/{name} is empty and is left out" in caplog.text
    assert "class folder 'archery' holds no readable image and is left out" in caplog.text


def test_one_class_name_in_two_spellings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k, name in enumerate(("Dog", "dog", "cafe\u0301")):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.jpg").write_bytes(encoded(picture(k, number)))
    assert build_manifest(tmp_path).class_names == ("Dog", "cafe\u0301", "dog")
    assert "classes Dog and dog differ only by case; they are taken for different classes" in caplog.text
    (tmp_path / "caf\u00e9").mkdir()
    (tmp_path / "caf\u00e9" / "1.jpg").write_bytes(encoded(picture(2, 5)))
    with pytest.raises(InputError, match=r"'cafe\\u0301' and 'caf\\xe9' are both shown as caf\u00e9: one name"):
        build_manifest(tmp_path)


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    write_indoor67(tmp_path)
    data = prepare_folder(build_manifest(tmp_path, kind="indoor67", split="all"), preprocessing=SMALL).test
    from PIL import Image

    stored = Image.open(tmp_path / "Images" / ROOMS[1] / "turned.jpg").convert("RGB")
    upright = np.asarray(stored.transpose(Image.Transpose.ROTATE_270).resize((16, 16), Image.Resampling.BICUBIC))
    shown = data.picture(data.ids.index(f"{ROOMS[1]}/turned.jpg"))
    assert np.abs(shown.astype(int) - upright).mean() < 25 < np.abs(shown.astype(int) - upright[::-1, ::-1]).mean()
