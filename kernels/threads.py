"""Threads of the numba backend: parts of the work, each without Python's lock, over a pool of Python's threads.

Numba's own parallel regions are not used. Compiling them takes as long again as the loops in them; the threads of an
OpenMP region spin after it and take the cores that torch needs next; and without OpenMP a region that two threads
enter at once ends the process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

__all__ = ["num_threads", "one_thread", "over_parts", "set_num_threads"]

# Parts for each thread: enough that one slow core does not hold up the others for long.
_PARTS_A_THREAD = 4

_wanted: int | None = None
_thread = threading.local()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def num_threads() -> int:
    """Threads a measurement uses: as set, or NUMBA_NUM_THREADS, or the CPUs this process may run on.

    Raises:
        ValueError: NUMBA_NUM_THREADS is not a positive number.
    """
    if getattr(_thread, "alone", False):
        return 1
    if _wanted is not None:
        return _wanted
    told = os.environ.get("NUMBA_NUM_THREADS")
    if told:
        if not told.isdigit() or int(told) == 0:
            raise ValueError(f"NUMBA_NUM_THREADS is {told!r}; expected a positive number of threads")
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(count: int | None) -> None:
    """Sets the threads that measurements use from now on; None takes the setting back.

    Raises:
        ValueError: count is below 1.
    """
    global _wanted
    if count is not None and count < 1:
        raise ValueError(f"{count} threads were asked for; expected at least 1, or None for the default")
    _wanted = count


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Measurements of the calling thread stay in it: for one of several that measure side by side."""
    before = getattr(_thread, "alone", False)
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = before


def over_parts(run: Callable[[int, int], None], count: int) -> None:
    """Calls run(begin, end) for parts that make up 0 … count, side by side; returns when all have returned.

    Raises:
        Exception: what the first part that failed raised.
    """
    threads = min(num_threads(), count)
    if threads <= 1:
        run(0, count)
        return
    parts = min(count, threads * _PARTS_A_THREAD)
    bounds = [count * i // parts for i in range(parts + 1)]
    left = iter(list(pairwise(bounds)))

    def work() -> None:
        for begin, end in left:  # each part goes to the thread that asks first
            run(begin, end)

    helpers = [_threads(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < count:
        # A pool that has become too small is left to its running tasks; its threads end with them.
        if _pool is not None:
            _pool.shutdown(wait=False)
        _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="kernels"), count
    return _pool


def _forget_pool() -> None:
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a forked child has the pool, but none of its threads
