"""Encodings: what a capture keeps of a model's attention, what comes back, and what is measured from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_cases as case
import timm
import torch
import xarray
import zarr

import kernels
from engine.capture import Capture, capture_attention, capture_to_store
from engine.measure.store import measure_store
from kernels import TokenLayout
from store import AttentionStore, AttentionWriter, Factors, LayerSchema, StoreError, estimate_bytes
from store.arrays import create_constant, layer_arrays
from store.encodings import ENCODINGS, factor_schema
from store.halves import bfloat16_to_float32, float16_to_float32, float32_to_bfloat16, float32_to_float16
from store.verify import info, verify

ALL = tuple(ENCODINGS)
METRICS = ("distance", "entropy", "morans_i", "prefix_mass")


@pytest.mark.parametrize("encoding", ALL)
def test_round_trip(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "run.zarr"
    schema = case.make_schema(encoding)
    assert case.capture(path, schema) == [0, 1, 2]
    case.check_values(path)
    assert AttentionStore.open(path).schema == schema
    assert verify(path) == []
    assert case.capture(path, schema) == []
    assert info(path)["encoding"] == encoding
    written = sum(len(content) for content in case.file_bytes(path.parent).values())
    assert written <= estimate_bytes(schema)


@pytest.mark.parametrize("encoding", ALL)
@pytest.mark.parametrize("images", [slice(2, 9), [10, 0, 5, 5]])
def test_reads_select_images_and_heads(tmp_path: Path, encoding: str, images: Any) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema(encoding))
    store = AttentionStore.open(path)
    for layer, heads in ((0, [2, 0]), (1, slice(1, None))):
        np.testing.assert_array_equal(store.read(layer, images, heads), store.read(layer)[images][:, heads])


def test_factors_come_back_as_they_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema("qk"))
    store = AttentionStore.open(path)
    kept = store.read_factors(0, slice(2, 9), [1])
    given = case.factors(0, slice(2, 9))
    assert kept.scale == given.scale
    np.testing.assert_array_equal(kept.query, given.query[:, [1]].astype(np.float16))
    np.testing.assert_array_equal(kept.bias, given.bias[0, [1]])
    masked = store.read_factors(1, slice(2, 9))
    assert store.precision(1) == "bfloat16"
    np.testing.assert_array_equal(
        (masked.key.astype(np.uint32) << 16).view(np.float32), case.factors(1, slice(2, 9)).key
    )
    np.testing.assert_array_equal(masked.bias, case.factors(1, slice(2, 9)).bias)
    with pytest.raises(StoreError, match="keeps query and key, not maps"):
        store.read_stored(0)
    case.capture(tmp_path / "maps.zarr")
    with pytest.raises(StoreError, match="keeps maps, not query and key"):
        AttentionStore.open(tmp_path / "maps.zarr").read_factors(0)


def test_plain_zarr_and_xarray_read_factors(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    case.capture(path, case.make_schema("qk"))
    query = zarr.open_array(path / "attention/layer_00/query", mode="r")
    np.testing.assert_array_equal(np.asarray(query[:]), case.factors(0, slice(None)).query.astype(np.float16))
    group = xarray.open_zarr(path, group="attention/layer_01", consolidated=False)
    assert group["query"].dims == ("image", "head", "token", "dim")
    assert group["bias"].dims == ("image", "key_token")
    assert group.attrs["factors"]["scale"] == 0.5
    assert json.loads((path / "attention/layer_01/query/zarr.json").read_text())["fill_value"] == 0x7FC0
    assert xarray.open_zarr(path, group="attention/layer_00", consolidated=False)["bias"].shape == (3, 14, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 1.0}, "has scale 1.0; the store's schema has 0.4"),
        ({"bias": None}, "comes without a bias, unlike the first one"),
        ({"query": np.full((4, 3, 14, 6), 7e4, np.float32)}, "query of layer 0 reaches 7e"),
        ({"query": np.full((4, 3, 14, 6), np.nan, np.float32)}, "query of layer 0 reaches nan"),
        ({"key": np.zeros((4, 3, 13, 6), np.float32)}, r"key of layer 0 has shape \(4, 3, 13, 6\); expected"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    schema = case.make_schema("qk")
    with AttentionWriter.open(tmp_path / "run.zarr", schema, **case.fixed(schema)) as writer:
        with pytest.raises(StoreError, match=message):
            writer.add_attention(0, 0, replace(case.factors(0, slice(0, 4)), **changes))
        with pytest.raises(StoreError, match="takes Factors"):
            writer.add_attention(0, 0, case.maps(0)[:4])


def test_another_bias_is_another_capture(tmp_path: Path) -> None:
    path, schema = tmp_path / "run.zarr", case.make_schema("qk")
    case.capture(path, schema)
    other = case.fixed(schema) | {"biases": {0: case.factors(0, slice(None)).bias + 1}}
    with pytest.raises(StoreError, match="captured with another bias in attention/layer_00/bias"):
        AttentionWriter.open(path, schema, **other)
    with pytest.raises(StoreError, match=r"layers with a shared bias are \[\]; the store's schema has \[0\]"):
        AttentionWriter.open(path, schema, **case.fixed())
    with pytest.raises(StoreError, match="encoding is 'fp16'; qk's layers, and no others, describe query and key"):
        replace(schema, encoding="fp16")


def test_a_bias_is_described_by_what_it_varies_along() -> None:
    query = torch.zeros(2, 3, 5, 4)
    shared, expanded, own = torch.zeros(3, 5, 5), torch.zeros(1, 1, 5, 5).expand(2, 3, 5, 5), torch.ones(2, 1, 1, 5) > 0
    described = [factor_schema(Factors(query=query, key=query, scale=0.5, bias=b), 3) for b in (shared, expanded, own)]
    assert [(d.bias, d.bias_shape, d.bias_precision) for d in described] == [
        ("shared", (3, 5, 5), "float32"),
        ("shared", (3, 5, 5), "float32"),
        ("image", (1, 1, 5), "bool"),
    ]
    with pytest.raises(StoreError, match=r"expected \[image, head, query, key\]"):
        factor_schema(Factors(query=query, key=query, scale=0.5, bias=torch.zeros(4, 3, 5, 5)), 3)


def test_halves_round_as_ieee_754_has_it() -> None:
    """A million floats of every exponent, all 65,536 halves: NumPy and torch say the same."""
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    edges = np.float32(
        [0, 65503.99, 65504, 65519.99, 65520, 2**-14, 2**-24, 2**-25, np.nextafter(np.float32(2**-25), 1)]
    )
    values = np.concatenate([bits.view(np.float32), edges, -edges, np.float32([np.inf, -np.inf, np.nan])])
    nan = np.isnan(values)
    half, brain = np.empty(values.shape, np.uint16), np.empty(values.shape, np.uint16)
    float32_to_float16(values, values.view(np.uint32), half)
    float32_to_bfloat16(values.view(np.uint32), brain)
    tensor = torch.from_numpy(values)
    np.testing.assert_array_equal(half[~nan], tensor.half().view(torch.int16).numpy().view(np.uint16)[~nan])
    np.testing.assert_array_equal(brain[~nan], tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)[~nan])
    assert np.isnan(half.view(np.float16)[nan]).all()
    every = np.arange(2**16, dtype=np.uint16)
    wide, broad = np.empty(2**16, np.float32), np.empty(2**16, np.float32)
    float16_to_float32(every, wide)
    bfloat16_to_float32(every, broad.view(np.uint32))
    np.testing.assert_array_equal(wide, torch.from_numpy(every.view(np.int16)).view(torch.float16).float().numpy())
    np.testing.assert_array_equal(broad, torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy())


# ------------------------------------------------------------------------------------------------- through the engine


class Pictures:
    """Ten seeded images, as an ImageSet gives them."""

    ids = tuple(f"{row}.png" for row in range(10))
    labels = np.zeros(10, np.int64)
    class_names = ("any",)
    region_names: tuple[str, ...] = ()
    boxes = None

    def __init__(self, size: int) -> None:
        self._pixels = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Any, device: Any = "cpu") -> torch.Tensor:
        return self._pixels[list(rows)]

    def regions(self, layout: TokenLayout) -> None:
        return None


def capture(
    path: Path,
    encoding: str,
    name: str = "vit_tiny_patch16_224",
    sinks: tuple[str, ...] = ("store", "metrics"),
    seed: int = 0,
) -> tuple[torch.nn.Module, AttentionStore]:
    torch.manual_seed(seed)
    small = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 3}
    model = timm.create_model(name, pretrained=False, **small).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    wanted = Capture(sinks=sinks, metrics=METRICS, encoding=encoding, batch_size=4)
    about: dict[str, Any] = {"model_info": {"name": name, "seed": seed}, "dataset_info": {}, "preprocessing": {}}
    return model, capture_to_store(model, Pictures(64), path, wanted, **about)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ALL)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_a_captured_model_is_kept_and_measured_alike(tmp_path: Path, encoding: str, name: str) -> None:
    """The maps that come back are the model's; metrics measured from the store are those of the forward pass."""
    path = tmp_path / "run.zarr"
    model, store = capture(path, encoding, name)
    maps = capture_attention(model, Pictures(64).batch(range(10)))
    for layer, expected in enumerate(maps.values()):
        atol = {"fp16": 3e-4, "bf16": 2e-3, "qk": 5e-3}[encoding]
        np.testing.assert_allclose(store.read(layer), expected, atol=atol, rtol=0)
    own = {metric: store.read_metric(metric)[0] for metric in METRICS}
    metrics_only = tmp_path / "again.zarr"
    capture(metrics_only, encoding, name, ("store",))
    again = AttentionStore.open(metrics_only)
    measure_store(again, METRICS, "auto")
    for metric, expected in own.items():
        np.testing.assert_allclose(again.read_metric(metric)[0], expected, atol=6e-3, rtol=0)
    if encoding == "qk":
        assert (store.schema.layers[0].factors.bias == "shared") == name.startswith("beit")
        direct = kernels.measure_attention(store.read(1), TokenLayout.from_dict(store.layout(1)), METRICS)
        for metric in METRICS:
            np.testing.assert_allclose(again.read_metric(metric)[0][:, 1], direct[metric], atol=1e-5, rtol=1e-5)
    assert verify(path) == []
    assert verify(metrics_only) == []


