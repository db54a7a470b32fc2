"""Where compiled loops are kept between processes: the first folder that can be written of NUMBA_CACHE_DIR, the one of
the sources, and the user's own cache. Where none can, every process compiles its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

from kernels.cpu.math import OPTIONS

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _sources() -> str:
    """Digest of the files that compiled loops are made of: this folder's, and the definitions, for their constants."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / "reference.py"]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def called_from_python(function: Callable[..., None]) -> Any:
    """Compiled when first called, and kept on disk where that can be done."""
    compiled = njit(**{**OPTIONS, "no_cpython_wrapper": False})(function)
    try:
        compiled._cache = _Kept(function)
    except RuntimeError:
        _say_not_kept("no folder for them can be written")
    return compiled


class _Kept(FunctionCache):
    """Numba's cache of one function; a fault of its files costs the time to compile, and no measurement.

    With a fault the index goes. It may name files that were not written, and older code lies under their names.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """Numba's own knows a function by its file alone; a change in a file of its callees makes it another, too."""
        return (*super()._index_key(sig, codegen), _sources())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # files that a killed process or a full disk left: unpickling them may raise anything
            self._forget()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self._forget()
            _say_not_kept(f"{self.cache_path}: {error.strerror or error}")

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            Path(self._cache_file._index_path).unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _say_not_kept(reason: str) -> None:
    logger.warning(
        "the compiled kernels cannot be kept (%s), so that every process compiles its own, in about 15 s; set "
        "NUMBA_CACHE_DIR to a folder that can be written and has some MB of space",
        reason,
    )
