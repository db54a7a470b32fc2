"""Heads whose patches get almost nothing are said by layer and head, in the same words by capture and table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import store_cases as case
import timm
import torch
import xarray

from engine.capture.prefix_mass import heads_on_prefix
from engine.capture.stream import Capture, _warn_of_prefix_mass, capture_to_store
from engine.measure.table import prefix_mass_warning
from tests.test_capture_sinks import Pictures


def test_words() -> None:
    assert heads_on_prefix({"layer 0, head 0": 0.9, "layer 0, head 1": np.nan}) == ""
    assert (
        heads_on_prefix({"layer 0, head 0": 0.2, "layer 3, head 1": 0.9012})
        == "prefix tokens take more than 0.9 of the attention of 1 head: layer 3, head 1 (0.901)"
    )
    assert heads_on_prefix({f"layer 1, head {head}": 0.91 + 0.01 * head for head in range(7)}) == (
        "prefix tokens take more than 0.9 of the attention of 7 heads, most in layer 1, head 6 (0.970); "
        "layer 1, head 5 (0.960); layer 1, head 4 (0.950); and 4 more"
    )


@pytest.fixture
def sinking() -> torch.nn.Module:
    """A ViT of 2 layers and 3 heads of which layer 0's second gives all to the class token, and no other much."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64, depth=2)
    dim, first = 64, 64  # of a head; where the second one begins
    with torch.no_grad():
        model.cls_token[..., 0] = 50.0  # the class token alone has much in dimension 0
        weight, bias = model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.bias
        for part in (0, 3 * dim):  # of the query, of the key
            weight[part + first : part + first + dim] = 0.0
            bias[part + first : part + first + dim] = 0.0
        bias[first] = 10.0
        weight[3 * dim + first, 0] = 10.0
    return model.eval()


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_a_capture_names_the_head(
    sinking: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    """The mean over the layer's heads stays far below .9. The batches are of 2, 2 and 1 images."""
    capture_to_store(
        sinking,
        Pictures(),
        tmp_path / "s.zarr",
        Capture(sinks=("store",), encoding=encoding, batch_size=2),
        model_info={"name": "vit"},
        dataset_info={"id": "random"},
        preprocessing={},
        label="vit",
    )
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "prefix tokens" in line]
    assert lines == [
        "vit: prefix tokens take more than 0.9 of the attention of 1 head: layer 0, head 1 (1.000); "
        f"{encoding} keeps the little that patches get there too coarsely for Moran's I (errors up to 0.1): use the "
        "metrics sink"
    ]


def test_a_batch_without_a_sound_row_hides_no_head(capsys: pytest.CaptureFixture[str]) -> None:
    """The mean is over the images of the other batches; 11 images in batches of 4, 4 and 3."""
    entries = [(0, 0, 0, np.nan), (0, 0, 1, 0.95), (0, 0, 2, 0.88), (0, 1, 0, np.nan)]
    _warn_of_prefix_mass(entries, case.make_schema(), "vit")
    assert "of 1 head: layer 0, head 0 (0.920);" in "".join(capsys.readouterr())


def table_of(masses: np.ndarray) -> xarray.Dataset:
    """A table whose prefix mass is given, [condition, seed, image, layer, head]."""
    dims = ("condition", "seed", "image", "layer", "head")
    coords = {"condition": ["baseline", "tuned"], "layer": [0, 5], "head": [0, 1, 2]}
    return xarray.Dataset({"prefix_mass": (dims, masses)}, coords)


def test_the_table_names_the_head_and_the_condition() -> None:
    masses = np.full((2, 2, 4, 2, 3), 0.1)
    masses[1, :, :, 1, 2] = [[0.9, 0.92, 0.94, 0.96], [0.98, 0.98, 0.98, 0.98]]
    assert prefix_mass_warning(table_of(masses)) == (
        "Prefix tokens take more than 0.9 of the attention of 1 head: layer 5, head 2 of tuned (0.955): there the "
        "metrics describe how the small remainder is spread over the patches."
    )


def test_the_table_says_nothing_where_there_is_nothing() -> None:
    assert prefix_mass_warning(table_of(np.full((2, 2, 4, 2, 3), 0.89))) == ""
    assert prefix_mass_warning(xarray.Dataset()) == ""
