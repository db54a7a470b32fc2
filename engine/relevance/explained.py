"""Relevance maps of the sample images, as pictures and a table. Illustrative: a few images picked by seed.

A method's folder holds one panel per image (the image, then each condition's map of its class and of another one, the
two on one scale of colours) and `<method>_samples.csv`; Grad-CAM's also each map as a picture of its own, for the page.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from engine.relevance.choice import Targets
from engine.relevance.maps import relevance_maps
from engine.relevance.results import ILLUSTRATIVE
from engine.relevance.targets import device_of, image_logits
from train.data import ImageSet
from train.whole_files import replace_files

# Pictures are drawn at least this large, whatever the model's input size.
_PICTURE_PX = 192
_OVERLAY = 0.7  # share of the heat map's colour where relevance is highest
_GAP_PX, _TEXT_PX, _BAR_PX = 10, 14, 14


@dataclass(frozen=True)
class Explained:
    """One map: an image, the model and class it explains, and how probable the model finds that class."""

    image: int  # row of the data set
    condition: str
    target: str  # class name
    role: str  # "true", "other" or "predicted"
    probability: float  # softmax of the model's logits at the target
    map: np.ndarray  # float32 [row, col] on the patch grid, not normalised


def explain_samples(
    model: torch.nn.Module,
    condition: str,
    images: ImageSet,
    rows: Sequence[int],
    targets: Targets,
    method: str,
    batch_size: int,
) -> list[Explained]:
    """Maps of one model, in evaluation mode, for the sample images. Raises as `relevance_maps`."""
    pixels = images.batch(rows).to(device_of(model))
    logits = image_logits(model, images, rows, batch_size)
    probabilities = logits.float().softmax(dim=-1).cpu().numpy()
    roles = {targets.role: targets.target} | ({} if targets.other is None else {"other": targets.other})
    explained = []
    for role, outputs in roles.items():
        classes = outputs.tolist()
        maps = relevance_maps(model, pixels, classes, method, batch_size=batch_size).cpu().numpy()
        for row, target, chances, one in zip(rows, classes, probabilities, maps, strict=True):
            explained.append(Explained(row, condition, targets.head.name(target), role, float(chances[target]), one))
    return explained


def write_samples(folder: Path, method: str, images: ImageSet, explained: Sequence[Explained]) -> None:
    """The panels, the table and Grad-CAM's single pictures, those of an earlier run being replaced.

    The colours of an image's maps share one scale over the classes of a condition, so that a paler map is a weaker one.
    Conditions have each their own: maps are as strong as a model's logits are large.
    """
    files: dict[str, bytes] = {}
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "image", "condition", "role", "target", "probability", "peak"])
    rows = list(dict.fromkeys(item.image for item in explained))
    for row in tqdm(rows, desc=f"{method} samples", unit="image", disable=None):
        items = [item for item in explained if item.image == row]
        strongest = dict.fromkeys((item.condition for item in items), 0.0)
        for item in items:
            strongest[item.condition] = float(item.map.max(initial=strongest[item.condition]))
        picture = images.picture(row)
        overlays = [_overlay(picture, item.map, strongest[item.condition]) for item in items]
        panel = f"{row:05d}_panel.png"
        files[panel] = _png(_panel(images, row, items, overlays, method))
        for item, overlay in zip(items, overlays, strict=True):
            name = panel
            if method in ILLUSTRATIVE:
                name = f"{row:05d}_{item.condition}_{item.role}_{_plain(item.target)}.png"
                files[name] = _png(overlay)
            peak, probability = f"{float(item.map.max()):.6g}", f"{item.probability:.4f}"
            writer.writerow([name, images.ids[row], item.condition, item.role, item.target, probability, peak])
    files[f"{method}_samples.csv"] = table.getvalue().encode()
    replace_files(folder, files.items())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _overlay(picture: np.ndarray, map: np.ndarray, strongest: float) -> Image.Image:
    """The picture in grey under the map, up-sampled bilinearly, in colour."""
    height, width = picture.shape[:2]
    scale = max(1, -(-_PICTURE_PX // min(height, width)))
    size = (height * scale, width * scale)
    heat = torch.from_numpy(map.astype(np.float32))[None, None]
    heat = F.interpolate(heat, size=size, mode="bilinear", align_corners=False)[0, 0]
    strength = (heat / strongest).clamp(0, 1).numpy() if strongest > 0 else np.zeros(size, dtype=np.float32)
    grey = Image.fromarray(picture).convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    base = np.repeat(np.asarray(grey, dtype=np.float32)[..., None] / 255, 3, axis=-1)
    share = _OVERLAY * np.sqrt(strength)[..., None]  # the root: weak relevance is seen, too
    mixed = base * (1 - share) + _colours(strength) * share
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _colours(strength: np.ndarray) -> np.ndarray:
    """Colours of 0..1, [..., 3] in 0..1."""
    from matplotlib import colormaps

    return np.asarray(colormaps["inferno"](strength)[..., :3])


def _panel(
    images: ImageSet, row: int, items: Sequence[Explained], overlays: Sequence[Image.Image], method: str
) -> Image.Image:
    """One row per class, one column per condition, the image itself first, and the scale of the colours last."""
    roles = list(dict.fromkeys(item.role for item in items))
    conditions = list(dict.fromkeys(item.condition for item in items))
    width, height = overlays[0].size
    title_px = 2 * _TEXT_PX + 8
    top = _TEXT_PX + 2 * _GAP_PX
    cell = (width + _GAP_PX, height + title_px + _GAP_PX)
    bar_left = _GAP_PX + cell[0] * (1 + len(conditions))
    canvas = Image.new("RGB", (bar_left + _BAR_PX + 64, top + cell[1] * len(roles)), "white")
    draw = ImageDraw.Draw(canvas)
    small, bold = _font(_TEXT_PX - 2), _font(_TEXT_PX, bold=True)
    draw.text((_GAP_PX, _GAP_PX), _one_line(f"{method}: {images.ids[row]}"), fill="black", font=bold)
    if method in ILLUSTRATIVE:
        draw.text((canvas.width - _GAP_PX, _GAP_PX), "for illustration", fill="#555555", font=small, anchor="ra")
    original = Image.fromarray(images.picture(row)).resize((width, height), Image.Resampling.BILINEAR)
    for line, role in enumerate(roles):
        upper = top + cell[1] * line
        if line == 0:
            _titles(draw, (_GAP_PX, upper), "image", "", width, (bold, small))
            canvas.paste(original, (_GAP_PX, upper + title_px))
        for column, condition in enumerate(conditions):
            place = next(i for i, item in enumerate(items) if (item.role, item.condition) == (role, condition))
            x = _GAP_PX + cell[0] * (1 + column)
            note = f"{role} class {items[place].target}, p = {items[place].probability:.2f}"
            _titles(draw, (x, upper), condition, note, width, (bold, small))
            canvas.paste(overlays[place], (x, upper + title_px))
    upper, length = top + title_px, height + cell[1] * (len(roles) - 1)
    ramp = np.linspace(1, 0, length)[:, None].repeat(_BAR_PX, axis=1)
    canvas.paste(Image.fromarray((_colours(ramp) * 255).round().astype(np.uint8)), (bar_left, upper))
    for label, y, anchor in (("strongest", upper, "la"), ("0", upper + length, "ld")):
        draw.text((bar_left + _BAR_PX + 4, y), label, fill="black", font=small, anchor=anchor)
    return canvas


Font = ImageFont.FreeTypeFont


def _titles(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], first: str, second: str, width: int, fonts: tuple[Font, Font]
) -> None:
    for line, (text, font) in enumerate(zip((first, second), fonts, strict=True)):
        fitting = _one_line(text)
        while fitting and draw.textlength(fitting, font=font) > width:
            fitting = fitting[:-2] + "…" if len(fitting) > 2 else ""
        draw.text((corner[0], corner[1] + line * (_TEXT_PX + 2)), fitting, fill="black", font=font)


def _font(size_px: int, *, bold: bool = False) -> Font:
    """matplotlib's own DejaVu Sans: the same glyphs on every machine."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size_px)


def _one_line(text: str) -> str:
    """Names of files and classes may hold line breaks, and Pillow measures one line."""
    return " ".join(text.split())


def _plain(name: str) -> str:
    """A name that is a file name everywhere."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:40] or "x"
