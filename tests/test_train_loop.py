"""Conditions: what may change and what may not, the same bits every time, and resuming to the same bits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

import train.loop
import train.state
from tests.training_runs import training_run
from train.augment import Augmentation
from train.checkpoint import read_checkpoint, read_metadata, save_checkpoint, state_digest
from train.data.digits import DigitScenes, prepare_digits
from train.data.images import DataSplits, ImageSet
from train.errors import InputError, TrainingDivergedError
from train.evaluation import Evaluation, evaluate
from train.loop import epoch_order, learning_rate
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint, preprocessing_of
from train.precision import training_mode
from train.pretrain import pretrain_digits
from train.probe import fit_probe
from train.settings import PretrainConfig
from train.training import TrainResult, train_condition

CPU = torch.device("cpu")
HYPER: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "label_smoothing": 0.05, "precision": "fp32"}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    preprocessing = preprocessing_of(build_model("digits_vit", num_classes=10))
    return prepare_digits(preprocessing=preprocessing, train_scenes=40, validation_scenes=16, test_scenes=16)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "pretrained.safetensors"
    result = pretrain_digits(
        PretrainConfig(scenes=64, epochs=1), checkpoint=path, validation_scenes=16, test_scenes=16, precision="fp32"
    )
    assert not result.reused
    again = pretrain_digits(
        PretrainConfig(scenes=64, epochs=1), checkpoint=path, validation_scenes=16, test_scenes=16, precision="fp32"
    )
    assert again.reused
    assert again.sha256 == result.sha256
    return path


@pytest.fixture(scope="module")
def probe(data: DataSplits, backbone: Path) -> TrainResult:
    return train_condition(
        training_run("probe", **HYPER),
        model=ModelSource("digits_vit", weights=backbone),
        data=data,
        checkpoint=backbone.with_name("probe.safetensors"),
    )


@pytest.fixture
def run(data: DataSplits, backbone: Path, probe: TrainResult, tmp_path: Path) -> Callable[..., TrainResult]:
    def run(name: str = "a", recipe: str = "full", seed: int = 1, **values: Any) -> TrainResult:
        given = {
            "model": ModelSource("digits_vit", weights=backbone),
            "data": data,
            "checkpoint": tmp_path / f"{name}.safetensors",
            "probe_checkpoint": probe.checkpoint,
        }
        given |= {key: values.pop(key) for key in given.keys() & values.keys()}
        return train_condition(training_run(recipe, seed, **(HYPER | values)), **given)

    return run


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return read_checkpoint(result.checkpoint).tensors


def test_the_probe_changes_no_bit_of_the_backbone(run: Callable[..., TrainResult], backbone: Path) -> None:
    before, result = read_checkpoint(backbone).tensors, run(recipe="probe")
    after = weights(result)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert result.seed_invariant
    assert result.trainable_parameters == 650
    assert run("b", recipe="probe", seed=7).sha256 == result.sha256, "no seed can change a probe"
    assert result.validation_accuracy == max(entry["validation_accuracy"] for entry in result.history)


def test_the_folded_probe_is_the_regression_on_standardised_features(data: DataSplits) -> None:
    """Against scikit-learn's logistic regression, at the weakest penalty that both can be given."""
    from sklearn.linear_model import LogisticRegression

    from train.probe import PENALTIES, cached_features

    torch.manual_seed(0)
    model = build_model("digits_vit", num_classes=10).eval()
    history = fit_probe(model, data.train, data.validation, label_smoothing=0.0, device=CPU)
    chosen = max(history, key=lambda entry: entry["validation_accuracy"])["penalty"]
    assert chosen in PENALTIES
    features = cached_features(model, data.train, CPU).numpy()
    scaled = (features - features.mean(0)) / features.std(0)
    reference = LogisticRegression(C=1 / (chosen * len(scaled)), max_iter=2000, tol=1e-8).fit(scaled, data.train.labels)
    with torch.no_grad():
        found = model(data.train.batch(range(len(data.train)))).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(scaled), atol=0.02)


