"""The report from stored results alone: every file, the same bytes, sound pages, escaped names, clear refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_study import build_study, payload, record_stages, report_on, results_of, small, texts

from engine.report import viewer
from engine.report.write import render_figures, render_page
from engine.study.journal import Journal
from engine.study.stages import STAGES
from store import DiskError
from train.errors import InputError
from train.whole_files import replace_files

DRAWN = ("distance", "entropy", "region_mass")
HOSTILE = '<script>alert("x")</script>|`[a](b)`&amp;$x$\n# h'


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study with its report written."""
    outputs = record_stages(build_study(tmp_path_factory.mktemp("study") / "outputs", metrics=DRAWN))
    report_on(outputs)
    return outputs


def test_every_file_is_written(study: Path) -> None:
    figures = {path.name for path in (study / "visualizations/figures").iterdir()}
    stems = {"layers_distance", "layers_entropy", "region_mass", "accuracy", "training"}
    stems |= {f"difference_{name}" for name in DRAWN}
    assert figures == {".written.json", *(f"{stem}.{kind}" for stem in stems for kind in ("svg", "png"))}
    for path in (study / "visualizations/figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        drawing = ElementTree.parse(path.with_suffix(".svg"))
        assert next(drawing.iter("{http://www.w3.org/2000/svg}text")).text, "text is text"
    assert (study / "summary.md").read_text(encoding="utf-8").startswith("# Summary\n")
    assert (study / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not list(study.rglob("*.partial"))


def test_the_same_inputs_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    """In another process and another folder, with what the report itself logged added."""
    again = tmp_path / "elsewhere"
    shutil.copytree(study, again, ignore=shutil.ignore_patterns("figures", "summary.md", "report.html"))
    Journal(again / "run.jsonl").stage("report", {}, [], lambda: None)
    with (again / "run.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "done", "stage": "mea')
    code = (
        "import sys; from pathlib import Path; from engine.report import write_report\n"
        f"from engine.study.journal import Journal; outputs = Path({str(again)!r})\n"
        "write_report(outputs, Journal(outputs / 'run.jsonl'))\n"
        "print([name for name in ('torch', 'timm', 'peft', 'numba') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert run.stdout.splitlines()[-1] == "[]", "nothing heavy is imported"
    for path in [study / "summary.md", study / "report.html", *(study / "visualizations/figures").iterdir()]:
        assert (again / path.relative_to(study)).read_bytes() == path.read_bytes(), path.name


def test_what_is_no_longer_measured_has_no_figure(tmp_path: Path) -> None:
    outputs = small(tmp_path, metrics=("distance",), regions=(), conditions=("only",), samples=False, training=False)
    figures = outputs / "visualizations/figures"
    replace_files(figures, [("layers_entropy.svg", b"of an earlier study")])
    (figures / "mine.svg").write_text("somebody's own", encoding="utf-8")
    written = {path.name for path in report_on(outputs) if path.parent == figures}
    assert {path.name for path in figures.iterdir()} == {*written, ".written.json", "mine.svg"}
    assert "layers_entropy.svg" not in written


def test_a_place_that_cannot_be_written_is_one_clear_sentence(tmp_path: Path) -> None:
    outputs = small(tmp_path, metrics=("distance",), regions=(), conditions=("only",), samples=False, gradcam=False)
    (outputs / "visualizations").write_text("a file where a folder must go", encoding="utf-8")
    with pytest.raises(DiskError, match=r"figures.* cannot be written: a part of the path is a file"):
        report_on(outputs)


class _Page(HTMLParser):
    """Checks that tags close in order, and collects what an accessible, self-contained page is judged by."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values[name] or "" for name in ("src", "href") if name in values]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img" and not values.get("alt"):
            self.problems.append("an image has no alternative text")
        if tag == "svg" and not values.get("aria-label"):
            self.problems.append("a chart has no accessible name")
        self.problems += [f"{tag} has an inline handler" for name in values if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")


def test_the_page_is_sound_and_self_contained(study: Path) -> None:
    text = (study / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.problems == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "an id is used twice"
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(page.ids)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert "://" not in text, "the page names an address"
    assert page.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert text.count("<table") == text.count("<caption")
    assert len(text) < 10e6


def test_the_policy_names_the_script_that_is_there(study: Path) -> None:
    """Chromium refuses to run the script when this fails; the page would be dead and no other test would see it."""
    import base64
    import hashlib

    text = (study / "report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text or f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_the_page_holds_the_tests_numbers(study: Path) -> None:
    results = results_of(study)
    shown = payload((study / "report.html").read_text(encoding="utf-8"))
    by_label = {entry["label"]: entry for entry in shown["maps"]}
    test = results.select("head", condition="dora", metric="entropy", layer=2, head=1)[0]
    grid = next(g for g in by_label["Entropy"]["grids"] if shown["conditions"][g["condition"]] == "dora")
    cell = grid["cells"][2][1]
    assert cell["d"] == pytest.approx(test.difference, rel=1e-5)
    assert cell["p"] == pytest.approx(test.p_max_t)
    assert cell["n"] == 40
    assert (cell["verdict"] == "different") == (test.p_max_t is not None and test.p_max_t <= 0.05)
    assert sum(cell["hist"]["counts"]) == 40


def test_sample_maps_survive_the_eight_bits(study: Path) -> None:
    """Unpacked as the page unpacks them, the maps are the stored ones to half a step of 1/255."""
    import base64
    import zlib

    results = results_of(study)
    assert results.samples is not None
    viewer = payload((study / "report.html").read_text(encoding="utf-8"))["viewer"]
    layer = viewer["layers"][3]
    assert layer["queries"] == list(range(65))
    content = zlib.decompress(base64.b64decode(viewer["maps"]["1/2/3"]))
    rows = layer["heads"] * len(layer["queries"])
    greatest = np.frombuffer(content, "<f4", rows)
    prefix = np.frombuffer(content, "<f4", rows, 4 * rows)
    weights = np.frombuffer(content, np.uint8, offset=8 * rows).reshape(rows, 64) / 255 * greatest[:, None]
    stored = np.asarray(results.samples.runs["dora_seed42"].layers[3].attention[1], dtype=np.float32).reshape(rows, 65)
    assert prefix == pytest.approx(stored[:, 0])
    assert np.abs(weights - stored[:, 1:]).max() <= stored[:, 1:].max() / 255


def test_a_page_of_a_large_model_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps beyond the budget are thinned to every second row and column of queries, and the page says so."""
    outputs = small(tmp_path, layers=6, heads=6, grid=(10, 14), sample_images=4, metrics=("distance",), permutations=49)
    whole = payload(texts(outputs)[1])["viewer"]
    assert (whole["stride"], len(whole["images"])) == (1, 4)
    budget = sum(map(len, whole["maps"].values())) // 6
    monkeypatch.setattr(viewer, "BUDGET", budget)
    page = texts(outputs)[1]
    thinned = payload(page)["viewer"]
    assert thinned["stride"] == 2
    assert 2 <= len(thinned["images"]) <= 3
    assert sum(map(len, thinned["maps"].values())) <= budget
    assert len(thinned["layers"][0]["queries"]) == 1 + 5 * 7
    assert "every 2nd row" in page


@pytest.mark.slow
def test_the_page_of_a_12_by_12_model_is_below_ten_megabytes(tmp_path: Path) -> None:
    """Twelve layers of twelve heads, all metrics and regions, three conditions, whole maps of noise: the worst case."""
    outputs = build_study(
        tmp_path / "outputs", layers=12, heads=12, grid=(14, 14), patch_px=16, images=300, permutations=49
    )
    page = texts(outputs)[1]
    assert len(page.encode()) < 10e6
    shown = payload(page)
    assert len(shown["viewer"]["images"]) >= 2
    assert len(shown["images"]) >= 200
    assert "too large for a page: metrics/attention_comparison.json in the outputs folder" in page


def test_pairs_of_values_survive_the_eight_bits(study: Path) -> None:
    """Unpacked as the page unpacks them, a cell's pairs are the table's values to half a step of its range."""
    import base64
    import zlib

    results = results_of(study)
    shown = payload((study / "report.html").read_text(encoding="utf-8"))
    rows = [list(results.table["image"].values).index(name) for name in shown["images"]]
    entry = next(entry for entry in shown["maps"] if entry["metric"] == "entropy")
    content = zlib.decompress(base64.b64decode(entry["pairs"]))
    low, high = np.frombuffer(content, "<f4", 2 * 4 * 5).reshape(2, 4, 5)
    steps = np.frombuffer(content, np.uint8, offset=8 * 4 * 5).reshape(4, 5, 3, len(rows))
    values = low[..., None, None] + (high - low)[..., None, None] * (steps / 254)
    stored = results.table["entropy"].mean("seed").transpose("layer", "head", "condition", "image").values[..., rows]
    stored = np.concatenate([stored, stored.mean(1, keepdims=True)], axis=1)
    half = ((high - low) / 254 / 2)[..., None, None]
    assert (np.abs(values - stored) <= 1.01 * half + 1e-6).all()
    assert {sample["id"] for sample in shown["viewer"]["images"]} <= set(shown["images"])


def test_tables_can_be_downloaded_whole(study: Path) -> None:
    import base64
    import csv
    import io

    page = (study / "report.html").read_text(encoding="utf-8")
    files = dict(re.findall(r'<a download="([^"]+)" href="data:[^,]+,([^"]+)"', page))
    assert {"tests.csv", "trends.csv", "clusters.csv", "relations.csv", "layer_curves.csv", "training.csv"} <= set(
        files
    )
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(files["tests.csv"]).decode("utf-8"))))
    results = results_of(study)
    assert len(rows) == len(results.document.tests)
    for row, test in zip(rows, results.document.tests, strict=True):
        assert row["family"] == test.family
        assert row["ci_low"] == ("" if test.ci[0] is None else repr(test.ci[0]))
    clusters = list(csv.DictReader(io.StringIO(base64.b64decode(files["clusters.csv"]).decode("utf-8"))))
    assert [row["layers"] for row in clusters] == [" ".join(map(str, c.layers)) for c in results.document.clusters]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    outputs = small(
        tmp_path,
        conditions=("baseline", "<b>tuned"),
        regions=('<img src="x" onerror="alert(1)">', "$\\frac$"),
        classes=("</script><script>alert(2)</script>", "b"),
        samples=False,
    )
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    comparison["data"]["dropped"] = [{"id": HOSTILE, "status": "unreadable"}]
    comparison["controls"][0]["detail"] = HOSTILE
    path.write_text(json.dumps(comparison), encoding="utf-8")
    report_on(outputs)

    text = (outputs / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.problems == []
    assert text.count("<script") == 2, "the data and the page's own script, and no other"
    assert "<img src=" not in text.replace('<img src="data:', "")
    assert "<b>tuned" not in text
    assert payload(text)["conditions"] == ["baseline", "<b>tuned"]
    summary = (outputs / "summary.md").read_text(encoding="utf-8")
    assert not re.search(r"<[A-Za-z/!?]", summary), "a tag was opened"
    assert "\n# h" not in summary
    assert not re.search(r"(?<!\\)\]\(", summary), "a link was made"
    assert not re.search(r"(?<!\\)`", summary), "a code span was opened"
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 6, 7, 11) for row in rows), "a name has split a table's row"


