"""docs/encodings.md: bytes an image and the error in every metric, for each encoding of a store.

    python -m engine.run                                    the embedded study, whose models are looked at
    python -m benchmarks.encodings_table outputs            writes docs/encodings.md

The truth is the fine-tuned model's own query and key in float64, every metric by the reference backend. A store's
values are computed by the reference backend too, from what the store holds, so that what differs is the encoding.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.capture import AttentionSite, AttentionTap, attention_map
from engine.measure import measure_store
from engine.sinks import Capture, capture_to_store
from kernels import METRICS, MetricSpec, measure_attention, measure_pair
from store import AttentionStore, info
from store.encodings import ENCODINGS
from train.digits_vit import IMAGE_SIZE
from train.embedded import prepare_digits
from train.models import load_checkpoint, preprocessing_of

IMAGES = 128
MODEL = "digits_vit"
CHECKPOINTS = ("finetuned", "baseline")  # the second is what pair metrics compare with
PAGE = Path(__file__).parent.parent / "docs" / "encodings.md"


def specs() -> list[MetricSpec]:
    """Every metric but those that need regions."""
    return [spec for spec in METRICS.values() if spec.inputs != "regions"]


def model_of(outputs: Path, condition: str) -> torch.nn.Module:
    return load_checkpoint(MODEL, outputs / "checkpoints" / f"{condition}_seed42.safetensors").eval()


def exact_maps(model: torch.nn.Module, images: torch.Tensor) -> list[tuple[AttentionSite, torch.Tensor]]:
    """float64 maps of every layer, from the float32 query and key that the model computes."""
    maps: list[tuple[AttentionSite, torch.Tensor]] = []

    def keep(site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: Any) -> None:
        maps.append((site, attention_map(query.double(), key.double(), scale, bias)))

    with torch.inference_mode(), AttentionTap(model, keep):
        model(images)
    return maps


def true_values(ours: list[Any], theirs: list[Any]) -> dict[str, np.ndarray]:
    """metric -> [layer, image, head]."""
    found: dict[str, list[np.ndarray]] = {}
    for (site, maps), (_, others) in zip(ours, theirs, strict=True):
        of_one = [spec for spec in specs() if spec.inputs == "rows"]
        of_two = [spec for spec in specs() if spec.inputs == "pair"]
        measured = dict(measure_attention(maps, site.layout, of_one, "reference"))
        measured |= measure_pair(maps, others, site.layout, of_two, "reference")
        for name, values in measured.items():
            found.setdefault(name, []).append(np.asarray(values))
    return {name: np.stack(values) for name, values in found.items()}


def stored(folder: Path, outputs: Path, encoding: str, images: Any) -> AttentionStore:
    """The store of the fine-tuned model's attention, measured."""
    paths = {condition: folder / f"{condition}_{encoding}.zarr" for condition in CHECKPOINTS}
    for condition, path in paths.items():
        about: dict[str, Any] = {"model_info": {"name": condition}, "dataset_info": {}, "preprocessing": {}}
        capture = Capture(sinks=("store",), encoding=encoding, batch_size=32)
        capture_to_store(model_of(outputs, condition), images, path, capture, **about)
    names = [spec.name for spec in specs()]
    return measure_store(paths["finetuned"], names, "reference", against=paths["baseline"])