def test_full_fine_tuning_starts_from_the_probes_head(run: Callable[..., TrainResult], probe: TrainResult) -> None:
    still = {"lr": 0.0, "epochs": 1}
    computed, taken = run("a", probe_checkpoint=None, **still), run("b", **still)
    for result in (computed, taken):
        assert state_digest(weights(result)) == state_digest(weights(probe))
    trained = run("c")
    moved = weights(trained)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in weights(probe).items() if "attn" in name)
    with pytest.raises(InputError, match="is not a probe of the same backbone"):
        run("d", probe_checkpoint=trained.checkpoint)
    foreign = probe.checkpoint.with_name("foreign.safetensors")
    saved = read_checkpoint(probe.checkpoint)
    facts = {
        name: value for name, value in saved.metadata.items() if name not in ("schema", "file", "sha256", "checksum")
    }
    save_checkpoint(foreign, saved.tensors, facts | {"dataset": {"kind": "digits", "sha256": "another"}})
    with pytest.raises(InputError, match="is a probe of other images, splits or classes than the run's"):
        run("e", probe_checkpoint=foreign)


@pytest.mark.parametrize("recipe", ["full", "lora", "dora"])
def test_the_same_inputs_give_the_same_bits(run: Callable[..., TrainResult], recipe: str) -> None:
    one, two, other = run("a", recipe=recipe), run("b", recipe=recipe), run("c", recipe=recipe, seed=2)
    assert one.sha256 == two.sha256 != other.sha256
    assert one.history == two.history
    assert len(one.history) == 2
    assert (one.merge_difference is None) == (recipe == "full")
    assert read_metadata(one.checkpoint) == read_metadata(two.checkpoint) | {"file": "a.safetensors"}
    again = run("a", recipe=recipe)
    assert again.reused
    assert replace(again, reused=False) == one


def test_adapters_change_their_targets_and_the_head_alone(run: Callable[..., TrainResult], backbone: Path) -> None:
    before, after = read_checkpoint(backbone).tensors, weights(run(recipe="dora"))
    assert set(before) == set(after), "a plain timm model again"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {f"blocks.{k}.attn.{layer}.weight" for k in range(4) for layer in ("qkv", "proj")}
    assert changed == {*blocks, "head.weight", "head.bias"}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("recipe", ["full", "dora"])
