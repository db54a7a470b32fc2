"""Compressed, checksummed, resumable attention in Zarr v3."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from store.disk import DiskError
from store.schema import SCHEMA, FactorSchema, LayerSchema, NetworkError, StoreError, StoreSchema

if TYPE_CHECKING:
    from store.arrays import estimate_bytes as estimate_bytes
    from store.arrays import require_free_disk as require_free_disk
    from store.encodings import Factors as Factors
    from store.reader import AttentionStore as AttentionStore
    from store.results import MetricWriter as MetricWriter
    from store.results import has_metric as has_metric
    from store.verify import info as info
    from store.writer import AttentionWriter as AttentionWriter

# Importing zarr takes about 0.4 s, which `--help` should not wait for.
_LAZY = {
    "AttentionStore": "store.reader",
    "AttentionWriter": "store.writer",
    "Factors": "store.encodings",
    "MetricWriter": "store.results",
    "estimate_bytes": "store.arrays",
    "has_metric": "store.results",
    "info": "store.verify",
    "require_free_disk": "store.arrays",
}

__all__ = ["SCHEMA", "DiskError", "FactorSchema", "LayerSchema", "NetworkError", "StoreError", "StoreSchema", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
