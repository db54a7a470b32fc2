"""What `counters` runs under the profiler: both of Triton's passes at 197 tokens once, after a warm-up."""

from __future__ import annotations

import torch

from benchmarks.gpu.kernels import Work, public
from tests.cases import layout


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    of = layout(14, 14, 1)
    works = [Work(of, 129, torch.float16, device, False), Work(of, 129, torch.bfloat16, device, True)]
    drawn = [(public(work, "triton"), work.draw()) for work in works]
    for run, given in drawn:
        run(*given)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for run, given in drawn:
        run(*given)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
