"""Relevance maps of the sample images, as pictures and a table. Illustrative: gradient correlations, not causes."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from engine.relevance import relevance_maps
from train.data import ImageSet

__all__ = ["Explained", "choose_targets", "explain_samples", "samples_folder", "write_samples"]

# Pictures are drawn at least this large, whatever the model's input size.
_PICTURE_PX = 192
_OVERLAY = 0.55  # share of the heat map's colour where relevance is highest


@dataclass(frozen=True)
class Explained:
    """One map: an image, the model and class it explains, and how probable the model finds that class.

    Args:
        image: row of the data set.
        condition: the model.
        target: class index; role: "true", "other" or "predicted".
        probability: softmax of the model's logits at the target.
        map: float32 [row, col] on the patch grid, not normalised.
    """

    image: int
    condition: str
    target: int
    role: str
    probability: float
    map: np.ndarray


def samples_folder(outputs: Path, method: str) -> Path:
    """Where a method's pictures go."""
    visualizations = outputs / "visualizations"
    return visualizations / "gradcam_samples" if method == "gradcam" else visualizations / "relevance" / method


def choose_targets(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """A seeded class other than the true one for each image, [image]."""
    steps = np.random.default_rng(seed).integers(1, num_classes, size=len(labels))
    return np.asarray((labels + steps) % num_classes)


def explain_samples(
    model: torch.nn.Module,
    condition: str,
    images: ImageSet,
    rows: Sequence[int],
    targets: Mapping[str, np.ndarray],
    method: str,
    *,
    device: str,
) -> list[Explained]:
    """Maps of one model for the sample images.

    Args:
        model: in evaluation mode, on `device`.
        condition: its name.
        images, rows: the samples.
        targets: role -> class index a sample, [sample]; none: the class that the model predicts.
        method: see `relevance_maps`.
    """
    pixels = images.batch(rows).to(device)
    with torch.inference_mode():
        probabilities = model(pixels).float().softmax(dim=-1).cpu().numpy()
    roles = targets or {"predicted": probabilities.argmax(axis=1)}
    found = []
    for role, classes in roles.items():
        maps = relevance_maps(model, pixels, [int(c) for c in classes], method).cpu().numpy()
        for sample, (row, target) in enumerate(zip(rows, classes, strict=True)):
            probability = float(probabilities[sample, int(target)])
            found.append(Explained(row, condition, int(target), role, probability, maps[sample]))
    return found


def write_samples(folder: Path, method: str, images: ImageSet, explained: Sequence[Explained]) -> None:
    """One picture a map and `<method>_samples.csv`, in a folder that is replaced whole.

    The colours of an image's pictures share one scale over conditions and classes, so that a paler map is a weaker one.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    strongest: dict[int, float] = {}
    for item in explained:
        strongest[item.image] = max(strongest.get(item.image, 0.0), float(item.map.max(initial=0.0)))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "image", "condition", "role", "target", "probability", "peak"])
    for item in tqdm(explained, desc=f"{method} samples", unit="picture", disable=None):
        target = images.class_names[item.target] if item.target < len(images.class_names) else f"class {item.target}"
        name = f"{item.image:05d}_{_plain(item.condition)}_{item.role}_{_plain(target)}.png"
        _overlay(images.picture(item.image), item.map, strongest[item.image]).save(partial / name, optimize=True)
        peak = f"{float(item.map.max()):.6g}"
        writer.writerow(
            [name, images.ids[item.image], item.condition, item.role, target, f"{item.probability:.4f}", peak]
        )
    (partial / f"{method}_samples.csv").write_text(table.getvalue(), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _overlay(picture: np.ndarray, map: np.ndarray, strongest: float) -> Image.Image:
    """The picture in grey under the map, up-sampled bilinearly, in colour."""
    from matplotlib import colormaps

    height, width = picture.shape[:2]
    scale = max(1, -(-_PICTURE_PX // min(height, width)))
    size = (height * scale, width * scale)
    heat = torch.from_numpy(map.astype(np.float32))[None, None]
    heat = F.interpolate(heat, size=size, mode="bilinear", align_corners=False)[0, 0]
    strength = (heat / strongest).clamp(0, 1).numpy() if strongest > 0 else np.zeros(size, dtype=np.float32)
    grey = Image.fromarray(picture).convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    base = np.repeat(np.asarray(grey, dtype=np.float32)[..., None] / 255, 3, axis=-1)
    colour = colormaps["inferno"](strength)[..., :3]
    mixed = base * (1 - _OVERLAY * strength[..., None]) + colour * _OVERLAY * strength[..., None]
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _plain(name: str) -> str:
    """A name that is a file name everywhere."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:40] or "x"
