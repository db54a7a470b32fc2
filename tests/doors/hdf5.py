"""HDF5 files of attention, ours and users', with other bytes, another structure or another kind of file: `import`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.fuzz import Trial, changed, command, random_of

SHARE = 40

IMAGES, HEADS, TOKENS = 3, 2, 5  # a grid of 2×2 and a class token
_GRID = ("--grid", "2,2", "--hdf5.patch_px", "8,8")
_LAYOUT = {"grid_rows": 2, "grid_cols": 2, "num_prefix_tokens": 1, "patch_height_px": 8, "patch_width_px": 8}
_AXES = ("image", "head", "query", "key")


def trials(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    path, store = folder / "maps.h5", folder / "maps.zarr"
    export = _export(folder / "sound")
    for number in range(count):
        random = random_of(seed, number)
        for name in ("maps.zarr", "maps.ledger"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for file in folder.glob("*.h5"):
            file.unlink()
        way = random.random()
        if way < 0.4:
            path.write_bytes(changed(_users(), random, (export,)))
            name = "bytes of a user's file"
        elif way < 0.5:
            path.write_bytes(changed(export, random, (_users(),)))
            name = "bytes of an export"
        else:
            name = _structured(path, random, export)
        flags = [*_GRID] if random.random() < 0.8 else []
        if random.random() < 0.3:
            flags += [
                "--axes",
                str(random.choice(["image,head,query,key", "layer,image,head,query,key", "head,layer,key,query"])),
            ]
        arguments = ["import", "--hdf5", str(path), "--store", str(store), *flags]
        yield Trial(f"{name}; {' '.join(flags)}", functools.partial(command, *arguments))


@functools.cache
def _export(folder: Path) -> bytes:
    """The bytes of an export of an import of a user's file."""
    folder.mkdir()
    path, store, export = (folder / name for name in ("maps.h5", "maps.zarr", "export.h5"))
    path.write_bytes(_users())
    assert command("import", "--hdf5", str(path), "--store", str(store), *_GRID) == 0
    assert command("export", "--store", str(store), "--hdf5", str(export)) == 0
    content = export.read_bytes()
    shutil.rmtree(folder)
    return content


@functools.cache
def _users() -> bytes:
    """The bytes of a sound file of a user's own."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for layer in range(2):
            _sound(file, f"attn/layer_{layer}", compression=(None, "gzip")[layer])
        file["images/id"] = [f"room/{row}.jpg" for row in range(IMAGES)]
        file["images/label"] = np.arange(IMAGES)
        file.attrs["note"] = "maps"
    return stream.getvalue()


def _maps(random: np.random.Generator, *shape: int) -> np.ndarray:
    values = random.random(shape) + 0.1
    return (values / values.sum(-1, keepdims=True)).astype(np.float32)


def _sound(file: Any, name: str, **options: Any) -> Any:
    maps = _maps(np.random.default_rng(0), IMAGES, HEADS, TOKENS, TOKENS)
    dataset = file.create_dataset(name, data=maps, chunks=(1, HEADS, TOKENS, TOKENS), **options)
    for axis, label in enumerate(_AXES):
        dataset.dims[axis].label = label
    return dataset


# --- other kinds of files ---------------------------------------------------------------------------------------------

_OTHERS = (
    b"",
    b"<!DOCTYPE html><html><body>404 not found</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    b"MATLAB 5.0 MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2024".ljust(124) + b"\0\1IM" + b"\0" * 99,
    b"CDF\1\0\0\0\0" + b"\0" * 64,
    b"CDF\2" + b"\xff" * 64,
    b"PK\3\4" + b"\0" * 64,
    b"\x93NUMPY\1\0v\0{'descr': '<f4'}",
    b"\x1f\x8b\x08\0" + b"\0" * 32,
    b"\x89HDF\r\n\x1a\n",
    b"\x0e\x03\x13\x01" + b"\0" * 64,  # HDF4
    b"vit-attention-hdf5/1, sha256 of what follows these 512 bytes: ",
)


def _structured(path: Path, random: np.random.Generator, export: bytes) -> str:
    """Write a file of another structure, or of another kind; returns what."""
    name = str(random.choice(sorted(_STRUCTURES)))
    _STRUCTURES[name](path, random, export)
    return name


def _other_file(path: Path, random: np.random.Generator, export: bytes) -> None:
    path.write_bytes(_OTHERS[int(random.integers(len(_OTHERS)))])


def _cut(path: Path, random: np.random.Generator, export: bytes) -> None:
    content = _users() if random.random() < 0.7 else export
    path.write_bytes(content[: int(random.integers(len(content)))])


def _edited(edit: Callable[[Any, np.random.Generator], None]) -> Callable[[Path, np.random.Generator, bytes], None]:
    """A user's sound file, edited."""

    def write(path: Path, random: np.random.Generator, export: bytes) -> None:
        path.write_bytes(_users())
        with h5py.File(path, "r+") as file:
            edit(file, random)

    return write


