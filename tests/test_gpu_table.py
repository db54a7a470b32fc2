"""docs/gpu.md shows what lies in benchmarks/results, all of it, and nothing else."""

from __future__ import annotations

from typing import Any

from benchmarks import gpu_table
from benchmarks.gpu.results import SCHEMA, Results, Row, share_of_limit


def row(name: str, value: float, unit: str = "images/s", **more: Any) -> dict[str, Any]:
    return Row(name=name, value=value, unit=unit, **more).to_dict()


def tables(**sections: list[dict[str, Any]]) -> str:
    about = {"device": "GPU", "date": "2026-01-02T03:04", "python": "3.12", "cuda": "13.0", "versions": {"torch": "2"}}
    found = {name: {"rows": rows, "seconds": 1.0} for name, rows in sections.items()}
    return "\n".join(gpu_table.device({"schema": SCHEMA, "about": about, "sections": found}))


def test_the_page_has_the_figures_of_the_results() -> None:
    found = gpu_table.measured()
    assert found
    assert all(document["schema"] == SCHEMA and not document["about"]["small"] for document in found)
    text = gpu_table.PAGE.read_text(encoding="utf-8")
    assert gpu_table.page(text, found) == text, "run python -m benchmarks.gpu_table"
    for document in found:
        assert f"### {document['about']['device']}, {document['about']['date'][:10]}\n" in text
        assert {"ceilings", "tests", "kernels_197", "capture", "training"} <= set(document["sections"])


def test_a_kernels_row_says_by_what_and_how_far_from_its_limit() -> None:
    said = tables(
        kernels_577=[row("measure_attention, 577 tokens, float16, triton", 5.0)],
        kernels_197=[
            row("scaled_dot_product_attention, 197 tokens, bfloat16", 2e5, note="forward, cudnn"),
            row("measure_qk, 197 tokens, bfloat16, torch, compiled", 1e3, limit=4e3, bound_by="copy", times_sdpa=0.005),
        ],
    )
    assert said.index("197 tokens") < said.index("577 tokens")
    assert "| `scaled_dot_product_attention` | bfloat16 | forward, cudnn | 200,000 |" in said
    assert "| `measure_qk` | bfloat16 | torch, compiled | 1,000 | 25% | copy |  | 0.01 |" in said


def test_what_failed_is_said_and_what_was_not_run_is_not() -> None:
    said = tables(training=[row("full", 0.0, error="RuntimeError: a|b\nc"), row("save", 2.0, "s", limit=1.0)])
    assert "Not measured: training, full: RuntimeError: a\\|b c" in said
    assert "| save | 2.00 s | 50% |  |" in said
    assert "**Capture**" not in said
    assert share_of_limit(row("x", 1.0, "min", limit=None)) == ""


def test_launches_of_one_kernel_are_kept_apart() -> None:
    stalled = "warps stalled, "
    counters = [
        *(row("qk: gpu__time_duration.sum", 34e3, "ns"), row("qk: local memory", 0.0), row(f"qk: {stalled}wait", 1.0)),
        *(row("qk: gpu__time_duration.sum", 5e3, "ns"), row("qk: local memory", 8.0)),
        *(row(f"qk: {stalled}long_scoreboard", 3.0), row(f"qk: {stalled}not_selected", 9.0)),
        row("means: gpu__time_duration.sum", 1500.0, "ns"),
    ]
    lines = [line.split(" | ") for line in tables(counters=counters).splitlines() if line.startswith("| `")]
    assert [(cells[0], cells[1], cells[-2], cells[-1]) for cells in lines] == [
        ("| `qk`", "34", "none", "wait 1.0 |"),
        ("| `qk`", "5", "8", "long scoreboard 3.0 |"),
        ("| `means`", "1.5", "", " |"),
    ]


def test_results_are_written_a_row_a_line(tmp_path: Any) -> None:
    results = Results.open(tmp_path / "gpu.json", {"device": "GPU", "code": "1", "versions": {}, "small": False})
    results.add("one", {"rows": [row("a ³", 1.0), row("b", 2.0)], "seconds": 1.0})
    results.add("two", {"rows": [], "seconds": 2.0, "error": "x"})
    assert sum('"name"' in line for line in (tmp_path / "gpu.json").read_text(encoding="utf-8").splitlines()) == 2
    again = Results.open(tmp_path / "gpu.json", results.about)
    assert again.sections == {"one": results.sections["one"]}, "what failed is measured again"
