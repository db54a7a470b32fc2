"""The packages' import rule, read off the source: a straight line, no circles."""

from __future__ import annotations

import ast
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


def project_imports(path: Path) -> set[str]:
    """Dotted names of the project's modules that a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in (*PACKAGES, "tests", "benchmarks")}


def may_import(package: str, name: str) -> bool:
    allowed = (package, *ALLOWED[package])
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


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


def test_the_rule_is_able_to_fail() -> None:
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