def test_several_seeds_draw_their_spread(tmp_path: Path) -> None:
    """Each training run is a line of its own; the frozen baseline has one, which stands at every seed."""
    outputs = small(
        tmp_path, seeds=(1, 2, 3), conditions=("baseline", "finetuned"), samples=False, gradcam=False, training=False
    )
    results = results_of(outputs)
    drawn = dict(render_figures(results))
    assert {"seeds.svg", "seeds.png"} <= set(drawn)
    page = render_page(results, "")
    assert page.count('class="thin c1"') == 2 * 3 * 3  # curves and differences of distance and two regions, three runs
    assert 'class="thin c0"' not in page


def test_some_layers_and_heads_only_keep_their_numbers(tmp_path: Path) -> None:
    """Layers 1 and 3 and heads 2 and 3 of four each: nothing may take a number for a place."""
    outputs = small(tmp_path, gradcam=False)
    import xarray as xr

    path = outputs / "metrics/attention_metrics.zarr"
    table = xr.open_zarr(path, consolidated=False).load().isel(layer=[1, 3], head=[2, 3])
    for variable in table.variables.values():
        variable.encoding.clear()
    shutil.rmtree(path)
    with pytest.warns(match="string|specification|Unicode"):
        table.to_zarr(path, zarr_format=3, consolidated=False)
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    comparison["layers"] = [comparison["layers"][layer] for layer in (1, 3)]
    for part in ("tests", "relations"):
        comparison[part] = [entry for entry in comparison[part] if entry["layer"] in (None, 1, 3)]
    comparison["tests"] = [test for test in comparison["tests"] if test["head"] in (None, 2, 3)]
    comparison["trends"] = comparison["clusters"] = []
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    shown = payload(page)
    assert (shown["layers"], shown["heads"]) == ([1, 3], [2, 3])
    test = results_of(outputs).select("head", condition="finetuned", metric="distance", layer=3, head=2)[0]
    assert shown["maps"][0]["grids"][0]["cells"][1][0]["d"] == pytest.approx(test.difference, rel=1e-5)
    assert shown["maps"][0]["grids"][0]["cells"][1][0]["hist"] is not None
    assert [layer["layer"] for layer in shown["viewer"]["layers"]] == [0, 1, 2, 3]
    regional = [test for test in comparison["tests"] if test["level"] == "layer" and test["region"]]
    most = max(regional, key=lambda test: abs(test["difference"]))["layer"]
    assert f"differs most in layer {most} (blocks.{most}.attn)" in summary
    assert 'data-label="largest change">layer 0' not in page
    assert {name for name, _ in render_figures(results_of(outputs))} >= {"region_mass.svg", "difference_distance.png"}


