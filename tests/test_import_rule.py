"""The packages' import rule, read off the source: a straight line, no circles."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "kernels", "store", "train")

# package -> module prefixes of the project that it may import (besides itself)
ALLOWED = {
    "kernels": (),
    "store": (),
    "train": ("store", "kernels.layout"),
    "engine": ("kernels", "store", "train"),
}


# Rooms, from below: one imports of those before it, and of them what their `__init__` names; never back.
ROOMS = (
    "engine.config",
    "engine.progress",
    "engine.capture",
    "engine.measure",
    "engine.statistics",
    "engine.relevance",
    "engine.report",
    "engine.study",
    "engine.run",
)
DATA = "train.data"  # a room too, below all that is not in it


def imports_of(path: Path) -> set[tuple[str, str]]:
    """(module, name) of what a file imports of the project, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            assert node.module is not None
            found |= {(node.module, alias.name) for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] in (*PACKAGES, "tests", "benchmarks")}


def project_imports(path: Path) -> set[str]:
    """Dotted names of what a file imports of the project."""
    return {f"{module}.{name}" if name else module for module, name in imports_of(path)}


def may_import(package: str, name: str) -> bool:
    allowed = (package, *ALLOWED[package])
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def room_of(module: str) -> str:
    return next((room for room in (*ROOMS, DATA) if module == room or module.startswith(room + ".")), "")


def breaks_rooms(module: str, imported: str, name: str, named: frozenset[str]) -> bool:
    """Whether a module of one room imports from a later one, or of another what its `__init__` does not name."""
    here, there = room_of(module), room_of(imported)
    if not there or here == there:
        return False
    if here in ROOMS and there in ROOMS and ROOMS.index(there) > ROOMS.index(here):
        return True
    return imported != there or name not in named


def named_by(room: str) -> frozenset[str]:
    """`__all__` of a room's `__init__`, or what it imports of the room; of a room that is one file, all in it."""
    path = ROOT / room.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return frozenset(ast.literal_eval(node.value))
    if path.is_dir():
        return frozenset(name for module, name in imports_of(path / "__init__.py") if module.startswith(f"{room}."))
    return frozenset(
        getattr(node, "name", getattr(getattr(node, "targets", [None])[0], "id", "")) for node in ast.parse(text).body
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_rule_allows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no source files found under {package}/"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(project_imports(path))
        if not may_import(package, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_import_only_from_rooms_before_them_and_what_their_init_names() -> None:
    wrong = []
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "train").rglob("*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for imported, name in sorted(imports_of(path)):
            there = room_of(imported)
            if there and breaks_rooms(module, imported, name, named_by(there)):
                wrong.append(f"{path.relative_to(ROOT)}: from {imported} import {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["engine.capture", "engine.measure", "engine.relevance", "engine.study"])
def test_what_a_room_names_is_there_when_it_is_used(room: str) -> None:
    module = importlib.import_module(room)
    assert sorted(named_by(room)) == module.__all__ == dir(module)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_the_rule_is_able_to_fail() -> None:
    capture = named_by("engine.capture")
    assert breaks_rooms("engine.capture.sinks", "engine.measure", "measure_store", named_by("engine.measure"))
    assert breaks_rooms("engine.measure.store", "engine.capture.tap", "AttentionTap", capture)
    assert breaks_rooms("engine.measure.store", "engine.capture", "BatchSinks", capture)
    assert not breaks_rooms("engine.measure.store", "engine.capture", "AttentionTap", capture)
    assert not breaks_rooms("engine.capture.sinks", "engine.progress", "say", named_by("engine.progress"))
    assert not may_import("kernels", "store.schema")
    assert not may_import("train", "kernels.metrics")
    assert not may_import("store", "engine.config")
    assert may_import("train", "kernels.layout.TokenLayout")


def test_kernels_is_ours_and_peft_works_beside_it() -> None:
    """PyPI has a package of the name `kernels`, which transformers (and so peft) looks for."""
    spec = importlib.util.find_spec("kernels")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / "kernels" / "__init__.py"

    import peft
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
