"""The study's images in their splits, and the model that its conditions start from or the checkpoints it was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from engine.progress import say
from engine.study.journal import digest, digest_path
from engine.study.model import given_conditions, model_source
from engine.study.start import Start
from train.checkpoint import save_checkpoint, sidecar_path
from train.data import DataSplits, HeadClasses, ImageSet, Manifest, Preprocessing, prepare_digits, prepare_folder
from train.models import build_model, seeded
from train.pretrain import pretrain_digits


@dataclass(frozen=True)
class StudyData:
    """The images in their splits, and what is known of the models that see them."""

    splits: DataSplits
    preprocessing: Preprocessing
    pretrained_digest: str  # hash of the weights that every condition starts from; "" where checkpoints are given
    heads: Mapping[str, HeadClasses] = field(default_factory=dict)  # condition → its head, where checkpoints are given
    redrawn: Callable[[int], DataSplits] | None = None  # seed → splits with its own training and validation images

    def splits_of(self, seed: int) -> DataSplits:
        """What a seed's runs are trained and tested on."""
        return self.splits if self.redrawn is None else self.redrawn(seed)

    @property
    def test(self) -> ImageSet:
        return self.splits.test

    @property
    def digest(self) -> str:
        """Hash of every image, label and split, and of how images are prepared for the model."""
        return digest([self.splits.manifest.sha256, self.preprocessing.to_dict()])

    def head(self, condition: str) -> HeadClasses:
        """The classes of a condition's head: those of the data where it is trained here."""
        names = self.splits.class_names
        return self.heads.get(condition) or HeadClasses(len(names), names)

    def summary(self) -> dict[str, Any]:
        """What the report says of the data: counts, splits, and every file that was left out with its reason.

        `training_split` is "fixed" where all runs are trained on the same images, "drawn by the seed" where each seed
        has its own, and missing where nothing is trained.
        """
        manifest = self.splits.manifest
        splits = {"train": self.splits.train, "validation": self.splits.validation, "test": self.splits.test}
        return {
            "kind": manifest.kind,
            "images": sum(len(images) for images in splits.values()),
            "classes": len(manifest.class_names),
            "splits": {name: len(images) for name, images in splits.items()},
            "split": manifest.rule,
            **({"training_split": "drawn by the seed" if self.redrawn else "fixed"} if self.pretrained_digest else {}),
            "dropped": [
                {"id": record.id, "status": record.status} for record in manifest.records if record.status != "ok"
            ],
            "same_file_in_several_splits": [list(ids) for ids in manifest.leaks()],
            "sha256": manifest.sha256,
        }


def prepare_data(start: Start, *, device: str) -> StudyData:
    """Images in their splits, and the pretrained weights, made or fetched once, unless checkpoints are given."""
    if not given_conditions(start.config):
        splits, pretrained = _digits(start, device) if start.config.data.kind == "digits" else _folder(start)
        redrawn = lru_cache(maxsize=8)(partial(_redrawn, start)) if start.config.train.resplit else None
        return StudyData(splits, start.preprocessing, pretrained, redrawn=redrawn)
    splits = _folder_splits(start)
    heads = start.heads(splits.class_names)
    for name, head in heads.items():
        say(head.origin(name))
    return StudyData(splits, start.preprocessing, "", heads)


def dataset_info(manifest: Manifest) -> dict[str, str]:
    """Provenance of the test images."""
    return {"id": manifest.kind, "split": f"{manifest.rule}/test", "sha256": manifest.sha256}


def manifest_dict(manifest: Manifest) -> dict[str, Any]:
    """Every file with its status, as plain values; without the folder's own place on this machine."""
    return {"kind": manifest.kind, "records": [dataclasses.asdict(record) for record in manifest.records]}


def _folder(start: Start) -> tuple[DataSplits, str]:
    """A folder of images, and the hash of timm's (or the user's) pretrained weights with a head for its classes."""
    config, preprocessing, path = start.config, start.preprocessing, start.pretrained_path
    source = model_source(config)
    splits = _folder_splits(start)
    classes = len(splits.class_names)

    def work() -> None:
        with seeded(config.data.seed):
            built = build_model(source, num_classes=classes)
        facts = {
            "model": source.name,
            "arguments": dict(source.completed().arguments),
            "num_classes": classes,
            "img_size": source.completed().img_size,
            "preprocessing": preprocessing.to_dict(),
        }
        save_checkpoint(path, built.state_dict(), facts)

    inputs = {
        "model": dataclasses.asdict(config.model),
        "preprocessing": preprocessing.to_dict(),
        "weights": " ".join(map(digest_path, source.files)),
        "classes": classes,
        "seed": config.data.seed,
    }
    return splits, start.journal.stage("pretrained", inputs, [path, sidecar_path(path)], work, workers=start.workers)


def _folder_splits(start: Start) -> DataSplits:
    """The manifest of the folder, made again when a file was added, removed or touched, and its splits.

    Where each seed draws its own training and validation images, its manifest is left in `splits/`.
    """
    config, path = start.config, start.manifest_path
    start.journal.stage("data", start.data_inputs, [path], lambda: start.manifest.save(path), workers=start.workers)
    manifest = Manifest.load(path)
    for seed in config.train.seeds if config.train.resplit else ():
        _leave_redrawn(start, manifest, seed)
    say(f"{config.model.name} takes {start.preprocessing}")
    return _pictures(start, manifest)


def _manifest_of(start: Start, seed: int) -> Path:
    return start.outputs / "splits" / f"seed{seed}.json"


def _leave_redrawn(start: Start, manifest: Manifest, seed: int) -> None:
    path, inputs = _manifest_of(start, seed), {"manifest": manifest.sha256, "seed": seed}

    def work() -> None:
        manifest.redrawn(seed).save(path)

    start.journal.stage(f"data of seed {seed}", inputs, [path], work, workers=start.workers)


def _pictures(start: Start, manifest: Manifest) -> DataSplits:
    return prepare_folder(manifest, preprocessing=start.preprocessing, cache=start.cache_folder)


def _redrawn(start: Start, seed: int) -> DataSplits:
    """With the training and validation images that a seed draws."""
    return _scenes(start, seed) if start.listed is None else _pictures(start, Manifest.load(_manifest_of(start, seed)))


def _digits(start: Start, device: str) -> tuple[DataSplits, str]:
    """Scenes of the target task, and the hash of the backbone that is pretrained on the source task."""
    config, path = start.config, start.pretrained_path
    more: dict[str, Any] = {
        "data_seed": config.data.seed,
        "validation_scenes": config.data.validation_scenes,
        "test_scenes": config.data.test_scenes,
        "precision": config.train.precision,
        "deterministic": config.train.deterministic,
        "device": device,
    }

    def work() -> dict[str, Any]:
        result = pretrain_digits(config.pretrain, checkpoint=path, **more)
        say(f"pretrained: source task, validation {result.validation_accuracy:.1%}, test {result.test_accuracy:.1%}")
        return {"validation_accuracy": result.validation_accuracy, "test_accuracy": result.test_accuracy}

    inputs = dataclasses.asdict(config.pretrain) | more
    pretrained = start.journal.stage("pretrain", inputs, [path, sidecar_path(path)], work, workers=start.workers)
    return _scenes(start), pretrained


def _scenes(start: Start, draw: int | None = None) -> DataSplits:
    data = start.config.data
    return prepare_digits(
        preprocessing=start.preprocessing,
        seed=data.seed,
        train_scenes=data.train_scenes,
        validation_scenes=data.validation_scenes,
        test_scenes=data.test_scenes,
        draw=draw,
    )
