"""Training with compiled blocks: which batches run compiled, the same bits, and what is left afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train.compiled
import train.loop
import train.state
from tests.training_runs import interrupted, training_run
from train.checkpoint import read_checkpoint
from train.compiled import AUTO_STEPS, compiled_blocks, require_compiler, resolve_compile, transformer_blocks
from train.data.digits import prepare_digits
from train.data.images import DataSplits
from train.errors import InputError
from train.models import build_model, preprocessing_of
from train.training import TrainResult, train_condition

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> DataSplits:
    preprocessing = preprocessing_of(build_model("digits_vit", num_classes=10))
    return prepare_digits(preprocessing=preprocessing, train_scenes=20, validation_scenes=8, test_scenes=8)


@pytest.fixture
def run(data: DataSplits, tmp_path: Path) -> Callable[..., TrainResult]:
    def run(name: str, recipe: str = "full", **values: Any) -> TrainResult:
        given = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "precision": "fp32", "own_head": True, "compile": "on"}
        return train_condition(
            training_run(recipe, **(given | values)),
            model="digits_vit",
            data=data,
            checkpoint=tmp_path / f"{name}.safetensors",
        )

    return run


def compile_in_name(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of torch.compile: the module as it is; the sizes of the batches that come by."""
    sizes: list[int] = []

    def instead(self: nn.Module, **options: Any) -> None:
        def call(tokens: torch.Tensor) -> Any:
            sizes.append(len(tokens))
            return self._call_impl(tokens)  # type: ignore[no-untyped-call]

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", instead)
    for user in ("train.compiled", "train.training"):
        monkeypatch.setattr(f"{user}.require_compiler", lambda device: None)
    return sizes


@pytest.mark.parametrize("recipe", ["full", "dora"])
def test_full_batches_alone_run_compiled(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    sizes = compile_in_name(monkeypatch)
    plain = run("plain", recipe, compile="off")
    assert sizes == []
    compiled = run("compiled", recipe)
    # Two full batches of 8 an epoch, four blocks; not the last 4 images, nor validation, nor the end.
    assert sizes == [8] * (2 * 2 * 4)
    assert compiled.sha256 == plain.sha256
    sizes.clear()
    run("parts", recipe, accumulate=3)
    assert sizes == [*[3] * 4, *[2] * 4, *[3] * 4] * 4


def test_it_is_part_of_what_decides_a_result(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_in_name(monkeypatch)
    assert training_run(compile="on").used_values()["compile"] == "on"
    assert "compile" not in training_run().used_values(), "as in results from before the key"
    assert "compile" not in training_run("probe", compile="on").used_values()
    run("a")
    assert run("a").reused
    assert not run("a", compile="off").reused


def test_auto_compiles_long_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = build_model("digits_vit", num_classes=10), torch.device("cuda")
    monkeypatch.setattr(train.compiled, "_lacks", lambda device: "")
    assert resolve_compile("auto", model, gpu, AUTO_STEPS) == "on"
    assert resolve_compile("auto", model, gpu, AUTO_STEPS - 1) == "off"
    assert resolve_compile("auto", model, CPU, AUTO_STEPS) == "off"
    assert resolve_compile("auto", nn.Linear(2, 2), gpu, AUTO_STEPS) == "off"
    assert resolve_compile("on", model, CPU, 1) == "on"
    monkeypatch.setattr(train.compiled, "_lacks", lambda device: "no C compiler is on the path")
    assert resolve_compile("auto", model, gpu, AUTO_STEPS) == "off"


def test_auto_that_does_not_compile_is_off(run: Callable[..., TrainResult]) -> None:
    run("a", compile="off")
    assert run("a", compile="auto").reused


def test_blocks_are_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_in_name(monkeypatch)
    model = build_model("digits_vit", num_classes=10)
    names = list(model.state_dict())

    def fails() -> None:
        with compiled_blocks(model, True) as blocks:
            blocks.use(True)
            assert all(block._compiled_call_impl is not None for block in model.blocks)
            assert list(model.state_dict()) == names
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_what_cannot_be_compiled_is_refused(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(InputError, match="the model has no transformer blocks"),
        compiled_blocks(nn.Sequential(nn.Linear(2, 2)), True),
    ):
        pass
    with compiled_blocks(nn.Linear(2, 2), False) as none:
        none.use(True)
    model = build_model("digits_vit", num_classes=10)
    assert transformer_blocks(nn.ModuleList([model])) == list(model.blocks)
    monkeypatch.setattr(train.compiled.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(InputError, match="Python's header files are not installed"):
        require_compiler(CPU)
    monkeypatch.setattr(train.compiled.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"no C compiler \(gcc, clang, or one that CC names\) is on the path"):
        require_compiler(torch.device("cuda"))
    with pytest.raises(InputError, match=r"train.compile is on, and no C compiler \(g\+\+"):
        run("a")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "dora"])
def test_compiled_runs_give_the_same_bits_and_resume_to_them(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    plain, whole = run("plain", recipe, compile="off"), run("whole", recipe)
    compiled = counters["stats"]["unique_graphs"]
    assert run("again", recipe).sha256 == whole.sha256
    assert counters["stats"]["unique_graphs"] == compiled, "blocks of the same kind share what is compiled"
    if recipe == "full":
        assert compiled == 1
    for name, tensor in read_checkpoint(plain.checkpoint).tensors.items():
        torch.testing.assert_close(read_checkpoint(whole.checkpoint).tensors[name], tensor, atol=2e-3, rtol=0)
    with interrupted(monkeypatch, step=4):
        run("cut", recipe)
    resumed = run("cut", recipe)
    assert resumed.sha256 == whole.sha256
    assert resumed.history == whole.history


def test_deterministic_products_are_asked_for_before_any_runs() -> None:
    """torch looks at the variable once, at a process's first product on a GPU."""
    take, look = "os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)", "print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    code = f"import os; {take}; from engine.capture import AttentionTap; {look}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ":4096:8"
