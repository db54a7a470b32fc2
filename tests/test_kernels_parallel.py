"""The numba backend beside other threads: the same bits whatever the batch or the number of threads, and no clash."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import METRICS, measure_attention, measure_qk
from kernels.cpu import backend as numba_cpu
from kernels.cpu.threads import _begin_without_pool, num_threads, over_parts, set_num_threads
from tests.cases import CASES, layout, vit_qk

ROOT = Path(__file__).resolve().parents[1]
OF = layout(7, 6, 1)
NAMES = [name for name, spec in METRICS.items() if spec.inputs == "rows"]
QUERY, KEY = vit_qk(OF, 16, np.random.default_rng(0))
ATTENTION = CASES[0].make(OF, np.random.default_rng(1)).astype(np.float16)


@pytest.fixture
def threads() -> Iterator[None]:
    """Takes the setting back."""
    yield
    set_num_threads(None)


def test_bits_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    results = []
    for count in (1, 2, 5):
        set_num_threads(count)
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", ["the widest", "none"])
def test_bits_do_not_depend_on_where_memory_lies(
    dtype: type[np.floating], width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Working memory of a small grid may lie side by side or apart, as what was freed before has left it."""
    if width == "none":
        monkeypatch.setattr(numba_cpu, "vector_width", lambda: None)
    of, generator = layout(3, 4, 2), np.random.default_rng(2)
    attention = CASES[0].make(of, generator).astype(dtype)
    query, key = (part.astype(dtype) for part in vit_qk(of, 6, generator))
    found: dict[str, set[bytes]] = {}
    for _ in range(200):
        # Holes of many sizes in many orders, which the next calls fill.
        blocks = [np.empty(size, np.uint8) for size in generator.integers(1, 400, size=generator.integers(1, 200))]
        for place in generator.permutation(len(blocks))[: len(blocks) // 2].tolist():
            blocks[place] = blocks[-1]
        for name, values in measure_attention(attention, of, NAMES, backend="numba").items():
            found.setdefault(name, set()).add(values.tobytes())
        for name, values in measure_qk(query, key, of, NAMES, backend="numba").items():
            found.setdefault(f"{name} of query and key", set()).add(values.tobytes())
    assert {name for name, bits in found.items() if len(bits) > 1} == set()


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
    """As capture does it: a parallel region of torch's pool, a measurement, and so on, in a worker thread too."""
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_measures(threads: None) -> None:
    """A pool of threads does not survive a fork; a data loader's worker may fork at any time."""
    code = (
        "import os, sys\n"
        "import numpy as np\n"
        "from kernels import measure_attention\n"
        "from kernels.cpu.threads import set_num_threads\n"
        "from tests.cases import layout\n"
        "of = layout(3, 4, 1)\n"
        "a = np.full((8, 13, 13), 1 / 13, np.float32)\n"
        "set_num_threads(2)\n"
        "expected = measure_attention(a, of, 'distance')['distance']\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if np.array_equal(measure_attention(a, of, 'distance')['distance'], expected) else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class TestThreads:
    @pytest.mark.parametrize("count", [0, 1, 7, 100])
    def test_parts_make_up_the_whole(self, threads: None, count: int) -> None:
        set_num_threads(3)
        seen: list[int] = []
        over_parts(lambda begin, end: seen.extend(range(begin, end)), count)
        assert sorted(seen) == list(range(count))

    def test_the_first_failure_is_raised_when_all_have_ended(self, threads: None) -> None:
        set_num_threads(4)
        ended: list[int] = []

        def run(begin: int, end: int) -> None:
            if begin == 0:
                raise KeyError("the first part")
            ended.append(begin)

        with pytest.raises(KeyError, match="the first part"):
            over_parts(run, 64)
        before = list(ended)
        over_parts(lambda begin, end: None, 64)  # the pool still works
        assert ended == before

    @pytest.fixture
    def switching(self) -> Iterator[None]:
        """Threads take turns as often as they can."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    def test_threads_of_the_user_may_all_begin_at_once(self, threads: None, switching: None) -> None:
        """Each wants a pool of another size than the one before it: nobody's work may go to one that was closed."""
        set_num_threads(12)
        counts = list(range(2, 13, 2))
        together = threading.Barrier(len(counts))
        done: list[list[int]] = []

        def call(count: int) -> None:
            together.wait(timeout=60)
            seen: list[int] = []
            over_parts(lambda begin, end: seen.extend(range(begin, end)), count)
            done.append(sorted(seen))

        for _ in range(80):
            _begin_without_pool()
            done.clear()
            callers = [threading.Thread(target=call, args=(count,)) for count in counts]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(timeout=60)
            assert sorted(done, key=len) == [list(range(count)) for count in counts]

    def test_a_caller_does_not_wait_for_the_work_of_another(self, threads: None) -> None:
        """All threads of the pool are held by one call; another ends nevertheless."""
        set_num_threads(3)
        held, release = threading.Barrier(4), threading.Event()

        def hold(begin: int, end: int) -> None:
            if begin < 3:
                held.wait(timeout=60)
                release.wait(timeout=60)

        holder = threading.Thread(target=over_parts, args=(hold, 12))
        holder.start()
        held.wait(timeout=60)
        seen: list[int] = []
        over_parts(lambda begin, end: seen.extend(range(begin, end)), 40)
        assert sorted(seen) == list(range(40))
        assert holder.is_alive()
        release.set()
        holder.join(timeout=60)

    def test_without_more_threads_the_caller_works_alone(self, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_thread(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        set_num_threads(3)
        _begin_without_pool()
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        seen: list[int] = []
        over_parts(lambda begin, end: seen.extend(range(begin, end)), 40)
        assert seen == list(range(40))

        def fail(begin: int, end: int) -> None:
            seen.append(begin)
            raise KeyError("the first part")

        with pytest.raises(KeyError, match="the first part"):
            over_parts(fail, 40)
        assert len(seen) == 41  # the parts that had not begun are left out

    @pytest.mark.parametrize("when", ["fork while the pool grows", "after the main thread", "at exit"])
    def test_it_works_whenever_it_is_called(self, when: str) -> None:
        code = {
            "fork while the pool grows": (
                "holds = kernels.cpu.threads._pool_lock\n"
                "holds.acquire()  # as a thread does that the child will not have\n"
                "child = os.fork()\n"
                "if child == 0:\n"
                "    measure()\n"
                "    os._exit(0)\n"
                "holds.release()\n"
                "measure()\n"
                "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
            ),
            "after the main thread": (
                "def later():\n"
                "    threading.main_thread().join()\n"
                "    measure()\n"
                "threading.Thread(target=later).start()\n"
            ),
            "at exit": "atexit.register(measure)\n",
        }[when]
        begin = (
            "import atexit, os, sys, threading, kernels.cpu.threads\n"
            "def measure():\n"
            "    seen = []\n"
            "    kernels.cpu.threads.over_parts(lambda begin, end: seen.extend(range(begin, end)), 64)\n"
            "    print(sorted(seen) == list(range(64)), flush=True)\n"
            "kernels.cpu.threads.set_num_threads(3)\n"
            "measure()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", begin + code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("True") == (3 if "fork" in when else 2)

    def test_the_number_comes_from_the_setting_then_the_environment(
        self, threads: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
        assert num_threads() == 3
        set_num_threads(2)
        assert num_threads() == 2
        set_num_threads(None)
        monkeypatch.delenv("NUMBA_NUM_THREADS")
        assert num_threads() >= 1

    def test_nonsense_is_refused(self, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="0 threads were asked for"):
            set_num_threads(0)
        monkeypatch.setenv("NUMBA_NUM_THREADS", "many")
        with pytest.raises(ValueError, match="NUMBA_NUM_THREADS is 'many'"):
            num_threads()


def test_importing_kernels_stays_light() -> None:
    """`--help` may name metrics and backends: torch and numba come with the first measurement."""
    code = "import sys, kernels; print(sorted({'torch', 'numba', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.bool])
def test_a_broadcast_bias_is_converted_before_it_is_broadcast(dtype: torch.dtype) -> None:
    """One bias for all images and heads takes the memory of one map, in any dtype."""
    bias = (torch.arange(12).reshape(3, 4) % 5).to(dtype)
    additive = numba_cpu._additive(bias.expand(64, 6, 3, 4), np.dtype(np.float32))
    assert additive.shape == (64, 6, 3, 4)
    assert additive.strides[:2] == (0, 0)
    expected = torch.where(bias, 0.0, -torch.inf) if dtype == torch.bool else bias.float()
    np.testing.assert_array_equal(additive[63, 5], expected.numpy())
