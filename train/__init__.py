"""Data, conditions and checkpoints."""

import os

from train.errors import InputError

__all__ = ["InputError"]

# What cuBLAS needs to be deterministic; on a Hopper GPU it takes as much anyway. torch looks once in a process, at the
# first product on a GPU, which may be a capture's, and without this refuses all training that is deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
