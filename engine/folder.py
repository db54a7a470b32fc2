"""Attention of one model on a folder of images, and the provenance that every capture keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import StudyConfig
from engine.journal import digest_path
from engine.outputs import resolve_device
from engine.samples import add_sample_maps, choose_samples, start_samples
from engine.sinks import Capture, capture_to_store
from engine.training import image_kind
from store import AttentionStore
from train.conditions import versions
from train.folders import prepare_folder
from train.manifest import Manifest
from train.models import build_model, preprocessing_of

__all__ = ["capture_folder", "capture_settings", "manifest_dict", "model_info"]


def capture_folder(config: StudyConfig) -> AttentionStore:
    """One model's attention on a folder of images, into the store `capture.store`; see `capture_to_store`."""
    path = Path(config.capture.store)
    device = resolve_device(config.device)
    model = build_model(
        config.model.name,
        num_classes=None,
        pretrained=config.model.pretrained,
        weights=config.model.weights,
        img_size=config.model.img_size,
    )
    preprocessing = preprocessing_of(model)
    splits = prepare_folder(
        config.data.root,
        preprocessing=preprocessing,
        kind=image_kind(config),
        split=config.data.split,
        seed=config.data.seed,
    )
    manifest = splits.manifest
    if manifest.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
        tqdm.write(f"left out: {reasons}")
    store = capture_to_store(
        model.to(device).eval(),
        splits.test,
        path,
        capture_settings(config, device),
        model_info=model_info(config.model.name, Path(config.model.weights) if config.model.weights else None),
        dataset_info={"id": manifest.kind, "split": f"{manifest.rule}/test", "sha256": manifest.sha256},
        preprocessing=preprocessing.to_dict(),
        manifest=manifest_dict(manifest),
        label=f"capture {path.name}",
    )
    samples = path.with_name("samples.zarr")
    rows = choose_samples(config.capture.samples, len(splits.test), config.data.seed)
    start_samples(samples, splits.test, rows)
    add_sample_maps(samples, path.name.removesuffix(".zarr"), model, splits.test, rows, device=device)
    return store


def capture_settings(config: StudyConfig, device: str) -> Capture:
    """The capture that a configuration asks for."""
    return Capture(
        sinks=config.capture.sinks,
        metrics=config.measure.metrics,
        encoding=config.capture.encoding,
        batch_size=config.capture.batch_size,
        layers=config.capture.layers,
        heads=config.capture.heads,
        backend=config.measure.backend,
        device=device,
    )


def manifest_dict(manifest: Manifest) -> dict[str, Any]:
    """Every file with its status, as plain values; without the folder's own place on this machine."""
    return {"kind": manifest.kind, "records": [dataclasses.asdict(record) for record in manifest.records]}


def model_info(name: str, weights: Path | None) -> dict[str, Any]:
    """Provenance of a model: its name, the hash of its weights' file, and the versions that ran it."""
    return {"name": name, "weights_sha256": digest_path(weights) if weights is not None else "", **versions()}
