"""The page in a real browser: no error on the console, nothing requested, and every control does what it says.

Chromium is driven over its own debugging pipe, so no driver package is needed; without Chromium the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_study import build_study, report_on, results_of

from engine.report import html
from engine.report.document import Section, Text
from engine.report.text import number
from engine.report.write import render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Browser:
    """One tab. Commands go down a pipe as JSON with a NUL behind it; events are kept for the tests to look at."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # Chromium reads descriptor 3 and writes descriptor 4. The shell puts ours there.
        script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._rest = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._call(method, self._session, **params)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._from, 1 << 20)
            assert block, "chromium has ended"
            self._rest += block
        text, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def open(self, page: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression or promise."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def choose(self, select: str, value: str) -> None:
        """An option of a select element, as a user would choose it."""
        element = f"document.getElementById('{select}')"
        self.run(f"{element}.value = '{value}'; {element}.dispatchEvent(new Event('change'))")

    def wait(self, condition: str) -> None:
        """Until an expression is true, at most five seconds of the page's own time."""
        ok = self.run(
            "new Promise((resolve) => { let left = 250; const look = () => { "
            f"if ({condition}) resolve(true); else if (left-- === 0) resolve(false); else setTimeout(look, 20); }};"
            "look(); })"
        )
        assert ok, f"never came true: {condition}"

    def problems(self) -> list[str]:
        """Exceptions, console errors and requests that are not the page itself or data in it."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    found.append(params["exceptionDetails"]["text"])
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    found.append(str(params["args"]))
                case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                    found.append(params["entry"]["text"])
                case "Network.requestWillBeSent" if not params["request"]["url"].startswith(
                    ("file:", "data:", "blob:")
                ):
                    found.append(params["request"]["url"])
        return found

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # the session that was started above: chromium and its helpers
        self._process.wait()
        os.close(self._to)
        os.close(self._from)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = build_study(tmp_path_factory.mktemp("study") / "outputs", metrics=("distance", "region_mass"))
    report_on(outputs)
    return outputs / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


READY = "document.querySelectorAll('.heat td').length && document.getElementById('view-status').textContent"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits_the_screen_without_an_error(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme=scheme)
    browser.wait(READY)
    assert browser.problems() == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(251, 251, 249)") == (scheme == "light")


@pytest.mark.parametrize(
    "options",
    [
        {"conditions": ("pretrained",), "training": False},
        {"effect": 0.0, "regions": (), "metrics": ("distance",)},
        {"samples": False, "gradcam": False, "seeds": (1, 2)},
    ],
    ids=["one condition", "no effect", "no samples"],
)
def test_a_leaner_study_makes_a_sound_page(browser: Browser, tmp_path: Path, options: dict[str, Any]) -> None:
    outputs = build_study(tmp_path, **{"metrics": ("distance", "region_mass"), "permutations": 49, **options})
    page = tmp_path / "report.html"
    page.write_text(render_page(results_of(outputs), ""), encoding="utf-8")
    browser.open(page, 360)
    browser.wait("document.readyState === 'complete'")
    assert browser.problems() == []
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.run("document.querySelectorAll('.heat td').length > 0") == ("conditions" not in options)


def test_a_page_without_scripts_is_sound(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "trials.html"
    section = Section("Trials", "Trials", "trials", [Text("Best trial: the first.")])
    path.write_text(html.page([section], title="Trials", heading="Trials", facts=""), encoding="utf-8")
    browser.open(path, 360)
    assert browser.problems() == []


def test_it_opens_where_the_change_is_largest(browser: Browser, page: Path) -> None:
    """The map, the cell and the attention that a reader sees first are those that the headline names."""
    browser.open(page, 1400)
    browser.wait(READY)
    headline = browser.run("document.querySelector('.headline').textContent")
    layer = headline.split("most in layer ")[1].split(" ")[0]
    assert browser.run("document.querySelector('#map-detail h3').textContent") == f"Layer {layer}, mean over heads"
    assert f"layer {layer}," in browser.run("document.getElementById('view-status').textContent")


def test_a_cell_shows_its_numbers(browser: Browser, page: Path) -> None:
    browser.open(page, 1400)
    browser.wait(READY)
    browser.run('document.querySelector(\'td[data-row="2"][data-head="3"]\').click()')
    assert browser.run("document.querySelector('#map-detail h3').textContent") == "Layer 2, head 3"
    text = browser.run("document.getElementById('map-detail').textContent")
    data = json.loads(browser.run("document.getElementById('payload').textContent"))
    chosen = data["maps"][int(browser.run("document.getElementById('map-metric').value"))]
    cell = chosen["grids"][0]["cells"][2][3]
    assert f"dz{number(cell['dz'])}" in text
    assert ("survives)" in text) == any(grid["cells"][2][3]["verdict"] == "different" for grid in chosen["grids"])


def test_the_keyboard_moves_through_a_map(browser: Browser, page: Path) -> None:
    browser.open(page, 800)
    browser.wait(READY)
    assert browser.run("document.querySelectorAll('.heat td[tabindex=\"0\"]').length") == 2, "one tab stop a map"
    browser.run('document.querySelector(\'td[data-row="1"][data-head="1"]\').focus()')
    for key in ("ArrowDown", "ArrowRight"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
    assert browser.run("document.querySelector('#map-detail h3').textContent") == "Layer 2, head 2"
    assert browser.run("document.activeElement.dataset.row + ',' + document.activeElement.dataset.head") == "2,2"


def test_heads_that_were_chosen_keep_their_numbers(browser: Browser, tmp_path: Path) -> None:
    """Heads 1 and 3 of four were measured; the maps of the samples hold all four."""
    outputs = build_study(tmp_path, metrics=("distance",), regions=(), measured_heads=(1, 3), permutations=49)
    page = tmp_path / "report.html"
    page.write_text(render_page(results_of(outputs), ""), encoding="utf-8")
    browser.open(page, 800)
    browser.wait(READY)
    browser.run('document.querySelector(\'td[data-row="2"][data-head="1"]\').click()')
    assert browser.run("document.querySelector('#map-detail h3').textContent") == "Layer 2, head 3"
    browser.run("document.querySelector('#map-detail button').click()")
    browser.wait("document.getElementById('view-status').textContent.includes('layer 2, head 3')")
    assert browser.problems() == []


def test_another_metric_is_drawn(browser: Browser, page: Path) -> None:
    browser.open(page, 1400)
    browser.wait(READY)
    before = browser.run("document.getElementById('map-grids').innerHTML")
    assert "image diagonals" in browser.run("document.getElementById('map-scale').textContent")
    browser.choose("map-metric", "1")
    assert browser.run("document.getElementById('map-grids').innerHTML") != before
    assert "image diagonals" not in browser.run("document.getElementById('map-scale').textContent")


def test_pointing_at_a_patch_shows_where_it_attends(browser: Browser, page: Path) -> None:
    """The shares read off a map add up to what the stored maps give for that query."""
    browser.open(page, 1400, 5000)
    browser.wait(READY)
    assert "class token" in browser.run("document.getElementById('view-status').textContent")
    browser.choose("view-layer", "3")
    browser.wait("document.getElementById('view-status').textContent.includes('layer 3')")
    spot = browser.run(
        "(() => { const r = document.querySelector('#view-panels canvas').getBoundingClientRect();"
        " return [r.left + r.width * 3.5 / 8, r.top + r.height * 5.5 / 8]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=spot[0], y=spot[1], button="left", clickCount=1)
    browser.wait("document.getElementById('view-status').textContent.includes('row 5, column 3')")
    browser.wait("document.getElementById('view-class').getAttribute('aria-pressed') === 'false'")

    import numpy as np
    import zarr

    root = zarr.open_group(page.parent / "samples.zarr", mode="r")
    stored = np.asarray(root["dora_seed42/layer_03"][0], dtype=np.float64)[:, 1 + 5 * 8 + 3]
    shares = (stored[:, 1:] / stored[:, 1:].sum(-1, keepdims=True)).mean(0)
    row, col = divmod(int(shares.argmax()), 8)
    label = browser.run("document.querySelectorAll('#view-panels canvas')[3].getAttribute('aria-label')")
    share = f"{100 * shares.max():.{1 if shares.max() < 0.0995 else 0}f} %"
    assert f"most attention, {share}, on row {row}, column {col}" in label


def test_the_image_takes_arrow_keys_and_heads_can_be_chosen(browser: Browser, page: Path) -> None:
    browser.open(page, 360)
    browser.wait(READY)
    browser.run("document.querySelector('#view-panels canvas').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowUp", code="ArrowUp")
    browser.wait("document.getElementById('view-status').textContent.includes('row 3, column 4')")
    browser.choose("view-head", "2")
    browser.wait("document.getElementById('view-status').textContent.includes('head 2')")
    browser.choose("view-image", "2")
    browser.wait("document.querySelector('#view-panels p').textContent === 'class 2'")
    browser.run("document.getElementById('view-class').click()")
    browser.wait("document.getElementById('view-status').textContent.includes('class token')")
    assert browser.problems() == []


def test_a_verdict_leads_to_its_map_and_its_attention(browser: Browser, page: Path) -> None:
    browser.open(page, 1400)
    browser.wait(READY)
    button = "document.querySelector('.verdicts button[data-show=\"{}\"]')"
    row = browser.run(f"(() => {{ const b = {button.format('map')}; return {{...b.dataset}}; }})()")
    browser.run(f"{button.format('map')}.click()")
    assert (
        browser.run("document.querySelector('#map-detail h3').textContent") == f"Layer {row['layer']}, mean over heads"
    )
    data = json.loads(browser.run("document.getElementById('payload').textContent"))
    chosen = data["maps"][int(browser.run("document.getElementById('map-metric').value"))]
    assert (chosen["metric"], chosen["region"] or "") == (row["metric"], row["region"])
    browser.run(f"{button.format('attention')}.click()")
    browser.wait(f"document.getElementById('view-status').textContent.includes('layer {row['layer']},')")
    assert browser.problems() == []


def test_pairs_of_a_cell_are_the_images_of_the_table(browser: Browser, page: Path) -> None:
    """Every image is a point; those above the diagonal are the ones that rose; a ringed one leads to its attention."""
    browser.open(page, 800)
    browser.wait(READY)
    browser.choose("map-metric", "0")
    browser.run('document.querySelector(\'td[data-row="2"][data-head="1"]\').click()')
    browser.wait("document.querySelectorAll('.plot').length === 2")
    results = results_of(page.parent)
    values = results.table["distance"].mean("seed").isel(layer=2, head=1)
    d = (values.sel(condition="finetuned") - values.sel(condition="baseline")).values
    plot = "document.querySelector('.plot')"
    assert browser.run(f"{plot}.children.length") == len(d) == 40
    label = browser.run(f"{plot}.getAttribute('aria-label')")
    higher = int(label.split(": ")[1].split(" higher")[0])
    assert abs(higher - int((d > 0).sum())) <= 2  # eight bits: pairs a step apart may tie
    assert browser.run(f"{plot}.querySelectorAll('.sample').length") == 3
    browser.run(f"{plot}.querySelectorAll('.sample')[1].click()")
    browser.wait("document.getElementById('view-status').textContent.includes('layer 2, head 1')")
    image = browser.run("document.getElementById('view-image').selectedOptions[0].textContent")
    assert image.split(" (")[0] == browser.run(f"{plot}.querySelectorAll('.sample')[1].title").split(":")[0]
    assert browser.problems() == []


def test_several_runs_say_which_one_is_shown(browser: Browser, tmp_path: Path) -> None:
    outputs = build_study(tmp_path, metrics=("distance",), regions=(), seeds=(3, 4), permutations=49, gradcam=False)
    page = tmp_path / "report.html"
    page.write_text(render_page(results_of(outputs), ""), encoding="utf-8")
    browser.open(page, 800)
    browser.wait(READY)
    assert browser.problems() == []
    assert "seed 3" in browser.run("document.querySelectorAll('#view-panels p')[4].textContent")
    assert browser.run("document.querySelectorAll('#seeds .thin').length") == 4  # two runs of two conditions


def test_a_cell_leads_to_its_attention(browser: Browser, page: Path) -> None:
    browser.open(page, 1400)
    browser.wait(READY)
    browser.run('document.querySelector(\'td[data-row="1"][data-head="2"]\').click()')
    browser.run("document.querySelector('#map-detail button').click()")
    browser.wait("document.getElementById('view-status').textContent.includes('layer 1, head 2')")
