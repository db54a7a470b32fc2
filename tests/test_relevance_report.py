"""The relevance document and what the report says of it, from numbers whose answers are known."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.capture import CaptureError
from engine.config import RelevanceConfig
from engine.relevance import CONTROL, METHODS, explain_study, parse_relevance
from engine.relevance.choice import ClassChoice, Targets
from engine.relevance.evaluation import Evaluation, evaluate_maps
from engine.relevance.explained import Explained, write_samples
from engine.relevance.faithfulness import Curves, perturbation_curves, random_maps
from engine.relevance.inference import relevance_results, write_relevance
from engine.relevance.results import HeadAssociation, PredictionLink, RelevanceResults
from engine.report.inputs import load_json
from engine.report.sections.relevance import load_relevance, relevance_sentences
from engine.statistics import Settings
from tests.relevance_cases import family
from tests.synthetic_study import report_on, results_of, small
from train.data.classes import HeadClasses
from train.data.images import ImageSet, Preprocessing
from train.errors import InputError

CONFIG = RelevanceConfig(steps=3)
SETTINGS = Settings(permutations=499)
IMAGES = 30


def evaluation(rng: np.random.Generator, good: float, alike: float) -> Evaluation:
    fractions = np.linspace(0, 1, 5)
    start = 0.8 + 0.05 * rng.standard_normal((IMAGES, 1))
    deletion = start * (1 - fractions) ** (1 + 6 * good)
    insertion = start * (1 - (1 - fractions) ** (1 + 6 * good))
    curves = Curves(fractions, deletion, insertion)
    values = curves.measures()
    values["class_rank_correlation"] = alike + 0.02 * rng.standard_normal(IMAGES)
    values["image_rank_correlation"] = alike / 3 + 0.01 * rng.standard_normal(IMAGES)
    values["total_variation"] = 1 + 0.1 * rng.standard_normal(IMAGES)
    values["total_variation_other"] = values["total_variation"] + 0.5
    return Evaluation(values, curves)


HEAD = HeadClasses(5, tuple("abcde"))


def documents() -> tuple[dict[str, dict[str, Evaluation]], dict[str, Targets], RelevanceResults]:
    rng = np.random.default_rng(0)
    good = {"rollout": 0.4, "generic": 0.9, CONTROL: 0.0}
    evaluations = {
        condition: {method: evaluation(rng, value, alike) for method, value in good.items()}
        for condition, alike in (("baseline", 0.3), ("finetuned", 0.6))
    }
    targets = Targets(HEAD, "true", np.zeros(IMAGES, dtype=np.int64), np.ones(IMAGES, dtype=np.int64))
    choice = ClassChoice("true", tuple(range(IMAGES)), HEAD.names)
    refused = {"baseline": {}, "finetuned": {"lrp": "adapters <b>not</b> merged"}}
    document = relevance_results(evaluations, refused, choice, CONFIG, SETTINGS, images=IMAGES)
    return evaluations, dict.fromkeys(evaluations, targets), document


def test_the_document_says_what_the_numbers_say() -> None:
    evaluations, _, document = documents()
    ranking = [
        entry
        for entry in document.methods
        if (entry.method, entry.than, entry.measure) == ("generic", "rollout", "faithfulness")
    ]
    assert [entry.condition for entry in ranking] == ["baseline", "finetuned"]
    for entry in ranking:
        values = evaluations[entry.condition]
        expected = values["generic"].values["faithfulness"] - values["rollout"].values["faithfulness"]
        assert entry.difference == pytest.approx(expected.mean())
        assert entry.p_max_t == 3 * 2 / 500  # three measures are three families
    (alike,) = (e for e in document.conditions if e.method == "generic" and "rank_correlation" in e.measure)
    assert alike.measure == "class_rank_correlation_excess"
    assert alike.difference == pytest.approx(0.2, abs=0.03)
    families = {entry.measure for entry in document.conditions}
    assert alike.p_max_t == len(families) * 2 / 500
    assert {entry.measure for entry in document.classes} == {"total_variation"}


def surely(good: float, sure: float) -> Evaluation:
    """Orders about as good as those of `evaluation`, of a model that is `sure` times as sure of each image."""
    fractions = np.linspace(0, 1, 5)
    rng = np.random.default_rng(int(100 * good))
    rise, good_here = sure * rng.uniform(0.2, 1.0, (IMAGES, 1)), good * rng.uniform(0.7, 1.3, (IMAGES, 1))
    deletion = 0.1 + rise * (1 - fractions) ** (1 + 6 * good_here)
    insertion = 0.1 + rise * (1 - (1 - fractions) ** (1 + 6 * good_here))
    curves = Curves(fractions, deletion, insertion)
    return Evaluation(curves.measures(), curves)


def test_conditions_are_compared_by_shares_of_the_rise(tmp_path: Path) -> None:
    evaluations = {
        "baseline": {"generic": surely(0.9, 0.2), "lrp": surely(0.9, 0.2), CONTROL: surely(0.0, 0.2)},
        "finetuned": {"generic": surely(0.9, 0.9), "lrp": surely(0.5, 0.9), CONTROL: surely(0.0, 0.9)},
        "chance": {"generic": surely(0.9, 0.0), CONTROL: surely(0.0, 0.0)},
    }
    choice = ClassChoice("true", tuple(range(IMAGES)), HEAD.names)
    document = relevance_results(evaluations, {}, choice, CONFIG, SETTINGS, images=IMAGES)
    areas = {f"{area}_normalised" for area in ("deletion_auc", "insertion_auc", "faithfulness")}
    assert {test.measure for test in document.conditions} == areas, "no probability, and no area in probability"
    tests = {(test.condition, test.method): test for test in document.conditions if "faith" in test.measure}
    means = {(m.condition, m.method, m.measure): m for m in document.means}
    for method in ("generic", "lrp"):
        raw = [means[name, method, "faithfulness"].mean for name in evaluations if (name, method) != ("chance", "lrp")]
        assert raw[1] > 2 * raw[0], "the surer one has the larger area"
    assert tests["finetuned", "generic"].difference == pytest.approx(0.0, abs=1e-12)
    assert tests["finetuned", "lrp"].difference < -0.08
    assert tests["finetuned", "lrp"].p_max_t <= 0.05
    assert tests["chance", "generic"].difference is None
    undefined = means["chance", "generic", "faithfulness_normalised"]
    assert (undefined.mean, undefined.ci, undefined.n) == (None, None, 0)

    outputs = small(tmp_path, metrics=("entropy",), conditions=tuple(evaluations), samples=False)
    targets = dict.fromkeys(evaluations, Targets(HEAD, "true", np.zeros(IMAGES, dtype=np.int64)))
    write_relevance(outputs / "metrics", document, evaluations, targets, [f"image{i}" for i in range(IMAGES)])
    found = load_relevance(results_of(outputs))
    assert found is not None
    said = relevance_sentences(results_of(outputs), found)["Faithfulness"]
    assert any(s.startswith("chance, ") and "no clear rise" in s for s in said)
    (of_lrp,) = (s for s in said if s.startswith("lrp, the area as a share of the rise, against baseline: finetuned −"))
    assert "no difference is claimed" not in of_lrp
    assert "undefined" not in of_lrp + "".join(said), "what has no share is not compared"
    assert any(s.startswith("finetuned, against a random order") and "generic and lrp better" in s for s in said)
    report_on(outputs)


def test_the_report_says_it_too_and_escapes_names(tmp_path: Path) -> None:
    outputs = small(tmp_path, metrics=("entropy",), conditions=("baseline", "finetuned"), samples=False)
    evaluations, targets, document = documents()
    strongest = HeadAssociation(
        metric="entropy", layer=1, head=2, n=50, df=40, rho=-0.5, rho_raw=0.25, p=0.01, p_max_r=0.01
    )
    link = PredictionLink(
        condition="finetuned",
        against="baseline",
        outcome="logit",
        family_size=1,
        images=50,
        permutations=99,
        alone=0,
        rho_start=-0.75,
        tests=(strongest,),
    )
    document = replace(document, link=(link,))
    write_relevance(outputs / "metrics", document, evaluations, targets, [f"image{i}" for i in range(IMAGES)])
    with (outputs / "metrics" / "relevance.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 3 * IMAGES
    assert float(rows[0]["faithfulness"]) == pytest.approx(
        evaluations["baseline"]["rollout"].values["faithfulness"][0], rel=1e-6
    )
    results = results_of(outputs)
    found = load_relevance(results)
    assert found is not None
    sentences = relevance_sentences(results, found)
    assert any("against rollout" in s and "generic better" in s for s in sentences["Faithfulness"])
    (alike,) = (s for s in sentences["How much maps depend on the class"] if s.startswith("generic, rank"))
    assert "of maps of different images: 0." in alike
    assert "the excess over these: 0." in alike
    assert "against baseline: finetuned +0.2" in alike
    assert any("maps of another class are noisier" in s for s in sentences["How much maps depend on the class"])
    assert "adjusted ρ = −0.500, p 0.01; raw ρ = +0.250" in sentences["Attention and the prediction"][1]
    report_on(outputs)
    page = (outputs / "report.html").read_text(encoding="utf-8")
    assert 'id="relevance"' in page
    assert "finetuned: deletion" in page
    assert "adapters &lt;b&gt;not&lt;/b&gt; merged" in page
    assert "### Faithfulness" in (outputs / "summary.md").read_text(encoding="utf-8")
    path = outputs / "metrics" / "relevance.json"
    written = path.read_text(encoding="utf-8")
    for part, key in (("methods", "p_max_t"), ("methods", "difference"), ("means", "mean"), ("link", "tests")):
        damaged = json.loads(written)
        del damaged[part][0][key]
        path.write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(InputError, match=rf"relevance\.json: {part}\[0\] has no {key}; expected"):
            report_on(outputs)
    for key, expected in (("baseline", "blur, mean"), ("target", "true, predicted, own")):
        path.write_text(json.dumps(json.loads(written) | {key: "x"}), encoding="utf-8")
        with pytest.raises(InputError, match=f"{key} is 'x'; expected one of {expected}"):
            report_on(outputs)
    damaged = json.loads(written)
    del damaged["classes"]
    path.write_text(json.dumps(damaged), encoding="utf-8")
    with pytest.raises(InputError, match="has no classes; run the relevance stage again"):
        report_on(outputs)
    path.write_text('{"schema": 7}')
    with pytest.raises(InputError, match="schema is 7; this version reads schema 1"):
        report_on(outputs)


def one_image(of: Evaluation) -> Evaluation:
    curves = Curves(of.curves.fractions, of.curves.deletion[:1], of.curves.insertion[:1])
    return Evaluation({name: values[:1] for name, values in of.values.items()}, curves)


@pytest.mark.parametrize("images", [0, 1])
def test_maps_of_no_image_or_of_one_are_reported_without_tests(tmp_path: Path, images: int) -> None:
    outputs = small(tmp_path, metrics=("entropy",), conditions=("baseline", "finetuned"), samples=False)
    evaluations, targets, _ = documents()
    few = {
        condition: {method: one_image(of) for method, of in methods.items()} if images else {}
        for condition, methods in evaluations.items()
    }
    choice = ClassChoice("true", tuple(range(IMAGES)), HEAD.names)
    nothing: dict[str, dict[str, str]] = {condition: {} for condition in few}
    document = relevance_results(few, nothing, choice, CONFIG, SETTINGS, images=images)
    assert document.methods == document.conditions == document.classes == ()
    write_relevance(outputs / "metrics", document, few, targets, ["image0"][:images])
    report_on(outputs)
    said = "No map was measured: relevance.measured is 0."
    for file in ("report.html", "summary.md"):
        text = (outputs / file).read_text(encoding="utf-8")
        assert (said in text) == (images == 0), file
        assert images == 0 or "areas under the curves" in text, file
        assert images == 0 or "Of fewer than 20 images they flip signs" in text, file
        if images and file == "report.html":
            assert "Student's over images" in unescape(text), "no bootstrap of so few"


def test_a_panel_takes_names_with_line_breaks(tmp_path: Path) -> None:
    images = Noise(2)
    images.ids = ("two\nlines/0.jpg", "two\nlines/1.jpg")
    item = Explained(0, "baseline", "two\nlines", "true", 0.5, np.ones((4, 4), dtype=np.float32))
    write_samples(tmp_path / "gradcam", "gradcam", images, [item])
    assert {path.suffix for path in (tmp_path / "gradcam").iterdir() if path.name[0] != "."} == {".png", ".csv"}


def test_a_model_with_larger_logits_has_no_brighter_pictures(tmp_path: Path) -> None:
    map = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    scales = {("small", "true"): 0.2, ("small", "other"): 0.1, ("large", "true"): 1.0, ("large", "other"): 0.5}
    items = [Explained(0, condition, "a", role, 0.5, scale * map) for (condition, role), scale in scales.items()]
    write_samples(tmp_path / "gradcam", "gradcam", Noise(1), items)
    pictures = {key: (tmp_path / f"gradcam/00000_{key[0]}_{key[1]}_a.png").read_bytes() for key in scales}
    for role in ("true", "other"):
        assert pictures["small", role] == pictures["large", role]
    assert pictures["small", "true"] != pictures["small", "other"], "of one model, the weaker map is paler"


class Noise(ImageSet):
    """Seeded pictures for the small models."""

    def __init__(self, count: int) -> None:
        self.ids = tuple(f"noise/{i}" for i in range(count))
        self.labels = np.arange(count) % 5
        self.class_names = tuple("abcde")
        self.preprocessing = Preprocessing(
            channels=3,
            height_px=32,
            width_px=32,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            interpolation="bilinear",
            crop_pct=1.0,
            crop_mode="center",
        )

    def _read(self, indices: object) -> np.ndarray:
        every = torch.randint(0, 256, (len(self), 3, 32, 32), generator=torch.Generator().manual_seed(0))
        return every[np.asarray(indices)].to(torch.uint8).numpy()


def test_a_refused_method_is_named_and_the_others_are_measured() -> None:
    images, rows = Noise(5), [0, 1, 3]
    targets = Targets(HEAD, "true", images.labels[rows], (images.labels[rows] + 1) % 5)
    found, refused = evaluate_maps(
        family("parallel"),
        images,
        rows,
        targets,
        ("gradcam", "rollout", "generic"),
        RelevanceConfig(baseline="mean", steps=2),
        seed=0,
        batch_size=2,
    )
    assert list(refused) == ["gradcam"]
    assert "Grad-CAM needs the norm" in refused["gradcam"]
    assert set(found) == {"rollout", "generic", CONTROL}
    assert all(evaluation.curves.deletion.shape == (3, 4) for evaluation in found.values())
    assert {"class_ssim", "image_ssim"} <= set(found["generic"].values)
    assert "class_ssim" not in found["rollout"].values, "rollout is the same for every class"


@pytest.mark.parametrize("role", ["true", "other"])
def test_a_method_refused_for_a_later_image_is_left_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    images, rows = Noise(40), list(range(40))
    refuse = 35  # of the second block of images that is measured; the pictures are of the first
    generic = METHODS["generic"].maps

    def leaking(model: torch.nn.Module, pixels: torch.Tensor, targets: torch.Tensor, dtype: object) -> torch.Tensor:
        (at,) = (pixels == images.batch([refuse])).flatten(1).all(dim=1).nonzero(as_tuple=True)
        if ((targets[at] == int(images.labels[refuse])) == (role == "true")).any():
            raise CaptureError("lrp does not fit")
        return generic(model, pixels, targets, None)

    monkeypatch.setitem(METHODS, "generic", replace(METHODS["generic"], class_free=True))
    monkeypatch.setitem(METHODS, "lrp", replace(METHODS["lrp"], maps=leaking))
    explain_study(
        tmp_path,
        {"baseline": lambda: family("parallel")},
        images,
        [0, 1],
        rows,
        RelevanceConfig(methods=("lrp", "rollout", "generic"), baseline="mean", steps=1),
        heads={"baseline": HEAD},
        choice=ClassChoice("true", tuple(rows), HEAD.names),
        settings=SETTINGS,
        link=[],
        seed=0,
        batch_size=16,
    )
    path = tmp_path / "metrics" / "relevance.json"
    document = parse_relevance(load_json(path, ""), path)
    assert [(entry.method, entry.reason) for entry in document.refused] == [("lrp", "lrp does not fit")]
    assert {entry.method for entry in document.means} == {"rollout", "generic", CONTROL}
    assert len(document.rollout_peaks) == 1, "of rollout alone, though generic is class-free here"
    assert {entry.n for entry in document.means if entry.measure == "faithfulness"} == {40}
    pictures = {method: sorted((tmp_path / "visualizations/relevance" / method).glob("*.png")) for method in METHODS}
    assert [method for method, files in pictures.items() if files] == ["generic", "rollout"]


def test_what_is_measured_does_not_depend_on_the_batch() -> None:
    images, rows = Noise(40), list(range(40))
    targets = Targets(HEAD, "true", images.labels)
    config = RelevanceConfig(baseline="mean", steps=2)
    sizes: list[int] = []
    model = family("parallel")
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))

    def curves_of(batch_size: int) -> Curves:
        sizes.clear()
        found, _ = evaluate_maps(model, images, rows, targets, (), config, seed=3, batch_size=batch_size)
        assert max(sizes) == batch_size
        return found[CONTROL].curves

    one, other = curves_of(32), curves_of(7)
    np.testing.assert_allclose(one.deletion, other.deletion, atol=1e-5)
    np.testing.assert_allclose(one.insertion, other.insertion, atol=1e-5)
    assert (one.measures()["faithfulness"] == 0).all(), "a random order and its reverse"
    # Of images 32 to 39 the maps are those of the next seed: the numbers of studies made before.
    pixels = images.batch(rows[32:])
    maps = random_maps((8, 4, 4), 3 + 32)
    before = perturbation_curves(
        model, pixels, torch.zeros_like(pixels), torch.from_numpy(images.labels[32:]), maps, steps=2, seed=3
    )
    np.testing.assert_allclose(before.with_reverse().deletion, one.deletion[32:], atol=1e-5)
