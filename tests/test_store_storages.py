"""Folders and object stores (of memory, of an S3 server) keep the same promises."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from storage_conformance import ObjectStorageTests, StorageTests

from store.local import LocalStorage
from store.objects import ObjectStorage
from store.schema import StoreError
from store.storage import StoreUrl


class TestFolder(StorageTests):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        return LocalStorage(tmp_path / "run.zarr")


class TestMemory(ObjectStorageTests):
    @pytest.fixture
    def storage(self) -> ObjectStorage:
        return ObjectStorage(MemoryStore(), StoreUrl("s3://bucket/runs/run.zarr"))

    def test_a_lock_that_was_put_just_now_is_held(
        self, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another thread of the process comes between the PUT and what follows it."""
        put_over = ObjectStorage.put_over
        refused: list[StoreError] = []

        def second() -> None:
            with pytest.raises(StoreError, match="is locked: process") as error, storage.locked():
                pass
            refused.append(error.value)

        def put(self: ObjectStorage, file: str, content: bytes, version: object = None) -> bool:
            done = put_over(self, file, content, version)
            if done:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join(30)
            return done

        monkeypatch.setattr(ObjectStorage, "put_over", put)
        with storage.locked():
            assert len(refused) == 1
        assert not storage.exists("lock")


class TestS3(ObjectStorageTests):
    @pytest.fixture
    def storage(self, bucket: str) -> ObjectStorage:
        return ObjectStorage.open(StoreUrl(f"{bucket}/runs/run.zarr"))