def _links(file: Any, random: np.random.Generator) -> None:
    other = Path(file.filename).with_name("other.h5")
    with h5py.File(other, "w") as theirs:
        _sound(theirs, "attn/layer_9")
    name = str(random.choice(["attn/layer_0", "attn/layer_2", "images/id", "images/label", "images", "attn", "x"]))
    links = [
        h5py.ExternalLink(str(other), "/attn/layer_9"),
        h5py.ExternalLink("other.h5", "/attn"),
        h5py.ExternalLink("nowhere.h5", "/attn/layer_9"),
        h5py.ExternalLink("maps.h5", "/attn/layer_1"),
        h5py.ExternalLink("/dev/zero", "/attn"),
        h5py.SoftLink("/attn/layer_1"),
        h5py.SoftLink("/nowhere"),
        h5py.SoftLink(f"/{name}"),
        file["/"],
    ]
    if name in file:
        del file[name]
    file[name] = links[int(random.integers(len(links)))]


def _virtual(file: Any, random: np.random.Generator) -> None:
    other = Path(file.filename).with_name("other.h5")
    with h5py.File(other, "w") as theirs:
        _sound(theirs, "attn/layer_9")
    shape = (IMAGES, HEADS, TOKENS, TOKENS)
    layout = h5py.VirtualLayout(shape=shape, dtype="float32")
    source = str(random.choice([str(other), "other.h5", "nowhere.h5", "."]))
    layout[...] = h5py.VirtualSource(source, "attn/layer_9" if source != "." else "attn/layer_1", shape=shape)
    file.create_virtual_dataset(str(random.choice(["attn/layer_2", "layer_0"])), layout)


def _external_storage(file: Any, random: np.random.Generator) -> None:
    raw = str(random.choice(["/etc/hostname", "raw.bin", "/dev/zero"]))
    space = h5py.h5s.create_simple((IMAGES, HEADS, TOKENS, TOKENS))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_external(raw.encode(), 0, h5py.h5f.UNLIMITED)
    h5py.h5d.create(file.id, b"attn/layer_2", h5py.h5t.IEEE_F32LE, space, plist)


def _missing_filter(file: Any, random: np.random.Generator) -> None:
    number = int(random.choice([32015, 32001, 32004, 307, 32008, 65000, h5py.h5z.FILTER_SZIP]))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    shape = (IMAGES, HEADS, TOKENS, TOKENS)
    plist.set_chunk((1, *shape[1:]))
    plist.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (3,))
    name = str(random.choice(["attn/layer_0", "attn/layer_2", "images/label"]))
    if name in file:
        del file[name]
    data = h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), plist)
    for image in range(IMAGES):
        data.write_direct_chunk((image, 0, 0, 0), b"compressed", 0)


def _other_types(file: Any, random: np.random.Generator) -> None:
    name = str(random.choice(["attn/layer_0", "attn/layer_2", "images/id", "images/label", "other"]))
    shapes = [(IMAGES, HEADS, TOKENS, TOKENS), (IMAGES,), (), (0,), (IMAGES, 0, TOKENS, TOKENS), (0, 0, 0, 0)]
    shapes += [(1,) * 32, (IMAGES, 1), (1, IMAGES), (2, IMAGES, HEADS, TOKENS, TOKENS)]
    shape = shapes[0 if random.random() < 0.4 else int(random.integers(len(shapes)))]
    dtypes = ["u1", "i4", "f8", ">f4", "f2", "c8", "?", "S4", "V7", h5py.string_dtype(), h5py.ref_dtype]
    dtypes += [h5py.regionref_dtype, h5py.vlen_dtype("f4"), h5py.enum_dtype({"a": 1}), [("r", "f4"), ("i", "f4")]]
    dtypes += [np.dtype(("f4", (2,))), "f4", "longdouble", h5py.string_dtype("utf-8", 6), h5py.opaque_dtype("M8[s]")]
    if name in file:
        del file[name]
    file.create_dataset(name, shape, dtypes[int(random.integers(len(dtypes)))])


