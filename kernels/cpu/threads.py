"""Threads of the numba backend: parts of the work, each without Python's lock, over a pool of Python's threads.

Numba's own parallel regions are not used. Compiling them takes as long again as the loops in them; the threads of an
OpenMP region spin after it and take the cores that torch needs next; and without OpenMP a region that two threads
enter at once ends the process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise

from kernels.errors import OptionError

# Enough that one slow core does not hold up the others for long.
_PARTS_PER_THREAD = 4

_wanted: int | None = None
_thread = threading.local()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()  # held while the pool grows and while it is given work


def num_threads() -> int:
    """Threads a measurement uses: as set, or NUMBA_NUM_THREADS (else OptionError), or the CPUs this process may use."""
    if getattr(_thread, "alone", False):
        return 1
    if _wanted is not None:
        return _wanted
    text = os.environ.get("NUMBA_NUM_THREADS")
    if text:
        if not text.isdigit() or int(text) == 0:
            raise OptionError(f"NUMBA_NUM_THREADS is {text!r}; expected a positive number of threads")
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(count: int | None) -> None:
    """Sets the threads that measurements use from now on, at least 1; None takes the setting back."""
    global _wanted
    if count is not None and count < 1:
        raise OptionError(f"{count} threads were asked for; expected at least 1, or None for the default")
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

    Any number of threads may call it at once. They share the pool's threads: each works on its own parts in any case.
    What a failed part raised is raised, and parts that had not begun by then are left out.
    """
    threads = min(num_threads(), count)
    if threads <= 1:
        run(0, count)
        return
    number = min(count, threads * _PARTS_PER_THREAD)
    parts = deque(pairwise(count * i // number for i in range(number + 1)))

    def work() -> None:
        """Run parts until none remains: each goes to the thread that asks first."""
        while True:
            try:
                begin, end = parts.popleft()
            except IndexError:
                return
            try:
                run(begin, end)
            except BaseException:  # an interrupt too: the parts of other threads must end first
                parts.clear()
                raise

    helpers = _ask_for_help(work, threads - 1)
    try:
        work()
    finally:
        wait([helper for helper in helpers if not helper.cancel()])  # what has not begun finds nothing to do
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _ask_for_help(work: Callable[[], None], count: int) -> list[Future[None]]:
    """Have up to `count` threads of the pool call `work` as they become free."""
    global _pool, _pool_size
    helpers: list[Future[None]] = []
    with _pool_lock:
        if _pool is None or _pool_size < count:
            # A pool that has become too small is left to what it was given; its threads end with that.
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="kernels"), count
        try:
            for _ in range(count):
                helpers.append(_pool.submit(work))
        except RuntimeError:  # the system gives no more threads, or the interpreter is ending: the caller works alone
            _pool.shutdown(wait=False, cancel_futures=True)
            _pool, _pool_size = None, 0
    return helpers


def _begin_without_pool() -> None:
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    # A forked child has the pool, but none of its threads, and perhaps a lock that nobody will release.
    os.register_at_fork(after_in_child=_begin_without_pool)
