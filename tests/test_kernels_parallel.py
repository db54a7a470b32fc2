"""The numba backend beside other threads: the same bits whatever the batch or the number of threads, and no clash."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from kernels import METRICS, measure_attention, measure_qk
from tests.cases import CASES, layout, vit_qk

ROOT = Path(__file__).resolve().parents[1]
OF = layout(7, 6, 1)
NAMES = [name for name, spec in METRICS.items() if spec.inputs == "rows"]
QUERY, KEY = vit_qk(OF, 16, np.random.default_rng(0))
ATTENTION = CASES[0].make(OF, np.random.default_rng(1)).astype(np.float16)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts numba's thread count back."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    results = []
    for count in sorted({1, numba.config.NUMBA_NUM_THREADS}):
        numba.set_num_threads(count)
        results.append((measure_attention(ATTENTION, OF, NAMES), measure_qk(QUERY, KEY, OF, NAMES)))
    for from_maps, from_qk in results[1:]:
        for name in NAMES:
            np.testing.assert_array_equal(from_maps[name], results[0][0][name], err_msg=name)
            np.testing.assert_array_equal(from_qk[name], results[0][1][name], err_msg=name)


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_bits_do_not_depend_on_the_batch(reduce: str) -> None:
    whole = measure_attention(ATTENTION, OF, NAMES, reduce=reduce)  # type: ignore[arg-type]
    whole_qk = measure_qk(QUERY, KEY, OF, NAMES, reduce=reduce)  # type: ignore[arg-type]
    for image in range(2):
        for head in range(3):
            at = (slice(image, image + 1), slice(head, head + 1))
            part = measure_attention(ATTENTION[at], OF, NAMES, reduce=reduce)  # type: ignore[arg-type]
            part_qk = measure_qk(QUERY[at], KEY[at], OF, NAMES, reduce=reduce)  # type: ignore[arg-type]
            for name in NAMES:
                np.testing.assert_array_equal(part[name], whole[name][at], err_msg=name)
                np.testing.assert_array_equal(part_qk[name], whole_qk[name][at], err_msg=name)


def test_bits_do_not_depend_on_the_metrics_asked_for() -> None:
    together = measure_attention(ATTENTION, OF, NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(measure_attention(ATTENTION, OF, name)[name], together[name], err_msg=name)


def test_worker_threads_may_measure_at_once() -> None:
    expected = measure_qk(QUERY, KEY, OF, NAMES)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: measure_qk(QUERY, KEY, OF, NAMES), range(16)):
            for name in NAMES:
                np.testing.assert_array_equal(got[name], expected[name])


def test_torch_goes_on_working_in_between() -> None:
    """As capture does it: a parallel region of torch's pool, one of numba's, and so on, in a worker thread too."""
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    product = matrix @ matrix
    expected = measure_qk(QUERY, KEY, OF)
    failures: list[str] = []

    def alternate() -> None:
        for _ in range(10):
            if not torch.equal(matrix @ matrix, product):
                failures.append("torch")
            got = measure_qk(torch.from_numpy(QUERY), torch.from_numpy(KEY), OF)
            if any(not np.array_equal(got[name].numpy(), expected[name]) for name in expected):
                failures.append("numba")

    alternate()
    worker = threading.Thread(target=alternate)
    worker.start()
    alternate()
    worker.join()
    assert not failures


@pytest.mark.slow
def test_workqueue_threads_may_measure_at_once() -> None:
    """Numba's fallback where no OpenMP library is found aborts the process on concurrent use: a lock prevents it."""
    code = (
        "import numba, numpy as np\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from kernels import measure_attention\n"
        "from tests.cases import layout\n"
        "of = layout(7, 6, 1)\n"
        "a = np.full((64, 43, 43), 1 / 43, np.float32)\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    list(pool.map(lambda _: measure_attention(a, of, 'entropy'), range(200)))\n"
        "print(numba.threading_layer())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "workqueue"


def test_importing_kernels_stays_light() -> None:
    """`--help` may name metrics and backends: torch and numba come with the first measurement."""
    code = "import sys, kernels; print(sorted({'torch', 'numba', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
