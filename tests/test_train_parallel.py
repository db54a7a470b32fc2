"""Two processes that train one model: what one process would, up to rounding; the first does the rest of the study."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.run import main
from tests.miniatures import write_sports100
from train.checkpoint import read_checkpoint, read_metadata
from train.parallel import Workers

WORKER = """
import json, sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from train.parallel import Workers

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = distributed.FileStore(str(folder / "store"), 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
workers = Workers.current()
first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
if rank == 0:
    first.grad = torch.full((2, 3), 1.5)
workers.sum_gradients([first, second]) if rank == 0 else None
if rank == 1:
    first.grad, second.grad = torch.ones(2, 3), torch.arange(4.0)
    workers.sum_gradients([first, second])
found = {
    "sum": workers.add_up(torch.tensor([1.0 + rank, 10.0])).tolist(),
    "tell": [workers.tell(rank == 0), workers.tell(rank == 1)],
    "gradients": [first.grad.tolist(), second.grad.tolist()],
    "share": workers.share(np.arange(5)).tolist(),
    "one": workers.share(np.arange(1)).tolist(),
}
workers.wait()
(folder / f"{rank}.json").write_text(json.dumps(found))
distributed.destroy_process_group()
"""


def test_workers_share_images_and_sum_gradients(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for found in (first, second):
        assert found["sum"] == [3.0, 20.0]
        assert found["tell"] == [True, False]
        assert found["gradients"] == [[[2.5] * 3] * 2, [0.0, 1.0, 2.0, 3.0]]
    assert first["share"] + second["share"] == [0, 1, 2, 3, 4]
    assert sorted([first["one"], second["one"]]) == [[], [0]]


def test_one_process_is_its_own_worker() -> None:
    single = Workers.current()
    assert single == Workers(0, 1)
    assert single.first
    assert single.add_up(torch.tensor([2.0])).tolist() == [2.0]
    np.testing.assert_array_equal(single.share(np.arange(3)), np.arange(3))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_trains_what_one_process_does(tmp_path: Path) -> None:
    write_sports100(tmp_path / "sports", train=5, held_out=3)
    arguments = ["--data.kind", "sports100", "--data.root", str(tmp_path / "sports"), "--train.epochs", "2"]
    arguments += ["--model.name", "test_vit", "--model.pretrained", "false", "--model.img_size", "32"]
    # 25 images in batches of 8: the last step has a single image, so one worker has none.
    arguments += ["--train.batch_size", "8", "--train.precision", "fp32", "--conditions.dora.rank", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    for _ in range(2):  # the second time everything is done
        done = subprocess.run(
            [*command, "engine.run", "train", *arguments, "--outputs", str(together)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "train dora seed 42: done already" in done.stdout
    assert main(["train", *arguments, "--outputs", str(alone)]) == 0
    for name in ("baseline", "finetuned", "dora"):
        path = f"checkpoints/{name}_seed42.safetensors"
        one, other = read_checkpoint(alone / path).tensors, read_checkpoint(together / path).tensors
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, atol=2e-4, rtol=0, msg=f"{name} {key}")
        losses = [[e["loss"] for e in read_metadata(folder / path)["history"]] for folder in (alone, together)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # Alone goes on where together ended.
    assert main(["train", *arguments, "--outputs", str(together)]) == 0
    assert (together / "metrics" / "training.json").is_file()
