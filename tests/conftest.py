"""Where several processes share the tests (`-n auto`), each computes in one thread: together they have the cores."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")
