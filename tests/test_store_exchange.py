"""Attention as HDF5, out and in, by the command line."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import store_cases as case

from engine.run import main
from kernels import TokenLayout
from store import AttentionStore
from store.hdf5_values import read_names
from store.verify import verify

LAYOUT = TokenLayout.from_dict(case.LAYOUT)


def store_of(path: Path, encoding: str = "fp16", **changes: object) -> Path:
    case.capture(path, case.make_schema(encoding, **changes))
    return path


PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "qk": "float32"}


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_out_and_in_again(tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, file, back = store_of(tmp_path / "one.zarr", encoding), tmp_path / "maps.h5", tmp_path / "back.zarr"
    assert main(["export", "--store", str(one), "--hdf5", str(file)]) == 0
    store = AttentionStore.open(one)
    with h5py.File(file) as opened:
        for layer in (0, 1):
            dataset = opened[f"attention/layer_0{layer}"]
            np.testing.assert_array_equal(dataset[...].astype(np.float32), store.read(layer))
            assert [dim.label for dim in dataset.dims] == ["image", "head", "query", "key"]
        assert [name.decode() for name in opened["images/id"]] == list(store.image_ids)
        assert [opened[f"attention/layer_0{layer}"].attrs["precision"] for layer in (0, 1)] == 2 * [
            PRECISIONS[encoding]
        ]
    kept = "bf16" if encoding == "bf16" else "fp16"
    assert main(["import", "--hdf5", str(file), "--store", str(back), "--encoding", kept, "--batch-size", "5"]) == 0
    assert "11 images, 2 layers" in capsys.readouterr().out
    again = AttentionStore.open(back)
    assert (again.image_ids, again.sites, again.layouts) == (store.image_ids, store.sites, store.layouts)
    np.testing.assert_array_equal(again.labels, store.labels)
    assert again.class_names == store.class_names
    for layer in (0, 1):
        whole = store.read(layer)
        same = whole.astype(np.float16).astype(np.float32) if encoding == "qk" else whole
        np.testing.assert_array_equal(again.read(layer), same)
    assert verify(back) == []
    printed = capsys.readouterr()
    assert main(["measure", "--store", str(back), "--metrics", "distance,entropy"]) == 0
    assert "rows are no post-softmax attention" not in "".join([*capsys.readouterr(), *printed])
    assert not AttentionStore.open(back).read_undefined("entropy")[:, :, :2].any()
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("maps")) == ["maps.h5"]


@pytest.mark.parametrize("one_array", [True, False])
def test_a_users_own_file(tmp_path: Path, one_array: bool) -> None:
    """Plain arrays: one a layer under names that are no numbers' order as text, or one for all layers."""
    rng = np.random.default_rng(0)
    maps = {f"block{layer}": rng.dirichlet(np.ones(14), size=(6, 2, 14)).astype(np.float32) for layer in (2, 10)}
    with h5py.File(tmp_path / "own.h5", "w") as file:
        if one_array:
            file["attention"] = np.stack(list(maps.values()), axis=1)
        else:
            for name in ("block10", "block2"):
                file[f"vit/{name}"] = maps[name]
    command = ["import", "--hdf5", str(tmp_path / "own.h5"), "--store", str(tmp_path / "own.zarr")]
    command += ["--grid", "3,4", "--hdf5.prefix_tokens", "2", "--hdf5.patch_px", "4,4"]
    assert main([*command, *(["--axes", "image,layer,head,query,key"] if one_array else [])]) == 0
    store = AttentionStore.open(tmp_path / "own.zarr")
    assert store.sites == (("attention[0]", "attention[1]") if one_array else ("vit/block2", "vit/block10"))
    assert store.layouts[0] == case.LAYOUT
    for layer, expected in enumerate(maps.values()):
        np.testing.assert_array_equal(store.read(layer), expected.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ({"layer_0": np.full((2, 1, 14, 14), 1 / 14)}, [], "does not say how its 14 tokens lie; give --grid ROWS,COLS"),
        ({"layer_0": np.full((2, 1, 14, 14), 1 / 14)}, ["--grid", "3,3"], "a grid of 3×3 with 1 prefix tokens has 10"),
        (
            {"layer_0": np.full((2, 1, 13, 13), 0.5)},
            ["--grid", "3,4"],
            "the row of image 0, head 0, query 0 sums to 6.5",
        ),
        ({"layer_0": np.ones((2, 1, 13, 12))}, ["--grid", "3,4"], "as many queries as keys"),
        ({"layer_0": np.ones((2, 1, 13, 13), int)}, ["--grid", "3,4"], "layer_0 is int64"),
        ({"a": np.ones((2, 3))}, [], "holds no attention; expected a dataset"),
        (
            {"attn": np.ones((2, 3, 13, 13))},
            [],
            "may be one layer [image, head, query, key] or one image [layer, head,",
        ),
        (
            {"img_1": np.ones((2, 3, 13, 13)), "img_2": np.ones((2, 3, 13, 13))},
            [],
            "nothing says which; say it with --axes",
        ),
        ({"attn": np.ones((2, 3, 1, 13, 13))}, [], "may be [image, layer, head, query, key] or [layer, image, head,"),
        (
            {"attn": np.ones((2, 3, 1, 13, 13))},
            ["--axes", "layer,head,query,key"],
            "has 5 axes, (2, 3, 1, 13, 13); --axes",
        ),
        (
            {"attn": np.ones((2, 3, 13, 13))},
            ["--axes", "image,image,query,key"],
            "names 'image' more than once",
        ),
        ({}, ["--encoding", "qk"], "encoding qk keeps query and key, and a file of maps has none"),
    ],
)
def test_files_that_hold_something_else_are_one_sentence(
    tmp_path: Path, content: dict[str, np.ndarray], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(tmp_path / "own.h5", "w") as file:
        for name, values in content.items():
            file[name] = values
    assert main(["import", "--hdf5", str(tmp_path / "own.h5"), "--store", str(tmp_path / "s.zarr"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


GRID = ["--grid", "3,4", "--hdf5.prefix_tokens", "2", "--hdf5.patch_px", "4,4"]


def own_file(folder: Path, attention: np.ndarray, name: str = "layer_0", **images: object) -> list[str]:
    """A user's file of one dataset, its images' names and labels; the command that imports it."""
    with h5py.File(folder / "own.h5", "w") as file:
        file[name] = attention
        for key, values in images.items():
            file[f"images/{key}"] = values
    return ["import", "--hdf5", str(folder / "own.h5"), "--store", str(folder / "own.zarr"), *GRID]


def rows(*shape: int) -> np.ndarray:
    """Post-softmax maps [*shape, query, key] of 14 tokens."""
    return np.random.default_rng(0).dirichlet(np.ones(14), size=(*shape, 14)).astype(np.float32)


def test_the_order_of_axes_comes_from_labels_scales_a_flag_or_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 layers of 5 images with 2 heads, layers first."""
    maps = rows(3, 5, 2)
    command = own_file(tmp_path, maps, "attentions")

    def imported(*flags: str) -> tuple[AttentionStore, str]:
        assert main([*command, *flags]) == 0
        store, printed = AttentionStore.open(tmp_path / "own.zarr"), "".join(capsys.readouterr())
        for layer in store.layers:
            np.testing.assert_array_equal(store.read(layer), maps[layer].astype(np.float16).astype(np.float32))
        for folder in ("own.zarr", "own.ledger"):
            shutil.rmtree(tmp_path / folder)
        return store, printed

    assert main(command) == 2
    assert not (tmp_path / "own.zarr").exists()
    capsys.readouterr()
    for how in ("labels", "plurals", "scales", "flag", "ids", "labels of images"):
        with h5py.File(tmp_path / "own.h5", "w") as file:
            dataset = file.create_dataset("attentions", data=maps)
            for axis, name in enumerate(("layer", "image", "head", "query", "key")):
                if how in ("labels", "plurals"):
                    dataset.dims[axis].label = name if how == "labels" else f"{name.title()}s".replace("ys", "y")
                if how == "scales":
                    file[name] = np.arange(dataset.shape[axis])
                    file[name].make_scale(name)
                    dataset.dims[axis].attach_scale(file[name])
            if how == "ids":
                file["images/id"] = [f"{row}.png" for row in range(5)]
            if how == "labels of images":
                file["images/label"] = np.arange(5)
        store, printed = imported(*(["--axes", "layer,image,head,query,key"] if how == "flag" else []))
        assert "attentions is taken as [layer, image, head, query, key], " in printed
        assert "5 images, 3 layers" in printed
        assert (store.schema.num_images, len(store.layers)) == (5, 3)
        assert "the dimension labels" not in printed
        if how == "labels":
            contrary = [str(tmp_path / "contrary.zarr") if flag.endswith("own.zarr") else flag for flag in command]
            contrary += ["--axes", "image,layer,head,query,key"]
            assert main(contrary) == 0
            said = capsys.readouterr().out
            assert "as --axes says (the dimension labels of attentions say [layer, image, head, query, key])" in said


def test_a_dataset_is_an_image_where_it_has_no_such_axis(tmp_path: Path) -> None:
    """Groups per image, keys before queries, and no axis of heads."""
    maps = rows(3, 2)  # [image, layer, query, key]
    with h5py.File(tmp_path / "own.h5", "w") as file:
        for number in (2, 10, 1):
            image = maps[(1, 2, 10).index(number)]
            file[f"cat {number}.jpg/attn"] = np.stack([image, image], axis=-1).swapaxes(1, 2)[..., :1]
    command = ["import", "--hdf5", str(tmp_path / "own.h5"), "--store", str(tmp_path / "own.zarr"), *GRID]
    assert main([*command, "--batch-size", "2", "--axes", "layer,key,query,head"]) == 0
    store = AttentionStore.open(tmp_path / "own.zarr")
    assert store.image_ids == tuple(f"cat {number}.jpg/attn" for number in (1, 2, 10))
    assert store.sites == ("layer_0", "layer_1")
    for layer in (0, 1):
        np.testing.assert_array_equal(store.read(layer)[:, 0], maps[:, layer].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.arange(3) + 7, ("7", "8", "9")),
        (np.array([[1.0], [2.0], [3.0]]), ("1", "2", "3")),
        (np.array([[99, 97], [100, 111], [98, 32]], "u2"), ("ca", "do", "b")),
        (np.array([b"caf\xe9", "é".encode(), b"a/../b"], "S8"), ("café", "é", "a/../b")),
        (np.array(["ü", "x" * 300, "z"], h5py.string_dtype()), ("ü", "x" * 300, "z")),
    ],
)
def test_names_of_any_type_are_text(tmp_path: Path, ids: np.ndarray, expected: tuple[str, ...]) -> None:
    assert main(own_file(tmp_path, rows(3, 1), id=ids)) == 0
    assert AttentionStore.open(tmp_path / "own.zarr").image_ids == expected


def test_what_matlab_writes_is_read(tmp_path: Path) -> None:
    """A cell of characters, a row of doubles, and a matrix of characters, whose axes are reversed."""
    command = own_file(tmp_path, rows(3, 1), label=np.array([[2.0, 0.0, -1.0]]))
    with h5py.File(tmp_path / "own.h5", "a") as file:
        cells = [
            file.create_dataset(f"#refs#/{n}", data=np.array([[ord(c)] for c in n], "u2")) for n in ("a1", "b", "c")
        ]
        file.create_dataset(
            "images/id", data=np.array([[cell.ref for cell in cells]], h5py.ref_dtype), dtype=h5py.ref_dtype
        )
    assert main(command) == 0
    store = AttentionStore.open(tmp_path / "own.zarr")
    assert (store.image_ids, store.labels.tolist()) == (("a1", "b", "c"), [2, 0, -1])
    with h5py.File(tmp_path / "chars.h5", "w") as file:
        dataset = file.create_dataset(
            "names", data=np.array([[ord(c) for c in name] for name in ("ab", "cd", "ef")], "u2").T
        )
        dataset.attrs["MATLAB_class"] = np.bytes_("char")
        assert read_names(dataset) == ["ab", "cd", "ef"]


def test_labels_that_are_names_number_the_classes(tmp_path: Path) -> None:
    labels = np.array([b"kitchen", b"bar", b"", b"kitchen"], "S8")
    assert main(own_file(tmp_path, rows(4, 1), label=labels)) == 0
    store = AttentionStore.open(tmp_path / "own.zarr")
    assert (store.class_names, store.labels.tolist()) == (("bar", "kitchen"), [1, 0, -1, 1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            {"label": np.array([0, np.nan, 1])},
            "images/label holds nan for image 1; expected whole numbers or class names",
        ),
        ({"label": np.array([0, 1.5, 1])}, "images/label holds 1.5 for image 1; expected whole numbers or class names"),
        ({"label": np.array([0, -3, 1])}, "images/label holds -3 for image 1; expected 0 or more, or -1"),
        (
            {"label": np.zeros((3, 2))},
            "images/label is float64 3×2; expected whole numbers or class names, one for each image",
        ),
        ({"label": np.zeros(3, "V4")}, "images/label is |V4 3; expected whole numbers or class names"),
        ({"id": np.array([b"a", b"b", b"a"])}, "images/id names images 0 and 2 both 'a'; expected a name for each"),
        ({"id": np.arange(2)}, "images/id has 2 entries for 3 images"),
        ({"id/more": np.arange(3)}, "images/id is a group; expected a dataset"),
    ],
)
def test_names_and_labels_that_are_none_are_one_sentence(
    tmp_path: Path, images: dict[str, np.ndarray], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*own_file(tmp_path, rows(3, 1), **images), "--axes", "image,head,query,key"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "own.zarr").exists()


@pytest.mark.parametrize("layout", ["14x14", '{"rows": 4}', "[]", "3"])
def test_a_layout_that_is_not_ours_needs_the_flag(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = own_file(tmp_path, rows(3, 1))
    with h5py.File(tmp_path / "own.h5", "a") as file:
        file["layer_0"].attrs["layout"] = layout
    assert main(command[:5]) == 2
    assert f"its attribute layout is {layout!r}, which is none of this program's" in capsys.readouterr().err
    assert main(command) == 0
    assert "--grid is taken instead" in capsys.readouterr().out


def test_what_is_read_from_no_dataset_of_the_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of images under another name than `images/id` would be lost in silence."""
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file["blocks.0"] = case.maps(0)
        file["images/label"] = np.arange(case.IMAGES)
        file["image_ids"] = [f"{row}.png" for row in range(case.IMAGES)]
        file["#refs#/a"] = [1]
    command = ["import", "--hdf5", str(path), "--store", str(tmp_path / "own.zarr"), "--grid", "3,4"]
    assert main([*command, "--hdf5.prefix_tokens", "2"]) == 0
    said = "".join(capsys.readouterr())
    assert "not used: image_ids (names of images are read from images/id" in said
    assert AttentionStore.open(tmp_path / "own.zarr").image_ids[0] == "image_000000"


def test_byte_order_and_length_of_floats_change_nothing(tmp_path: Path) -> None:
    for dtype in (">f2", ">f4", "<f8"):
        assert main(own_file(tmp_path, rows(3, 1).astype(np.float16).astype(dtype))) == 0
        store = AttentionStore.open(tmp_path / "own.zarr")
        np.testing.assert_array_equal(store.read(0), rows(3, 1).astype(np.float16).astype(np.float32))
        for folder in ("own.zarr", "own.ledger"):
            shutil.rmtree(tmp_path / folder)


def test_rows_sum_to_one_within_their_own_precision_and_nan_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = rows(3, 1)
    assert main(own_file(tmp_path, maps * np.float32(1.0005))) == 2
    assert "expected non-negative values that sum to 1 within 0.0001 (float32)" in capsys.readouterr().err
    assert main(own_file(tmp_path, maps.swapaxes(-1, -2))) == 2
    assert "its columns do, so if keys come before queries, say so with --axes" in capsys.readouterr().err
    coarse = (maps.view(np.uint32) & 0xFFFF0000).view(np.float32)  # cut off: rows are up to 8e-3 off
    assert main(own_file(tmp_path, coarse)) == 2
    assert "as rows of bfloat16 do, and fp16 is read as attention within 0.002 only" in capsys.readouterr().err
    coarse[1, 0, 3:5, 7] = np.nan
    assert main([*own_file(tmp_path, coarse), "--encoding", "bf16"]) == 0
    assert "2 rows of layer_0 hold NaN; they are left out and counted" in capsys.readouterr().out
    assert main(["measure", "--store", str(tmp_path / "own.zarr"), "--metrics", "entropy"]) == 0
    assert AttentionStore.open(tmp_path / "own.zarr").read_undefined("entropy").ravel().tolist() == [0, 2, 0]


def test_a_file_that_is_refused_leaves_nothing_and_a_stopped_import_is_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, place = rows(5, 1), tmp_path / "own.zarr"
    wrong = maps.copy()
    wrong[4] *= 1.01
    command = [*own_file(tmp_path, wrong), "--batch-size", "2"]
    assert main(command) == 2
    assert "the row of image 4, head 0, query 0 sums to 1.01" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own.h5"]

    def stop(writer: object) -> None:
        raise KeyboardInterrupt

    own_file(tmp_path, maps[:4])
    with monkeypatch.context() as stopped:
        stopped.setattr("store.writer.AttentionWriter.finish", stop)
        assert main(command) == 130
    assert [str(damage) for damage in verify(place)] != []
    for refused in (["verify"], ["measure", "--metrics", "entropy", "--store"], ["info"]):
        assert main([*refused, str(place)]) == 1
        assert "is an import that was not finished; import its file again" in "".join(capsys.readouterr())
    own_file(tmp_path, maps)
    assert main(command) == 0
    assert verify(place) == []
    np.testing.assert_array_equal(AttentionStore.open(place).read(0), maps.astype(np.float16).astype(np.float32))
    own_file(tmp_path, maps[::-1])
    assert main(command) == 1  # a whole store is not replaced
    assert "was captured with another dataset.sha256" in capsys.readouterr().err


def test_an_export_takes_no_place_but_an_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, file = store_of(tmp_path / "one.zarr"), tmp_path / "maps.h5"
    own_file(tmp_path, rows(3, 1))
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    before = (tmp_path / "own.h5").read_bytes()
    for name, message in (
        ("own.h5", "is there and no export of this program, so it is kept"),
        ("notes.txt", "is there and no export of this program, so it is kept"),
        ("pipe", "is a folder or a device"),
        ("/dev/full", "is a folder or a device"),
        (".", "is a folder or a device"),
        ("one.zarr/maps.h5", "lies inside"),
        ("one.ledger/maps.h5", "lies inside"),
    ):
        assert main(["export", "--store", str(store), "--hdf5", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "own.h5").read_bytes() == before
    assert verify(store) == []
    (tmp_path / "link.h5").symlink_to(file)
    for target in ("link.h5", "maps.h5"):
        assert main(["export", "--store", str(store), "--hdf5", str(tmp_path / target)]) == 0
    assert (tmp_path / "link.h5").is_symlink()
    with h5py.File(file, "a") as opened:  # one that was changed is an export still
        del opened.attrs["schema"]
    assert main(["export", "--store", str(store), "--hdf5", str(file)]) == 0


def test_a_flipped_bit_of_an_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, strings, attributes and what lies where have no checksum in HDF5; some flips there end the process."""
    file, store = tmp_path / "maps.h5", tmp_path / "again.zarr"
    assert main(["export", "--store", str(store_of(tmp_path / "run.zarr")), "--hdf5", str(file)]) == 0
    sound = file.read_bytes()
    places = [sound.index(b"SNOD"), sound.index(b"classe"), sound.index(b"grid_rows"), len(sound) - 1]
    for place in places + random.Random(0).sample(range(512, len(sound)), 8):
        content = bytearray(sound)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        assert main(["import", "--hdf5", str(file), "--store", str(store)]) == 2
        assert f"{file} is damaged" in capsys.readouterr().err
        assert not store.exists()
    # A damaged export is still one, and is replaced; a file that is not sealed is damaged where HDF5 says so.
    assert main(["export", "--store", str(tmp_path / "run.zarr"), "--hdf5", str(file)]) == 0
    assert file.read_bytes() == sound
    file.write_bytes(bytes(512) + sound[512:].replace(b"SNOD", b"SNOE"))
    assert main(["import", "--hdf5", str(file), "--store", str(store)]) == 2
    assert f"{file} is damaged: " in capsys.readouterr().err


def test_an_incomplete_store_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with case.AttentionWriter.open(tmp_path / "run.zarr", case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 1)
    assert main(["export", "--store", str(tmp_path / "run.zarr"), "--hdf5", str(tmp_path / "maps.h5")]) == 1
    assert "lacks 7 images; resume its capture" in capsys.readouterr().err
    (tmp_path / "run.ledger" / "batch_000001.json").write_bytes(b"{}")
    assert main(["export", "--store", str(tmp_path / "run.zarr"), "--hdf5", str(tmp_path / "maps.h5")]) == 1
    assert "batch_000001.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "maps.h5").exists()


def test_a_store_of_metrics_alone_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.capture(tmp_path / "run.zarr", case.make_schema(encoding=""))
    assert main(["export", "--store", str(tmp_path / "run.zarr"), "--hdf5", str(tmp_path / "maps.h5")]) == 1
    assert "run.zarr holds metrics only, and an export is of attention" in capsys.readouterr().err
    assert not (tmp_path / "maps.h5").exists()
