"""Attention of one model on a folder of images, and the provenance that every capture keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from engine.capture import FILES, SampleMaps, capture_to_store, choose_samples, require_samples_place
from engine.config import StudyConfig
from engine.progress import say
from engine.study.check import check_capture, one_torch_thread
from engine.study.data import dataset_info, manifest_dict
from engine.study.model import capture_settings, model_info, model_source, named_head
from engine.study.outputs import resolve_device
from engine.study.start import list_images
from store import StoreError
from store.places import require_place, storage_at
from store.schema import samples_name
from store.storage import Location, location_of
from train.data import Manifest, Record, check_shared_names, folder_classes, prepare_folder, read_class_names
from train.errors import InputError
from train.models import build_model, preprocessing_of, seeded
from train.parallel import Workers, joined


def capture_folder(config: StudyConfig) -> None:
    """One model's attention on a folder of images, into the store `capture.store`; see `capture_to_store`.

    Started by torchrun, the processes divide the batches among them, and the store's attention has the same bytes.
    """
    device = resolve_device(config.device)
    with joined(device) as workers:
        _capture_folder(config, device, workers)


def _capture_folder(config: StudyConfig, device: str, workers: Workers) -> None:
    path = location_of(config.capture.store)
    if workers.first:
        require_places(path)
    if config.model.classes:
        read_class_names(Path(config.model.classes))  # a wrong file is found before anything is loaded
    source = model_source(config)
    with seeded(config.data.seed):
        model = build_model(source, num_classes=None)
    outputs = int(cast(Any, model).num_classes)
    named = named_head(config, outputs)
    workers.share_weights(model)  # whatever each of them has read, all processes capture one model
    preprocessing = preprocessing_of(model)
    model.to(device)
    if workers.first:  # before any picture is decoded
        with one_torch_thread():
            check_capture(config, model, preprocessing, device, stored_alone="metrics" not in config.capture.sinks)
    manifest = _manifest(config, workers)
    images = prepare_folder(manifest, preprocessing=preprocessing).test
    head = named or folder_classes(outputs, images.class_names, config.data.class_order, "model.classes")
    check_shared_names(head, images.class_names, config.model.classes)
    if sentence := head.origin("the model"):
        say(sentence)
    made = {"weights_seed": config.data.seed} if source.file is None and not source.pretrained else {}
    capture_to_store(
        model.eval(),
        images,
        path,
        capture_settings(config, device),
        model_info=model_info(source) | made | ({"classes": list(head.names)} if head.known else {}),
        preprocessing=preprocessing.to_dict(),
        dataset_info=dataset_info(manifest),
        manifest=manifest_dict(manifest),
        label=f"capture {path.name}",
        workers=workers,
    )
    if workers.first and config.capture.samples:
        with _samples_beside(path) as samples:
            rows = choose_samples(config.capture.samples, len(images), config.data.seed)
            name = path.name.removesuffix(".zarr")
            SampleMaps.create(samples, images, rows).add(name, model, images, rows, device=device)


def require_places(store: Location) -> None:
    """Check, before any work, that no new store, nor sample maps beside it, take the place of something else."""
    root = storage_at(store)
    if isinstance(store, Path):
        nearest = next(folder for folder in store.absolute().parents if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"store {store} cannot be made: {nearest} is a file; expected a folder there")
    try:
        require_place(root)
        require_samples_place(root.beside(samples_name(root.name)))
    except StoreError as error:
        raise InputError(str(error)) from error


@contextmanager
def _samples_beside(store: Location) -> Iterator[Path]:
    """A folder for the sample images' maps beside the store; beside one in an object store, they are put at the end."""
    name = samples_name(store.name)
    if isinstance(store, Path):
        yield store.with_name(name)
        return
    storage = storage_at(store).beside(name)
    with storage.skeleton() as folder:
        yield folder / name
        require_samples_place(storage)
        storage.clear(FILES)
        storage.adopt(folder / name, lambda: None)


def _manifest(config: StudyConfig, workers: Workers) -> Manifest:
    """The folder's files; the first process decodes them and tells the others."""
    if workers.count == 1:
        return list_images(config).decoded()
    values = workers.tell(dataclasses.asdict(list_images(config).decoded()) if workers.first else {})
    records = tuple(Record(**record) for record in values["records"])
    return Manifest(**values | {"class_names": tuple(values["class_names"]), "records": records})
