"""Attention to and from HDF5: `export` writes a store's maps for other programs, `import` makes a store of theirs."""

from __future__ import annotations

from pathlib import Path

from engine import __version__
from engine.config import StudyConfig
from engine.journal import digest_path
from engine.progress import ImageProgress
from kernels import TokenLayout
from store import AttentionStore, AttentionWriter, LayerSchema, StoreSchema
from store.arrays import attention_arrays
from store.hdf5_attention import AttentionFile, Dataset, export_attention
from train.errors import InputError

__all__ = ["export_hdf5", "import_hdf5"]


def export_hdf5(config: StudyConfig) -> Path:
    """Write the attention of `measure.store` as the HDF5 file `hdf5.file`."""
    store = AttentionStore.open(config.measure.store)
    path = Path(config.hdf5.file)
    image_bytes = sum(array.row_bytes for array in attention_arrays(store.schema))
    with ImageProgress(f"export {path.name}", store.schema.num_images, 0, image_bytes) as progress:
        export_attention(store, path, progress.update)
    return path


def import_hdf5(config: StudyConfig) -> AttentionStore:
    """Make the store `capture.store` of the maps in the HDF5 file `hdf5.file`; `measure` takes it like any other.

    Raises:
        InputError: the encoding keeps query and key, or the tokens of a map are no grid with prefix tokens.
        StoreError: the file holds no post-softmax attention, or the store cannot be written.
    """
    encoding = config.capture.encoding
    if encoding == "qk":
        raise InputError("encoding qk keeps query and key, and a file of maps has none; use fp16 or bf16")
    path = Path(config.hdf5.file)
    with AttentionFile(path) as file:
        schema = StoreSchema(
            layers=tuple(
                LayerSchema(
                    layer=number, site=layer.site, heads=layer.heads, layout=_layout(path, layer, config).to_dict()
                )
                for number, layer in enumerate(file.layers)
            ),
            image_ids=file.image_ids,
            batch_size=config.capture.batch_size,
            encoding=encoding,
            metrics={},
            model={"name": "imported"},
            preprocessing={},
            dataset={"id": path.name, "sha256": digest_path(path)},
            precision="unknown",
            num_classes=0,
            code_version=__version__,
        )
        store = config.capture.store
        image_bytes = sum(array.row_bytes for array in attention_arrays(schema))
        with AttentionWriter.open(store, schema, labels=file.labels, class_names=[]) as writer:
            rows = {batch: schema.batch_rows(batch) for batch in writer.missing}
            done = schema.num_images - sum(of.stop - of.start for of in rows.values())
            with ImageProgress(f"import {path.name}", schema.num_images, done, image_bytes) as progress:
                for batch, of in rows.items():
                    for number, layer in enumerate(file.layers):
                        writer.add_attention(batch, number, layer.read(of))
                    writer.commit(batch)
                    progress.update(of.stop - of.start)
            writer.finish()
    return AttentionStore.open(store)


def _layout(path: Path, layer: Dataset, config: StudyConfig) -> TokenLayout:
    """Where a dataset's tokens lie: as its attribute says, else as the configuration does."""
    if layer.layout is not None:
        layout = TokenLayout.from_dict(layer.layout)
    else:
        keys = config.hdf5
        if len(keys.grid) != 2 or len(keys.patch_px) != 2:
            raise InputError(
                f"{path}: {layer.name} does not say how its {layer.tokens} tokens lie; give --grid ROWS,COLS "
                "(and --hdf5.prefix_tokens, --hdf5.patch_px if they are not 1 and 16,16)"
            )
        layout = TokenLayout(
            grid_rows=keys.grid[0],
            grid_cols=keys.grid[1],
            num_prefix_tokens=keys.prefix_tokens,
            patch_height_px=keys.patch_px[0],
            patch_width_px=keys.patch_px[1],
            class_token=keys.class_token and keys.prefix_tokens > 0,
        )
    if layout.num_tokens != layer.tokens:
        raise InputError(
            f"{path}: {layer.name} has {layer.tokens} tokens, and a grid of {layout.grid_rows}×{layout.grid_cols} "
            f"with {layout.num_prefix_tokens} prefix tokens has {layout.num_tokens}; give another --grid or "
            "--hdf5.prefix_tokens"
        )
    return layout
