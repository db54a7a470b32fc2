"""docs/encodings.md: bytes an image and the error in every metric, for each encoding of a store.

    vit-attention                                           the embedded study, whose models are looked at
    python -m benchmarks.encodings_table outputs --model.name NAME --model.weights FILE --data.root DIR
                                                            writes docs/encodings.md: the study's model beside another
    python -m benchmarks.encodings_table --model.name NAME --model.weights FILE --data.root DIR
                                                            prints the tables of that model alone: of yours

A model is a timm name, its weights and a folder of class folders with images; `--against FILE` adds other weights of it
for pair metrics to compare with, `--model.img_size` an input size, `--about` a sentence on what was run.

The truth is the model's own query and key in float64, every metric by the reference backend. A store's values are
computed by the reference backend too, from what the store holds, so that what differs is the encoding.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.capture import AttentionSite, AttentionTap, Capture, attention_map, capture_to_store
from engine.measure.store import measure_store
from kernels import METRICS, MetricSpec, measure_attention, measure_pair
from store import AttentionStore, info
from store.encodings import ENCODINGS
from train.data.datasets import build_manifest, prepare_folder
from train.data.digits import prepare_digits
from train.data.images import ImageSet
from train.digits_vit import IMAGE_SIZE
from train.model_source import ModelSource
from train.models import load_checkpoint, preprocessing_of

IMAGES = 128
MODEL = "digits_vit"
BATCH = 4  # images whose float64 maps exist at a time
PAGE = Path(__file__).parent.parent / "docs" / "encodings.md"

NOTES = {
    "fp16": "maps in half precision",
    "bf16": "maps in bfloat16: fewer bytes, about eight times the error",
    "qk": "query and key in 16 bits, exact for a model that ran in them",
}


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        name: of the model.
        models: "ours" -> what loads it; "theirs" too where there is one to compare with.
        images: all that are captured.
        about: a sentence on model and images.
    """

    name: str
    models: dict[str, Callable[[], torch.nn.Module]]
    images: ImageSet
    about: str

    def specs(self) -> list[MetricSpec]:
        """Every metric but those that need regions, and pairs where there are none."""
        kinds = ("rows", "pair") if "theirs" in self.models else ("rows",)
        return [spec for spec in METRICS.values() if spec.inputs in kinds]


@dataclass(frozen=True)
class Found:
    """What was found of a subject.

    Args:
        shape: of its attention, in words.
        truth: metric -> [layer, image, head].
        sizes: encoding -> `info` of its store's attention.
        errors: (metric, encoding) -> [layer, image, head], NaN where the metric has no value.
    """

    shape: str
    truth: dict[str, np.ndarray]
    sizes: dict[str, dict[str, Any]]
    errors: dict[tuple[str, str], np.ndarray]

    def worst(self, metric: str, encoding: str) -> float:
        return float(np.nanmax(self.errors[metric, encoding], initial=0.0))

    def where(self, metric: str, encoding: str) -> str:
        """Layer and head of the largest error."""
        known = np.nan_to_num(self.errors[metric, encoding], nan=-1.0)
        layer, _, head = np.unravel_index(known.argmax(), known.shape)
        return f"{layer}, {head}"


def embedded(outputs: Path) -> Subject:
    """The embedded study's fine-tuned model beside its baseline, on test scenes."""

    def loader(condition: str) -> Callable[[], torch.nn.Module]:
        return lambda: load_checkpoint(MODEL, outputs / "checkpoints" / f"{condition}_seed42.safetensors").eval()

    models = {"ours": loader("finetuned"), "theirs": loader("baseline")}
    images = prepare_digits(preprocessing=preprocessing_of(models["ours"]()), test_scenes=IMAGES).test
    about = (
        f"the fine-tuned model of the embedded study (`vit-attention`), {IMAGE_SIZE}×{IMAGE_SIZE} pixels, and "
        f"its baseline; {IMAGES} test scenes"
    )
    return Subject(MODEL, models, images, about)


def of_files(name: str, weights: Path, against: Path | None, root: Path, img_size: int, about: str) -> Subject:
    """A timm model with its weights, on the pictures of a folder."""
    models = {"ours": lambda: load_checkpoint(ModelSource(name, img_size=img_size), weights).eval()}
    if against is not None:
        models["theirs"] = lambda: load_checkpoint(ModelSource(name, img_size=img_size), against).eval()
    preprocessing = preprocessing_of(models["ours"]())
    manifest = build_manifest(root, kind="folder", split="all", seed=0)
    images = prepare_folder(manifest, preprocessing=preprocessing).test
    return Subject(name, models, images, about or f"`{weights.name}`; {len(images)} images of `{root.name}`")