def test_undefined_values_are_hatched_and_counted(tmp_path: Path) -> None:
    """A whole layer without a value: no NaN reaches the page, and the summary does not average it away."""
    outputs = small(tmp_path, conditions=("baseline", "finetuned"), samples=False, gradcam=False)
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    for test in comparison["tests"]:
        if test["layer"] == 1:
            test |= dict.fromkeys(("difference", "dz", "gz", "t", "p", "p_max_t", "mean_against", "mean_condition"))
            test |= {"ci": None, "n": 0, "degenerate": "0 complete pairs: a test needs at least 2"}
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    shown = payload(page)
    assert all(cell["d"] is None for cell in shown["maps"][0]["grids"][0]["cells"][1])
    assert "of 12 layer × head cells" in summary
    assert "NaN" not in json.dumps(shown)


def _break(outputs: Path, fault: str) -> None:
    comparison = outputs / "metrics/attention_comparison.json"
    match fault:
        case "no folder":
            shutil.rmtree(outputs)
        case "no table":
            shutil.rmtree(outputs / "metrics/attention_metrics.zarr")
        case "no comparison":
            comparison.unlink()
        case "torn comparison":
            comparison.write_text(comparison.read_text(encoding="utf-8")[:500], encoding="utf-8")
        case "schema":
            comparison.write_text('{"schema": 2}', encoding="utf-8")
        case "no tests":
            entries = json.loads(comparison.read_text(encoding="utf-8"))
            del entries["tests"]
            comparison.write_text(json.dumps(entries), encoding="utf-8")
        case "trends":
            entries = json.loads(comparison.read_text(encoding="utf-8"))
            entries["trends"][1]["deep_layers"] = 3
            comparison.write_text(json.dumps(entries), encoding="utf-8")
        case "level":
            entries = json.loads(comparison.read_text(encoding="utf-8"))
            entries["tests"][2]["level"] = "token"
            comparison.write_text(json.dumps(entries), encoding="utf-8")
        case "other run":
            entries = json.loads(comparison.read_text(encoding="utf-8"))
            entries["layers"].pop()
            comparison.write_text(json.dumps(entries), encoding="utf-8")
        case "other condition":
            comparison.write_text(comparison.read_text(encoding="utf-8").replace("finetuned", "lora"), encoding="utf-8")
        case "gradcam outside":
            (outputs / "visualizations/gradcam_samples/gradcam_samples.csv").write_text(
                "file,image,condition,role,target,probability\n../../study.toml,a,b,true,c,0.5\n", encoding="utf-8"
            )
        case "samples":
            shutil.rmtree(outputs / "samples.zarr/images/pixels")
        case "sample maps":
            chunk = next((outputs / "samples.zarr").glob("baseline_seed*/layer_01/c/0/*/*/*"))
            chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")
        case "study":
            (outputs / "study.toml").write_text("= 3", encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "names", "says"),
    [
        ("no folder", "outputs", "no such folder"),
        ("no table", "attention_metrics.zarr", "run the study first"),
        ("no comparison", "attention_comparison.json", "not found"),
        ("torn comparison", "attention_comparison.json", "cannot be read as JSON"),
        ("schema", "attention_comparison.json", "schema is 2"),
        ("no tests", "attention_comparison.json", "has no tests; run the statistics stage again"),
        ("other run", "attention_comparison.json", "lists 3 layers but"),
        ("trends", "attention_comparison.json", "trends[1].deep_layers is 3; expected whole numbers"),
        ("level", "attention_comparison.json", "tests[2].level is 'token'; expected one of head, layer"),
        ("other condition", "attention_comparison.json", "names condition 'lora'"),
        ("gradcam outside", "gradcam_samples.csv", "does not lie beside it"),
        ("samples", "samples.zarr", "run capture again"),
        ("sample maps", "/layer_01: cannot be read as the sample maps", "run capture again"),
        ("study", "study.toml", "cannot be read as TOML"),
    ],
)
def test_bad_inputs_are_one_clear_sentence(tmp_path: Path, fault: str, names: str, says: str) -> None:
    outputs = small(tmp_path, permutations=49)
    _break(outputs, fault)
    with pytest.raises(InputError) as caught:
        report_on(outputs)
    message = str(caught.value)
    assert names in message
    assert says in message
    assert set(re.findall(r"(\w+) stage", message)) <= {*STAGES}
    assert "\n" not in message
    assert not (outputs / "report.html").exists()
