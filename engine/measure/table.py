"""Stores -> table [condition, seed, image, layer, head], as Zarr, HDF5 and CSV."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.capture import heads_on_prefix, stored_parameters
from engine.config import TABLE_AXES as AXES
from engine.config import load_metrics
from kernels import METRICS
from store import AttentionStore
from store.disk import making
from store.removal import attributes_of, holds_only
from train.errors import InputError, brief

if TYPE_CHECKING:
    import xarray


def build_table(
    stores: Mapping[tuple[str, int], AttentionStore],
    metrics: Sequence[str],
    *,
    conventions: Sequence[str] | None = None,
    seed_invariant: Sequence[str],
    attributes: Mapping[str, Any],
) -> xarray.Dataset:
    """One variable per metric over (condition, seed, image, layer, head[, region]).

    The coordinate `region_area` [image, region] is each region's share of the patches' area: what an even spread of
    attention would put on it.

    Args:
        stores: (condition, seed) -> its capture, all over the same images.
        metrics: names or `module:name`; each must be in every store.
        conventions: of the same things, measured beside them to see what depends on the convention; None: not asked
            for. The attribute `conventions` names them, and `engine.config.chosen_metrics` leaves them out.
        seed_invariant: conditions captured once; their values stand at every seed.
        attributes: of the data set (model, dataset, …); `precision`, `undefined` and `metrics` come out of the stores.

    Raises:
        InputError: the captures are not over the same images, layers, heads and seeds.
    """
    import xarray

    first = next(iter(stores.values()))
    conditions = list(dict.fromkeys(condition for condition, _ in stores))
    seeds = sorted({seed for condition, seed in stores if condition not in seed_invariant}) or [next(iter(stores))[1]]
    for key, store in stores.items():
        _require_same(first, store, key)
    # The capture whose values stand at a condition and a seed: its own, or the one of all seeds.
    pick = {(condition, seed): (condition, seed) for condition in conditions for seed in seeds}
    pick |= {
        key: next(captured for captured in stores if captured[0] == key[0]) for key in pick if key[0] in seed_invariant
    }
    for key in pick.values():
        if key not in stores:
            raise InputError(f"{key[0]} has no capture of seed {key[1]}, which another condition has; capture it too")
    schema = first.schema
    coords: dict[str, Any] = {
        "condition": _names(conditions),
        "seed": seeds,
        "image": _names(first.image_ids),
        "layer": [layer.layer for layer in schema.layers],
        "head": np.array(schema.head_ids or range(schema.max_heads)),
        "site": ("layer", _names(layer.site for layer in schema.layers)),
        "label": ("image", first.labels),
        "class_name": ("image", _names(first.class_names[label] for label in first.labels)),
        "seed_invariant": ("condition", [condition in seed_invariant for condition in conditions]),
    }
    if (coverage := first.regions) is not None:
        coords["region"] = _names(schema.regions)
        coords["region_area"] = (("image", "region"), coverage.mean(axis=2, dtype=np.float64))
    variables: dict[str, Any] = {}
    undefined: dict[str, dict[str, int]] = {}
    for spec in load_metrics((*metrics, *(conventions or ()))):
        backends = set()
        of_capture: dict[tuple[str, int], np.ndarray] = {}
        undefined[spec.name] = dict.fromkeys(conditions, 0)
        for key in dict.fromkeys(pick.values()):  # each capture once, at however many seeds its values stand
            store = stores[key]
            parameters = stored_parameters(store, spec)
            if parameters is None:
                raise InputError(f"{store.path} has no {spec.name}; measure it first")
            of_capture[key], _ = store.read_metric(spec.name, params=parameters)
            backends.add(parameters["backend"])
            counts = store.read_undefined(spec.name, params=parameters)
            undefined[spec.name][key[0]] += int(counts.clip(min=0).sum())
        columns = [np.stack([of_capture[pick[condition, seed]] for seed in seeds]) for condition in conditions]
        dims = ("condition", "seed", *spec.axes)
        described = {
            "units": spec.unit,
            "title": spec.title or spec.name,
            "undefined": spec.undefined,
            "source": spec.source,
            "construct": spec.construct,
            "convention": spec.convention,
            "backend": ", ".join(sorted(backends)),
        }
        variables[spec.name] = (dims, np.stack(columns), described)
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in attributes.items()}
    precisions = sorted({store.schema.precision for store in stores.values()})
    plain |= {
        "precision": ", ".join(precisions),
        "undefined": json.dumps(undefined),
        "metrics": json.dumps(list(variables)),
    }
    if conventions is not None:
        plain["conventions"] = json.dumps(list(conventions))
    return xarray.Dataset(variables, coords, plain)


def _names(names: Iterable[str]) -> np.ndarray:
    """Strings as objects: Zarr v3 has a type for strings of any length, and none for NumPy's fixed-length ones."""
    return np.array(list(names), dtype=object)


