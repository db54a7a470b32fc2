"""Tables as HDF5, for those who work in MATLAB, R or Julia: a netCDF-4 file, labelled dimensions, attributes kept."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from store.hdf5_file import BLOCK_BYTES, check_seal, is_sealed, sealed
from store.schema import MARK, StoreError

if TYPE_CHECKING:
    import xarray

_TABLE = f"{MARK}-table/"
SCHEMA = f"{_TABLE}2"


def write_table(dataset: xarray.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a dataset as one HDF5 file: a dataset for each variable, coordinates as dimension scales.

    The file appears under its name only when it is whole, and has the same bytes whenever it is written. Chunks are
    gzipped and carry a Fletcher-32 checksum, which every reader checks; the block before it holds the sha256 of
    everything behind it, which `read_table` checks.

    Args:
        dataset: numbers, booleans and strings; attributes are numbers and strings.
        path: the file; a table that is there is replaced.

    Raises:
        DiskError: the file cannot be written.
        StoreError: a variable or an attribute of another type, or something else lies there.
    """
    packed = {"zlib": True, "shuffle": True, "fletcher32": True}
    numbers = [name for name, values in dataset.variables.items() if values.dtype.kind in "biuf" and values.size > 1]
    content = io.BytesIO()  # in memory: where HDF5's library meets a full disk, it can end the process
    try:
        dataset.to_netcdf(content, engine="h5netcdf", encoding=dict.fromkeys(numbers, packed))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} cannot be written as a table: {error}") from error
    with sealed(Path(path), SCHEMA, _is_table) as partial, open(partial, "wb") as file:
        file.write(bytes(BLOCK_BYTES))
        file.write(content.getbuffer())


def read_table(path: str | os.PathLike[str]) -> xarray.Dataset:
    """Read what `write_table` wrote.

    Raises:
        StoreError: there is no such file, it is damaged, or it was not written by `write_table`.
    """
    import xarray

    try:
        if check_seal(Path(path), SCHEMA):
            return xarray.load_dataset(path, engine="h5netcdf")
    except OSError as error:
        raise StoreError(f"{path} cannot be read as a table: {error}") from error
    raise StoreError(f"{path} was not written by write_table: it does not begin with {SCHEMA!r}")


def _is_table(path: Path) -> bool:
    """Whether `write_table` wrote a file, sound or damaged, in this version or an earlier one."""
    return is_sealed(path, _TABLE)