@pytest.mark.parametrize(("batch_size", "chunk"), [(8, 2), (6, 3), (4, 2), (1, 1)])
def test_a_chunk_holds_no_more_than_can_be_compressed_together(batch_size: int, chunk: int) -> None:
    """A ViT-L/16 on 1024 pixels: 2.1 GB in four images."""
    layer = LayerSchema(
        layer=0, site="blocks.0.attn", heads=16, layout=case.LAYOUT | {"grid_rows": 64, "grid_cols": 64}
    )
    schema = case.make_schema(layers=(layer,), batch_size=batch_size)
    (array,) = layer_arrays(schema, layer).values()
    assert array.chunk == chunk
    assert array.shard_chunks == batch_size // chunk
    assert {array.chunk for array in layer_arrays(case.make_schema(), case.make_schema().layers[0]).values()} == {4}


def test_an_image_that_cannot_be_compressed_in_one_piece_is_one_sentence(tmp_path: Path) -> None:
    layer = LayerSchema(
        layer=0, site="blocks.0.attn", heads=16, layout=case.LAYOUT | {"grid_rows": 128, "grid_cols": 64}
    )
    message = r"attention/layer_00 would need 2,148,532,352 bytes for 1 image\(s\) in one piece; at most 2,147,483,631"
    with pytest.raises(StoreError, match=message):
        AttentionWriter.open(tmp_path / "run.zarr", case.make_schema(layers=(layer,)), **case.fixed())
    many = case.make_schema(num_classes=2**28)
    with pytest.raises(StoreError, match=r"logits would need 4,294,967,296 bytes for 4 image.*: give a smaller batch"):
        estimate_bytes(many)


def test_regions_of_many_images_are_compressed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = case.fixed()["regions"]
    monkeypatch.setattr("store.arrays.CHUNK_BYTES", 3 * regions[0].nbytes)
    create_constant(tmp_path, "images/regions", ("image", "region", "patch"), regions, {})
    array: Any = zarr.open_array(tmp_path, path="images/regions", mode="r")
    assert array.chunks == (3, *regions.shape[1:])
    np.testing.assert_array_equal(array[...], regions)
