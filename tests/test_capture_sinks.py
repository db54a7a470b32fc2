"""Chosen layers and heads through the sinks: what the store and the table hold is what the tap hands over."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from engine.capture import Capture, CaptureError, SampleMaps, capture_attention, capture_to_store, logits_of
from engine.capture.sinks import unusable_rows
from engine.measure.table import build_table
from kernels import TokenLayout, measure_attention
from store import AttentionStore, StoreError
from store.local import LocalStorage
from tests.families import images, spread

METRICS = ("distance", "entropy")
# qk keeps the factors of a float32 model in 16 bits: logits of up to 10 are off by some 1e-3 of themselves.
TOLERANCE = {"fp16": 5e-4, "qk": 5e-3}


class Pictures:
    """Random images in memory, as capture takes them."""

    ids = ("a", "b", "c", "d", "e")
    labels = (0, 1, 0, 1, 0)
    class_names = ("zero", "one")
    region_names = ()

    def __init__(self) -> None:
        self.pixels = images(64, 64, count=len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Any, device: Any = "cpu") -> torch.Tensor:
        return self.pixels[list(rows)]

    def regions(self, layout: TokenLayout) -> None:
        return None


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return spread(timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64, depth=3))


def capture(model: torch.nn.Module, path: Path, replace: bool = False, **settings: Any) -> Any:
    return capture_to_store(
        model,
        Pictures(),  # type: ignore[arg-type]
        path,
        Capture(**{"sinks": ("store", "metrics"), "metrics": METRICS, "batch_size": 2} | settings),
        model_info={"name": "vit"},
        dataset_info={"id": "random"},
        preprocessing={},
        label="vit",
        replace=replace,
    )


@pytest.mark.parametrize("encoding", ["fp16", "qk"])
@pytest.mark.parametrize("heads", [(), (0, 2)])
def test_stored_and_measured_layers_and_heads_are_the_chosen_ones(
    model: torch.nn.Module, tmp_path: Path, encoding: str, heads: tuple[int, ...]
) -> None:
    layers = (0, 2)
    store = capture(model, tmp_path / "s.zarr", encoding=encoding, layers=layers, heads=heads)
    expected = capture_attention(model, Pictures().pixels, layers=layers, heads=heads or None)
    table = build_table({("vit", 0): store}, METRICS, seed_invariant=[], attributes={})
    assert list(table["layer"].values) == list(layers)
    assert list(table["head"].values) == list(heads or range(3))
    for layer, attention in zip(layers, expected.values(), strict=True):
        np.testing.assert_allclose(store.read(layer), attention.numpy(), atol=TOLERANCE[encoding])
        layout = TokenLayout(**next(s.layout for s in store.schema.layers if s.layer == layer))
        measured = measure_attention(attention, layout, metrics=METRICS)
        for name in METRICS:
            found = table[name].sel(condition="vit", seed=0, layer=layer).values
            np.testing.assert_allclose(found, measured[name].numpy(), atol=1e-5)


@pytest.fixture
def biased() -> torch.nn.Module:
    """Relative-position bias: one a head, the same for all images."""
    return spread(timm.create_model("vit_relpos_small_patch16_224", num_classes=2, img_size=64, depth=2))


@pytest.mark.parametrize("heads", [(0, 3), (2, 3), (5,)])
def test_heads_kept_as_query_and_key_give_the_full_captures_maps(
    biased: torch.nn.Module, tmp_path: Path, heads: tuple[int, ...]
) -> None:
    """The bias of the chosen heads goes with them, also when some of those are read."""
    full = capture(biased, tmp_path / "full.zarr", encoding="qk")
    some = capture(biased, tmp_path / "some.zarr", encoding="qk", heads=heads)
    assert full.schema.layers[0].factors.bias == "shared"
    assert some.schema.layers[0].factors.bias_shape[0] == len(heads)
    for layer in full.layers:
        expected = full.read(layer)[:, list(heads)]
        np.testing.assert_array_equal(some.read(layer), expected)
        np.testing.assert_array_equal(some.read(layer, slice(1, 4), [len(heads) - 1]), expected[1:4, -1:])
        np.testing.assert_array_equal(full.read(layer, heads=heads), expected)
    for name in METRICS:
        np.testing.assert_array_equal(some.read_metric(name)[0], full.read_metric(name)[0][:, :, list(heads)])


def test_a_shared_bias_that_changes_with_the_batch_is_refused(biased: torch.nn.Module, tmp_path: Path) -> None:
    """It is stored once: another one in a later batch would read back as maps that the model never had."""
    scale = biased.blocks[1].attn.rel_pos.mlp.fc2.weight

    def drift(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        scale.data.fill_(float(args[0].mean()))

    biased.register_forward_pre_hook(drift)
    with pytest.raises(CaptureError, match=r"the bias of layer 1 changes from batch to batch .* use fp16 or bf16"):
        capture(biased, tmp_path / "s.zarr", encoding="qk")
    store = capture(biased, tmp_path / "maps.zarr", encoding="fp16")
    assert store.complete


def test_a_store_of_other_heads_is_not_continued(model: torch.nn.Module, tmp_path: Path) -> None:
    capture(model, tmp_path / "s.zarr", heads=(0, 2))
    with pytest.raises(Exception, match="head_ids"):
        capture(model, tmp_path / "s.zarr", heads=(0, 1))


def test_only_a_store_of_another_run_or_without_a_ledger_is_replaced(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study asks for it; what cannot be read stays, and so does whatever is not ours."""
    path = tmp_path / "s.zarr"
    capture(model, path, heads=(0, 2))
    assert capture(model, path, True, heads=(0, 1)).schema.head_ids == (0, 1)
    assert "captured from the beginning, since what was there cannot be continued" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "s.ledger")
    assert capture(model, path, True, heads=(0, 1)).complete
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(
            LocalStorage, "read", lambda self, file: (_ for _ in ()).throw(PermissionError(13, "denied", file))
        )
        with pytest.raises(StoreError, match="cannot be opened for writing"):
            capture(model, path, True, heads=(0, 1))
    (path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt is in the way"):
        capture(model, path, True, heads=(0, 2))
    after = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert after.pop(path / "notes.txt")
    assert after == before


def test_heads_that_are_not_there_are_refused_before_anything_is_written(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(CaptureError, match="has no head 7; its heads are 0 to 2"):
        capture(model, tmp_path / "s.zarr", heads=(7,))
    assert not (tmp_path / "s.zarr").exists()


def test_rows_that_are_no_attention_are_left_out_and_counted_in_a_sentence(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in one query dimension of layer 1's first head: that head has no row left, and layer 2 sees NaN alone."""
    sound = capture(model, tmp_path / "sound.zarr")
    with nan_in(model.blocks[1].attn.qkv.bias):
        broken = capture(model, tmp_path / "broken.zarr")
    printed = capsys.readouterr()
    assert "vit: 85 rows of layer 1 (blocks.1.attn) are no post-softmax attention" in printed.out + printed.err
    assert "vit: 255 rows of layer 2 (blocks.2.attn)" in printed.out + printed.err
    assert "layer 0" not in printed.out + printed.err
    assert broken.complete
    for name in METRICS:
        expected, values = sound.read_metric(name)[0], broken.read_metric(name)[0]
        lost = np.zeros(values.shape, bool)
        lost[:, 1, 0] = lost[:, 2] = True
        np.testing.assert_array_equal(np.isnan(values), lost)
        np.testing.assert_array_equal(values[~lost], expected[~lost])
        np.testing.assert_array_equal(broken.read_undefined(name), np.where(lost, 16, 0))


def test_a_batch_without_any_attention_ends_the_capture(model: torch.nn.Module, tmp_path: Path) -> None:
    with (
        nan_in(model.patch_embed.proj.bias),
        pytest.raises(CaptureError, match=r"no row of batch 0 is post-softmax attention, in any layer: .* weights"),
    ):
        capture(model, tmp_path / "s.zarr")
    assert not AttentionStore.open(tmp_path / "s.zarr").complete
    assert capture(model, tmp_path / "s.zarr").complete


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_a_store_alone_says_what_is_no_attention(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    """The same rows as with metrics; a batch without any attention is not kept."""
    only_store: dict[str, Any] = {"sinks": ("store",), "encoding": encoding}
    wrong = pytest.raises(CaptureError, match="no row of batch 0 is post-softmax attention, in any layer")
    if encoding == "qk":  # which cannot hold NaN in float16
        wrong = pytest.raises(StoreError, match="query of layer 0 reaches nan")
    with nan_in(model.patch_embed.proj.bias), wrong:
        capture(model, tmp_path / "s.zarr", **only_store)
    assert not AttentionStore.open(tmp_path / "s.zarr").committed_batches
    capsys.readouterr()
    if encoding != "qk":
        with nan_in(model.blocks[1].attn.qkv.bias):
            assert capture(model, tmp_path / "s.zarr", **only_store).complete
        printed = "".join(capsys.readouterr())
        assert "vit: 85 rows of layer 1 (blocks.1.attn) are no post-softmax attention" in printed
        assert "vit: 255 rows of layer 2 (blocks.2.attn)" in printed
        assert "layer 0" not in printed


def test_rows_that_factors_leave_without_a_value() -> None:
    query, key = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    query[0, 1, 2, 3], key[1, 2, 0, 0] = torch.inf, torch.nan
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1, 2] = expected[1, 2] = True
    assert torch.equal(unusable_rows(query, key), expected)


def test_the_stores_precision_is_the_forward_passs(model: torch.nn.Module, tmp_path: Path) -> None:
    assert capture(model, tmp_path / "s.zarr").schema.precision == "float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert capture(model, tmp_path / "cast.zarr").schema.precision == "bfloat16"


@contextmanager
def nan_in(parameter: torch.Tensor) -> Iterator[None]:
    """Its first item is NaN for the while."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter[0] = torch.nan
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def test_the_c_library_is_asked_to_trim_only_where_it_may_have_the_function(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(name: str | None) -> None:
        raise TypeError("bad argument type for built-in operation")  # what Windows says of None

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(sys, "platform", "win32")
    assert len(capture(model, tmp_path / "s.zarr").image_ids) == len(Pictures.ids)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel"])
def test_a_hugging_face_model_gives_its_logits_if_it_has_any(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=64, patch_size=16, num_labels=2, **sizes)
    model = getattr(transformers, name)(config).eval()
    with torch.inference_mode():
        output = model(Pictures().pixels)
    store = capture(model, tmp_path / "s.zarr")
    samples = SampleMaps(
        path=tmp_path / "maps.samples.zarr",
        pixels=np.zeros((2, 1, 1, 3)),
        ids=("a", "b"),
        labels=(0, 1),
        boxes=None,
        regions=(),
        classes=("zero", "one"),
    )
    samples._write_images(samples.path)
    samples.add("vit", model, Pictures(), [0, 1])  # type: ignore[arg-type]
    kept = SampleMaps.open(samples.path, ["vit"]).runs["vit"].logits
    if name == "ViTModel":
        assert store.schema.num_classes == 0
        assert kept is None
        with pytest.raises(CaptureError, match="has no logits; expected scores of classes"):
            logits_of(output)
        return
    assert store.schema.num_classes == 2
    np.testing.assert_allclose(store.read_logits(), logits_of(output).numpy(), atol=1e-5)
    np.testing.assert_allclose(kept, output.logits[:2].numpy(), atol=1e-5)
