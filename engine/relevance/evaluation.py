"""Maps of a model measured: how faithful, where they point, how noisy, how much they depend on the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from engine.capture import CaptureError, evaluating, token_layout, vision_module
from engine.config import RelevanceConfig
from engine.relevance.choice import Targets
from engine.relevance.faithfulness import Curves, baseline_images, perturbation_curves, random_maps
from engine.relevance.map_measures import LIKENESS, between_images, localization, noise
from engine.relevance.maps import relevance_maps
from engine.relevance.methods import METHODS
from engine.relevance.results import CONTROL
from engine.relevance.targets import device_of
from engine.statistics import Floats
from train.data import ImageSet

# Images that one seed of the random control and of ties is for: whatever the batch size, the numbers are the same.
_BLOCK = 32


_Part = tuple[dict[str, Floats], Curves, Floats]  # of one block of images: measures, curves, maps [image, row, col]


@dataclass(frozen=True)
class Evaluation:
    """One model's maps by one method over the evaluated images."""

    values: Mapping[str, Floats]  # measure -> [image]
    curves: Curves


def evaluate_maps(
    model: torch.nn.Module,
    images: ImageSet,
    rows: Sequence[int],
    targets: Targets,
    methods: Sequence[str],
    config: RelevanceConfig,
    *,
    seed: int,
    batch_size: int,
    label: str = "",
) -> tuple[dict[str, Evaluation], dict[str, str]]:
    """Every method's maps, and those of the random control, measured on the same images.

    The control's curves are the mean of a random order's and its reverse's: its faithfulness is 0 in every image, and
    a test against it is a test against 0.

    Returns method -> its evaluation, and method -> why it cannot be computed for this model and these images. `seed` is
    of the random control and of ties; `batch_size` images are in memory at a time.
    """
    measured: dict[str, list[_Part]] = {}
    refused: dict[str, str] = {}
    with evaluating(model), tqdm(total=len(rows), desc=f"relevance {label}", unit="image", disable=None) as progress:
        for start in range(0, len(rows), _BLOCK):
            block = slice(start, start + _BLOCK)
            pixels = images.batch(rows[block]).to(device_of(model))
            stand_in = baseline_images(pixels, config.baseline)
            layout = token_layout(vision_module(model), pixels.shape)
            regions = images.regions(layout)
            coverage = None if regions is None else regions[list(rows[block])].astype(np.float64)
            true = torch.from_numpy(targets.target[block])
            for method in (*methods, CONTROL):
                if method in refused:
                    continue
                others: Floats | None = None
                if method == CONTROL:
                    maps = random_maps((len(pixels), layout.grid_rows, layout.grid_cols), seed + start)
                else:
                    try:
                        maps = relevance_maps(model, pixels, true, method, batch_size=batch_size)
                        if targets.other is not None and not METHODS[method].class_free:
                            other = torch.from_numpy(targets.other[block])
                            of_other = relevance_maps(model, pixels, other, method, batch_size=batch_size)
                            others = of_other.double().cpu().numpy()
                    except CaptureError as error:
                        refused[method] = str(error)
                        measured.pop(method, None)
                        continue
                curves = perturbation_curves(
                    model, pixels, stand_in, true, maps, steps=config.steps, batch_size=batch_size, seed=seed
                )
                curves = curves.with_reverse() if method == CONTROL else curves
                of_class = maps.double().cpu().numpy()
                values = curves.measures() | _measure(of_class, others, coverage, images.region_names)
                measured.setdefault(method, []).append((values, curves, of_class))
            progress.update(len(pixels))
    return {method: _joined(parts) for method, parts in measured.items()}, refused


def _measure(maps: Floats, others: Floats | None, coverage: Floats | None, regions: Sequence[str]) -> dict[str, Floats]:
    values = noise(maps)
    if coverage is not None:
        for name, by_region in localization(maps, coverage).items():
            values |= {f"{name}[{region}]": by_region[:, i] for i, region in enumerate(regions)}
    if others is not None:
        values |= {f"class_{name}": likeness(maps, others) for name, likeness in LIKENESS.items()}
        values |= {f"{name}_other": value for name, value in noise(others).items()}
    return values


def _joined(parts: Sequence[_Part]) -> Evaluation:
    """The batches' parts as one, with what takes the maps of all images."""
    values, curves, maps = zip(*parts, strict=True)
    deletion, insertion = (np.concatenate([getattr(c, name) for c in curves]) for name in ("deletion", "insertion"))
    joined = {name: np.concatenate([part[name] for part in values]) for name in values[0]}
    for name, likeness in LIKENESS.items():
        if f"class_{name}" in joined:
            joined[f"image_{name}"] = between_images(np.concatenate(maps), likeness)
    return Evaluation(joined, Curves(curves[0].fractions, deletion, insertion))
