"""A folder on disk as the three splits of a data set, decoded once if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.data.cache import CachedImages, ImageCache
from train.data.datasets import DataKind, SplitRule, build_manifest
from train.data.manifest import Manifest, Record
from train.data.sets import DataSplits, FolderImages, Preprocessing
from train.data.splits import SPLITS


def prepare_folder(
    root: str | Path,
    *,
    preprocessing: Preprocessing,
    kind: DataKind = "folder",
    split: SplitRule = "auto",
    seed: int = 42,
    follow_links: bool = False,
    manifest: Manifest | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
) -> DataSplits:
    """The images of a data set in three splits; see `build_manifest` for layouts and errors.

    Args:
        manifest: one built before of the same folder, so that no file is decoded again.
        cache: a folder for the decoded pictures, see `train.data.cache`; None: decode whenever they are asked for.
    """
    if manifest is None:
        manifest = build_manifest(root, kind=kind, split=split, seed=seed, follow_links=follow_links, workers=workers)
    base = Path(manifest.root)

    def pictures(records: Sequence[Record]) -> FolderImages:
        return FolderImages(base, records, manifest.class_names, preprocessing)

    train, validation, test = (pictures(manifest.split(name)) for name in SPLITS)
    if cache is None:
        return DataSplits(train, validation, test, manifest)
    decoded = ImageCache(cache, pictures([record for record in manifest.records if record.status == "ok"]))
    cached = [CachedImages(decoded, images) for images in (train, validation, test)]
    return DataSplits(cached[0], cached[1], cached[2], manifest)
