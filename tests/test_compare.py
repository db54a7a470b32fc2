"""`compare`: two checkpoints on a folder of photographs, against float64 metrics of timm's own unfused maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.utils import AttentionExtract

from engine.measure.table import read_table
from engine.run import main
from kernels import METRICS, TokenLayout
from tests.photographs import write_broken, write_photographs

METRIC_NAMES = ("distance", "entropy", "morans_i", "prefix_mass")
# float32 forward and fused attention on one side, float32 forward and float64 metrics on the other.
TOLERANCE = {"distance": 2e-6, "entropy": 1e-5, "morans_i": 2e-5, "prefix_mass": 2e-6}

DEPTH = 3  # the first blocks of each: all that a comparison does, in a quarter of the time
MODELS = {
    "vit_tiny_patch16_224": (
        0,
        TokenLayout(grid_rows=14, grid_cols=14, num_prefix_tokens=1, patch_height_px=16, patch_width_px=16),
    ),
    "vit_small_patch14_reg4_dinov2": (
        140,
        TokenLayout(grid_rows=10, grid_cols=10, num_prefix_tokens=5, patch_height_px=14, patch_width_px=14),
    ),
}


def random_model(name: str, img_size: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": img_size} if img_size else {}
    return timm.create_model(name, num_classes=3, depth=DEPTH, **sizes).eval()


def reference_values(model: torch.nn.Module, root: Path, ids: list[str], layout: TokenLayout) -> dict[str, np.ndarray]:
    """Metric -> [image, layer, head], from unfused maps in float32 and the float64 definitions."""
    config = resolve_model_data_config(model) | {"input_size": (3, *model.patch_embed.img_size)}
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.open(root / name).convert("RGB")) for name in ids])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.inference_mode():
        maps = list(AttentionExtract(model, method="hook")(images).values())
    values = {}
    for name in METRIC_NAMES:
        layers = []
        for layer in maps:
            rows = layer.double().numpy()
            flat = rows.reshape(-1, *rows.shape[-2:])
            per_query = METRICS[name].reference(flat, layout)
            layers.append(np.nanmean(per_query, axis=-1).reshape(rows.shape[:2]))
        values[name] = np.stack(layers, axis=1)
    return values


@pytest.mark.parametrize("name", MODELS)
def test_numbers_agree_with_timms_unfused_maps(name: str, tmp_path: Path) -> None:
    img_size, layout = MODELS[name]
    root = tmp_path / "photos"
    count = write_photographs(root, per_class=3)
    broken = write_broken(root)
    models = [random_model(name, img_size, seed) for seed in (0, 1)]
    save_file(models[0].state_dict(), tmp_path / "a.safetensors")
    wrapped = {f"module._orig_mod.{key}": value for key, value in models[1].state_dict().items()}
    torch.save({"model": wrapped, "epoch": 3}, tmp_path / "b.pth")
    outputs = tmp_path / "outputs"
    command = ["compare", "--baseline", str(tmp_path / "a.safetensors"), "--finetuned", str(tmp_path / "b.pth")]
    command += ["--model.name", name, "--data.root", str(root), "--outputs", str(outputs)]
    command += ["--statistics.permutations", "199", "--capture.batch_size", "4"]
    command += ["--capture.samples", "2", "--relevance.methods", "gradcam", "--relevance.measured", "2"]
    command += ["--relevance.steps", "3", "--model.arguments", f"depth={DEPTH}"]
    if img_size:
        command += ["--model.img_size", str(img_size)]
    assert main(command) == 0

    table = read_table(outputs / "metrics" / "attention_metrics.zarr")
    ids = [str(image) for image in table["image"].values]
    assert len(ids) == count
    assert not set(ids) & set(broken)
    document = json.loads((outputs / "metrics" / "attention_comparison.json").read_text())
    assert {entry["id"] for entry in document["data"]["dropped"]} == set(broken)
    assert document["layers"] == [f"blocks.{i}.attn" for i in range(DEPTH)]
    for condition, model in zip(("baseline", "finetuned"), models, strict=True):
        expected = reference_values(model, root, ids, layout)
        for metric in METRIC_NAMES:
            found = table[metric].sel(condition=condition).isel(seed=0).values
            np.testing.assert_allclose(found, expected[metric], atol=TOLERANCE[metric], rtol=0, err_msg=metric)
            np.testing.assert_allclose(
                document["conditions"][condition][metric], expected[metric].mean(axis=(0, 2)), atol=TOLERANCE[metric]
            )
    assert document["head_pairing"]["finetuned"]["note"].startswith("Heads of finetuned and baseline are not paired: ")
    assert list(document["head_pairing"]["finetuned"]["similarity"]) == document["layers"]
    held = {control["name"]: control["held"] for control in document["controls"]}
    assert held == {"itself_finetuned": True, "hybrid_finetuned": True}
    for left in ("report.html", "summary.md", "study.toml", "run.jsonl", "samples.zarr"):
        assert (outputs / left).exists(), left

    before = (outputs / "run.jsonl").read_text()
    assert main(command) == 0
    assert (outputs / "run.jsonl").read_text() == before, "a second run does nothing that is done"


def test_one_picture_is_refused_before_anything_is_captured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path / "photos", per_class=1)
    for other in ("china", "flower"):
        (tmp_path / "photos" / other / "0.jpg").unlink()
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "a.safetensors")
    command = ["compare", "--baseline", str(tmp_path / "a.safetensors"), "--finetuned", str(tmp_path / "a.safetensors")]
    command += ["--model.name", "test_vit", "--data.root", str(tmp_path / "photos")]
    assert main([*command, "--outputs", str(tmp_path / "outputs")]) == 2
    assert (
        "gives 1 file for the test split with split all, and conditions are compared over two images"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "outputs").exists()