@pytest.mark.parametrize("stop", [1, 5, 7])  # 5 steps an epoch
def test_an_interrupted_run_ends_with_the_same_bytes(
    run: Callable[..., TrainResult], data: DataSplits, monkeypatch: pytest.MonkeyPatch, recipe: str, stop: int
) -> None:
    drop = {"rotation_degrees": 5.0, "batch_size": 9}
    whole = run("whole", recipe=recipe, **drop)
    monkeypatch.setattr(train.state, "SAVE_SECONDS", 0.0)  # save at every step
    monkeypatch.setattr(train.state, "SAVE_SHARE", 1e9)
    steps = 0
    real = train.loop.learning_rate

    def interrupt(step: int, total: int, *rest: float) -> float:
        nonlocal steps
        if steps == stop:
            raise KeyboardInterrupt
        steps += 1
        return real(step, total, *rest)

    monkeypatch.setattr(train.loop, "learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("cut", recipe=recipe, **drop)
    state = whole.checkpoint.with_name("cut.state.safetensors")
    assert state.is_file()
    assert not whole.checkpoint.with_name("cut.safetensors").exists()
    begun: list[int] = []

    def record(step: int, total: int, *rest: float) -> float:
        begun.append(step)
        return real(step, total, *rest)

    bars: list[Any] = []

    def bar(**options: Any) -> Any:
        bars.append(tqdm(**options | {"disable": False, "file": io.StringIO()}))
        assert bars[-1].n == stop // 5 * len(data.train) + stop % 5 * 9
        return bars[-1]

    monkeypatch.setattr(train.loop, "learning_rate", record)
    monkeypatch.setattr(train.loop, "tqdm", bar)
    resumed = run("cut", recipe=recipe, **drop)
    assert begun[0] == stop, "it went on, rather than beginning again"
    assert bars[0].n == bars[0].total == HYPER["epochs"] * len(data.train)
    assert resumed.sha256 == whole.sha256
    assert resumed.history == whole.history
    assert not state.exists()


def test_a_state_of_other_settings_or_a_damaged_one_is_left_aside(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run("whole")
    real = train.state.StateFile.save

    def stop_after_saving(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        raise KeyboardInterrupt

    state = whole.checkpoint.with_name("cut.state.safetensors")
    for damage in (False, True):
        monkeypatch.setattr(train.state.StateFile, "save", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            run("cut", **({} if damage else {"seed": 5}))
        if damage:
            content = bytearray(state.read_bytes())
            content[-100] ^= 1
            state.write_bytes(content)
        monkeypatch.setattr(train.state.StateFile, "save", real)
        assert run("cut").sha256 == whole.sha256
        whole.checkpoint.with_name("cut.safetensors").unlink()
    assert "is damaged (its digest differs); training begins again" in caplog.text


def test_a_damaged_result_is_trained_again(run: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture) -> None:
    first = run()
    content = bytearray(first.checkpoint.read_bytes())
    content[-1] ^= 1
    first.checkpoint.write_bytes(content)
    second = run()
    assert not second.reused
    assert second.sha256 == first.sha256
    assert "a.safetensors is damaged" in caplog.text


def test_the_best_epoch_is_kept(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    short = run("short", epochs=1)
    real = train.loop.learning_rate
    # The first epoch of a longer run at the shorter run's rates.
    monkeypatch.setattr(train.loop, "learning_rate", lambda step, total, *rest: real(min(step, 4), 5, *rest))
    worse = iter(Evaluation(accuracy, 1.0) for accuracy in (0.9, 0.2, 0.2, 0.0, 0.0))
    monkeypatch.setattr("train.training.evaluate", lambda *arguments, **options: next(worse))
    long = run("long", epochs=3)
    assert [entry["validation_accuracy"] for entry in long.history] == [0.9, 0.2, 0.2]
    assert state_digest(weights(long)) == state_digest(weights(short))


def test_the_data_order_is_of_seed_and_epoch_alone() -> None:
    order = epoch_order(3, 1, 50)
    assert sorted(order.tolist()) == list(range(50))
    torch.manual_seed(9)
    np.random.default_rng(9).random()
    np.testing.assert_array_equal(order, epoch_order(3, 1, 50))
    assert (order != epoch_order(3, 2, 50)).any()
    assert (order != epoch_order(4, 1, 50)).any()


def test_all_conditions_of_a_seed_see_the_same_images_in_the_same_order(
    data: DataSplits, run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    real = DigitScenes.pixels
    for recipe in ("full", "lora", "dora"):
        batches: list[list[int]] = []

        def record(self: DigitScenes, indices: Sequence[int], batches: list[list[int]] = batches) -> torch.Tensor:
            if self.split == "train" and len(indices) == 8:
                batches.append(list(map(int, indices)))
            return real(self, indices)

        monkeypatch.setattr(DigitScenes, "pixels", record)
        run(recipe, recipe=recipe)
        seen[recipe] = batches
    assert seen["full"] == seen["lora"] == seen["dora"]
    epochs = np.concatenate(seen["full"]).reshape(2, 40)
    np.testing.assert_array_equal(epochs, [epoch_order(1, 0, 40), epoch_order(1, 1, 40)])


def test_schedule_warms_up_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 1 + np.cos(np.pi * np.arange(90) / 90))


def test_timms_layer_decay_sets_the_rates(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.optim import param_groups_layer_decay

    groups: list[dict[str, Any]] = []
    real = torch.optim.AdamW

    def record(given: list[dict[str, Any]], **options: Any) -> torch.optim.AdamW:
        groups.extend({key: value for key, value in group.items() if key != "params"} for group in given)
        optimizer = real(given, **options)
        rates.append(optimizer)
        return optimizer

    rates: list[torch.optim.AdamW] = []
    monkeypatch.setattr(torch.optim, "AdamW", record)
    run(layer_decay=0.5)
    model = build_model("digits_vit", num_classes=10)
    expected = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scales = [group["lr_scale"] for group in expected]
    assert [group["lr_scale"] for group in groups] == scales
    assert scales[0] == pytest.approx(0.5**5)
    last = [group["lr"] for group in rates[0].param_groups]
    np.testing.assert_allclose(np.array(last) / last[-1], scales)


def test_a_loss_looked_at_a_step_later_is_the_same(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the next step is launched before the loss of this one is there."""
    diverging = {"lr": 1e30, "clip_norm": 0.0}
    results, errors = [], []
    for later in (0, 1):
        monkeypatch.setitem(train.loop.LOOK_LATER, "cpu", later)
        results.append(run(f"a{later}"))
        with pytest.raises(TrainingDivergedError) as raised:
            run(f"b{later}", **diverging)
        errors.append(str(raised.value))
    assert results[0].sha256 == results[1].sha256
    assert results[0].history == results[1].history
    assert errors[0] == errors[1]


def test_nan_stops_at_its_step_and_names_images(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"loss nan .* at step \d+ \(epoch \d, images target/train/"):
        run(lr=1e30, clip_norm=0.0, warmup_fraction=0.0)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_mode_puts_everything_back(precision: str) -> None:
    model = build_model("digits_vit", num_classes=10)
    state = torch.get_rng_state()

    def interrupted() -> None:
        with training_mode(model, CPU, precision=precision, deterministic=True):
            assert all(block.attn.fused_attn == (precision == "fp32") for block in model.blocks)
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.allow_tf32
            torch.rand(3)
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_is_of_seed_epoch_and_image() -> None:
    images = torch.rand(6, 3, 20, 20)
    augment = Augmentation(flip=True, rotation_degrees=10, color_jitter=0.2)
    whole = augment.apply(images, seed=1, epoch=2, indices=range(6))
    torch.testing.assert_close(augment.apply(images[3:5], seed=1, epoch=2, indices=[3, 4]), whole[3:5])
    assert not torch.allclose(augment.apply(images, seed=1, epoch=3, indices=range(6)), whole)
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert Augmentation().apply(images, seed=1, epoch=2, indices=range(6)) is images
    flipped = Augmentation(flip=True).apply(images, seed=1, epoch=2, indices=range(6))
    kinds = [
        "same" if torch.allclose(a, b, atol=1e-5) else "mirror" if torch.allclose(a, b.flip(-1), atol=1e-5) else "?"
        for a, b in zip(flipped, images, strict=True)
    ]
    assert set(kinds) == {"same", "mirror"}


def test_splits_without_images_and_unknown_recipes(data: DataSplits, run: Callable[..., TrainResult]) -> None:
    class Nothing(ImageSet):
        ids = ()

        def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
            raise AssertionError

    with pytest.raises(InputError, match="the train split has no images"):
        run(data=replace(data, train=Nothing()))
    with pytest.raises(InputError, match="unknown recipe 'finetune'"):
        run(recipe="finetune")
    with pytest.raises(InputError, match="epochs 0"):
        run(epochs=0)


def test_the_sidecar_says_what_the_weights_are(run: Callable[..., TrainResult]) -> None:
    result = run()
    document = json.loads(result.checkpoint.with_suffix(".json").read_text())
    assert document["model"] == "digits_vit"
    assert document["recipe"] == "full"
    assert document["test_accuracy"] == result.test_accuracy
    assert document["preprocessing"]["mean"] == [0.25]
    model = load_checkpoint("digits_vit", result.checkpoint)
    assert (
        evaluate(
            model,
            prepare_digits(
                preprocessing=preprocessing_of(model), train_scenes=1, validation_scenes=16, test_scenes=1
            ).validation,
            CPU,
        ).accuracy
        == result.validation_accuracy
    )


def test_a_folder_of_photographs_trains(tmp_path: Path) -> None:
    from PIL import Image

    from train.data.datasets import build_manifest, prepare_folder

    rng = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light", "middle")):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for index in range(7):
            shade = rng.integers(0, 60, (40, 50, 3)) + (0, 180, 90)[k]
            Image.fromarray(shade.astype(np.uint8)).save(tmp_path / "photographs" / name / f"{index}.jpg")
    (tmp_path / "photographs" / "dark" / "broken.jpg").write_bytes(b"")
    preprocessing = preprocessing_of(build_model(ModelSource("test_vit", img_size=64), num_classes=1))
    data = prepare_folder(build_manifest(tmp_path / "photographs"), preprocessing=preprocessing)
    assert data.manifest.dropped == {"empty file": 1}
    values = HYPER | {"flip": True, "rotation_degrees": 10.0, "color_jitter": 0.2, "batch_size": 4}
    results = [
        train_condition(
            training_run(recipe, **values),
            model=ModelSource("test_vit", img_size=64),
            data=data,
            checkpoint=tmp_path / f"{recipe}{again}.safetensors",
        )
        for recipe in ("probe", "lora", "full")
        for again in ("", "_again")
    ]
    assert [a.sha256 == b.sha256 for a, b in zip(results[::2], results[1::2], strict=True)] == [True] * 3
    assert results[0].test_accuracy == 1.0, "a linear probe separates three shades"