def _require_same(first: AttentionStore, store: AttentionStore, key: tuple[str, int]) -> None:
    if store.image_ids != first.image_ids:
        raise InputError(f"{key[0]} seed {key[1]} was captured over other images than {first.path.name}; capture again")
    if not same_architecture(store, first):
        raise InputError(
            f"{key[0]} seed {key[1]} has other layers, heads or tokens than {first.path.name}; "
            "only models of one architecture at one input size can be compared"
        )


def same_architecture(one: AttentionStore, other: AttentionStore) -> bool:
    """Whether captures have the same layers, heads and tokens, however their attention is kept."""
    schemas = (one.schema, other.schema)
    heads = [schema.head_ids or tuple(range(schema.max_heads)) for schema in schemas]
    layers = [[dataclasses.replace(layer, factors=None) for layer in schema.layers] for schema in schemas]
    return heads[0] == heads[1] and layers[0] == layers[1]


def write_table(table: xarray.Dataset, folder: Path) -> list[Path]:
    """Write `attention_metrics` as .zarr, .h5 and .csv; each appears whole or not at all.

    The CSV is long: one row per (condition, seed, image, layer, head), one column per metric (`metric[region]`).
    """
    from zarr.codecs import Crc32cCodec, ZstdCodec

    from store.hdf5 import write_table as write_hdf5

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"attention_metrics{suffix}" for suffix in (".zarr", ".h5", ".csv")]
    codecs = {"compressors": [ZstdCodec(), Crc32cCodec()]}  # of coordinates too: every reader notices damage
    encoding = {str(name): codecs for name in table.variables}
    with making(paths[0], _is_table) as partial:
        table.to_zarr(partial, mode="w-", zarr_format=3, consolidated=False, encoding=encoding)
    write_hdf5(table, paths[1])
    with making(paths[2], Path.is_file) as partial:  # in metrics/ of the outputs folder, where the name is ours
        _long_frame(table).to_csv(partial, index=False, float_format="%.7g", lineterminator="\n")
    return paths


def _is_table(path: Path) -> bool:
    """Whether a folder holds a table of `write_table`, and nothing else."""
    root = path / "zarr.json"
    attributes = attributes_of(root.read_bytes() if root.is_file() else None)
    is_ours = holds_only(r"(?:[^/]+/)?(?:zarr\.json|c(?:/\d+)*)")
    return {"metrics", "undefined"} <= attributes.keys() and is_ours(path)


def _long_frame(table: xarray.Dataset) -> Any:
    columns: dict[str, Any] = {}
    for name, values in table.data_vars.items():
        if "region" in values.dims:
            columns |= {f"{name}[{key}]": values.sel(region=key, drop=True) for key in table["region"].values}
        else:
            columns[str(name)] = values
    frame = table.assign(columns)[list(columns)].reset_coords(drop=True).to_dataframe(dim_order=AXES).reset_index()
    frame.insert(AXES.index("layer") + 1, "site", frame["layer"].map(table["site"].to_series()))
    return frame.dropna(how="all", subset=list(columns))


def read_table(path: Path) -> xarray.Dataset:
    """The table of `write_table`, from its Zarr form, in memory, its metrics in the order they were asked for.

    Raises:
        InputError: it is not there, damaged, or no such table.
    """
    import xarray

    if not path.exists():
        raise InputError(f"{path}: not found; expected the table that the measure stage writes, so run the study first")
    try:
        table: xarray.Dataset = xarray.load_dataset(path, engine="zarr", consolidated=False)
        table = table[json.loads(table.attrs["metrics"])]  # a folder's listing has an order of its own
    except Exception as error:  # zarr, xarray and the codecs share no base class
        raise InputError(f"{path}: cannot be read as an xarray table in Zarr ({brief(error)})") from error
    wrong = [f"{name} over {values.dims}" for name, values in table.items() if values.dims[:5] != AXES]
    wrong += [
        f"no coordinate {axis}" for axis in dict.fromkeys((*AXES, *map(str, table.dims))) if axis not in table.coords
    ]
    if wrong or not table.data_vars:
        raise InputError(
            f"{path}: has {', '.join(wrong) or 'no metric'}; expected one variable per metric over {', '.join(AXES)}"
        )
    return table


def prefix_mass_warning(table: xarray.Dataset) -> str:
    """A sentence on the heads whose patches get almost nothing, or "" when there are none."""
    name = next((name for name, spec in METRICS.items() if spec.is_prefix_share), "")
    if name not in table:
        return ""
    means = table[name].mean(["seed", "image"]).stack(cell=("layer", "head", "condition"))
    found = heads_on_prefix(
        {
            f"layer {layer}, head {head} of {condition}": float(mass)
            for (layer, head, condition), mass in zip(means["cell"].values, means.values, strict=True)
        }
    )
    if not found:
        return ""
    return (
        f"{found[0].upper()}{found[1:]}: there the metrics describe how the small remainder is spread over the patches."
    )
