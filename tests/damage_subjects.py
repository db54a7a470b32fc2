"""Small folders as commands leave them, each made once: a study, a comparison, captures, an export, a sweep."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from tests.damage import Subject, contents
from tests.damage_steps import (
    Ending,
    Step,
    call,
    command,
    done,
    exporting,
    importing,
    reading,
    telling,
    verifying,
)
from tests.flags import flags
from tests.photographs import write_photographs
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint
from train.training import train_condition

STORE = {
    r"attention/layer_\d+/(query/|key/|)c\.[\d.]+": "shard",
    r"attention/layer_\d+/bias/c\.[\d.]+": "bias",
    r"metrics/.+/c\.[\d.]+": "metric value",
    r"logits/c\.[\d.]+": "logits",
    r"images/.+/c\.[\d.]+": "ids, labels, regions",
    r"(.+/)?zarr\.json": "store metadata",
}
LEDGER = {
    r"batch_\d+\.json": "ledger batch",
    r"metrics/.+/batch_\d+\.json": "ledger batch of a metric",
    r"metrics/.+/metadata\.json": "ledger metadata of a metric",
    r"metadata\.json": "ledger metadata",
    r"manifest\.json": "ledger manifest",
    r"complete\.json": "ledger complete",
    r"lock": "lock",
}
SAMPLES = {r".+/c/[\d/]+": "sample chunk", r"(.+/)?zarr\.json": "sample metadata"}


UNITS = {
    r"(checkpoints/[^.]+)\..+": "unit of a checkpoint",
    r"(captures/[^/]+)\.(?:zarr|ledger)/.+": "unit of a capture",
    r"(samples\.zarr/[^/]+)/.+": "unit of samples",
    r"(samples\.zarr|metrics/attention_metrics|metrics|visualizations)[./].+": "unit of a folder",
    r"()(?!run\.jsonl).+": "unit of all but the journal",
}


def below(folder: str, rules: dict[str, str]) -> dict[str, str]:
    """Rules for files below a folder, a regular expression that ends in a slash."""
    return {f"{folder}{pattern}": kind for pattern, kind in rules.items()}


CAPTURES = {
    **below(r"[^/]*samples\.zarr/", SAMPLES),
    **below(r"[^/]+\.zarr/", STORE),
    **below(r"[^/]+\.ledger/", LEDGER),
}
METRICS = {
    r"attention_metrics\.zarr/.+/c/[\d/]+": "table chunk",
    r"attention_metrics\.zarr/(.+/)?zarr\.json": "table metadata",
    r"attention_metrics\.h5": "table h5",
    r"attention_metrics\.csv": "table csv",
    r"attention_comparison\.json": "comparison json",
    r"controls\.json": "controls json",
    r"primary\.json": "primary json",
    r"training\.json": "training json",
    r"relevance\.json": "relevance json",
    r"relevance\.csv": "relevance csv",
}
OUTPUTS = {
    r"checkpoints/.+\.state(\.previous)?\.safetensors": "training state",
    r"checkpoints/.+\.safetensors": "checkpoint",
    r"checkpoints/.+\.history\.jsonl": "history",
    r"checkpoints/.+\.json": "checkpoint sidecar",
    **below("captures/", CAPTURES),
    **below(r"samples\.zarr/", SAMPLES),
    **below("metrics/", METRICS),
    r"visualizations/.+/\.written\.json": "record of a folder of pictures",
    r"visualizations/.+_samples\.csv": "relevance sample csv",
    r"visualizations/(relevance/.+|gradcam_samples/.+)\.png": "relevance picture",
    r"visualizations/figures/.+\.(png|svg)": "figure",
    r"summary\.md": "summary",
    r"report\.html": "report page",
    r"study\.toml": "study.toml",
    r"run\.jsonl": "journal",
    r"manifest\.json|splits/seed\d+\.json": "manifest",
    r"cache/.+\.npy": "image cache",
    r"cache/.+\.json": "image cache sidecar",
    r"\.lock|cache/.+\.lock": "lock",
}
SWEEP = {
    r"sweep/.+/trials\.jsonl": "trials",
    r"sweep/.+/evaluation\.csv": "evaluation",
    r"sweep/.+\.png": "curve",
    r"sweep/.+\.html": "trial history page",
    r"sweep/.+\.safetensors": "sweep checkpoint",
    r"sweep/.+\.json": "sweep sidecar",
}


TRAINED = [
    *("--data.train_scenes", "24", "--data.validation_scenes", "12", "--data.test_scenes", "12"),
    *("--pretrain.scenes", "24", "--pretrain.epochs", "1", "--train.precision", "fp32", "--train.seeds", "1,2"),
    *("--model.name", "digits_vit"),
]
DIGITS = [
    *TRAINED,
    *("--capture.batch_size", "8", "--capture.sinks", "metrics,store"),
    *("--relevance.images", "1", "--relevance.measured", "2", "--relevance.steps", "2", "--capture.samples", "2"),
    *("--measure.metrics", "distance"),
]
CONDITIONS = '[conditions.baseline]\nrecipe = "probe"\n[conditions.finetuned]\nrecipe = "full"\nlr = 1e-3\n'

READ_BY_REPORT = (
    *("sample chunk", "sample metadata", "table chunk", "table metadata", "comparison json", "training json"),
    *("relevance json", "relevance sample csv", "relevance picture", "study.toml", "journal"),
)


CACHED = ("image cache", "image cache sidecar")


# --- the subjects -----------------------------------------------------------------------------------------------------


def study_ways(home: Path) -> dict[str, Sequence[Sequence[Step]]]:
    """kind -> what is run before a study is run again."""
    stores = sorted((home / "captures").glob("*.zarr"))
    look = [verifying(stores), *(reading(path) for path in stores)]

    def table_again() -> Ending:
        for name in ("attention_metrics.csv", "attention_comparison.json", "relevance.csv"):
            (home / "metrics" / name).unlink()
        return 0, ""

    report, stats = command("report", "--outputs", home), command("stats", "--outputs", home)
    ways: dict[str, Sequence[Sequence[Step]]] = {}
    ways |= {kind: [[report], [stats], []] for kind in (*READ_BY_REPORT, *UNITS.values())}
    return ways | {kind: [look, [*look, table_again]] for kind in (*STORE.values(), *LEDGER.values())}


def study(folder: Path) -> Subject:
    """The embedded study, with stored maps and relevance."""
    home = folder / "out"
    config = folder / "conditions.toml"
    config.write_text(CONDITIONS, encoding="utf-8")

    def run(outputs: Path, *more: str) -> list[str]:
        return ["study", "--config", str(config), "--outputs", str(outputs), *DIGITS, *more]

    own = ("--train.epochs", "1", "--statistics.permutations", "19")
    done(run(folder / "other", *own, "--data.seed", "7"))
    done(run(home, "--train.epochs", "2", "--statistics.permutations", "29"))
    older = contents(home)
    done(run(home, *own))
    return Subject(
        home=home,
        kinds=OUTPUTS,
        remake=[command(*run(home, *own))],
        before=study_ways(home),
        units=UNITS,
        older=older,
        foreign=contents(folder / "other"),
    )


def interrupted(folder: Path) -> Subject:
    """A study that was stopped in an epoch of its last training run."""
    home = folder / "out"
    config = folder / "conditions.toml"
    config.write_text(CONDITIONS, encoding="utf-8")

    def run(outputs: Path) -> list[str]:
        return ["train", "--config", str(config), "--outputs", str(outputs), *TRAINED, "--train.epochs", "3"]

    real = train_condition

    def stopped(run: Any, **arguments: Any) -> Any:
        def stop(history: Sequence[Any]) -> None:
            if len(history) == 2:
                raise KeyboardInterrupt

        return real(run, **arguments | ({"on_epoch": stop} if arguments["name"] == "finetuned" else {}))

    done(run(home))
    finished = contents(home)
    shutil.rmtree(home)
    with mock.patch("engine.study.training.train_condition", stopped):
        assert call(run(home))[0] == 130
    return Subject(home=home, kinds=OUTPUTS, remake=[command(*run(home))], finished=finished)


def photographs(folder: Path) -> Path:
    root = folder / "photographs"
    write_photographs(root, per_class=4, size=64)
    return root


def weights(folder: Path, name: str, seed: int, img_size: int = 64) -> Path:
    """A random model's weights, as a user has them."""
    torch.manual_seed(seed)
    path = folder / f"{name}.safetensors"
    save_file(build_model(ModelSource("test_vit", img_size=img_size), num_classes=3).state_dict(), path)
    return path


