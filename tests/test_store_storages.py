"""Folders and object stores (of memory, of an S3 server) keep the same promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from obstore.store import MemoryStore
from storage_conformance import ObjectStorageTests, StorageTests

from store.local import LocalStorage
from store.objects import ObjectStorage
from store.storage import StoreUrl


class TestFolder(StorageTests):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        return LocalStorage(tmp_path / "run.zarr")


class TestMemory(ObjectStorageTests):
    @pytest.fixture
    def storage(self) -> ObjectStorage:
        return ObjectStorage(MemoryStore(), StoreUrl("s3://bucket/runs/run.zarr"))


class TestS3(ObjectStorageTests):
    @pytest.fixture
    def storage(self, bucket: str) -> ObjectStorage:
        return ObjectStorage.open(StoreUrl(f"{bucket}/runs/run.zarr"))
