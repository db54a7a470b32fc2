"""What would fail after hours, found in seconds: a study against its model and its data, before any work.

One model is built or loaded, one image goes through it, and everything that the study asks for is tried on that: what
is captured, every metric, the adapters, the relevance methods, the sizes of the splits, the disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.capture import CaptureError, Discovery, SiteAttention, discover, has_classes, observe
from engine.config import SAMPLES, StudyConfig, metrics_of_one_capture, run_name
from engine.progress import say
from engine.relevance import relevance_maps
from engine.study.model import capture_settings, captured_seeds, given_conditions, trained_seeds
from engine.study.start import Start
from kernels import BACKENDS, check_metrics, measure_attention, resolve
from store import estimate_bytes
from train.adapters import check_adapters
from train.data import REGION_NAMES, SPLITS, Manifest, Preprocessing
from train.errors import InputError
from train.models import classifier_name
from train.recipes import RECIPES

# What it is → the files and folders that it goes to, and at most how many bytes they take.
_Needs = dict[str, tuple[list[Path], int]]


def check_study(start: Start, model: torch.nn.Module, device: str, stages: Sequence[str]) -> None:
    """Raise the sentence for what a study cannot have in its `stages`; `model` is one of its own, before training."""
    config = start.config
    given = given_conditions(config)
    trained = {name: condition for name, condition in config.conditions.items() if name not in given}
    if trained:
        classifier_name(model)
    for name, condition in trained.items():
        if RECIPES[condition.recipe].adapters:
            _check_targets(model, condition.targets, [condition.rank], f"condition {name}: ")
    model.to(device)
    captured = check_capture(config, model, start.preprocessing, device) if "capture" in stages else None
    for pairing in start.head_pairing([site.name for site in captured.sites] if captured else []).values():
        if pairing.note:
            say(pairing.note)
    if start.listed is not None:
        _check_splits(start.listed, "file", trained=bool(trained))
    _require_disk(_needs(start, model, captured, device), start.outputs)
    if "relevance" in stages and (config.relevance.measured or config.capture.samples):
        _check_methods(config.relevance.methods, model, start.preprocessing, device)
    if start.listed is not None:  # all that takes seconds is sound, so the files are decoded
        _check_decoded(start, trained=bool(trained))
        start.heads(start.manifest.class_names)


def check_sweep(start: Start, model: torch.nn.Module, targets: str) -> None:
    """Raise the sentence for what a sweep cannot have; `targets` are the adapted layers of the model."""
    assert start.listed is not None  # a sweep is of pictures on disk
    sweep, outputs = start.config.sweep, start.outputs
    _check_targets(model, targets, sweep.ranks, "sweep.ranks: ")
    _check_splits(start.listed, "file", trained=True)
    results, weights = len(sweep.bases) * len(sweep.ranks), _bytes_of(model)
    needs = {
        "checkpoints": ([start.pretrained_path, start.sweep_probe_path], 2 * weights),
        "results": ([outputs / "sweep" / f"{sweep.recipe}_{sweep.init}"], (results + 1) * weights),
    }
    _require_disk(needs | _cache_need(start), outputs)
    _check_decoded(start, trained=True)


def check_capture(
    config: StudyConfig,
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    device: str,
    *,
    stored_alone: bool = False,
) -> Discovery:
    """Send one image through the model, on the device: its attention, the layers and heads chosen, and every metric.

    Where maps are `stored_alone` nothing will be measured, so metrics are not looked at.
    """
    capture = capture_settings(config, device)
    noise = _noise(preprocessing, 2 if capture.keeps_factors else 1, device)
    found = discover(model, noise, layers=capture.layers, heads=capture.heads, keeps_factors=capture.keeps_factors)
    specs = [] if stored_alone else metrics_of_one_capture(capture.metrics)
    if specs:
        measured_on = torch.device(device).type if "metrics" in capture.sinks else "cpu"  # stored maps
        backend = resolve(config.measure.backend, measured_on, dtypes=found.dtypes, specs=specs).name
        regions = len(REGION_NAMES) if config.data.kind == "digits" else 0
        check_metrics(specs, [site.layout for site in found.sites], regions, backend)
        rows = [spec for spec in specs if spec.inputs == "rows"]
        if rows and BACKENDS[backend].devices != ("cpu",):  # what a backend that compiles lacks on the device
            of_maps = "metrics" not in capture.sinks and not capture.keeps_factors

            def measure(attention: SiteAttention) -> None:
                if of_maps:
                    measure_attention(attention.maps().cpu(), attention.site.layout, rows, backend, "mask")
                else:
                    attention.measure(rows, backend)

            observe(model, _noise(preprocessing, 1, device), measure)
    return found


def _check_targets(model: torch.nn.Module, targets: str, ranks: Sequence[int], whose: str) -> None:
    """Whether adapters of these ranks fit the layers that are meant; `whose` begins the sentence."""
    for rank in ranks:
        try:
            check_adapters(model, rank=rank, targets=targets)
        except InputError as error:
            raise InputError(f"{whose}{error}") from error


def _check_splits(manifest: Manifest, found: str, *, trained: bool) -> None:
    """Whether each split has the images that it needs; each is a "file", or a "readable image" once it is decoded."""
    sizes = {split: len(manifest.split(split)) for split in SPLITS}
    for split in ("train", "validation") if trained else ():
        if not sizes[split]:
            raise InputError(
                f"{manifest.root} gives no {found} for the {split} split with split {manifest.rule}, and training "
                "needs all three; use --data.split stratified, or folders with train, val and test"
            )
    if trained and len(manifest.class_names) < 2:
        raise InputError(
            f"{manifest.root} has one class, {manifest.class_names[0]}, and a classifier is trained to tell two at "
            "least apart; add a class folder"
        )
    if sizes["test"] < 2:
        advice = "" if trained or manifest.rule == "all" else ", or use --data.split all"
        raise InputError(
            f"{manifest.root} gives {sizes['test'] or 'no'} {found} for the test split with split {manifest.rule}, and "
            f"conditions are compared over two images at least; add images{advice}"
        )


def _check_decoded(start: Start, *, trained: bool) -> None:
    """`_check_splits` of the files once they are decoded, and of what each seed draws."""
    shared = start.config.train
    draws = (start.manifest.redrawn(seed) for seed in shared.seeds) if shared.resplit else ()
    for manifest in (start.manifest, *draws):
        _check_splits(manifest, "readable image", trained=trained)


def _require_disk(needs: _Needs, outputs: Path) -> None:
    """Whether the disks have room for what will be written; what is there of an earlier run counts as written."""
    disks: dict[int, dict[str, tuple[Path, int]]] = {}
    for what, (paths, needed) in needs.items():
        nearest = next(folder for folder in (paths[0], *paths[0].absolute().parents) if folder.exists())
        there = sum(f.lstat().st_size for path in paths for f in (path, *path.rglob("*")) if f.is_file())
        disks.setdefault(os.stat(nearest).st_dev, {})[what] = (nearest, max(0, needed - there))
    for of_disk in disks.values():
        total = sum(missing for _, missing in of_disk.values())
        free = shutil.disk_usage(next(iter(of_disk.values()))[0]).free
        if total > free:
            parts = ", ".join(f"{what} {_megabytes(missing)}" for what, (_, missing) in of_disk.items())
            raise InputError(
                f"{outputs} may need {_megabytes(total)} ({parts}), and the disk has {_megabytes(free)} free; free "
                "some space, or give another folder with --outputs"
            )


def _needs(start: Start, model: torch.nn.Module, captured: Discovery | None, device: str) -> _Needs:
    """What a study writes of more than a few megabytes."""
    config, outputs = start.config, start.outputs
    trained, runs = (
        [run_name(name, seed) for name in config.conditions for seed in seeds(config, name)]
        for seeds in (trained_seeds, captured_seeds)
    )
    recipes = [RECIPES[condition.recipe] for condition in config.conditions.values()]
    needs = _cache_need(start)
    if all(recipe.train for recipe in recipes):
        # While all weights are trained: they, the best ones, two moments of each, a moving average if one is kept, and
        # the same of the state before.
        state = 2 * (5 if config.train.ema_decay else 4) if any(recipe.whole for recipe in recipes) else 0
        ends = (".safetensors", ".state.safetensors")
        files = [outputs / "checkpoints" / f"{run}{end}" for run in trained for end in ends]
        needs["checkpoints"] = ([start.pretrained_path, *files], (1 + len(trained) + state) * _bytes_of(model))
    if captured is not None:
        tested = config.data.test_scenes if start.listed is None else len(start.listed.split("test"))
        stores = [outputs / "captures" / f"{run}{end}" for run in runs for end in (".zarr", ".ledger")]
        needs["captures"] = (stores, len(runs) * _capture_bytes(config, captured, tested))
        chosen = config.capture.layers or config.capture.heads  # of sample maps all are kept
        whole = discover(model, _noise(start.preprocessing, 1, device)) if chosen else captured
        maps = sum(2 * site.heads * site.layout.num_tokens**2 for site in whole.sites)
        groups = [outputs / SAMPLES / name for name in ("images", *runs)]
        needs["sample maps"] = (groups, len(runs) * min(config.capture.samples, tested) * maps)
    return needs


def _cache_need(start: Start) -> _Needs:
    """The image cache as an entry of `_needs`; none where there is none."""
    if start.listed is None or start.cache_folder is None:
        return {}
    size = start.preprocessing
    images = sum(len(start.listed.split(split)) for split in SPLITS)
    return {"image cache": ([start.cache_folder], images * size.channels * size.height_px * size.width_px)}


def _bytes_of(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _capture_bytes(config: StudyConfig, captured: Discovery, images: int) -> int:
    """Most bytes that the store of one capture takes."""
    capture = capture_settings(config, "cpu")
    ids, regions = map(str, range(images)), REGION_NAMES if config.data.kind == "digits" else ()
    specs = metrics_of_one_capture(capture.metrics)
    schema = capture.schema(captured, specs, "", ids, regions, model={}, preprocessing={}, dataset={})
    return estimate_bytes(schema)


def _check_methods(methods: Sequence[str], model: torch.nn.Module, preprocessing: Preprocessing, device: str) -> None:
    """Run every relevance method on one image; a model without a head has no class to explain, which is no mistake."""
    for method in methods if has_classes(model) else ():
        try:
            # In float32 all of them: whether a map can be made does not depend on the type, how long it takes does.
            relevance_maps(model, _noise(preprocessing, 1, device), [0], method, dtype=torch.float32)
        except CaptureError as error:
            raise InputError(f"leave {method} out of relevance.methods, as this model has none: {error}") from error


def _noise(preprocessing: Preprocessing, images: int, device: str) -> torch.Tensor:
    """Images as the model takes them, of noise: neither layouts nor operations depend on what they show."""
    shape = (images, preprocessing.channels, preprocessing.height_px, preprocessing.width_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch on one CPU inside: of one image there is nothing to share out, and threads that wait burn time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
