"""Labelled images as capture and training see them: `ImageSet`, and the one over a folder."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from kernels.layout import TokenLayout
from train.data.decoding import UndecodableError, decoded_image, picture_bytes
from train.data.manifest import Manifest, Record
from train.errors import InputError
from train.files import path_of
from train.transfer import uploaded

T = TypeVar("T")
R = TypeVar("R")
_OR = "or delete the outputs to begin with a new manifest"
_RESIZED_PIXELS = 2**25  # of a picture while it is resized, before the crop


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a model's input; read off the model by `train.models.preprocessing_of`."""

    channels: int
    height_px: int
    width_px: int
    mean: tuple[float, ...]  # per channel, on pixels scaled to 0..1
    std: tuple[float, ...]
    interpolation: str  # of the resize, as timm names it
    crop_pct: float  # the kept share of the resized picture
    crop_mode: str  # timm's "center", "squash" or "border"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        """As a log line has it: "224×224×3, bicubic, crop 0.9 (center), mean 0.5 0.5 0.5, std 0.5 0.5 0.5"."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        size = f"{self.height_px}×{self.width_px}×{self.channels}"
        return f"{size}, {self.interpolation}, crop {self.crop_pct:g} ({self.crop_mode}), mean {mean}, std {std}"

    def normalize(self, scaled: torch.Tensor) -> torch.Tensor:
        """(value − mean) / std of pixels in 0..1, float32 [image, channel, row, col]."""
        mean, std = (_channels(values, scaled.device) for values in (self.mean, self.std))
        return (scaled - mean).div_(std)


@lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[1, channel, 1, 1] on the device; kept there, since every copy to a GPU would wait for it."""
    with torch.inference_mode(False):  # a tensor made in that mode is of no use outside it
        return torch.tensor(values, device=device).view(1, -1, 1, 1)


def read_ahead(read: Callable[[T], R], items: Iterable[T]) -> Generator[tuple[T, R]]:
    """(item, `read` of it) of each, in order; the next one is read by another thread while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as pool:
        waiting: tuple[T, Future[R]] | None = None
        for item in items:
            coming = item, pool.submit(read, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


class ImageSet(ABC):
    """Labelled images in a fixed order."""

    ids: tuple[str, ...]  # one per image; the identity under which conditions are paired
    labels: np.ndarray  # int64 [image]
    class_names: tuple[str, ...]  # in label order
    preprocessing: Preprocessing  # what `batch` applies
    region_names: tuple[str, ...] = ()  # of the regions' axis; empty without regions
    # [image, region, (row0, col0, row1, col1)] in pixels of the model's input, half-open; None without boxes.
    boxes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """What `pixels` returns, in whatever strides it comes."""

    def pixels(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Pictures at the model's input size, uint8 [image, channel, row, col], before normalisation.

        They lie in memory in that order, whatever they were read from: convolutions and sums round by the strides of
        their input, so equal pixels in two layouts would train two models.
        """
        values = np.ascontiguousarray(self._read(indices))
        # Over one axis: the stride of an axis of length 1 is free, and torch takes a layout from it.
        return torch.from_numpy(values.reshape(-1)).view(values.shape)

    def batch(self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """The model's input, float32 [image, channel, row, col], made on the device from its bytes."""
        return self.preprocessing.normalize(uploaded(self.pixels(indices), device).float().div_(255))

    def batches(
        self, parts: Iterable[np.ndarray], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(indices, `batch` of them) of each part, in order; the next part is read while one is used."""
        device = torch.empty(0, device=device).device  # with its number: another thread has another current GPU
        return read_ahead(lambda part: self.batch(part, device), parts)

    def parts(self, batch_size: int, start: int = 0, step: int = 1) -> list[np.ndarray]:
        """Indices in order, as batches: from batch `start` on, every `step`-th."""
        firsts = range(start * batch_size, len(self), step * batch_size)
        return [np.arange(first, min(first + batch_size, len(self))) for first in firsts]

    def picture(self, index: int) -> np.ndarray:
        """One picture as the model sees it, uint8 [row, col, 3], before normalisation."""
        pixels = self.pixels([index])[0].permute(1, 2, 0).numpy()
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def regions(self, layout: TokenLayout) -> np.ndarray | None:
        """Share of each patch that each annotated region covers, float32 [image, region, patch]; None without any."""
        return None if self.boxes is None else region_coverage(self.boxes, layout)


def region_coverage(boxes: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Share of each patch's area that each box covers, float32 [scene, region, patch]; for boxes see `ImageSet`."""
    if boxes.ndim != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes are {list(boxes.shape)}, expected [scene, region, 4]")
    outside = (boxes < 0).any() or (boxes[..., 2] > layout.image_height_px).any()
    if outside or (boxes[..., 3] > layout.image_width_px).any():
        raise ValueError(f"a box leaves the {layout.image_height_px}×{layout.image_width_px} px image of this layout")
    rows = _overlap(boxes[..., 0], boxes[..., 2], layout.grid_rows, layout.patch_height_px)
    cols = _overlap(boxes[..., 1], boxes[..., 3], layout.grid_cols, layout.patch_width_px)
    coverage = (rows[..., :, None] * cols[..., None, :]).astype(np.float32)
    return np.reshape(coverage, (*boxes.shape[:2], layout.num_patches))


def _overlap(start: np.ndarray, end: np.ndarray, patches: int, patch_px: int) -> np.ndarray:
    """Share of each patch's side within [start, end), [..., patch]."""
    edges = np.arange(patches + 1) * patch_px
    low = np.maximum(start[..., None], edges[:-1])
    high = np.minimum(end[..., None], edges[1:])
    return np.asarray((high - low).clip(0) / patch_px)


@dataclass(frozen=True)
class DataSplits:
    """The three splits of one data set and the manifest that they come from."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    manifest: Manifest

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names


class FolderImages(ImageSet):
    """Pictures of a folder, decoded by a few threads when asked for; resized by timm's transform of the model."""

    def __init__(
        self,
        root: str | Path,
        records: Sequence[Record],
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        workers: int = 4,
    ) -> None:
        from timm.data.transforms_factory import create_transform

        self.root = Path(root)
        self.records = tuple(records)
        self.ids = tuple(record.id for record in records)
        self.labels = np.array([record.label for record in records], dtype=np.int64)
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self._mode = "L" if preprocessing.channels == 1 else "RGB"
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        # use_prefetcher: timm leaves out conversion to float and normalisation, which come after augmentation here.
        self._transform = create_transform(
            input_size=(preprocessing.channels, preprocessing.height_px, preprocessing.width_px),
            is_training=False,
            use_prefetcher=True,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            crop_pct=preprocessing.crop_pct,
            crop_mode=preprocessing.crop_mode,
        )

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """InputError: a file vanished, changed or can no longer be decoded since the manifest was built."""
        return np.stack(list(self._pool.map(self._decode, [self.records[int(i)] for i in indices])))

    def _decode(self, record: Record) -> np.ndarray:
        """At the model's size, uint8 [channel, row, col]."""
        path = self.root / path_of(record.id)
        try:
            with picture_bytes(path) as content:
                if hashlib.sha256(content).hexdigest() != record.sha256:
                    raise InputError(f"{path} has changed since the manifest was built; put the old file back, {_OR}")
                with decoded_image(content) as picture:
                    colors = picture if picture.mode == self._mode else picture.convert(self._mode)
                    return np.asarray(self._transform(_resizable(colors, self.preprocessing)))
        except OSError as error:
            raise InputError(
                f"{path} was readable when the manifest was built and is not now ({error.strerror}); put it back, {_OR}"
            ) from error
        except UndecodableError as error:
            raise InputError(
                f"{path} was decoded when the manifest was built and no longer is ({error}); delete the outputs to "
                "begin with a new manifest"
            ) from error


def _resizable(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """A picture so thin that enlarging it would take gigabytes, made shorter first; any other as it is.

    What is cut off would be cut off after the resize: 60000×1 pixels at a height of 248 are 14,880,000 pixels wide, of
    which the crop leaves 224. The middle stays where it is to within one pixel of the result.
    """
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms.functional import resize

    rows, cols = (math.floor(x / preprocessing.crop_pct) for x in (preprocessing.height_px, preprocessing.width_px))
    ratios = picture.height / rows, picture.width / cols
    interpolation = str_to_interp_mode(preprocessing.interpolation)
    if preprocessing.crop_mode == "squash":  # the first pass leaves all rows
        tall = cols * picture.height > _RESIZED_PIXELS
        return resize(picture, [rows, picture.width], interpolation) if tall else picture
    if preprocessing.crop_mode == "border":  # the whole picture is kept; of a thin one no pixel would be left
        size = [round(side / max(ratios)) for side in (picture.height, picture.width)]
        return picture if all(size) else resize(picture, [max(1, side) for side in size], interpolation)
    ratio = min(ratios)
    if picture.width * picture.height <= _RESIZED_PIXELS * ratio**2:
        return picture
    # Twice what is kept, and the pixels beside it that the interpolation sees; as much from both ends.
    cut = [
        max(0, (side - math.ceil(2 * kept * ratio) - 16) // 2)
        for side, kept in ((picture.width, cols), (picture.height, rows))
    ]
    return picture.crop((cut[0], cut[1], picture.width - cut[0], picture.height - cut[1]))
