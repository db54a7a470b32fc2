"""Rows, the JSON file that they lie in, and the table."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "LOGS",
    "About",
    "Results",
    "Row",
    "Section",
    "describe",
    "failed",
    "heading",
    "lines",
    "logs",
    "share_of_limit",
]

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "vit-attention-gpu-benchmark/1"
LOGS = "GPU_BENCHMARK_LOGS"  # environment variable: the folder of --logs
PACKAGES = ("torch", "triton", "numba", "numba-cuda", "timm", "zarr", "numpy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    Args:
        name: what was measured.
        value, unit: the median.
        key: under which other sections find a ceiling; "" for other rows.
        limit: what the device could do at best, in the same unit, from measured ceilings and counted bytes, products
            and exponentials; None where there is none.
        bound_by: which of them that is.
        times_compiled: how many times as fast as the `torch` backend under torch.compile on the same input.
        times_sdpa: how many times as fast as a forward pass of F.scaled_dot_product_attention on the same query and
            key, with a value of their shape.
        note: how it was measured, where not as the others.
        error: why it could not be measured; the value is 0 then.
    """

    name: str
    value: float
    unit: str
    key: str = ""
    limit: float | None = None
    bound_by: str = ""
    times_compiled: float | None = None
    times_sdpa: float | None = None
    note: str = ""
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class About:
    """What was measured on: the first entry of the file."""

    fields: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.fields


# (small sizes on the CPU?, ceilings by key) → rows
Section = Callable[[bool, dict[str, float]], Iterable[Any]]


def describe(small: bool, ceilings: dict[str, float]) -> list[About]:
    """Device, versions and code. Without `small` there must be a CUDA device."""
    import torch

    if not small and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device; benchmarks/gpu.sh --small runs on a CPU, at tiny sizes")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    device = "CPU, small" if small else torch.cuda.get_device_name()
    driver = {} if small else {"cuda": torch.version.cuda, "memory_bytes": torch.cuda.mem_get_info()[1]}
    return [
        About(
            {
                "device": device,
                "small": small,
                "code": _code_digest(),
                "commit": _commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "versions": versions,
                **driver,
            }
        )
    ]


def _code_digest() -> str:
    """Of every Python file that a figure could depend on; a copy of the tree need not have its history."""
    found = hashlib.sha256()
    for folder in ("kernels", "store", "train", "engine", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _commit() -> str:
    try:
        said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


def logs(otherwise: Path) -> Path:
    """Where whole outputs go: the folder of `--logs`, or another."""
    return Path(os.environ.get(LOGS) or otherwise)


def failed(section: dict[str, Any]) -> bool:
    """Whether anything of a section could not be measured."""
    return "error" in section or any(row["error"] for row in section.get("rows", ()))


class Results:
    """The sections measured so far of one state of the code on one device, kept in a file after each."""

    def __init__(self, path: Path, about: dict[str, Any], sections: dict[str, Any]) -> None:
        self.path, self.about, self.sections = path, about, sections

    @classmethod
    def open(cls, path: Path | None, about: dict[str, Any]) -> Results:
        """The file's own sections if they are of this code and device, else none."""
        slug = "".join(c if c.isalnum() else "_" for c in about["device"].lower())
        path = path or ROOT / "benchmarks" / "results" / f"gpu_{slug}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            same = ("device", "code", "versions", "small")
            if kept.get("schema") == SCHEMA and all(kept["about"].get(k) == about[k] for k in same):
                return cls(path, kept["about"], {n: s for n, s in kept["sections"].items() if not failed(s)})
        return cls(path, about, {})

    def has(self, name: str) -> bool:
        return name in self.sections

    def add(self, name: str, section: dict[str, Any]) -> None:
        self.sections[name] = section
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """JSON, a row a line."""
        sections = []
        for name, section in self.sections.items():
            rest = json.dumps({key: value for key, value in section.items() if key != "rows"}, ensure_ascii=False)
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in section["rows"])
            sections.append(f' {json.dumps(name)}: {rest[:-1]}, "rows": [\n{rows}\n ]}}')
        head = json.dumps({"schema": SCHEMA, "about": self.about}, indent=1)
        return f'{head[:-2]},\n "sections": {{\n' + ",\n".join(sections) + "\n}}\n"

    def rows(self) -> Iterator[dict[str, Any]]:
        for section in self.sections.values():
            yield from section.get("rows", ())

    def ceilings(self) -> dict[str, float]:
        return {row["key"]: row["value"] for row in self.rows() if row["key"]}


def heading(results: Results) -> str:
    """What is measured on, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in results.about["versions"].items())
    return f"{results.about['device']}, {results.about['date']}, {versions}"


def share_of_limit(row: dict[str, Any]) -> str:
    """The fraction of its limit that a row reaches, of a time the limit's of it; "" where there is none."""
    if not row["limit"] or not row["value"]:
        return ""
    is_time = row["unit"] in ("s", "ms", "min")
    return f"{row['limit'] / row['value'] if is_time else row['value'] / row['limit']:.0%}"


def lines(name: str, section: dict[str, Any]) -> Iterator[str]:
    """Every row of a section, a line each; what failed is said in its place."""
    columns = f"{'of limit':>10}{'× compiled':>12}{'× SDPA':>9}"
    yield f"\n{name} ({section['seconds']:.0f} s)".ljust(61) + f"{'':>24}{columns}"
    for row in section["rows"]:
        if row["error"]:
            yield f"  {row['name']:<58}  FAILED: {row['error'][:400]}"
            continue
        of_limit = share_of_limit(row)
        ratios = (f"{ratio:.2f}" if ratio else "" for ratio in (row["times_compiled"], row["times_sdpa"]))
        said = f"  {row['name']:<58}{row['value']:>13,.4g} {row['unit']:<11}{of_limit:>9}" + "{:>12}{:>9}".format(
            *ratios
        )
        yield "  ".join(filter(None, (said, row["bound_by"], row["note"]))).rstrip()
    if "error" in section:
        yield f"  FAILED: {section['error'][:1500]}"
