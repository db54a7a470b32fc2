"""torchrun with processes forked from one that has imported everything: `python -m tests.torchrun N COMMAND`."""

from __future__ import annotations

import sys

import timm  # noqa: F401 - what the command imports, once for all processes
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import engine.capture
import engine.measure
import engine.study.one_capture  # noqa: F401
from engine.run import main


def run(arguments: list[str]) -> None:
    """What each process does."""
    if code := main(arguments):
        raise SystemExit(code)


if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(sys.argv[1]),
        run_id="tests",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run)(sys.argv[2:])