def compare(folder: Path) -> Subject:
    """Two checkpoints on a folder of photographs."""
    root, home = photographs(folder), folder / "out"

    def run(outputs: Path, first: Path, second: Path, *more: str) -> list[str]:
        usual = [
            *("--baseline", str(first), "--finetuned", str(second), "--model.name", "test_vit"),
            *("--model.img_size", "64", "--data.root", str(root), "--outputs", str(outputs)),
            *("--capture.batch_size", "8", "--capture.samples", "2"),
            *("--measure.metrics", "distance", "--relevance.measured", "2", "--relevance.images", "1"),
            *("--relevance.methods", "generic", "--relevance.steps", "2", "--data.cache", "true"),
        ]
        return ["compare", *flags(usual, more)]

    models = [weights(folder, name, seed) for seed, name in enumerate("abcd")]
    own = ("--statistics.permutations", "19")
    done(run(folder / "other", models[2], models[3], *own))
    done(run(home, models[0], models[1], "--statistics.permutations", "29", "--capture.samples", "1"))
    older = contents(home)
    done(run(home, models[0], models[1], *own))

    def images_again() -> Ending:
        (home / "metrics" / "controls.json").unlink()
        return 0, ""

    return Subject(
        home=home,
        kinds=OUTPUTS,
        remake=[command(*run(home, models[0], models[1], *own))],
        before=study_ways(home) | {kind: [[images_again]] for kind in CACHED},
        units=UNITS,
        older=older,
        foreign=contents(folder / "other"),
    )