def _empty(file: Any, random: np.random.Generator) -> None:
    for name in ("attn/layer_0", "images/id", "images/label", "attn/layer_1"):
        if random.random() < 0.5:
            del file[name]
            file[name] = h5py.Empty(str(random.choice(["f4", "S3", "i8"])))


def _huge(file: Any, random: np.random.Generator) -> None:
    """Terabytes by its shape, without any data."""
    shapes: list[tuple[int, ...]] = [(10**6, 12, 1025, 1025), (1, 12, 10**5, 10**5), (1, 10**6, TOKENS, TOKENS)]
    shapes += [(10**9, HEADS, TOKENS, TOKENS), (10**5, IMAGES, HEADS, TOKENS, TOKENS), (IMAGES, 1, 2**31, 2**31)]
    shape = shapes[int(random.integers(len(shapes)))]
    keep = random.random() < 0.3
    for name in ["attn", "images"] if not keep else []:
        del file[name]
    file.create_dataset("attn/layer_5", shape, "f2", chunks=(1,) * (len(shape) - 2) + (5, 5))
    if random.random() < 0.3:
        for name in ("images/id", "images/label"):
            if name not in file:
                file.create_dataset(name, (10**10,), "i8", chunks=(1000,))


def _attributes(file: Any, random: np.random.Generator) -> None:
    texts: list[Any] = ["{", "[]", "null", "{}", '"x"', "[" * 100_000, json.dumps(_LAYOUT), b"\xff\xfe", "é\x07\n", 5]
    texts += [np.arange(3), np.float32(1.5), h5py.Empty("f4"), [b"a", b"b"], np.array([["a"]], object), float("nan")]
    for key, value in (("grid_rows", "2"), ("grid_rows", 2.5), ("grid_rows", -2), ("grid_cols", None), ("x", 1)):
        texts.append(json.dumps({**_LAYOUT, key: value}))
    texts += [
        json.dumps({**_LAYOUT, "class_token": True}),
        json.dumps({**_LAYOUT, "grid_rows": 10**30, "grid_cols": 1}),
    ]
    texts += [json.dumps({**_LAYOUT, "patch_height_px": float("nan")}), json.dumps(dict.fromkeys(_LAYOUT, 0))]
    names = ["layout", "site", "precision", "layer", "class_names", "schema", "DIMENSION_LIST", "DIMENSION_LABELS"]
    where = [file, file["attn/layer_0"], file["attn/layer_1"], file["images/label"], file["images/id"], file["attn"]]
    for _ in range(int(random.integers(1, 4))):
        target = where[int(random.integers(len(where)))]
        target.attrs[str(random.choice(names))] = texts[int(random.integers(len(texts)))]


def _entries(file: Any, random: np.random.Generator) -> None:
    """Names and labels of images that are none, too many, the same, or in another form."""
    ids: list[Any] = [
        ["a", "a", "b"],
        [b"caf\xe9", b"\xff\xfe", b"x"],
        [1, 2, 3],
        [1.5, 2, 3],
        [float("nan"), 1, 2],
        ["a"],
    ]
    ids += [
        ["", "", ""],
        ["a\nb", "c\x07d", "e"],
        [10**18, 1, 2],
        [["a", "b"], ["c", "d"], ["e", "f"]],
        "text",
        7,
        [True] * 3,
    ]
    ids += [np.array([[104, 105]] * 3, "u2"), np.array([[55296, 56320]] * 3, "u2"), np.arange(3, dtype="u2")]
    labels: list[Any] = [
        [0, 1, 10**9],
        [-1, -2, 0],
        [2**64 - 1, 0, 1],
        ["a", "b", ""],
        [0.5, 1, 2],
        [1e300, 0, 1],
        [0, 1],
    ]
    labels += [[[0, 1, 2]], [[0], [1], [2]], np.eye(3), [b"\xff", b"a", b"b"], [float("inf"), 0, 0], np.uint64(2**63)]
    for name, values in (("images/id", ids), ("images/label", labels)):
        if random.random() < 0.7:
            del file[name]
            file[name] = values[int(random.integers(len(values)))]


