"""Tables as HDF5, for those who work in MATLAB, R or Julia: labelled dimensions, attributes kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from store.hdf5_file import new_hdf5
from store.hdf5_seal import DAMAGE, check_seal, is_sealed
from store.schema import MARK, StoreError

if TYPE_CHECKING:
    import xarray

SCHEMA = f"{MARK}-table/1"
_ORDER = "variable_order"
_JSON = "json_attributes"  # names of attributes kept as JSON, for HDF5 attributes hold no lists or dicts


def write_table(dataset: xarray.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a dataset as one HDF5 file: a dataset a variable, coordinates as dimension scales.

    The file appears under its name only when it is whole. Chunks are gzipped and carry a Fletcher-32 checksum, which
    every reader checks; its user block holds the sha256 of everything behind it, which `read_table` checks.

    Args:
        dataset: numbers, booleans and strings; dimensions of any names.
        path: the file; a table that is there is replaced.

    Raises:
        DiskError: the file cannot be written.
        StoreError: a variable of another type, or something else lies there.
    """
    with new_hdf5(Path(path), SCHEMA, _is_table) as (file, check):
        _set_attributes(file, dataset.attrs)
        file.attrs[_ORDER] = json.dumps({"coords": list(map(str, dataset.coords)), "data": list(map(str, dataset))})
        for name, variable in dataset.variables.items():
            _write_variable(file, str(name), variable)
            check()
        for name, variable in dataset.variables.items():
            for axis, dim in enumerate(variable.dims):
                file[str(name)].dims[axis].label = str(dim)
                if dim in dataset.coords and dim != name:
                    file[str(name)].dims[axis].attach_scale(file[str(dim)])


def read_table(path: str | os.PathLike[str]) -> xarray.Dataset:
    """Read what `write_table` wrote.

    Raises:
        StoreError: there is no such file, it is damaged, or it was not written by `write_table`.
    """
    import h5py
    import xarray

    try:
        if not check_seal(Path(path), SCHEMA):
            raise StoreError(f"{path} was not written by write_table: it does not begin with {SCHEMA!r}")
        with h5py.File(path, "r") as file:
            order = json.loads(file.attrs[_ORDER])
            variables = {name: _read_variable(file[name]) for name in [*order["coords"], *order["data"]]}
            coords = {name: variables[name] for name in order["coords"]}
            data = {name: variables[name] for name in order["data"]}
            return xarray.Dataset(data, coords, _get_attributes(file))
    except (OSError, KeyError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a table: {error}") from error


def _is_table(path: Path) -> bool:
    """Whether `write_table` wrote a file, sound or damaged; earlier versions put no seal before their tables."""
    import h5py

    if is_sealed(path, SCHEMA):
        return True
    try:
        with h5py.File(path, "r") as file:
            return _ORDER in file.attrs
    except DAMAGE:
        return False


def _write_variable(file: Any, name: str, variable: xarray.Variable) -> None:
    import h5py

    values = np.asarray(variable.values)
    options: dict[str, Any] = {}
    if values.dtype.kind in "OUT":
        strangers = {type(value).__name__ for value in values.ravel().tolist() if not isinstance(value, str)}
        if strangers:
            raise StoreError(f"variable {name!r} holds {', '.join(sorted(strangers))}; expected numbers or strings")
        values, options["dtype"] = values.astype(object), h5py.string_dtype()
    elif values.dtype.kind not in "biuf":
        raise StoreError(f"variable {name!r} has dtype {values.dtype}; HDF5 export takes numbers, booleans, strings")
    elif values.ndim and values.size:
        options |= {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True}
    dataset = file.create_dataset(name, data=values, **options)
    _set_attributes(dataset, variable.attrs)
    if variable.dims == (name,):
        dataset.make_scale(name)


def _read_variable(dataset: Any) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
    import h5py

    values = dataset[...]
    if h5py.check_string_dtype(dataset.dtype) is not None:
        values = np.asarray(dataset.asstr()[...]).astype(str)
    return tuple(dim.label for dim in dataset.dims), values, _get_attributes(dataset)


def _set_attributes(target: Any, attributes: Mapping[Any, Any]) -> None:
    as_json = []
    for name, value in attributes.items():
        if isinstance(value, str | bool | int | float | np.generic | np.ndarray):
            target.attrs[str(name)] = value
        else:
            target.attrs[str(name)] = json.dumps(value)
            as_json.append(str(name))
    if as_json:
        target.attrs[_JSON] = json.dumps(as_json)


def _get_attributes(source: Any) -> dict[str, Any]:
    own = {_JSON, _ORDER, "CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST"}
    as_json = set(json.loads(source.attrs.get(_JSON, "[]")))
    attributes: dict[str, Any] = {}
    for name, value in source.attrs.items():
        if name in as_json:
            attributes[name] = json.loads(value)
        elif name not in own:
            attributes[name] = value.item() if isinstance(value, np.generic) else value
    return attributes
