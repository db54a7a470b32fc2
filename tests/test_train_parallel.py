"""Two processes that train one model: what one process would, up to rounding; the first does the rest of the study."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.run import main
from tests.miniatures import write_sports100
from train.checkpoint import read_checkpoint, read_metadata
from train.parallel import SINGLE, Tally, Workers

WORKER = """
import json, os, sys
from pathlib import Path

import numpy as np
import torch

from train.parallel import Tally, joined

child = os.fork()  # two processes, which import torch once
os.environ["RANK"] = "0" if child else "1"
with joined("cpu") as workers:
    rank = workers.rank
    first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    if rank == 0:
        first.grad = torch.full((2, 3), 1.5)
    else:
        first.grad, second.grad = torch.ones(2, 3), torch.arange(4.0)
    workers.sum_gradients([first, second])
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.rand(5) > 0.5)
    model.register_parameter("transposed", torch.nn.Parameter(torch.rand(3, 2).T))
    workers.share_weights(model)
    tally = Tally(workers, "images")
    counted = tally.add(rank + 1)
    workers.wait()
    found = {
        "sum": workers.add_up(torch.tensor([1.0 + rank, 10.0])).tolist(),
        "tell": [workers.tell(rank), workers.tell({"é": [rank, None]})],
        "gather": workers.gather(["x" * (3 + 100 * rank), rank]),
        "gradients": [first.grad.tolist(), second.grad.tolist()],
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "share": workers.share(np.arange(5)).tolist(),
        "one": workers.share(np.arange(1)).tolist(),
        "deal": [workers.deal([7, 8, 9]), workers.deal([7])],
        "tally": [counted, tally.add(0)],
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_workers_divide_and_tell(tmp_path: Path) -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | group | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], env=environment, timeout=120, check=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for found in (first, second):
        assert found["sum"] == [3.0, 20.0]
        assert found["tell"] == [0, {"é": [0, None]}]
        assert found["gather"] == [["xxx", 0], ["x" * 103, 1]]
        assert found["gradients"] == [[[2.5] * 3] * 2, [0.0, 1.0, 2.0, 3.0]]
        assert found["tally"][1] == 3
    assert first["weights"] == second["weights"]
    assert first["share"] + second["share"] == [0, 1, 2, 3, 4]
    assert sorted([first["one"], second["one"]]) == [[], [0]]
    assert (first["deal"], second["deal"]) == ([[7, 9], [7]], [[8], []])
    assert 3 in (first["tally"][0], second["tally"][0])


LEFT_ALONE = """
import os, signal, sys
import engine.run
from engine.run import commands
from train.parallel import joined

def train(config, arguments):
    with joined("cpu") as workers:
        workers.wait()
        if workers.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        workers.wait()
    return 0

commands.COMMANDS["train"] = commands.Command("", train, shared=True)
sys.exit(engine.run.main(["train"]))
"""


def test_a_process_that_is_left_alone_says_so() -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", LEFT_ALONE],
            env=os.environ | group | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    printed = first.communicate(timeout=120)[1]
    assert (first.returncode, second.wait(timeout=120)) == (1, -signal.SIGKILL)
    assert printed.startswith("error: another process of this run ended before its work was done")
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    assert second.communicate()[1] == ""


def test_one_process_is_its_own_worker() -> None:
    single = SINGLE
    assert single == Workers(0, 1)
    assert single.first
    assert single.add_up(torch.tensor([2.0])).tolist() == [2.0]
    assert single.tell("this") == "this"
    assert single.gather("this") == ["this"]
    assert single.deal([1, 2]) == [1, 2]
    tally = Tally(single, "images")
    assert [tally.add(2), tally.add(3)] == [2, 5]
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
