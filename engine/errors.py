"""Which errors speak to the user: their message is one sentence that says all, and no traceback is shown."""

from __future__ import annotations

import sys

from train.errors import InputError, TrainingDivergedError, WorkerLostError

__all__ = ["exit_code", "reason_of"]


def exit_code(error: Exception) -> int | None:
    """Exit code of an error whose message says all a user needs; None for one that is a fault of ours.

    Looked up by what is already imported: a store's or a kernel's error cannot come before its module.
    """
    if isinstance(error, InputError):
        return 2
    if isinstance(error, TrainingDivergedError | WorkerLostError):
        return 1
    store, kernels, cluster = (sys.modules.get(name) for name in ("store", "kernels", "engine.cluster"))
    if cluster is not None and isinstance(error, cluster.ClusterError):
        return 1
    if store is not None and isinstance(error, store.StoreError):
        return 1
    if kernels is not None and isinstance(
        error, kernels.InvalidAttentionError | kernels.BackendUnavailableError | kernels.MetricError
    ):
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        return 1
    return None


def reason_of(error: Exception) -> str:
    """What went wrong, for a sentence: the message; of a fault of ours with the error's class, one line."""
    text = " ".join(str(error).split())
    return text if exit_code(error) is not None else f"{type(error).__name__}: {text}".removesuffix(": ")
