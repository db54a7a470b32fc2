"""Compressed, checksummed, resumable attention in Zarr v3."""

from store.schema import SCHEMA, LayerSchema, StoreError, StoreSchema

__all__ = ["SCHEMA", "LayerSchema", "StoreError", "StoreSchema"]