LATER = ("entropy", "morans_i_received")
PAIR = "js_divergence"


def captures(encoding: str) -> Callable[[Path], Subject]:
    """Two captures, metrics computed later, a pair metric, and an export."""

    def make(folder: Path) -> Subject:
        root, home = photographs(folder), folder / "home"
        home.mkdir()
        models = [weights(folder, name, seed) for seed, name in enumerate("abcd")]

        def capture(place: Path, name: str, model: Path) -> list[str]:
            return [
                *("capture", "--store", str(place / f"{name}.zarr"), "--model.name", "test_vit"),
                *("--model.weights", str(model), "--model.img_size", "64", "--data.root", str(root)),
                *("--encoding", encoding, "--batch-size", "4", "--measure.metrics", "distance"),
                *("--capture.layers", "0,3", "--capture.samples", "2"),
            ]

        def commands(place: Path, first: Path, second: Path) -> list[list[str]]:
            a, b = str(place / "a.zarr"), str(place / "second" / "b.zarr")
            return [
                capture(place, "a", first),
                capture(place / "second", "b", second),
                ["measure", "--store", a, "--metrics", ",".join(LATER)],
                ["measure", "--store", a, "--metrics", PAIR, "--against", b],
                ["export", "--store", a, "--hdf5", str(place / "a.h5")],
            ]

        own, other = commands(home, models[0], models[1]), commands(folder / "other", models[2], models[3])
        (folder / "other").mkdir()
        for arguments in [*own, *other]:
            done(arguments)
        a, b = home / "a.zarr", home / "second" / "b.zarr"
        measuring = [command(*arguments) for arguments in own[2:4]]
        export_elsewhere = exporting(a, folder / "again.h5")
        looks = [verifying([a, b]), reading(a), reading(b), telling(a)]
        ways = [looks, measuring, [export_elsewhere], []]
        of_store = list(dict.fromkeys([*STORE.values(), *LEDGER.values()]))
        later = [f"a.{part}/metrics/{name}" for part in ("zarr", "ledger") for name in (*LATER, PAIR)]
        return Subject(
            home=home,
            kinds={r"a\.h5": "export h5"} | below("(second/|)", CAPTURES),
            remake=[command(*arguments) for arguments in own],
            before=dict.fromkeys(of_store, ways) | {"export h5": [[importing(home / "a.h5", folder)]]},
            foreign={name: content for name, content in contents(folder / "other").items() if name != "a.h5"},
            forget={"shard": later, "bias": later},
        )

    return make


def sweep(folder: Path) -> Subject:
    """A sweep of two backbones."""
    root, home = photographs(folder), folder / "out"

    def run(outputs: Path, model: Path, *more: str) -> list[str]:
        return [
            *("sweep", "--data.root", str(root), "--outputs", str(outputs), "--model.name", "test_vit"),
            *("--model.weights", str(model), "--model.img_size", "32", "--sweep.ranks", "1", "--sweep.trials", "2"),
            *("--sweep.bases", "plain,int1", "--train.batch_size", "8", "--train.precision", "fp32", *more),
        ]

    models = [weights(folder, name, seed, 32) for seed, name in enumerate("ab")]
    done(run(folder / "other", models[1], "--sweep.epochs", "1"))
    done(run(home, models[0], "--sweep.epochs", "2"))
    older = contents(home)
    done(run(home, models[0], "--sweep.epochs", "1"))

    def images_again() -> Ending:
        for path in (home / "sweep").rglob("quant=plain_r=1_eval_acc=*"):
            path.unlink()
        return 0, ""

    return Subject(
        home=home,
        kinds=SWEEP | OUTPUTS,
        remake=[command(*run(home, models[0], "--sweep.epochs", "1"))],
        before={kind: [[images_again]] for kind in CACHED},
        older=older,
        foreign=contents(folder / "other"),
    )


def checkpoint(folder: Path) -> Subject:
    """A user's own .pth."""
    home = folder / "home"
    home.mkdir()
    path = home / "b.pth"
    torch.manual_seed(0)
    model = build_model(ModelSource("test_vit", img_size=64), num_classes=3)
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    sound = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}

    def load() -> Ending:
        try:
            loaded = load_checkpoint(ModelSource("test_vit", img_size=64), path).state_dict()
        except ValueError as error:
            return 2, str(error)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"
        if {name: tensor.numpy().tobytes() for name, tensor in loaded.items()} != sound:
            return None, "other weights, in silence"
        return 0, ""

    return Subject(
        home=home,
        kinds={r"b\.pth": "user's .pth"},
        remake=[],
        before={"user's .pth": [[load]]},
    )


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "study": study,
    "interrupted": interrupted,
    "compare": compare,
    "fp16": captures("fp16"),
    "bf16": captures("bf16"),
    "qk": captures("qk"),
    "sweep": sweep,
    "checkpoint": checkpoint,
}
