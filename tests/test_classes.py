"""A class is a name: heads of other sizes, orders and classes, and none at all, through every use of a label."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageDataset, create_transform, resolve_model_data_config

from engine.config import StudyConfig, load_study
from engine.run import main
from engine.study.controls import hybrid_state
from engine.study.stages import run_study
from engine.study.sweep import _head_is_of
from store import AttentionStore
from tests.synthetic_study import texts
from train.checkpoint import read_metadata, save_checkpoint
from train.data.classes import folder_classes

NATURAL = tuple(str(number) for number in range(1, 13))
STRINGS = tuple(sorted(NATURAL))
SIZE = 64


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    waves = np.sin(np.mgrid[:SIZE, :SIZE][0] * rng.random() + np.mgrid[:SIZE, :SIZE][1] * rng.random())
    return np.uint8(127 + 120 * waves[..., None] * rng.random(3))


def model(classes: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = timm.create_model("test_vit", num_classes=classes, img_size=SIZE).eval()
    for weights in made.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.08)
    return made


def scores(model: Any, pictures: list[np.ndarray]) -> torch.Tensor:
    transform = create_transform(**resolve_model_data_config(model) | {"input_size": (3, SIZE, SIZE)})
    with torch.no_grad():
        return model(torch.stack([transform(Image.fromarray(pixels)) for pixels in pictures]))


def with_outputs(model: Any, outputs: list[int]) -> dict[str, torch.Tensor]:
    """The model's weights with these outputs of its head, in this order."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {name: state[name][outputs].clone() for name in ("head.weight", "head.bias")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 1 to 12 of pictures that `whole.safetensors` names without an error, its outputs in natural order."""
    root = tmp_path_factory.mktemp("classes")
    made, pictures = model(12), [picture(seed) for seed in range(60)]
    with torch.no_grad():
        raw = scores(made, pictures)
        spread = raw.std(dim=0)
        made.head.weight /= spread[:, None]
        made.head.bias.copy_((made.head.bias - raw.mean(dim=0)) / spread)
    predicted = scores(made, pictures)
    clear = predicted.topk(2).values.diff().abs()[:, 0] > 0.02  # no rounding of another CPU turns it
    kept: dict[int, int] = {}
    for number, best in enumerate(predicted.argmax(dim=1).tolist()):
        if clear[number] and kept.get(best, 0) < 3:
            kept[best] = kept.get(best, 0) + 1
            (root / "photos" / NATURAL[best]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[number]).save(root / "photos" / NATURAL[best] / f"{number}.png")
    assert sorted(kept) == list(range(12))
    save_file(made.state_dict(), root / "whole.safetensors")
    save_file(model(12, seed=1).state_dict(), root / "other.safetensors")
    order = np.random.default_rng(0).permutation(12).tolist()
    names = [NATURAL[output] for output in order]
    save_checkpoint(root / "permuted.safetensors", with_outputs(made, order), {"class_names": names})
    save_file(with_outputs(made, [9, 2, 0]), root / "three.safetensors")
    (root / "three.json").write_text('{"1": 2, "10": 0, "3": 1}')
    headless = {name: tensor for name, tensor in made.state_dict().items() if not name.startswith("head.")}
    save_file(headless, root / "headless.safetensors")
    return root


def study(folder: Path, outputs: Path, conditions: dict[str, tuple[str, str]], order: str = "auto") -> StudyConfig:
    """Checkpoints of `folder` compared up to the relevance maps; conditions: name -> (checkpoint, class names)."""
    given = {
        name: {"recipe": "checkpoint", "checkpoint": str(folder / file), "classes": classes and str(folder / classes)}
        for name, (file, classes) in conditions.items()
    }
    keys = {
        "outputs": str(outputs),
        "conditions": given,
        "device": "cpu",
        "model.name": "test_vit",
        "model.img_size": SIZE,
        "data.kind": "folder",
        "data.root": str(folder / "photos"),
        "data.split": "all",
        "data.class_order": order,
        "measure.metrics": ["entropy"],
        "measure.backend": "torch",
        "statistics.permutations": 19,
        "capture.samples": 6,
        "relevance.methods": ["gradcam"],
        "relevance.images": 6,
        "relevance.measured": 12,
        "relevance.steps": 1,
    }
    return load_study(None, keys)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def document(outputs: Path, name: str) -> Any:
    return json.loads((outputs / "metrics" / name).read_text())