def exact_maps(model: torch.nn.Module, images: torch.Tensor) -> list[tuple[AttentionSite, torch.Tensor]]:
    """float64 maps of every layer, from the float32 query and key that the model computes."""
    maps: list[tuple[AttentionSite, torch.Tensor]] = []

    def keep(site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: Any) -> None:
        maps.append((site, attention_map(query.double(), key.double(), scale, bias)))

    with torch.inference_mode(), AttentionTap(model, keep):
        model(images)
    return maps


def true_values(subject: Subject) -> tuple[str, dict[str, np.ndarray]]:
    """(the attention's shape in words, metric -> [layer, image, head])."""
    of_one = [spec for spec in subject.specs() if spec.inputs == "rows"]
    of_two = [spec for spec in subject.specs() if spec.inputs == "pair"]
    models = {side: load() for side, load in subject.models.items()}
    batches: list[dict[str, np.ndarray]] = []
    shape = ""
    for start in range(0, len(subject.images), BATCH):
        pixels = subject.images.batch(range(start, min(start + BATCH, len(subject.images))))
        ours = exact_maps(models["ours"], pixels)
        theirs = exact_maps(models["theirs"], pixels) if of_two else ours
        layers: dict[str, list[np.ndarray]] = {}
        for (site, maps), (_, others) in zip(ours, theirs, strict=True):
            measured = dict(measure_attention(maps, site.layout, of_one, "reference"))
            if of_two:
                measured |= measure_pair(maps, others, site.layout, of_two, "reference")
            for name, values in measured.items():
                layers.setdefault(name, []).append(np.asarray(values))
        batches.append({name: np.stack(values) for name, values in layers.items()})
        site, maps = ours[0]
        shape = (
            f"{len(ours)} layers, {maps.shape[1]} heads, {maps.shape[2]} tokens ({site.layout.grid_rows}×"
            f"{site.layout.grid_cols} patches)"
        )
    return shape, {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}


def stored(folder: Path, subject: Subject, encoding: str) -> AttentionStore:
    """The store of the subject's attention, measured."""
    paths = {side: folder / f"{side}_{encoding}.zarr" for side in subject.models}
    for side, load in subject.models.items():
        about: dict[str, Any] = {"model_info": {"name": side}, "dataset_info": {}, "preprocessing": {}}
        capture = Capture(sinks=("store",), encoding=encoding, batch_size=BATCH)
        capture_to_store(load(), subject.images, paths[side], capture, **about)
    names = [spec.name for spec in subject.specs()]
    store = AttentionStore.open(paths["ours"])
    against = AttentionStore.open(paths["theirs"]) if "theirs" in paths else None
    measure_store(store, names, "reference", against)
    return store


def look_at(subject: Subject) -> Found:
    shape, truth = true_values(subject)
    sizes, errors = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ENCODINGS:
            store = stored(Path(folder), subject, name)
            sizes[name] = info(store.path)["attention"]
            for metric, expected in truth.items():
                values = store.read_metric(metric)[0].swapaxes(0, 1)  # [layer, image, head]
                assert (np.isnan(values) == np.isnan(expected)).all(), f"{metric} is undefined elsewhere in {name}"
                errors[metric, name] = np.abs(values - expected)
    return Found(shape, truth, sizes, errors)


