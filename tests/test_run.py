"""The command line as a person meets it: help, exit codes, and one sentence for each mistake."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.config import StudyConfig, load_study
from engine.progress import say
from engine.run import main
from engine.run.commands import COMMANDS
from engine.study.outputs import require_apart
from store import AttentionStore
from train.errors import InputError

TINY = "vit_tiny_patch16_224"
ROOT = Path(__file__).resolve().parents[1]


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    code = main(command)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1, captured.err
    return code, captured.err


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name, classes in ((TINY, 2), ("deit3_small_patch16_224", 2), ("swin_tiny_patch4_window7_224", 2)):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.safetensors"
        save_file(timm.create_model(name, num_classes=classes).state_dict(), files[name])
    return files


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def compare(model: str, a: Path, b: Path, root: Path, outputs: Path) -> list[str]:
    files = ["--baseline", str(a), "--finetuned", str(b)]
    return ["compare", *files, "--model.name", model, "--data.root", str(root), "--outputs", str(outputs)]


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from engine.run import main\n"
        f"for command in {list(COMMANDS)}:\n"
        "    try:\n"
        "        main([command, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, command\n"
        "heavy = {'torch', 'timm', 'peft', 'numba', 'matplotlib', 'xarray', 'zarr', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--train.seeds" in done.stdout
    assert "--conditions.baseline.lr" in done.stdout


def test_what_is_not_there_is_bad_input_for_every_command_and_is_said_without_torch(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    model = ["--model.name", TINY, "--data.root", "photos"]
    files = ["--baseline", "none.pth", "--finetuned", "none.pth"]
    commands = [
        ["--config", "none.toml"],
        ["train", "--config", "none.toml"],
        ["train", *model, "--data.kind", "folder", "--model.weights", "none.pth"],
        ["compare", *files, *model],
        ["compare", *files, "--model.name", TINY, "--data.root", "none"],
        ["compare", *files, *model, "--classes", "none.txt"],
        ["capture", "--model.name", TINY, "--data.root", "none", "--store", "s.zarr"],
        ["capture", *model, "--store", "s.zarr", "--model.weights", "none.pth"],
        ["capture", *model, "--store", "s.zarr", "--model.adapter", "none"],
        ["capture", *model, "--store", "s.zarr", "--classes", "none.txt"],
        ["measure", "--store", "none.zarr"],
        ["export", "--store", "none.zarr", "--hdf5", "x.h5"],
        ["import", "--hdf5", "none.h5", "--store", "s.zarr"],
        ["stats", "--outputs", "none"],
        ["relevance", "--outputs", "none"],
        ["report", "--outputs", "none"],
        ["sweep", "--data.root", "none"],
        ["verify", "none.zarr"],
        ["info", "none.zarr"],
        ["study", "--measure.metrics", "entropi"],
        ["study", "--measure.metrics", "none:metric"],
        ["study", "--statistics.equivalence", "entropi=1"],
        ["study", "--statistics.primary", "entropi"],
        ["study", "--statistics.primary", "gini"],
    ]
    assert {command[0] for command in commands} >= set(COMMANDS) - {"study"}
    code = (
        "import sys\n"
        "from engine.run import main\n"
        f"for command in {commands}:\n"
        "    assert main(command) == 2, command\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sentences = done.stderr.splitlines()
    assert len(sentences) == len(commands)
    assert all(sentence.startswith("error: ") for sentence in sentences)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["stduy"], "stduy is not a command; did you mean study?"),
        (["--train.epoch", "3"], "--train.epoch is not a flag of study; did you mean --train.epochs?"),
        (["--model.nam", "x"], "--model.nam is not a flag of study; did you mean --model.name?"),
        (["study", "stray"], "stray is not a flag of study; no flag comes before it"),
        (["stats", "--outputs", "typo"], "typo holds no study to go on with; give the folder of one with --outputs"),
        (["stats", "s.toml"], "s.toml is not a flag of stats; did you mean --config s.toml?"),
        (["compare", "--data", "photos"], "--data is not a flag of compare; did you mean --data.root?"),
        (["--train.epochs", "many"], "train.epochs is 'many'"),
        (["--config", "absent.toml"], "configuration file absent.toml does not exist"),
        (["--measure.metrics", "entropi"], "no metric is called 'entropi'; did you mean 'entropy'?"),
        (["--measure.metrics", "js_divergence"], "js_divergence compares two captures"),
        (
            ["report", "--statistics.alpha", ".01"],
            "report makes no use of --statistics.alpha; give it to study",
        ),
        (
            ["train", "--statistics.confidence", "0.5"],
            "train makes no use of --statistics.confidence; give it to study,",
        ),
        (["compare", "--train.epochs", "3"], "compare makes no use of --train.epochs; give it to study, train, stats,"),
        (["study", "--capture.store", "s.zarr"], "study makes no use of --capture.store; give it to capture, import"),
        (["verify", "s.zarr", "--sweep.trials=3"], "verify makes no use of --sweep.trials; give it to sweep"),
        (["compare"], "compare needs --baseline"),
        (["measure"], "measure needs --store"),
    ],
)
def test_mistaken_arguments(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = error_of(capsys, *command)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--train.seeds", "-1,2"], "--train.seeds holds '-1'; expected a whole number from 0"),
        (["train", "--data.seed", "-1"], "--data.seed is '-1'; expected a whole number from 0"),
        (["train", "--data.seed=-1e3"], "--data.seed is '-1e3'; expected a whole number from 0"),
        (["train", "--train.seeds", ""], "--train.seeds is an empty list; expected a list that is not empty, as in"),
        (["train", "--outputs", ""], "--outputs is ''; expected text that is not empty, as in --outputs outputs"),
        (["train", "--outputs", "a\0b"], "--outputs is 'a\\x00b'; it holds a line break, a tab or another control"),
        (["train", "--outputs", "caf\udce9"], "--outputs is 'caf\\udce9'; it holds bytes that are not UTF-8"),
        (["train", "--outputs", "x" * 100_000], "it holds 100,000 characters; expected text of one line"),
        (["train", "--outputs", "~/out"], "--outputs is '~/out'; write the path in full"),
        (["train", "--train.epochs", "3", "--train.epochs=4"], "--train.epochs gives train.epochs a second value"),
        (["capture", "--store", "a.zarr", "--capture.store", "b.zarr"], "--capture.store gives capture.store a second"),
        (["train", "--config", "a.toml", "--config", "b.toml"], "--config gives config a second value; give it once"),
        (["train", "--train.epochs"], "--train.epochs needs a value"),
        (["train", "--train.epochs", "--outputs", "out"], "--train.epochs needs a value"),
        (["train", "--train.epochs", "--"], "--train.epochs needs a value"),
        (["train", "–train.epochs", "3"], "'–train.epochs' begins with a dash that is not -"),
        (["—config", "a.toml"], "'—config' begins with a dash that is not -"),
        (["train", "--train.epo", "3"], "--train.epo is not a flag of train; did you mean --train.epochs?"),
        (["train", "--outputs", "/"], "outputs is /, which holds the whole system; give a folder of its own"),
        (["train", "--train.color_jitter", "1e30"], "is '1e30'; expected a number from 0 to 1, as in --train.color_ji"),
        (["train", "--data.train_scenes", "1000000000000"], "; expected a whole number from 1 to 1,000,000, as in"),
        (["verify"], "verify needs STORE: usage: "),
        (["info", ""], "info needs STORE: usage: "),
        (["info", "a\nb.zarr"], "store is 'a\\nb.zarr'; it holds a line break"),
        (["measure", "--store", ""], "measure needs --store: usage: "),
        (["stduy", "--help"], "stduy is not a command; did you mean study?"),
        (["train", "--train.seeds", "0.5"], "--train.seeds holds '0.5'; expected a whole number from 0"),
        (["study", "--model.img_size", "1e9"], "--model.img_size is '1e9'; expected a whole number from 0 to 16,384"),
        (
            ["train", "--data.cache", "maybe"],
            "--data.cache is 'maybe'; expected true or false, as in --data.cache true",
        ),
        (["x" * 5000], "...xxx"),
    ],
)
def test_what_is_wrong_with_a_flag(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = error_of(capsys, *command)
    assert code == 2
    assert message in error
    assert len(error) <= 1001


def test_numbers_and_switches_as_people_write_them() -> None:
    read: list[StudyConfig] = []
    flags = ["--statistics.seed", "8.0", "--train.epochs=1_000", "--data.cache", "no", "--train.flip", "True"]
    command = replace(COMMANDS["study"], run=lambda config, _: read.append(config) or 0)
    with mock.patch.dict(COMMANDS, {"study": command}):
        assert main(["study", *flags, "--train.seeds", "0, 1,", "--model.weights="]) == 0
    (config,) = read
    assert (config.statistics.seed, config.train.epochs) == (8, 1000)
    assert (config.data.cache, config.train.flip, config.train.seeds) == (False, True, (0, 1))


@pytest.mark.parametrize(
    ("kind", "split", "outputs", "refused"),
    [
        ("folder", "auto", "root", True),
        ("folder", "all", "root/out", True),
        ("folder", "all", "root/.out", False),
        ("folder", "all", ".", False),
        ("folder", "folders", "root/out", False),
        ("folder", "folders", "root/Train/out", True),
        ("sports100", "auto", "root/test", True),
        ("indoor67", "official", "root/out", False),
        ("indoor67", "official", "root/Images/out", True),
    ],
)
def test_outputs_do_not_become_a_class(
    kind: str, split: str, outputs: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_study(None, {"data.kind": kind, "data.split": split, "data.root": "root", "outputs": outputs})
    if not refused:
        require_apart(config, ("outputs", "data.cache_folder"))
        return
    with pytest.raises(InputError, match=f"outputs is {outputs}, where data.root root has its class folders"):
        require_apart(config, ("outputs",))


def test_a_store_does_not_become_a_class(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = photos / "a.zarr"
    code, error = error_of(capsys, "capture", "--model.name", TINY, "--data.root", str(photos), "--store", str(store))
    assert code == 2
    assert f"capture.store is {store}, where data.root {photos} has its class folders" in error


def test_mistaken_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.toml"
    path.write_text("[capture]\nbatchsize = 4\n", encoding="utf-8")
    code, error = error_of(capsys, "--config", str(path), "--outputs", str(tmp_path / "out"))
    assert code == 2
    assert "capture.batchsize is not a key of the configuration; did you mean capture.batch_size?" in error


def test_folders_without_images(weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "out"
    cases = {"absent": "does not exist", "empty": "expected class folders", "broken": "no readable image"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "broken" / "cat" / name).write_bytes(b"no picture")
    for name, message in cases.items():
        command = compare(TINY, weights[TINY], weights[TINY], tmp_path / name, outputs)
        code, error = error_of(capsys, *command)
        assert code == 2
        assert message in error
        assert str(tmp_path / name) in error


def test_wrong_models_and_checkpoints(
    weights: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "out"
    good = weights[TINY]
    cases = [
        (compare("vit_tiny_patch16_244", good, good, photos, outputs), "vit_tiny_patch16_224"),
        (compare(TINY, good, tmp_path / "none.pth", photos, outputs), "none.pth"),
        (compare(TINY, good, weights["deit3_small_patch16_224"], photos, outputs), "expected"),
        (compare(TINY, good, photos / "cat" / "0.png", photos, outputs), "0.png"),
    ]
    for command, message in cases:
        code, error = error_of(capsys, *command)
        assert code == 2
        assert message in error


def test_a_model_whose_attention_cannot_be_captured(
    weights: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swin = "swin_tiny_patch4_window7_224"
    code = main(compare(swin, weights[swin], weights[swin], photos, tmp_path / "out"))
    error = capsys.readouterr().err
    assert code == 2
    assert "no attention of SwinTransformer can be captured" in error
    assert "windowed" in error


def test_no_network_for_weights(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    store = tmp_path / "s.zarr"
    code = main(
        [
            "capture",
            "--model.name",
            "vit_tiny_patch16_224.augreg_in21k",
            "--data.root",
            str(photos),
            "--store",
            str(store),
        ]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert "--model.weights" in error
    assert not store.exists()


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    code, error = error_of(capsys, "--outputs", str(tmp_path / "file" / "out"))
    assert code == 2
    assert "cannot be written" in error
    assert "--outputs" in error


def test_capture_measure_verify_info(
    weights: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "samples.zarr"  # sample maps had this name, whatever the store's, and took its place
    capture = ["capture", "--model.name", TINY, "--model.weights", str(weights[TINY]), "--data.root", str(photos)]
    capture += ["--store", str(store), "--batch-size", "3", "--model.img_size", "64"]
    assert main(capture) == 0
    assert f"{store}: 4 images, 12 layers, 0." in (said := capsys.readouterr().out)
    assert said.endswith(" MB of attention\n")
    assert main(["verify", str(store)]) == 0
    assert main(["measure", "--store", str(store), "--metrics", "distance,entropy_normalized"]) == 0
    assert "measured entropy_normalized" in capsys.readouterr().out
    assert main(["measure", "--store", str(store), "--metrics", "distance,entropy_normalized"]) == 0
    assert "already" in capsys.readouterr().out
    assert main(["info", str(store)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "vit-attention/1"

    shard = sorted((store / "attention" / "layer_03").glob("c*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(store)]) == 1
    assert "layer_03" in capsys.readouterr().out
    assert main(capture) == 0, "the damaged batch alone is captured again"
    assert main(["verify", str(store)]) == 0
    assert {entry.name for entry in tmp_path.iterdir()} >= {"samples.zarr", "samples.ledger", "samples.samples.zarr"}
    assert main(["verify", str(tmp_path / "none.zarr")]) == 2
    assert "none.zarr" in capsys.readouterr().err


def test_random_weights_are_those_of_the_seed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A capture of them that was stopped goes on with the same model, and never with another one."""
    capture = ["capture", "--model.name", "test_vit", "--model.pretrained", "false", "--data.root", str(photos)]
    stores = [tmp_path / f"{name}.zarr" for name in "ab"]
    for store in stores:
        torch.rand(())  # what the process did before has no part in it
        assert main([*capture, "--store", str(store)]) == 0
    first, second = (AttentionStore.open(store).read_logits() for store in stores)
    np.testing.assert_array_equal(first, second)
    assert main([*capture, "--store", str(stores[0]), "--data.seed", "7"]) == 1
    assert "was captured with another model" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_has_to_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from engine.config import load_study
    from engine.study.study import Study

    outputs = tmp_path / "out"
    study = Study(load_study(None, {"outputs": str(outputs)}))
    with study.opened():
        code, error = error_of(capsys, "--outputs", str(outputs))
    assert code == 2
    assert "another run is writing" in error