def page(outputs: Path) -> str:
    model = model_of(outputs, "finetuned")
    images = prepare_digits(preprocessing=preprocessing_of(model), test_scenes=IMAGES).test
    pixels = images.batch(range(IMAGES))
    ours = exact_maps(model, pixels)
    truth = true_values(ours, exact_maps(model_of(outputs, "baseline"), pixels))
    bytes_rows, errors = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, encoding in ENCODINGS.items():
            store = stored(Path(folder), outputs, name, images)
            kept = info(store.path)["attention"]
            bytes_rows.append(
                f"| `{name}` | {encoding.note} | {kept['raw_bytes'] / IMAGES:,.0f} | {kept['bytes'] / IMAGES:,.0f} "
                f"| {kept['ratio']:.2f} |"
            )
            for metric, expected in truth.items():
                values = store.read_metric(metric)[0].swapaxes(0, 1)  # [layer, image, head]
                assert (np.isnan(values) == np.isnan(expected)).all(), f"{metric} is undefined elsewhere in {name}"
                errors[metric, name] = np.nanmax(np.abs(values - expected), initial=0.0)
    layout = ours[0][0].layout
    heads, tokens = ours[0][1].shape[1:3]
    dim = model.blocks[0].attn.head_dim
    entropy = truth["entropy"]
    ran = (
        f"What was run: the fine-tuned model of the embedded study (`python -m engine.run`: `{MODEL}`, {len(ours)} "
        f"layers, {heads} heads of {dim} dimensions, {IMAGE_SIZE}×{IMAGE_SIZE} pixels, {layout.grid_rows}×"
        f"{layout.grid_cols} patches and a class token: {tokens} tokens), float32 on a CPU, {IMAGES} test scenes. "
        f"Entropies of heads run from {np.nanmin(entropy):.2f} to {np.nanmax(entropy):.2f} of "
        f"{np.log(layout.num_patches):.2f} nat."
    )
    lines = [
        "# What each encoding costs",
        "",
        *_paragraph(
            "Made by `python -m benchmarks.encodings_table`; do not edit. `capture.encoding` chooses, see the "
            "[README](../README.md)."
        ),
        *_paragraph(ran),
        "## Bytes an image",
        "",
        *_paragraph("All layers and heads; on disk after Blosc (lz4, bitshuffle), checksums and index included."),
        "| encoding | what is kept | before compression | on disk | ratio |",
        "|---|---|---:|---:|---:|",
        *bytes_rows,
        "",
        *_paragraph(
            "Maps grow with the square of the tokens, query and key with the tokens. Before compression, for 12 layers "
            "of 12 heads of 64 dimensions, computed:"
        ),
        "| tokens | `fp16`, `bf16` MB | `qk` MB | `qk` / `fp16` |",
        "|---:|---:|---:|---:|",
        *(
            f"| {n} | {144 * n * n * 2 / 1e6:.1f} | {144 * n * 64 * 2 * 2 / 1e6:.1f} | {2 * 64 / n:.3f} |"
            for n in (197, 577, 1025)
        ),
        "",
        "## Error in each metric",
        "",
        *_paragraph(
            "The largest error over all images, layers and heads, of the value of one head of one image. The truth "
            "is computed in float64 from the float32 query and key. `js_divergence` compares the fine-tuned model with "
            "the baseline, both stored in the same encoding. The model ran in float32, so `qk` narrows query and "
            "key to float16; for a model that ran in float16 or bfloat16 they are kept as they are, and the error is "
            "that of float32 arithmetic alone."
        ),
        "| metric | unit | values from | to | " + " | ".join(f"`{name}`" for name in ENCODINGS) + " |",
        "|---|---|---:|---:|" + "---:|" * len(ENCODINGS),
    ]
    for metric, values in truth.items():
        row = " | ".join(f"{errors[metric, name]:.1e}" for name in ENCODINGS)
        lines.append(
            f"| `{metric}` | {METRICS[metric].unit} | {np.nanmin(values):.3g} | {np.nanmax(values):.3g} | {row} |"
        )
    lines += [
        "",
        *_paragraph(
            "`morans_i_seed1` is a function of how the rows' patch mass differs from 1: where the class token's mass "
            "is small, it is read off the last bits of a 16-bit map, and only `qk` keeps it."
        ),
        *_paragraph(
            "Where prefix tokens take nearly all of a row, or rows are almost uniform, 16-bit maps keep too little of "
            "what remains on the patches: with .99 on the prefix, or a relative spread of 5e-4, float16 costs up to "
            "7e-4 nat and 0.1 of Moran's I. A capture warns when a head's mean prefix mass passes .9. `qk` has no "
            "such limit, and an error that grows with the size of the logits instead."
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 120, break_on_hyphens=False), ""]


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")), encoding="utf-8")
    print(PAGE)
