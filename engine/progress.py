"""Progress over images: images/s, and GB/s of attention before compression."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from train.files import printable
from train.processes import first_process

# What the user types: the console script, or Python's -m.
PROGRAM = "vit-attention" if Path(sys.argv[0]).stem == "vit-attention" else "python -m engine.run"


def say(sentence: str) -> None:
    """Print a sentence above any progress bar; of several processes that torchrun started, the first one does."""
    if first_process():
        tqdm.write(printable(sentence))


class ImageProgress:
    """A progress bar, off when not in a terminal; of several processes, the first one has it.

    Args:
        label: what is being done.
        total: images.
        done: of them done already, by an earlier run.
        image_bytes: of attention an image, as stored before compression; 0: none is stored, and no GB/s shown.
        options: of tqdm.
    """

    def __init__(self, label: str, total: int, done: int, image_bytes: int, **options: Any) -> None:
        self._bar = tqdm(total=total, initial=done, desc=label, unit="image", **self._shown() | options)
        self._image_bytes = image_bytes
        self._begin = time.monotonic()
        self._images = 0

    @staticmethod
    def _shown() -> dict[str, bool | None]:
        return {"disable": None if first_process() else True}

    def update(self, images: int) -> None:
        """So many images more are done."""
        self._images += images
        if self._image_bytes:
            rate = self._images * self._image_bytes / max(time.monotonic() - self._begin, 1e-9)
            self._bar.set_postfix_str(f"{rate / 1e9:.2f} GB/s", refresh=False)
        self._bar.update(images)

    def reach(self, images: int) -> None:
        """So many images are done by now, those of other processes among them."""
        self.update(images - self._images)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
