"""docs/gpu.md: the figures of benchmarks/results/gpu_*.json, between two marks.

python -m benchmarks.gpu_table
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import share_of_limit

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN = "<!-- Written by `python -m benchmarks.gpu_table` from benchmarks/results/gpu_*.json; do not edit. -->"
END = "<!-- End of what is written. -->"

# Heading -> the sections under it.
TABLES = {
    "What the machine does at best": ("ceilings", "host"),
    "Capture": ("capture", "streaming"),
    "Training": ("training", "training_compiled", "training_variants", "training_whole"),
    "How much of the wall time the device is busy": ("profile",),
}
# Heading of a column -> counters of which the first that is there is shown, and what it is divided by.
COUNTERS = {
    "µs": (("gpu__time_duration.sum", "gpu__time_duration.avg"), 1e3),
    "issue slots used, %": (("smsp__issue_active.avg.pct_of_peak_sustained_active",), 1),
    "of memory's peak, %": (("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",), 1),
    "MB read": (("dram__bytes_read.sum",), 1e6),
    "FMA, %": (("sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",), 1),
    "exponentials, %": (("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",), 1),
    "matrix products, %": (("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",), 1),
    "warps there, %": (("sm__warps_active.avg.pct_of_peak_sustained_active",), 1),
    "registers": (("launch__registers_per_thread",), 1),
}
STALLS = 3  # reasons for which warps wait

Section = dict[str, Any]


def measured() -> list[dict[str, Any]]:
    """What was measured on each device."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("gpu_*.json"))]


def page(text: str, found: Iterable[dict[str, Any]]) -> str:
    """The page with these figures between the marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    figures = "\n".join(line for document in found for line in device(document))
    return f"{before}{BEGIN}\n\n{figures}\n{END}{after}"


def device(document: dict[str, Any]) -> Iterator[str]:
    """All tables of one device."""
    about, sections = document["about"], document["sections"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield f"### {about['device']}, {about['date'][:10]}"
    yield ""
    yield f"Python {about['python']}, CUDA {about['cuda']}, {versions}."
    if about.get("note"):
        yield f"Measured: {about['note']}."
    tests = [f"{row['value']:.0f} {row['name']}" for row in _rows(sections, "tests") if not row["error"]]
    if tests:
        yield f"On the device: {', '.join(tests)}."
    yield from _errors(sections)
    yield ""
    for name in sorted((name for name in sections if name.startswith("kernels_")), key=lambda name: int(name[8:])):
        yield from _table(
            f"{name[8:]} tokens: images of 12 layers × 12 heads a second",
            ("", "input", "by", "images/s", "of limit", "limited by", "× compiled", "× SDPA"),
            (_kernel(row) for row in _rows(sections, name)),
        )
    for heading, names in TABLES.items():
        rows = [row for name in names for row in _rows(sections, name) if not _is_kernel_of_profile(row)]
        cells = ([row["name"], _value(row), share_of_limit(row), _why(row)] for row in rows if not row["error"])
        yield from _table(heading, ("", "", "of limit", ""), cells)
    yield from _table(
        "Hardware counters of what one call launches, 197 tokens, fp16 maps and bf16 query and key",
        ("kernel", *COUNTERS, "spilled", "warps wait for (warps an instruction)"),
        map(_launch, launches(_rows(sections, "counters"))),
    )


def launches(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """Counter -> value of each launch, its kernel under ""; a counter that comes again begins the next one."""
    launch: dict[str, Any] = {}
    for row in rows:
        kernel, _, counter = row["name"].partition(": ")
        if launch and (kernel != launch[""] or counter in launch):
            yield launch
            launch = {}
        launch |= {"": kernel, counter: row["value"]}
    if launch:
        yield launch


def _rows(sections: dict[str, Section], name: str) -> list[dict[str, Any]]:
    return list(sections.get(name, {}).get("rows", ()))


def _errors(sections: dict[str, Section]) -> Iterator[str]:
    """What failed or could not be measured: a page that shows the rest alone would pass over it."""
    for name, section in sections.items():
        errors = [(f"{name}, {row['name']}", row["error"]) for row in section["rows"] if row["error"]]
        errors += [(name, section["error"])] if "error" in section else []
        for what, error in errors:
            yield f"\n{'Failed' if name == 'tests' else 'Not measured'}: {what}: {_cell(error)[:300]}"


def _kernel(row: dict[str, Any]) -> list[str]:
    if row["error"]:
        return [row["name"], "", "", "failed"]
    function, _, dtype, *by = row["name"].split(", ", 3)
    ratios = (f"{ratio:.2f}" if ratio else "" for ratio in (row["times_compiled"], row["times_sdpa"]))
    backend = ", ".join(filter(None, (*by, row["note"])))
    return [f"`{function}`", dtype, backend, f"{row['value']:,.0f}", share_of_limit(row), row["bound_by"], *ratios]


def _is_kernel_of_profile(row: dict[str, Any]) -> bool:
    return bool(row["unit"] == "ms" and row["note"].endswith("launches"))


def _value(row: dict[str, Any]) -> str:
    value, unit = row["value"], row["unit"]
    if unit == "of wall":
        return f"{value:.0%}"
    shown = f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
    return f"{shown} {unit}"


def _why(row: dict[str, Any]) -> str:
    return "; ".join(filter(None, (row["bound_by"] and f"limit: {row['bound_by']}", row["note"])))


def _launch(launch: dict[str, Any]) -> list[str]:
    cells = []
    for names, divisor in COUNTERS.values():
        value = next((launch[name] / divisor for name in names if name in launch), None)
        cells.append(
            "" if value is None else f"{value:.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"
        )
    waits = [(value, name) for name, value in launch.items() if name.startswith("warps stalled, ")]
    # "selected" and "not_selected" are warps that issue, or could.
    waits = [
        (value, name[15:].replace("_", " ")) for value, name in sorted(waits, reverse=True) if "selected" not in name
    ]
    spilled = launch.get("local memory")
    stalls = ", ".join(f"{name} {value:.1f}" for value, name in waits[:STALLS])
    return [f"`{launch['']}`", *cells, "" if spilled is None else "none" if not spilled else f"{spilled:,.0f}", stalls]


def _table(heading: str, columns: Iterable[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Nothing without rows."""
    columns, body = list(columns), list(rows)
    if body:
        yield from (f"**{heading}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
        for row in body:
            cells = [*map(_cell, row), *[""] * (len(columns) - len(row))]
            yield f"| {' | '.join(cells)} |"
        yield ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), measured()), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