def tables(subjects: Sequence[Subject], found: Sequence[Found]) -> list[str]:
    """What was run, bytes, errors, and where the largest ones lie."""
    pairs = list(zip(subjects, found, strict=True))
    lines = ["What was run, in float32 on a CPU:", ""]
    for subject, of in pairs:
        entropy, ran = of.truth["entropy"], f"`{subject.name}`: {subject.about}; {of.shape}"
        lines += _item(f"{ran}; entropies of heads from {np.nanmin(entropy):.3g} to {np.nanmax(entropy):.3g} nat.")
    lines += [
        "",
        "## Bytes per image",
        "",
        *_paragraph("All layers and heads; on disk after Blosc (lz4, bitshuffle), checksums and index included."),
        "| model | encoding | what is kept | before compression | on disk | ratio |",
        "|---|---|---|---:|---:|---:|",
    ]
    for subject, of in pairs:
        for name, kept in of.sizes.items():
            raw, disk = (kept[key] / len(subject.images) for key in ("raw_bytes", "bytes"))
            lines.append(
                f"| `{subject.name}` | `{name}` | {NOTES[name]} | {raw:,.0f} | {disk:,.0f} | {kept['ratio']:.2f} |"
            )
    columns = [(name, subject, of) for name in ENCODINGS for subject, of in pairs]
    lines += [
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
            f"is computed in float64 from the float32 query and key. {_pair_note(found)}The models ran in float32, so "
            "`qk` narrows query and key to float16; for a model that ran in float16 or bfloat16 they are kept as they "
            "are, and the error is that of float32 arithmetic alone."
        ),
        *_paragraph(_no_bounds(pairs)),
        "| metric | unit | " + " | ".join(f"`{name}`, `{subject.name}`" for name, subject, _ in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for metric in METRICS:
        if any(metric in of.truth for of in found):
            cells = (f"{of.worst(metric, name):.1e}" if metric in of.truth else "" for name, _, of in columns)
            lines.append(f"| `{metric}` | {METRICS[metric].unit} | {' | '.join(cells)} |")
    for subject, of in pairs:
        lines += [
            "",
            f"The values of `{subject.name}`, and layer and head of its largest errors:",
            "",
            "| metric | values from | to | " + " | ".join(f"`{name}`" for name in ENCODINGS) + " |",
            "|---|---:|---:|" + "---:|" * len(ENCODINGS),
        ]
        for metric, values in of.truth.items():
            cells = (of.where(metric, name) for name in ENCODINGS)
            lines.append(f"| `{metric}` | {np.nanmin(values):.3g} | {np.nanmax(values):.3g} | {' | '.join(cells)} |")
    return lines


def _pair_note(found: Sequence[Found]) -> str:
    names = [name for name, spec in METRICS.items() if spec.inputs == "pair" and any(name in of.truth for of in found)]
    listed = ", ".join(f"`{name}`" for name in names)
    return f"{listed} compares with the other weights, both stored in the same encoding. " if names else ""


def _no_bounds(pairs: Sequence[tuple[Subject, Found]]) -> str:
    """That errors depend on model and images, and by how much they did here."""
    said = "These are the largest errors found on these images and no bounds: they depend on the model."
    if len(pairs) < 2:
        return said
    (first, of_first), (second, of_second) = pairs[:2]
    ratios = {
        (metric, name): of_second.worst(metric, name) / of_first.worst(metric, name)
        for metric in of_first.truth
        for name in ENCODINGS
        if metric in of_second.truth and METRICS[metric].unit != "px"
    }
    metric, name = max(ratios, key=lambda key: ratios[key])
    more = sum(ratio > 1 for ratio in ratios.values())
    return (
        f"{said} Those of `{second.name}` are larger than those of `{first.name}` in {more} of {len(ratios)} cells "
        f"(pixels aside, which grow with the image), up to {ratios[metric, name]:.0f} times (`{metric}` in `{name}`). "
        "Run the benchmark on your own model and images where an error of this size would matter."
    )


def page(outputs: Path, others: Sequence[Subject]) -> str:
    subjects = [embedded(outputs), *others]
    lines = [
        "# What each encoding costs",
        "",
        *_paragraph(
            "Made by `python -m benchmarks.encodings_table`, which takes a model and images of your own too; do not "
            "edit. `capture.encoding` chooses, see the [README](../README.md)."
        ),
        *tables(subjects, [look_at(subject) for subject in subjects]),
        "",
        *_paragraph(
            "`morans_i_seed1` is a function of how the rows' patch mass differs from 1: where the class token's mass "
            "is small, it is read off the last bits of a 16-bit map, and only `qk` keeps it."
        ),
        *_paragraph(
            "float16 holds nothing below 3e-8 and few digits below 6e-5: in a head most of whose weights are that "
            "small, `fp16` is no better than `bf16`."
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


def _item(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False, initial_indent="- ", subsequent_indent="  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", type=Path, nargs="?", help="the embedded study's; docs/encodings.md is written")
    parser.add_argument("--model.name", dest="name", help="a timm model")
    parser.add_argument("--model.weights", dest="weights", type=Path)
    parser.add_argument("--model.img_size", dest="img_size", type=int, default=0)
    parser.add_argument("--data.root", dest="root", type=Path, help="class folders with images")
    parser.add_argument("--against", type=Path, help="other weights of the model, for pair metrics")
    parser.add_argument("--about", default="", help="a sentence on model and images")
    given = parser.parse_args()
    others = []
    if given.name:
        if given.weights is None or given.root is None:
            parser.error("--model.name needs --model.weights and --data.root")
        others.append(of_files(given.name, given.weights, given.against, given.root, given.img_size, given.about))
    if given.outputs is not None:
        PAGE.write_text(page(given.outputs, others), encoding="utf-8")
        print(PAGE)
    elif others:
        print("\n".join(tables(others, [look_at(subject) for subject in others])))
    else:
        parser.error("name the embedded study's outputs folder, or a model")


if __name__ == "__main__":
    main()