def test_a_changed_study_toml_is_used_on_purpose_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`stats` goes on with the study.toml of its folder: the one that a study wrote there, or one that is given."""
    from engine.study.journal import Journal

    journal, own = Journal(tmp_path / "run.jsonl"), tmp_path / "study.toml"
    journal.write(own, b"[statistics]\nconfidence = 0.95\n")
    own.write_bytes(own.read_bytes().replace(b"0.95", b"0.15"))
    for command in ("stats", "relevance"):
        code, error = error_of(capsys, command, "--outputs", str(tmp_path))
        assert code == 2
        assert "study.toml is not as it was written: edited, damaged or put in its place (stage study.toml)" in error
        assert f"--config {own}" in error
    edited = own.read_bytes()
    code, error = error_of(capsys, "--outputs", str(tmp_path))
    assert (code, own.read_bytes()) == (2, edited), "a study does not write over it"
    assert f"--config {own}; to go on without it, delete it" in error
    own.unlink()
    code, error = error_of(capsys, "stats", "--outputs", str(tmp_path))
    assert code == 2, "and not the embedded study in its place"
    assert "study.toml is missing" in error


def test_names_are_shown_on_one_line_whatever_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """In what is said and in the log; a name must not write over the terminal, or go on in a second line."""
    main(["info", "absent"])  # sets the log up
    capsys.readouterr()
    say("pictures of caf\udce9\x1b[2J\n\u202egpj")
    logging.getLogger("train").warning("%s is empty", "caf\udce9\x1b[2J\n")
    captured = capsys.readouterr()
    assert captured.out == "pictures of caf\\xe9\\x1b[2J\\n\\u202egpj\n"
    assert captured.err == "caf\\xe9\\x1b[2J\\n is empty\n"


def test_a_flag_of_an_earlier_version_is_left_out_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--statistics.bootstrap", "9", "--statistics.bootstrap=9", "x"]) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert said == 2 * ["--statistics.bootstrap is left out: statistics.permutations is the number of resamples, too"]
    assert error.startswith("error: x is not a flag of stats")


def test_a_flag_of_an_earlier_version_without_its_value_takes_no_other_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--statistics.bootstrap", "--no.such.flag", "1"]) == 2
    assert "--no.such.flag is not a flag of stats" in capsys.readouterr().err.splitlines()[-1]
