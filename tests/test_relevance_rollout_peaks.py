"""Rollout's peak at a patch that collects attention is counted by the relevance stage and said in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from engine.capture import capture_attention
from engine.relevance import relevance_maps
from engine.relevance.inference import write_relevance
from engine.relevance.results import RelevanceResults, RolloutPeaks
from engine.relevance.rollout_peaks import rollout_peaks
from engine.report.document import ReportedStudy, Text
from engine.report.sections.relevance import load_relevance, relevance, relevance_sentences
from engine.statistics import write_document
from kernels import TokenLayout, measure_attention
from tests.synthetic_study import report_on, results_of, small
from tests.test_relevance_report import IMAGES, documents

BRIGHT = [(0, 3), (2, 1), (1, 1)]  # the patch that stands out, another one in each image


@pytest.fixture
def model() -> torch.nn.Module:
    """A ViT of 2 layers, 3 heads and 4×4 patches, of which layer 0's second head looks at the bright patch alone."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64, depth=2)
    dim, first = 64, 64  # of a head; where the second one begins
    with torch.no_grad():
        model.patch_embed.proj.weight[0] = 1.0  # dimension 0 is the brightness
        weight, bias = model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.bias
        for part in (0, 3 * dim):  # of the query, of the key
            weight[part + first : part + first + dim] = 0.0
            bias[part + first : part + first + dim] = 0.0
        bias[first] = 10.0
        weight[3 * dim + first, 0] = 10.0
    return model.eval()


def pictures(bright: float) -> torch.Tensor:
    pixels = 0.1 * torch.randn(len(BRIGHT), 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for image, (row, col) in enumerate(BRIGHT):
        pixels[image, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] += bright
    return pixels


def test_a_patch_that_receives_all_is_found(model: torch.nn.Module) -> None:
    pixels = pictures(1.0)
    maps = relevance_maps(model, pixels, [0] * len(BRIGHT), "rollout").numpy()
    assert [np.unravel_index(one.argmax(), one.shape) for one in maps] == BRIGHT
    found = rollout_peaks("baseline", model, pixels, maps)
    of = TokenLayout(grid_rows=4, grid_cols=4, num_prefix_tokens=1, patch_height_px=16, patch_width_px=16)
    shares = measure_attention(capture_attention(model, pixels)["blocks.0.attn"], of, "sink_share")["sink_share"]
    assert found.share == pytest.approx(float(shares.max()), abs=1e-6)
    assert found.share > 0.9
    assert (found.images, found.at_dominant, found.layer, found.head) == (3, 3, 0, 1)
    elsewhere = np.roll(maps, 1, axis=2)  # a peak beside it is none at it
    assert rollout_peaks("baseline", model, pixels, [maps[0], *elsewhere[1:]]).at_dominant == 1


def test_nothing_dominates_where_nothing_stands_out() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64, depth=2).eval()
    pixels = pictures(0.0)
    maps = relevance_maps(plain, pixels, [0] * len(BRIGHT), "rollout").numpy()
    nothing = RolloutPeaks(condition="baseline", images=3, at_dominant=0, share=None, layer=None, head=None)
    assert rollout_peaks("baseline", plain, pixels, maps) == nothing


def alone(outputs: Path, document: RelevanceResults) -> Path:
    """An outputs folder with nothing but this document."""
    (outputs / "metrics").mkdir(parents=True)
    write_document(outputs / "metrics" / "relevance.json", document, indent=2)
    return outputs


@pytest.mark.parametrize("count", [0, 7, 8])
def test_the_report_warns_beside_rollout_where_it_applies(tmp_path: Path, count: int) -> None:
    outputs = small(tmp_path, metrics=("entropy",), conditions=("baseline", "finetuned"), samples=False)
    evaluations, targets, document = documents()
    none = RolloutPeaks(condition="baseline", images=8, at_dominant=0, share=None, layer=None, head=None)
    some = RolloutPeaks(condition="finetuned", images=8, at_dominant=count, share=0.8817, layer=0, head=5)
    document = replace(document, rollout_peaks=(none, some if count else replace(none, condition="finetuned")))
    write_relevance(outputs / "metrics", document, evaluations, targets, [f"image{i}" for i in range(IMAGES)])
    results = results_of(outputs)
    found = load_relevance(results)
    assert found is not None
    expected = (
        f"finetuned: in {'all 8' if count == 8 else '7 of 8'} images shown, rollout's peak is the patch that receives "
        "most of the attention of one head, up to 88.2 % of it (layer 0, head 5). A peak there says where attention "
        "collects, for every class alike, not what the prediction rests on."
    )
    assert relevance_sentences(results, found).get("Where rollout points", []) == ([expected] if count else [])
    # Nothing was measured: pictures alone.
    document = replace(document, means=(), curves=(), methods=(), conditions=(), classes=(), refused=())
    blocks = relevance(ReportedStudy(replace(results, outputs=alone(tmp_path / "alone", document))))
    said = [block.content for block in blocks if isinstance(block, Text)]
    assert said == ([expected] if count else [])
    if count == 7:
        report_on(outputs)
        assert expected.replace("'", "&#39;") in (outputs / "report.html").read_text(encoding="utf-8")
        assert expected in (outputs / "summary.md").read_text(encoding="utf-8")
