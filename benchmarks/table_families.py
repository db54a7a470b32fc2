"""Writes docs/families.md: what capture measures, family by family, and how far it is from the model's own maps.

python -m benchmarks.table_families
"""

from __future__ import annotations

import re
from pathlib import Path

import timm
import torch
import torchvision
import transformers

from engine.capture import AttentionTap, CaptureError, attention_map, capture_attention
from tests.families import MEASURED, REFUSED, Family
from tests.test_capture_families import own_maps

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def measured_row(family: Family) -> str:
    """One family's row: tokens, what is measured and skipped, and the largest difference of any map's element."""
    model, inputs = family.build(), family.inputs()
    maps: list[torch.Tensor] = []
    biased = False

    def keep(site: object, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None) -> None:
        nonlocal biased
        biased = bias is not None
        maps.append(attention_map(query, key, scale, bias))

    with torch.no_grad():
        with AttentionTap(model, keep) as tap:
            model(inputs)
        worst = max(
            float((ours - own.reshape(ours.shape)).abs().max())
            for ours, own in zip(maps, own_maps(family, model, inputs), strict=True)
        )
    layout = next(iter(tap.sites.values())).layout
    prefix = f"{layout.num_prefix_tokens}" + (", class token" if layout.class_token else "")
    skipped = "; ".join(f"`{_any_number(name)}`: {_any_number(reason)}" for name, reason in tap.skipped)
    sites = ", ".join(dict.fromkeys(f"`{_any_number(name)}`" for name in tap.sites))
    return (
        f"| {family.library} | {family.name} | `{family.example}` | {prefix} | {'yes' if biased else 'no'} | {sites} | "
        f"{skipped or '—'} | {worst:.0e} |"
    )


def refused_row(family: Family) -> str:
    model = family.build()
    try:
        capture_attention(model, family.inputs())
    except CaptureError as error:
        reason = str(error).partition("captured: ")[2] or str(error)
        reason = re.split(r"; expected (?:self-attention|a Vision)", reason)[0]
        reasons = dict.fromkeys(_any_number(part) for part in reason.split("; "))
        return f"| {family.library} | {family.name} | `{family.example}` | {'; '.join(reasons)} |"
    raise AssertionError(f"{family.name} is captured; it belongs among the measured families")


def _any_number(text: str) -> str:
    """Names of sites with the block's number as N; sizes of the small instances are left out."""
    text = re.sub(r"its map is (1×)?\d+(×\d+)? tokens, expected .*\): ", "", text)
    text = re.sub(r" … \S+ \(\d+ calls\)", "", text)
    return re.sub(r"(?<=[._])\d+(?=\.|$)", "N", text)


def main() -> None:
    versions = (
        f"timm {timm.__version__}, transformers {transformers.__version__}, torchvision {torchvision.__version__}"
    )
    lines = [
        "# Families",
        "",
        "Which models' attention is captured. Written by `python -m benchmarks.table_families` from small instances of",
        f"each family with random weights ({versions}, torch {torch.__version__}); the tests hold the same list.",
        "",
        "Maps are softmax(scale · q kᵀ + bias) of the operands that the fused kernel got. The last column is the",
        "largest difference of any element, in float32, from the map that the model computes with fused attention off",
        "(timm's `AttentionExtract`, Hugging Face's `output_attentions`, `nn.MultiheadAttention`'s weights).",
        "",
        "| library | family | for example | prefix tokens | bias | measured | skipped, and why | largest difference |",
        "|---|---|---|---|---|---|---|---|",
        *(measured_row(family) for family in MEASURED),
        "",
        "## Refused",
        "",
        "No attention of these can be measured, and capture says why.",
        "",
        "| library | family | for example | reason |",
        "|---|---|---|---|",
        *(refused_row(family) for family in REFUSED),
        "",
        "## What else a model may be",
        "",
        "| | |",
        "|---|---|",
        "| LoRA, DoRA and other peft adapters, merged or not | captured; sites are named as in the plain model |",
        "| `torch.compile`, of the model or of parts | captured; graphs run uncompiled while a tap is open |",
        "| `DistributedDataParallel`, `DataParallel` on one device | captured |",
        "| `DataParallel` over several devices, TorchScript | refused: pass the original module |",
        "| under autocast | captured: q and k have the type the kernel computes in |",
        "| train mode | captured before dropout, with the autograd graph; dropped patches are skipped |",
        "| gradient checkpointing | captured once: what the backward pass recomputes is left out |",
        "| NaFlexViT's batches of patches | captured when all images of a batch share one grid, skipped when padded |",
        "| Hugging Face models with eager or flash attention | captured: they run with `sdpa` while a tap is open |",
        "| `nn.MultiheadAttention` asked for its weights | skipped: it does not call the fused kernel |",
        "",
    ]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
