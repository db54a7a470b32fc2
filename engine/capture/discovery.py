"""What one forward pass shows of a model: the sites that can be measured, and what a store of it will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.capture.attention_call import AttentionSite, SiteAttention
from engine.capture.tap import has_classes, logits_of, observe
from store import Factors, FactorSchema, LayerSchema
from store.encodings import factor_schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What a capture of a model will hold."""

    sites: tuple[AttentionSite, ...]  # in depth order
    skipped: tuple[tuple[str, str], ...]  # (module name, reason) of the others
    num_classes: int  # scored by the model; 0 without a head
    precision: str  # dtype in which query meets key; under autocast, the one that it casts to
    factors: dict[int, FactorSchema]  # layer -> what is fixed about its query and key, where they are kept
    biases: dict[int, torch.Tensor]  # layer -> the bias that all images share, [1, head, query, key], likewise

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The names that `precision` lists: one, unless layers differ."""
        return tuple(self.precision.split(", "))

    @property
    def head_ids(self) -> tuple[int, ...]:
        """Numbers of the captured heads in the model, where some were chosen."""
        return self.sites[0].head_ids  # the tap's choice, one for all sites

    @property
    def layers(self) -> tuple[LayerSchema, ...]:
        """What a store says of its layers, each with its own layout."""
        return tuple(
            LayerSchema(
                layer=site.layer,
                site=site.name,
                heads=site.heads,
                layout=site.layout.to_dict(),
                factors=self.factors.get(site.layer),
            )
            for site in self.sites
        )


def discover(
    model: torch.nn.Module,
    images: torch.Tensor,
    *,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    keeps_factors: bool = False,
) -> Discovery:
    """Run the model once and note what it shows.

    Args:
        model: see `AttentionTap`.
        images: [image, channel, row, col]; two where factors are kept: from one alone, a bias per image cannot be
            distinguished from one for all.
        layers, heads: to look at; empty: all.
        keeps_factors: whether query and key will be stored.

    Raises:
        CaptureError: no measurable attention, or a layer or head that is not there.
    """
    sites: list[AttentionSite] = []
    dtypes: dict[torch.dtype, None] = {}
    factors: dict[int, FactorSchema] = {}
    biases: dict[int, torch.Tensor] = {}

    def look(attention: SiteAttention) -> None:
        site = attention.site
        sites.append(site)
        dtypes[attention.query.dtype] = None
        if not keeps_factors:
            return
        bias = None if attention.bias is None else attention.bias.cpu()
        kept = Factors(query=attention.query.cpu(), key=attention.key.cpu(), scale=attention.scale, bias=bias)
        factors[site.layer] = factor_schema(kept, site.heads)
        if bias is not None and factors[site.layer].bias == "shared":
            biases[site.layer] = one_bias(bias).clone()

    output, tap = observe(model, images, look, layers=layers or None, heads=heads or None)
    return Discovery(
        sites=tuple(sites),
        skipped=tuple(tap.skipped),
        num_classes=int(logits_of(output).shape[-1]) if has_classes(model, output) else 0,
        precision=", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
        factors=factors,
        biases=biases,
    )


def one_bias(bias: torch.Tensor) -> torch.Tensor:
    """[1, head, query, key] of a bias that all images share."""
    return bias[(None,) * (4 - bias.ndim)][:1]