def _references(file: Any, random: np.random.Generator) -> None:
    """Names as MATLAB's cells: references, of which some lead nowhere."""
    del file["images/id"]
    name = str(random.choice(["images/id", "images/label"]))
    if name in file:
        del file[name]
    cells = file.create_dataset(name, (IMAGES,), h5py.ref_dtype)
    targets = [file["attn"], file["attn/layer_0"], file, file["images"], cells]
    for row in range(IMAGES):
        text = file.create_dataset(f"#refs#/{row}", data=np.frombuffer(f"n{row}".encode("utf-16-le"), "u2"))
        target = text if random.random() < 0.6 else targets[int(random.integers(len(targets)))]
        if random.random() < 0.9:
            cells[row] = target.ref
    if random.random() < 0.3:
        del file["#refs#/1"]


def _values(file: Any, random: np.random.Generator) -> None:
    values = _maps(random, IMAGES, HEADS, TOKENS, TOKENS)
    odd = [float("nan"), float("inf"), -0.1, 2.0, 0.0, 1e38, 1e-45]
    for _ in range(int(random.integers(1, 4))):
        at = tuple(int(random.integers(length)) for length in values.shape)
        values[at[: int(random.integers(1, 5))]] = odd[int(random.integers(len(odd)))]
    file["attn/layer_0"][...] = values


def _names(file: Any, random: np.random.Generator) -> None:
    names = [
        b"caf\xe9",
        b"a\nb",
        b"layer\x07",
        "layer_é".encode(),
        b"x" * 3000,
        b"layer_99999999999999999999",
        b".\x1b[31m",
    ]
    names += [b"layer_\xc2\xb2", b"a" * 100 + b"/" + b"b" * 100, "layer_１".encode()]
    for _ in range(int(random.integers(1, 3))):
        name = names[int(random.integers(len(names)))]
        shape = (IMAGES, HEADS, TOKENS, TOKENS) if random.random() < 0.6 else (IMAGES,)
        with contextlib.suppress(ValueError):  # there is one of that name
            file.create_dataset(name, data=_maps(random, *shape))


def _labels(file: Any, random: np.random.Generator) -> None:
    labels = ["image", "layer", "head", "query", "key", "q", "", "phony_dim_0", "IMAGES", "x\ny", "é"]
    for axis in range(4):
        if random.random() < 0.6:
            file["attn/layer_0"].dims[axis].label = str(random.choice(labels))
    if random.random() < 0.3:
        file["attn/scale"] = np.arange(IMAGES)
        file["attn/scale"].make_scale(str(random.choice(labels)))
        file["attn/layer_1"].dims[0].attach_scale(file["attn/scale"])
        if random.random() < 0.5:
            del file["attn/scale"]


def _shapes(file: Any, random: np.random.Generator) -> None:
    del file["attn"]
    for name in [
        str(n) for n in random.choice(["layer_0", "b", "img_1.jpg", "h0", "block10"], size=int(random.integers(1, 3)))
    ]:
        shape = [int(random.choice([1, 2, 3, 4, 5, 6])) for _ in range(int(random.choice([3, 4, 4, 5, 5, 6])))]
        shape[-1] = shape[-2] if random.random() < 0.8 else shape[-1]
        if name not in file:
            file[name] = _maps(random, *shape)


def _deep(file: Any, random: np.random.Generator) -> None:
    group = file
    for _ in range(int(random.choice([10, 500, 3000]))):
        group = group.create_group("g")
    group["layer_0"] = _maps(random, IMAGES, HEADS, TOKENS, TOKENS)


def _many(file: Any, random: np.random.Generator) -> None:
    for number in range(1000):
        file.create_dataset(f"many/x{number}", data=np.float32(0))


_STRUCTURES: dict[str, Callable[[Path, np.random.Generator, bytes], None]] = {
    "another kind of file": _other_file,
    "a cut file": _cut,
    **{
        what: _edited(edit)
        for what, edit in {
            "links": _links,
            "a virtual dataset": _virtual,
            "values in another file": _external_storage,
            "a filter that is not there": _missing_filter,
            "other types": _other_types,
            "empty datasets": _empty,
            "huge shapes": _huge,
            "attributes": _attributes,
            "names and labels": _entries,
            "references": _references,
            "values": _values,
            "odd names": _names,
            "dimension labels": _labels,
            "shapes": _shapes,
            "deep groups": _deep,
            "many datasets": _many,
        }.items()
    },
}
