"""A capture divided among torchrun's processes leaves the bytes that one process leaves, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.run import main
from store import AttentionStore
from store.verify import verify
from tests.flags import flags

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
IMAGES = 22


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model's weights and a folder of images, as arguments of `capture`."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), folder / "w.safetensors")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        (folder / "photos" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / str(number % 2) / f"{number}.png")
    arguments = ["--model.name", "test_vit", "--model.weights", str(folder / "w.safetensors")]
    return [*arguments, "--data.root", str(folder / "photos"), "--batch-size", "3"]


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    whole = [*TORCHRUN, str(processes), "-m", "engine.run", *command]
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=ONE_THREAD)


def forked(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """What torchrun does, with processes that import everything once: see tests/torchrun.py."""
    whole = [sys.executable, "-m", "tests.torchrun", str(processes), *command]
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=ONE_THREAD, cwd=ROOT)


def one_process(*command: str) -> int:
    """With the threads of each of torchrun's processes: a library's products may depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main([*command])
    finally:
        torch.set_num_threads(threads)


def capture(inputs: list[str], path: Path, *more: str) -> list[str]:
    return ["capture", *flags([*inputs, "--store", str(path)], more)]


def file_bytes(path: Path, *parts: str) -> dict[str, bytes]:
    files = (file for part in parts for file in (path / part).rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def same_capture(path: Path, other: Path) -> None:
    """Every byte but the time at which the store was made."""
    assert verify(path) == []
    parts = ("attention", "metrics", "logits", "images")
    assert file_bytes(path, *parts) == file_bytes(other, *parts)
    assert file_bytes(path.parent, "maps.samples.zarr") == file_bytes(other.parent, "maps.samples.zarr")
    assert not list(path.parent.rglob("*.partial"))
    assert (path.with_name("maps.ledger") / "complete.json").is_file()


@pytest.fixture(scope="module")
def alone(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "maps.zarr"
    assert one_process(*capture(inputs, path)) == 0
    return path


@pytest.mark.timeout(600)
def test_two_processes_leave_the_bytes_of_one(inputs: list[str], alone: Path, tmp_path: Path) -> None:
    """From the beginning, and for the batches that are missing alone."""
    path = tmp_path / "maps.zarr"
    done = forked(2, *capture(inputs, path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{IMAGES} readable images") == 1, "one of the processes decodes the folder, and says so"
    same_capture(path, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_missing_is_dealt_out(inputs: list[str], alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    assert one_process(*capture(inputs, path)) == 0
    before = {file: file.stat().st_mtime_ns for file in (path / "attention").rglob("c.*")}
    for batch in (0, 5, 6):
        (path / "attention" / "layer_02" / f"c.{batch}.0.0.0").unlink()
    done = torchrun(2, *capture(inputs, path))
    assert done.returncode == 0, done.stderr
    same_capture(path, alone)
    written = {file for file in before if file.stat().st_mtime_ns != before[file]}
    assert {int(file.name.split(".")[1]) for file in written} == {0, 5, 6}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [
        ["--capture.sinks", "metrics"],
        ["--encoding", "qk", "--capture.heads", "1", "--capture.layers", "1,3"],
        ["--encoding", "bf16", "--batch-size", "16"],
    ],
)
def test_three_processes_leave_the_bytes_of_one(inputs: list[str], tmp_path: Path, settings: list[str]) -> None:
    """Metrics without maps; query and key of some heads; two batches for three processes."""
    one, three = tmp_path / "one" / "maps.zarr", tmp_path / "three" / "maps.zarr"
    assert one_process(*capture(inputs, one, *settings)) == 0
    done = torchrun(3, *capture(inputs, three, *settings))
    assert done.returncode == 0, done.stderr
    same_capture(three, one)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_random_model_is_captured(inputs: list[str], tmp_path: Path) -> None:
    """Without weights the model is a random one, the same in every process."""
    path = tmp_path / "maps.zarr"
    without = [*inputs[:2], "--model.pretrained", "false", *inputs[4:]]
    done = torchrun(2, *capture(without, path))
    assert done.returncode == 0, done.stderr
    store, samples = AttentionStore.open(path), tmp_path / "maps.samples.zarr"
    logits = store.read_logits()
    rows = [store.image_ids.index(name) for name in _zarr(samples / "images" / "id")]
    np.testing.assert_allclose(logits[rows], _zarr(samples / "maps" / "logits"), atol=1e-5)
    assert len({row // 3 % 2 for row in rows}) == 2, "sample images of both processes' batches"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compare_is_the_same_study(inputs: list[str], tmp_path: Path) -> None:
    """The processes share the captures; the first one does the rest."""
    weights, photos = inputs[3], inputs[5]
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), other)
    compare = ["compare", "--baseline", weights, "--finetuned", str(other), "--model.name", "test_vit"]
    compare += ["--data.root", photos, "--capture.batch_size", "4", "--statistics.permutations", "99"]
    compare += ["--relevance.images", "1", "--relevance.measured", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert one_process(*compare, "--outputs", str(one)) == 0
    done = torchrun(2, *compare, "--outputs", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("capture finetuned_seed0: ") == 1
    for name in ("baseline", "finetuned"):
        store = f"captures/{name}_seed0.zarr"
        assert verify(two / store) == []
        assert file_bytes(two / store, "metrics", "logits") == file_bytes(one / store, "metrics", "logits")
    results = [json.loads((folder / "metrics" / "attention_comparison.json").read_text()) for folder in (one, two)]
    assert results[0]["conditions"] == results[1]["conditions"]
    assert results[0]["tests"] == results[1]["tests"]
    assert main([*compare, "--outputs", str(two)]) == 0, "one process goes on, and finds everything done"


def _zarr(path: Path) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(path, mode="r")[...])


# --- mistakes and deaths --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_is_one_sentence_of_one_process(inputs: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other" / "maps.zarr"
    assert main(capture(inputs, other)) == 0
    cases = [
        (["--modell.name", "x"], "--modell.name is not a flag of capture", 2),
        (["--model.name", "test_vitt"], "unknown model 'test_vitt'", 2),
        (["--data.root", str(tmp_path / "absent")], "does not exist", 2),
        (["--capture.heads", "9"], "has no head 9", 2),
        (["--store", str(other), "--batch-size", "4"], "was captured with another batch_size", 1),
    ]
    for own, sentence, code in cases:
        done = torchrun(2, *capture(inputs, tmp_path / "maps.zarr", *own))
        assert done.returncode != 0
        assert [sentence in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
        assert done.stderr.index(sentence) < done.stderr.index("ChildFailedError"), "before torchrun's own report"
        assert f"exitcode  : {code} " in done.stderr.split("Root Cause")[1]


FAILING = """
import sys, time
import engine.run
from engine.run import commands
from train.errors import InputError
from train.parallel import joined

def capture(config, arguments):
    with joined("cpu") as workers:
        if workers.rank == int(config.capture.store):
            raise InputError("picture 7 is gone")
        time.sleep(0.2 * workers.rank)
        workers.wait()
        raise AssertionError("nobody waits in vain")

commands.COMMANDS["capture"] = commands.Command("", capture, flags={"--store": "capture.store"}, shared=True)
sys.exit(engine.run.main())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_whoever_fails_says_why(tmp_path: Path, rank: int) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    whole = [*TORCHRUN, "3", str(tmp_path / "failing.py"), "capture", "--store", str(rank)]
    environment = ONE_THREAD | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env=environment)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == ["error: picture 7 is gone"]
    assert "nobody waits in vain" not in done.stderr


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """torchrun's processes in the order of their ranks."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry.removeprefix(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


DYING = """
import os, signal, sys
from engine.capture import stream
from engine.run import main

captured, go_on = [], stream._return_freed_memory

def after_a_batch():
    captured.append(1)
    if len(captured) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    go_on()

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    stream._return_freed_memory = after_a_batch
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_starts_them_again(inputs: list[str], alone: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    path = tmp_path / "maps.zarr"
    whole = [*TORCHRUN, "2", "--max-restarts", "1", str(tmp_path / "dying.py"), *capture(inputs, path)]
    environment = ONE_THREAD | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    same_capture(path, alone)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("again", ["torchrun", "one process"])
def test_a_process_is_killed_at_random_moments(inputs: list[str], tmp_path: Path, again: str) -> None:
    """torchrun ends the others; what is left is whole batches, and the same command, or one process, goes on."""
    rng = random.Random(len(again))
    many = [*inputs[:-1], "1"]
    one = tmp_path / "one" / "maps.zarr"
    assert one_process(*capture(many, one)) == 0
    deaths = []
    for attempt in range(5):
        path = tmp_path / str(attempt) / "maps.zarr"
        command = [*TORCHRUN, "2", "-m", "engine.run", *capture(many, path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD) as process:
            records, enough = path.with_name("maps.ledger"), rng.randrange(IMAGES // 2)
            while not (path.exists() and len(list(records.glob("batch_*.json"))) >= enough):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            rank = rng.randrange(2)
            os.kill(children(process)[rank], signal.SIGKILL)
        assert verify(path) == []
        deaths.append((process.returncode, rank, len(AttentionStore.open(path).committed_batches)))
        if again == "torchrun":
            done = torchrun(2, *capture(many, path))
            assert done.returncode == 0, done.stderr
        else:
            assert one_process(*capture(many, path)) == 0
        same_capture(path, one)
    assert any(0 < committed < IMAGES for _, _, committed in deaths), deaths
