"""Which head of one model is which of another: the divergence of all pairs, the match, and what it is worth."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import store_cases as case
import timm
import torch
import xarray as xr
from safetensors.torch import save_file
from scipy.spatial.distance import jensenshannon

from engine.capture import capture_attention
from engine.config import load_study
from engine.measure import head_divergence
from engine.statistics import HeadPairing, analyse, match_heads
from engine.study.check import check_study
from engine.study.head_pairing import COMMON_START, head_pairing, weights_of
from engine.study.journal import Journal
from engine.study.start import Start
from kernels import TokenLayout, measure_attention
from store import AttentionStore
from tests.families import images, spread
from tests.photographs import write_photographs
from tests.synthetic_study import small, texts
from train.errors import InputError

HEADS, DEPTH = 4, 3
LAYOUT = TokenLayout(grid_rows=4, grid_cols=4, num_prefix_tokens=1, patch_height_px=8, patch_width_px=8)
PICTURES = images(32, 32, count=6)


def unrelated(**options: int) -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
    torch.manual_seed(1)
    return timm.models.VisionTransformer(**sizes | options)


def model(**options: int) -> torch.nn.Module:
    return spread(unrelated(**options))


def with_heads_in_another_order(of: torch.nn.Module) -> tuple[torch.nn.Module, np.ndarray]:
    """The same function, and the number that each head has now [layer, head]."""
    turned, places = copy.deepcopy(of), []
    for layer, block in enumerate(turned.blocks):
        order = torch.arange(HEADS).roll(1 + layer)
        with torch.no_grad():
            for rows in (block.attn.qkv.weight, block.attn.qkv.bias):  # [query · key · value, head, …]
                by_head = rows.unflatten(0, (3, HEADS, -1))
                by_head.copy_(by_head[:, order].clone())
            by_head = block.attn.proj.weight.unflatten(1, (HEADS, -1))
            by_head.copy_(by_head[:, order].clone())
        places.append(np.argsort(order.numpy()))
    return turned, np.stack(places)


def fine_tuned(of: torch.nn.Module) -> torch.nn.Module:
    tuned = copy.deepcopy(of).train()
    optimizer, labels = torch.optim.SGD(tuned.parameters(), lr=0.05), torch.arange(len(PICTURES)) % 5
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(tuned(PICTURES), labels).backward()
        optimizer.step()
    return tuned.eval()


def divergence_of(maps: np.ndarray, others: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """[image, head, other head] by scipy, row by row."""
    p, q = (layout.patches(part.astype(np.float64)) for part in (maps, others))
    return (jensenshannon(p[:, :, None], q[:, None], axis=-1) ** 2).mean(axis=-1)


# ------------------------------------------------------------------------------------------------------ the divergence


def test_of_models_it_is_scipys_whatever_the_batches() -> None:
    one, other = model(), fine_tuned(model())
    found = head_divergence(one, other, PICTURES)
    assert found.dims == ("image", "layer", "head", "other_head")
    assert found["site"].values.tolist() == [f"blocks.{layer}.attn" for layer in range(DEPTH)]
    maps, others = (list(capture_attention(each, PICTURES).values()) for each in (one, other))
    for layer in range(DEPTH):
        expected = divergence_of(maps[layer].numpy(), others[layer].numpy(), LAYOUT)
        np.testing.assert_allclose(found[:, layer], expected, rtol=0, atol=2e-6)
    for backend in ("auto", "torch"):
        again = head_divergence(one, other, PICTURES.split(4), backend=backend)
        np.testing.assert_allclose(again, found, rtol=0, atol=2e-6)


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_of_stores_it_is_scipys_and_a_head_that_a_layer_lacks_has_none(encoding: str, tmp_path: Path) -> None:
    stores = captures(tmp_path, [(0, 1, 2), (0, 1)], encoding)
    found = head_divergence(*stores)
    assert found["image"].values.tolist() == list(stores[0].image_ids)
    for layer, heads in enumerate(case.HEADS):
        maps = case.expected(encoding, layer)
        expected = divergence_of(maps, maps, TokenLayout.from_dict(case.LAYOUT))
        np.testing.assert_allclose(found[:, layer, :heads, :heads], np.nan_to_num(expected), rtol=0, atol=2e-6)
        assert np.isnan(found[:, layer, heads:]).all()
        assert np.isnan(found[:, layer, :, heads:]).all()
    xr.testing.assert_allclose(head_divergence(*stores, slice(3, 9)), found[3:9])


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"differ in layer 0: 4 heads over .*, and 2 heads over .*; heads can be"):
        head_divergence(model(), model(num_heads=2), PICTURES)
    for depths, found in (
        ((2, 3), "differ in layer 2: no attention, and 4 heads"),
        ((3, 2), "has 3 layers .* second 2"),
    ):
        with pytest.raises(InputError, match=found):
            head_divergence(*(model(depth=depth) for depth in depths), PICTURES)
    with pytest.raises(InputError, match="there are no images"):
        head_divergence(model(), model(), [])
    one = case_store(tmp_path / "one.zarr")
    other = case_store(tmp_path / "other.zarr", image_ids=tuple(f"{row}.png" for row in range(case.IMAGES)))
    with pytest.raises(InputError, match=r"other\.zarr was captured over other images than .*the same images"):
        head_divergence(one, other)
    with pytest.raises(InputError, match=r"capture again with capture\.sinks store$"):
        head_divergence(case_store(tmp_path / "plain.zarr", encoding=""), one)
    with pytest.raises(InputError, match="there are no images"):
        head_divergence(one, one, slice(0, 0))


def case_store(path: Path, encoding: str = "fp16", **changes: object) -> AttentionStore:
    case.capture(path, case.make_schema(encoding, **changes))
    return AttentionStore.open(path)


def captures(folder: Path, order: Sequence[tuple[int, ...]], encoding: str = "fp16") -> tuple[AttentionStore, ...]:
    """A capture, and one of the same maps with the heads of each layer in this order."""
    maps = case.maps
    one = case_store(folder / "one.zarr", encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case, "maps", lambda layer: maps(layer)[:, list(order[layer])])
        return one, case_store(folder / "two.zarr", encoding)


# ----------------------------------------------------------------------------------------------------------- the match


def test_heads_in_another_order_are_found_exactly() -> None:
    one = model()
    other, places = with_heads_in_another_order(one)
    with torch.inference_mode():
        torch.testing.assert_close(one(PICTURES), other(PICTURES), rtol=0, atol=1e-4)
    found = match_heads(head_divergence(one, other, PICTURES))
    assert (found["match"].values == places).all()
    assert (found["match"] != found["head"]).all(), "no head is in its old place"
    assert float(found["matched"].max()) < 1e-6 < float(found["gap"].min())
    assert (found["stability"] == 1).all()
    assert (found["mean_matched"] < found["mean_same_number"]).all()


def test_from_one_start_every_head_is_itself() -> None:
    start = model()
    found = match_heads(head_divergence(start, fine_tuned(start), PICTURES))
    assert (found["match"] == found["head"]).all()
    assert (found["mean_matched"] > 1e-4).all(), "fine-tuning changed every layer"
    assert (found["mean_matched"] == found["mean_same_number"]).all()


def test_of_stores_heads_keep_their_numbers(tmp_path: Path) -> None:
    found = match_heads(head_divergence(*captures(tmp_path, [(2, 0, 1), (1, 0)])))
    assert found["match"].values.tolist() == [[1, 2, 0], [1, 0, 2]]  # head 2 of layer 1 is not there, in either
    assert np.isnan(found["matched"].values[1, 2])
    np.testing.assert_allclose(found["mean_matched"], 0, atol=1e-7)


def test_best_and_next_best_are_those_of_enumeration() -> None:
    random = np.random.default_rng(0)
    divergence = random.random((7, 5, 4, 4))
    divergence[2, 1, 3, 0] = np.nan
    found = match_heads(divergence)
    for layer, mean in enumerate(np.nanmean(divergence, axis=0)):
        totals = {order: sum(mean[i, j] for i, j in enumerate(order)) for order in permutations(range(4))}
        best, following = sorted(totals, key=totals.__getitem__)[:2]
        of_layer = found.isel(layer=layer)
        assert tuple(of_layer["match"].values) == best
        np.testing.assert_allclose(of_layer["margin"], totals[following] - totals[best])
        np.testing.assert_allclose(of_layer["mean_matched"], totals[best] / 4)
        np.testing.assert_allclose(of_layer["mean_same_number"], mean.trace() / 4)
        np.testing.assert_allclose(of_layer["mean_all"], mean.mean())
        for head, other in enumerate(best):
            np.testing.assert_allclose(of_layer["gap"][head], np.delete(mean[head], other).min() - mean[head, other])


def test_stability_is_the_share_of_resamples() -> None:
    """Two images of three say one thing, the third more strongly another: drawn twice, it turns the match."""
    same, swapped = 1 - np.eye(3), 1 - np.eye(3)[[1, 0, 2]]
    divergence = np.stack([same, same, 1.5 * swapped])[:, None]
    found = match_heads(divergence, resamples=20_000)
    assert found["match"].values.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(found["stability"], 1 - 7 / 27, atol=0.01)  # binomial: drawn twice or thrice of three
    np.testing.assert_allclose(found["stable"][0], [1 - 7 / 27, 1 - 7 / 27, 1], atol=0.01)
    xr.testing.assert_identical(match_heads(divergence), match_heads(divergence))


def test_where_nothing_speaks_against_it_a_head_is_itself() -> None:
    found = match_heads(np.zeros((2, 1, 5, 5)))
    assert found["match"].values.tolist() == [[0, 1, 2, 3, 4]]
    assert found["margin"].values.tolist() == [0]
    alone = match_heads(np.zeros((1, 2, 1, 1)))
    assert np.isnan([alone["gap"].values, alone["stable"].values]).all()
    assert np.isnan([alone["margin"].values, alone["stability"].values]).all()


def test_what_cannot_be_matched_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\); expected \[image, layer, head, other_head\]"):
        match_heads(np.zeros((3, 4, 4)))
    missing = np.zeros((3, 2, 4, 4))
    missing[:, 1, 2] = np.nan
    with pytest.raises(ValueError, match="layer 1 has 3 heads of one model and 4 of the other"):
        match_heads(missing)
    with pytest.raises(ValueError, match="layer 0 has 0 heads"):
        match_heads(np.full((3, 1, 2, 2), np.nan))


def test_a_table_is_compared_with_its_heads_matched() -> None:
    """The three lines of docs/statistics.md."""
    one = model()
    models = {"baseline": one, "other": with_heads_in_another_order(one)[0]}
    values = [
        np.stack([measure_attention(maps, LAYOUT, ["entropy"])["entropy"] for maps in found.values()], axis=1)
        for found in (capture_attention(each, PICTURES) for each in models.values())
    ]
    table = xr.Dataset(
        {"entropy": (("condition", "seed", "image", "layer", "head"), np.stack(values)[:, None], {"units": "nat"})},
        {"condition": list(models), "seed": [0], "image": range(6), "layer": range(DEPTH), "head": range(HEADS)},
    ).assign_coords(site=("layer", [f"blocks.{layer}.attn" for layer in range(DEPTH)]))
    match = match_heads(head_divergence(*models.values(), PICTURES))["match"]
    paired = [table.sel(condition=["baseline"]), table.sel(condition=["other"]).sel(head=match)]
    analysed = analyse(xr.concat(paired, "condition"))
    assert max(abs(test.difference or 0) for test in analyse(table).tests if test.level == "head") > 0.01
    assert max(abs(test.difference or 0) for test in analysed.tests if test.level == "head") < 1e-5


# ------------------------------------------------------------------------------- the warning, from the weights alone


def pairing(one: torch.nn.Module, other: torch.nn.Module, depth: int = DEPTH) -> HeadPairing:
    weights = {"baseline": weights_of(one), "other": weights_of(other)}
    return head_pairing("other", "baseline", weights, [f"blocks.{layer}.attn" for layer in range(depth)])


def test_heads_are_paired_after_training_from_one_start_and_not_otherwise() -> None:
    start = model()
    tuned = pairing(start, fine_tuned(start))
    assert tuned.note == ""
    assert min(tuned.similarity.values()) > 0.9
    for other in (unrelated(), with_heads_in_another_order(start)[0]):
        found = pairing(start, other)
        assert found.note.startswith("Heads of other and baseline are not paired: the weights of their attention have")
        assert max(map(abs, found.similarity.values())) < COMMON_START / 2


def test_layers_that_were_made_anew_are_named() -> None:
    start = model()
    partly = fine_tuned(start)
    partly.blocks[2].attn = unrelated().blocks[2].attn
    found = pairing(start, partly)
    assert found.note.startswith("Heads of other and baseline are not paired in blocks.2.attn: ")
    assert list(found.similarity) == [f"blocks.{layer}.attn" for layer in range(DEPTH)]
    assert pairing(start, partly, depth=2).note == "", "a layer that is not measured does not count"


def test_compare_says_it_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path / "photos", per_class=3, size=96)
    for name, of in {"baseline": model(), "same": fine_tuned(model()), "other": unrelated()}.items():
        save_file(of.state_dict(), tmp_path / f"{name}.safetensors")
    keys = {
        "model.name": "vit_tiny_patch16_224",
        "model.arguments": {"patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": HEADS},
        "model.img_size": 32,
        "data.kind": "folder",
        "data.root": str(tmp_path / "photos"),
        "data.split": "all",
    }
    given = {
        name: {"recipe": "checkpoint", "checkpoint": str(tmp_path / f"{name}.safetensors")}
        for name in ("baseline", "same", "other")
    }
    config = load_study(None, keys | {"conditions": given})
    start = Start(config, tmp_path / "outputs", Journal(tmp_path / "run.jsonl"))
    check_study(start, start.take_model(), "cpu", ["capture"])
    said = [line for line in capsys.readouterr().out.splitlines() if "not paired" in line]
    found = start.head_pairing(["blocks.1.attn"])
    assert {name: pairing.note.split(":")[0] for name, pairing in found.items()} == {
        "same": "",
        "other": "Heads of other and baseline are not paired",
    }
    assert [line.split(":")[0] for line in said] == ["Heads of other and baseline are not paired"]


def test_the_report_says_it_among_the_limits_and_beside_what_it_counts(tmp_path: Path) -> None:
    outputs = small(tmp_path, regions=(), conditions=("baseline", "finetuned", "other"))
    summary, page = texts(outputs)
    assert "not paired" not in summary + page
    path = outputs / "metrics" / "attention_comparison.json"
    note = "Heads of other and baseline are not paired: of this."
    pairing = {"against": "baseline", "similarity": {"blocks.0.attn": 0.01}, "note": note}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_pairing": {"other": pairing}}))
    summary, page = texts(outputs)
    assert f"\n- {note}" in summary
    counted = re.findall(r"(\w+) against baseline: .*? cells( \(heads are not paired: see the limits\))?", summary)
    assert dict(counted) == {"finetuned": "", "other": " (heads are not paired: see the limits)"}
    assert "layer × head × metric cells (heads are not paired: see the limits)" in page
    assert "Heads are not paired in other against baseline: read the mean over heads" in page
