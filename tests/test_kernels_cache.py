"""Compiled kernels are kept on disk where that can be done; where not, they run all the same, and it is said once."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from kernels.cpu import cache as numba_cache
from kernels.cpu.cache import called_from_python

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "the compiled kernels cannot be kept ("


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where compiled functions are kept; nothing was said of it yet."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    numba_cache._say_not_kept.cache_clear()
    yield tmp_path
    numba_cache._say_not_kept.cache_clear()


def doubled(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = 2 * values[i]


def call(compiled: Any) -> list[float]:
    out = np.zeros(2)
    compiled(np.arange(2.0), out)
    return out.tolist()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_folder_can_be_written(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "cpu" / "__pycache__").touch()  # no folder, whoever the user is
    below_a_file = tmp_path / "kernels" / "__init__.py" / "cache"
    code = (
        "import numpy as np\n"
        "from kernels.cpu.loops import row_sums\n"
        "for call in range(2):\n"
        "    sums = np.zeros(2)\n"
        "    row_sums(np.ones((2, 3)), sums)\n"
        "    print(*sums)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "NUMBA_CACHE_DIR": str(below_a_file),
            "HOME": "/proc/none",
            "XDG_CACHE_HOME": "/proc/none",
            "PYTHONPATH": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "3.0 3.0\n" * 2), done.stderr
    assert done.stderr.count(SENTENCE) == 1
    assert "no folder for them can be written" in done.stderr
    assert "set NUMBA_CACHE_DIR" in done.stderr


def test_a_disk_that_becomes_full(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command line's handler writes to what pytest captures: a file, for which the limit holds too.
    monkeypatch.setattr(logging.getLogger("kernels"), "handlers", [])
    functions = [called_from_python(doubled) for _ in range(2)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        assert [call(compiled) for compiled in functions] == [[0.0, 2.0]] * 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(SENTENCE)
    assert str(cache) in said
    assert files(cache) == {}


@pytest.mark.parametrize("content", [b"", b"\x80\x05", b"not a pickle"])
@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
def test_a_damaged_file_is_made_again(cache: Path, content: bytes, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    call(called_from_python(doubled))
    sound = files(cache)
    assert sorted(Path(name).suffix for name in sound) == [".nbc", ".nbi"]
    (damaged,) = cache.rglob(f"*{kind}")
    damaged.write_bytes(content)
    assert call(called_from_python(doubled)) == [0.0, 2.0]
    assert set(files(cache)) == set(sound)
    again = called_from_python(doubled)
    assert call(again) == [0.0, 2.0]
    assert again.stats.cache_hits
    assert not caplog.records


def test_an_index_that_names_what_could_not_be_written_does_not_stay(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older code lies under the name: another function's, when the source has changed."""

    def full(self: Any, name: str, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", full)
    assert call(called_from_python(doubled)) == [0.0, 2.0]
    assert files(cache) == {}


def test_whatever_compiled_code_is_made_of_is_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source never meets machine code of the one before."""
    kernels = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(numba_cache, "__file__", str(kernels / "cpu" / "cache.py"))
    digests = {numba_cache._sources.__wrapped__()}
    sources = [*(kernels / "cpu").glob("*.py"), kernels / "reference.py"]
    for changed in sources:
        changed.write_bytes(changed.read_bytes() + b"\n")
        digests.add(numba_cache._sources.__wrapped__())
    assert len(digests) == 1 + len(sources) > 10
    for source in (kernels / "cpu").glob("*.py"):  # what they take from elsewhere is in it, or is not compiled
        text = source.read_text()
        if "njit" in text or "intrinsic" in text:
            elsewhere = set(re.findall(r"^from (kernels\.(?!cpu\.)\w+)", text, re.MULTILINE))
            assert elsewhere <= {"kernels.reference"}, source
