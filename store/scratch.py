"""Memory that a thread uses again and again."""

from __future__ import annotations

import threading

import numpy as np

from store.precisions import Array

_thread = threading.local()


def scratch(name: str, size: int) -> Array:
    """This thread's own bytes under a name, used again for the next chunk: fresh pages cost as much as reading them."""
    buffer: Array | None = getattr(_thread, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.uint8)
        setattr(_thread, name, buffer)
    return buffer[:size]