@pytest.fixture(scope="module")
def named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads whose classes the folders' order, a sidecar and a file say, and a model without one."""
    outputs = tmp_path_factory.mktemp("named")
    conditions = {
        "baseline": ("whole.safetensors", ""),
        "permuted": ("permuted.safetensors", ""),
        "three": ("three.safetensors", "three.json"),
        "headless": ("headless.safetensors", ""),
    }
    run_study(study(folder, outputs, conditions, "natural"), last="relevance")
    return outputs


@pytest.fixture(scope="module")
def unnamed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A headless baseline, and heads of which nothing says in which order their folders were."""
    outputs = tmp_path_factory.mktemp("unnamed")
    conditions = {
        "baseline": ("headless.safetensors", ""),
        "one": ("whole.safetensors", ""),
        "other": ("other.safetensors", ""),
    }
    run_study(study(folder, outputs, conditions), last="relevance")
    return outputs


def test_accuracy_goes_by_name(folder: Path, named: Path) -> None:
    found = document(named, "attention_comparison.json")
    accuracy = {condition: runs["42"] for condition, runs in found["accuracy"].items()}
    of_three = sum(len(list((folder / "photos" / name).iterdir())) for name in ("1", "3", "10"))
    images = sum(len(list((folder / "photos" / name).iterdir())) for name in NATURAL)
    whole = {"validation": None, "test": 1.0, "chance": pytest.approx(1 / 12), "images": images}
    assert accuracy == {
        "baseline": whole,
        "permuted": whole,
        "three": {"validation": None, "test": 1.0, "chance": pytest.approx(1 / 3), "images": of_three},
    }
    said = {condition: head["note"] for condition, head in found["classifiers"].items()}
    assert said["baseline"] == (
        "The classes of baseline's head are assumed to be the class folders in natural order, as data.class_order says."
    )
    assert said["permuted"] == "The classes of permuted's head are named by its sidecar permuted.json."
    assert said["three"].startswith(
        f"The classes of three's head are named by three.json. {images - of_three} of {images} images are of a class"
    )
    assert said["headless"].startswith("headless has no head: what it puts out are features and no classes.")
    assert found["classifiers"]["three"]["classes"] == ["10", "3", "1"]
    assert found["classifiers"]["headless"]["classes"] is None


def test_maps_are_of_the_same_class_by_name_in_every_head(named: Path) -> None:
    found = document(named, "relevance.json")
    assert found["target"] == "true"
    rows = {(row["condition"], row["method"], row["image"]): row for row in rows_of(named / "metrics/relevance.csv")}
    assert {condition for condition, _, _ in rows} == {"baseline", "permuted", "three"}
    for (condition, method, image), row in rows.items():
        assert row["target"] == image.split("/")[0], "the folder's name, whatever its index in this head"
        assert row["other"] == rows["baseline", method, image]["other"] != row["target"]
        if condition == "permuted":  # the same model with its outputs in another order
            for measure in ("faithfulness", "total_variation", "class_rank_correlation"):
                expected = float(rows["baseline", method, image][measure] or "nan")
                np.testing.assert_allclose(float(row[measure] or "nan"), expected, rtol=1e-3, atol=1e-5)
    assert {test["condition"] for test in found["conditions"]} == {"permuted", "three"}
    assert [entry["condition"] for entry in found["refused"]] == ["headless"]
    links = {(entry["condition"], entry["outcome"]): entry for entry in found["link"]}
    assert set(links) == {(name, outcome) for name in ("permuted", "three") for outcome in ("logit", "correct")}
    for entry in links.values():
        assert {test["rho"] for test in entry["tests"]} == {None}, (
            "the same attention and logits: nothing goes together"
        )
    for row in rows_of(named / "visualizations/gradcam_samples/gradcam_samples.csv"):
        if row["role"] == "true":
            assert row["target"] == row["image"].split("/")[0]


def test_without_identity_nothing_is_computed_by_index(unnamed: Path) -> None:
    found = document(unnamed, "attention_comparison.json")
    assert found["accuracy"] == {}
    for condition in ("one", "other"):
        note = found["classifiers"][condition]["note"]
        assert "class 2 is '10' in the order of strings and '2' in timm's natural order" in note
        assert f"or --data.class_order natural, or name the classes with --conditions.{condition}.classes FILE" in note
        assert "Left out for it: accuracy" in note
    relevance = document(unnamed, "relevance.json")
    assert relevance["target"] == "own"
    assert not relevance["link"]
    assert not relevance["conditions"]
    assert not any("class" in entry["measure"] or "other" in entry["measure"] for entry in relevance["means"])
    assert "the classes of the head of one and other are not known" in relevance["left_out"][0]
    for row in rows_of(unnamed / "visualizations/gradcam_samples/gradcam_samples.csv"):
        assert row["role"] == "predicted"
        assert row["target"].startswith("number ")


def test_report_and_summary_say_what_is_left_out(named: Path, unnamed: Path) -> None:
    summary, page = texts(named)
    for place in (summary, str(page).replace("&#39;", "'")):
        assert "permuted's head are named by its sidecar permuted.json" in place
        assert "headless has no head" in place
        assert "are of a class that it does not have, and are left out of its accuracy" in place
        assert "Accuracy on these images" in place
        assert "Whether given checkpoints were trained on some of these images is not known" in place
    assert "baseline 100.0 %, chance 8.3 %" in summary
    assert "three 100.0 %, chance 33.3 %" in summary
    assert "permuted against baseline: the change of being right cannot be tested:" in summary
    shown = json.loads(page.split('id="payload">')[1].split("</script>")[0])["viewer"]
    predicted = [run["predictions"] for run in shown["runs"]]
    assert predicted[0] == predicted[1], "the same model, by name"
    assert predicted[3] is None, "features are no prediction"
    summary, page = texts(unnamed)
    for place in (summary, str(page).replace("&#39;", "'")):
        assert "The classes of one's head are not known" in place
        assert "gradcam of baseline: it has no head" in place
        assert "Test accuracy" not in place
        assert "Accuracy on these images" not in place
        assert "depend on the class" not in place
    shown = json.loads(page.split('id="payload">')[1].split("</script>")[0])["viewer"]
    assert not any(run["predictions"] for run in shown["runs"])


def test_features_are_no_logits(named: Path) -> None:
    store = AttentionStore.open(named / "captures" / "headless_seed42.zarr")
    assert store.schema.num_classes == 0
    assert not (named / "samples.zarr" / "headless_seed42" / "logits").exists()
    assert AttentionStore.open(named / "captures" / "three_seed42.zarr").schema.num_classes == 3


def test_controls_need_no_head(named: Path, unnamed: Path) -> None:
    held = {control["name"]: control["held"] for control in document(named, "controls.json")}
    assert {"hybrid_three", "hybrid_headless", "itself_headless", "untouched_headless"} <= set(held)
    assert all(held.values())
    held = {control["name"]: control["held"] for control in document(unnamed, "controls.json")}
    assert held["hybrid_other"]
    assert held["hybrid_one"]
    small, large = model(3).state_dict(), model(12, seed=1).state_dict()
    mixed = hybrid_state(small, large, 1)
    assert mixed["head.weight"].shape[0] == 3
    assert torch.equal(mixed["blocks.1.attn.qkv.weight"], large["blocks.1.attn.qkv.weight"])
    assert torch.equal(mixed["blocks.0.attn.qkv.weight"], small["blocks.0.attn.qkv.weight"])


def test_folders_in_natural_order_are_timms(folder: Path) -> None:
    assert ImageDataset(folder / "photos").reader.class_to_idx == {name: i for i, name in enumerate(NATURAL)}
    assert folder_classes(12, STRINGS, "natural", "model.classes").names == NATURAL
    assert folder_classes(12, STRINGS, "string", "model.classes").names == STRINGS
    assert not folder_classes(12, STRINGS, "auto", "model.classes").known
    assert folder_classes(2, ("bar", "kitchen"), "auto", "model.classes").names == ("bar", "kitchen")
    assert not folder_classes(2, ("Kitchen", "bar"), "auto", "model.classes").known, "timm's order has no upper case"
    for names in (("1", "1²"), ("01", "1"), ("Bar", "bar")):  # timm's reader has no order for these
        assert folder_classes(2, names, "string", "model.classes").names == names
        for order in ("auto", "natural"):
            assert "natural order of the class folders is not defined" in folder_classes(2, names, order, "k").source
    unknown = folder_classes(1000, STRINGS, "natural", "model.classes")
    assert unknown.source == (
        "it has 1,000 outputs, the data set 12 classes, and nothing names them (--model.classes FILE does)"
    )


def test_wrong_names_are_refused_before_anything_runs(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    given = ["compare", "--baseline", str(folder / "whole.safetensors")]
    given += ["--model.name", "test_vit", "--data.root", str(folder / "photos"), "--outputs", str(tmp_path / "o")]
    finetuned, lost = ["--finetuned", given[2]], ["--finetuned", str(folder / "nowhere.pth")]
    assert main([*given, *finetuned, "--baseline-classes", str(tmp_path / "twice.txt")]) == 2
    assert "names the class 'cat' 2 times" in capsys.readouterr().err
    assert main([*given, *lost]) == 2
    assert "nowhere.pth, which does not exist" in capsys.readouterr().err, "a call leaves nothing to the next one"
    trained = ["--data.kind", "folder", "--data.root", str(folder / "photos"), "--outputs", str(tmp_path / "o")]
    assert main([*trained, "--model.classes", str(folder / "three.json")]) == 2
    assert "condition baseline is trained here, on the class folders" in capsys.readouterr().err
    store = ["--store", str(tmp_path / "s.zarr"), "--model.weights", str(folder / "whole.safetensors")]
    common = ["--model.name", "test_vit", "--data.root", str(folder / "photos"), "--model.img_size", str(SIZE)]
    assert main(["capture", *common, *store, "--classes", str(folder / "three.json")]) == 2
    assert "holds 3 class names, and the model has a head of 12 outputs" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()


def test_a_capture_keeps_the_names_of_its_logits(folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = [
        "capture",
        "--model.name",
        "test_vit",
        "--model.img_size",
        str(SIZE),
        "--data.root",
        str(folder / "photos"),
    ]
    given += ["--capture.sinks", "metrics", "--measure.metrics", "entropy", "--measure.backend", "torch"]
    for file, names in (("permuted", None), ("whole", NATURAL), ("headless", ())):
        store, weights = tmp_path / f"{file}.zarr", folder / f"{file}.safetensors"
        more = ["--store", str(store), "--model.weights", str(weights), "--data.class_order", "natural"]
        assert main([*given, *more]) == 0
        expected = read_metadata(weights)["class_names"] if names is None else list(names)
        schema = AttentionStore.open(store).schema
        assert schema.model.get("classes", []) == expected
        assert schema.num_classes == len(expected)
    assert "the model has no head" in capsys.readouterr().out


def test_a_sweep_begins_with_the_weights_head_only_where_it_is_of_the_data(folder: Path, capsys: Any) -> None:
    def kept(file: str, order: str) -> bool:
        keys = {"model.name": "test_vit", "model.weights": str(folder / file), "data.class_order": order}
        return _head_is_of(STRINGS, load_study(None, keys | {"data.kind": "folder"}))

    assert kept("whole.safetensors", "string")
    assert not kept("whole.safetensors", "natural"), "the data set's labels are in another order"
    assert not kept("permuted.safetensors", "string"), "its sidecar decides"
    assert not kept("three.safetensors", "string")
    assert not kept("headless.safetensors", "string")
    assert not kept("whole.safetensors", "auto")
    assert "class 2 is '10' in the order of strings" in capsys.readouterr().out
