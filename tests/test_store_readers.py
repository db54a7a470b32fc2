"""Other people's readers: the numeric arrays of a store, as they are, without this project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import store_cases as case
import tensorstore
import xarray
import zarr

from store import AttentionStore

ENCODINGS = ("fp16", "bf16", "qk")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete store of each encoding, with chunks of 2 images in shards of 6, the last of them half empty."""
    paths = {}
    for encoding in ENCODINGS:
        paths[encoding] = tmp_path_factory.mktemp(encoding) / "run.zarr"
        case.capture(paths[encoding], case.make_schema(encoding, batch_size=6))
    return paths


def numeric_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every numeric array of a store, as zarr-python reads it."""
    group = zarr.open_group(path, mode="r")
    arrays = {name: member for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    return {name: np.asarray(array[...]) for name, array in arrays.items() if name != "images/id"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zarr_python_reads_what_the_own_encoder_wrote(stores: dict[str, Path], encoding: str) -> None:
    store = AttentionStore.open(stores[encoding])
    found = numeric_arrays(stores[encoding])
    if encoding == "qk":
        np.testing.assert_array_equal(found["attention/layer_00/query"], store.read_factors(0).query)
        np.testing.assert_array_equal(found["attention/layer_01/key"], store.read_factors(1).key)
        np.testing.assert_array_equal(found["attention/layer_01/bias"], store.read_factors(1).bias[:, 0, 0])
    else:
        for layer in (0, 1):
            np.testing.assert_array_equal(found[f"attention/layer_0{layer}"], store.read_stored(layer))
    np.testing.assert_array_equal(found["logits"], case.logits())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tensorstore_reads_every_numeric_array(stores: dict[str, Path], encoding: str) -> None:
    for name, expected in numeric_arrays(stores[encoding]).items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{stores[encoding]}/{name}/"}}
        opened = tensorstore.open(spec, read=True).result()
        assert opened.domain.labels[0] == "image" or name.endswith("/bias")
        np.testing.assert_array_equal(opened.read().result(), expected, err_msg=name)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_xarray_opens_every_group_with_its_dimensions(stores: dict[str, Path], encoding: str) -> None:
    for name, expected in numeric_arrays(stores[encoding]).items():
        group, _, leaf = name.rpartition("/")
        # Layers differ in shape, and with it in the sizes of their dimensions.
        others = [layer for layer in ("layer_00", "layer_01") if group == "attention" and layer != leaf]
        opened = xarray.open_zarr(
            stores[encoding], group=group or None, consolidated=False, mask_and_scale=False, drop_variables=others
        )
        np.testing.assert_array_equal(opened[leaf].values, expected, err_msg=name)
        assert len(set(opened[leaf].dims)) == expected.ndim


def test_zarrs_reads_every_numeric_array(stores: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own: zarrs replaces zarr-python's codecs for good."""
    script = (
        "import sys, numpy, zarr, zarrs\n"
        "zarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})\n"
        "for number, name in enumerate(sys.argv[3:]):\n"
        "    array = zarr.open_array(f'{sys.argv[1]}/{name}', mode='r')\n"
        "    assert 'Zarrs' in type(array._async_array.codec_pipeline).__name__\n"
        "    numpy.save(f'{sys.argv[2]}/{number}.npy', array[...])\n"
    )
    for encoding in ENCODINGS:
        arrays = numeric_arrays(stores[encoding])
        command = [sys.executable, "-c", script, str(stores[encoding]), str(tmp_path), *arrays]
        subprocess.run(command, check=True)
        for number, (name, expected) in enumerate(arrays.items()):
            np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), expected, err_msg=name)


def test_two_runs_write_the_same_bytes(stores: dict[str, Path], tmp_path: Path) -> None:
    for encoding in ENCODINGS:
        path = tmp_path / encoding / "run.zarr"
        path.parent.mkdir()
        case.capture(path, case.make_schema(encoding, batch_size=6))
        assert case.file_bytes(path / "attention") == case.file_bytes(stores[encoding] / "attention")
