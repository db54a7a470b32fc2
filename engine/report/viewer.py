"""Real attention of sample images for the page: 8 bit, for pictures only, cut to a budget of bytes."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import special

from engine.capture import SampleLayer, SampleMaps, SampleRun
from engine.config import run_name
from engine.report.inputs import Results
from engine.statistics import Classifier

BUDGET = 4_800_000
"""Bytes of base64 text for all maps: with everything else the page stays below 10 MB."""
MOST_IMAGES = 8
STRIDES = (1, 2, 3, 4, 6, 8)


def viewer_payload(results: Results) -> dict[str, Any] | None:
    """What the attention viewer needs, or None where no maps were kept.

    The first training run of each condition is shown. Rows (queries) are kept for the class token and for the patches
    of every `stride`-th row and column; the least stride at which two images fit the budget is taken, then as many
    images as still fit. A row is its greatest weight on a patch (float32), the mass on prefix tokens (float32) and the
    weights on patches as 8-bit fractions of that greatest one; rows of a layer are deflated together.
    """
    samples = results.samples
    if samples is None or not samples.runs or not len(samples.ids):
        return None
    kept: dict[str, tuple[int, SampleRun]] = {}
    for condition in results.conditions:
        for seed in results.seeds:
            if run := samples.runs.get(run_name(condition, seed)):
                kept.setdefault(condition, (seed, run))
    runs = [run for _, run in kept.values()]
    depth = min(len(run.layers) for run in runs)  # layers that not every run has cannot be shown side by side
    if depth == 0:
        return None
    for stride in STRIDES:
        blobs = _fill(samples, runs, depth, stride)
        shown = len({key.split("/")[0] for key in blobs})
        if shown >= min(2, len(samples.ids)) or (stride == STRIDES[-1] and shown):
            break
    else:
        return None
    return {
        "images": [_image(samples, index) for index in range(shown)],
        "regions": list(samples.regions),
        "runs": [
            {
                "condition": results.conditions.index(condition),
                "seed": seed,
                "predictions": _predictions(run.logits, results.document.classifiers.get(condition)),
            }
            for condition, (seed, run) in kept.items()
        ],
        "layers": [
            {
                "layer": layer.layer,
                "site": layer.site,
                "heads": int(layer.attention.shape[1]),
                "rows": layer.layout.grid_rows,
                "cols": layer.layout.grid_cols,
                "prefix": layer.layout.num_prefix_tokens,
                "classToken": layer.layout.class_token,
                "queries": _queries(layer, stride).tolist(),
            }
            for layer in runs[0].layers[:depth]
        ],
        "seeds": len(results.seeds) > 1,
        "stride": stride,
        "kept": len(samples.ids),
        "maps": blobs,
    }


def _png_data_uri(pixels: np.ndarray) -> str:
    """uint8 [row, col, channel] as a PNG data URI (one or three channels)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).save(buffer, format="PNG")
    return data_uri("image/png", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def deflated(content: bytes) -> str:
    """What a script of the page unpacks."""
    return base64.b64encode(zlib.compress(content, 6)).decode("ascii")


def _fill(samples: SampleMaps, runs: Sequence[SampleRun], depth: int, stride: int) -> dict[str, str]:
    """ "image/run/layer" -> text, for as many images as fit the budget whole."""
    blobs: dict[str, str] = {}
    used = 0
    for image in range(min(MOST_IMAGES, len(samples.ids))):
        texts: dict[str, str] = {}
        for key, text in _encode(runs, depth, stride, image):
            texts[key] = text
            used += len(text)
            if used > BUDGET:
                return blobs
        blobs |= texts
    return blobs


def _encode(runs: Sequence[SampleRun], depth: int, stride: int, image: int) -> Iterator[tuple[str, str]]:
    for r, run in enumerate(runs):
        for number, layer in enumerate(run.layers[:depth]):
            maps = np.nan_to_num(layer.read(image))
            prefix = layer.layout.num_prefix_tokens
            rows = maps[:, _queries(layer, stride)]
            weights = rows[..., prefix:]
            greatest = weights.max(-1)
            fractions = weights / np.maximum(greatest, np.finfo(np.float32).tiny)[..., None]
            mass = rows[..., :prefix].sum(-1)
            parts = (greatest.astype("<f4"), mass.astype("<f4"), np.rint(255 * fractions).astype(np.uint8))
            yield f"{image}/{r}/{number}", deflated(b"".join(part.tobytes() for part in parts))


def _queries(layer: SampleLayer, stride: int) -> np.ndarray:
    """Tokens whose rows are kept: the class token, and patches of every `stride`-th row and column."""
    layout = layer.layout
    grid = layout.num_prefix_tokens + np.arange(layout.num_patches).reshape(layout.grid_rows, layout.grid_cols)
    offset = (stride - 1) // 2
    tokens = grid[offset::stride, offset::stride].ravel()
    return np.concatenate([[0], tokens]) if layout.class_token else tokens


def _image(samples: SampleMaps, index: int) -> dict[str, Any]:
    pixels = samples.pixels[index]
    boxes = []
    if samples.boxes is not None:
        for region, box in enumerate(samples.boxes[index]):
            if np.isfinite(box).all():
                name = samples.regions[region] if region < len(samples.regions) else f"region {region}"
                boxes.append({"name": name, "box": [round(float(edge), 3) for edge in box]})
    label = samples.labels[index]
    return {
        "id": samples.ids[index],
        "label": samples.classes[label] if 0 <= label < len(samples.classes) else str(label),
        "height": int(pixels.shape[0]),
        "width": int(pixels.shape[1]),
        "src": _png_data_uri(pixels),
        "boxes": boxes,
    }


def _predictions(logits: np.ndarray | None, classifier: Classifier | None) -> list[dict[str, Any]] | None:
    """Each image's likeliest class with its probability; None where it is not known what the outputs stand for."""
    if logits is None or classifier is None or not classifier.classes:
        return None
    shares = special.softmax(np.asarray(logits, dtype=np.float64), axis=-1)
    return [{"name": classifier.classes[row.argmax()], "probability": round(float(row.max()), 4)} for row in shares]
