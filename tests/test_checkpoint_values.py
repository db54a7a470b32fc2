"""Values of weights: those that are no numbers, too large, of another kind; which of several are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train.checkpoint import (
    state_digest,
)
from train.errors import InputError
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint
from train.weights import refuse_unfit_values

UNUSUAL: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "int8": (lambda weight: (weight * 100).to(torch.int8), r"is int8, expected real numbers \(float32\)"),
    "uint8": (lambda weight: (weight * 100).to(torch.uint8), r"is uint8, expected real numbers"),
    "bool": (lambda weight: weight > 0, r"is bool, expected real numbers"),
    "complex64": (lambda weight: weight.to(torch.complex64), "is complex64, expected plain numbers"),
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn, expected plain numbers"),
    "quantised": (lambda w: torch.quantize_per_tensor(w, 0.01, 0, torch.qint8), r"is quantised \(qint8\)"),
    "sparse": (lambda weight: weight.to_sparse(), r"is sparse \(sparse_coo, float32\)"),
    "meta": (lambda weight: weight.to("meta"), "is a shape without values"),
}


TINY = "test_vit"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(TINY, num_classes=3).eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, model: nn.Module, value: float) -> None:
    path = tmp_path / "a.safetensors"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.2.attn.qkv.weight"][5, 7] = value
    state["blocks.2.attn.qkv.weight"][6, 0] = value
    for dtype in (torch.float32, torch.bfloat16):
        save_file({name: tensor.to(dtype) for name, tensor in state.items()}, path)
        message = rf"a\.safetensors: blocks\.2\.attn\.qkv\.weight\[5, 7\] is {value}, and 1 more of its values"
        with pytest.raises(InputError, match=message):
            load_checkpoint(TINY, path)
        with pytest.raises(InputError, match=message):
            build_model(ModelSource(TINY, weights=path), num_classes=5)


def test_a_weight_too_large_for_float32_is_named(tmp_path: Path, model: nn.Module) -> None:
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state["norm.bias"][3] = 1e300
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"norm\.bias\[3\] is inf;"):
        load_checkpoint(TINY, tmp_path / "a.safetensors")


def test_infinity_that_is_the_models_own_may_stay(tmp_path: Path) -> None:
    own = {"bound": torch.tensor([-torch.inf, torch.inf]), "weight": torch.zeros(2)}
    refuse_unfit_values({name: tensor.clone() for name, tensor in own.items()}, own, tmp_path)
    for bound in ([torch.inf, torch.inf], [torch.nan, torch.inf]):
        with pytest.raises(InputError, match=r"bound\["):
            refuse_unfit_values({"bound": torch.tensor(bound)}, own, tmp_path)


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|TypedStorage|sparse tensor)")
def test_weights_that_would_be_cast_are_refused_by_name(tmp_path: Path, model: nn.Module, kind: str) -> None:
    change, message = UNUSUAL[kind]
    state = dict(model.state_dict())
    state["head.weight"] = change(state["head.weight"])
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"a\.pth: head\.weight {message}"):
        load_checkpoint(TINY, tmp_path / "a.pth")


def test_half_and_double_weights_are_computed_in_float32_which_is_said_once(
    tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="train")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = tmp_path / f"{dtype}.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, path)
        for _ in range(2):
            found = load_checkpoint(TINY, path).state_dict()
            expected = {name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()}
            assert state_digest(found) == state_digest(expected)
        sentence = f"weights of {str(dtype).removeprefix('torch.')} are computed with in float32"
        assert len([line for line in caplog.messages if sentence in line]) == 1


def test_integers_that_the_model_has_as_integers_stay(tmp_path: Path) -> None:
    model = build_model("test_resnet", num_classes=2)
    state = model.state_dict()
    state["bn1.num_batches_tracked"] += 7
    torch.save(state, tmp_path / "a.pth")
    found = load_checkpoint("test_resnet", tmp_path / "a.pth").state_dict()
    assert int(found["bn1.num_batches_tracked"]) == 7
    torch.save(state | {"bn1.num_batches_tracked": torch.tensor(7.5)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"num_batches_tracked is float32, expected integers \(int64\)"):
        load_checkpoint("test_resnet", tmp_path / "a.pth")


def test_which_of_several_weights_are_used_is_said_and_can_be_chosen(
    tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="train")
    plain = model.state_dict()
    average = {name: tensor * 0.5 for name, tensor in plain.items()}
    for ema in ("model_ema", "state_dict_ema", "ema"):
        path = tmp_path / f"{ema}.pth"
        torch.save({"epoch": 3, "model": plain, ema: average}, path)
        assert state_digest(load_checkpoint(TINY, path).state_dict()) == state_digest(plain)
        assert f"{path}: weights taken from 'model'; '{ema}' not used (model.state chooses another)" in caplog.text
        assert state_digest(load_checkpoint(ModelSource(TINY, state=ema), path).state_dict()) == state_digest(average)
        with pytest.raises(
            InputError, match=rf"holds no weights under 'other' \(it has keys 'epoch', 'model', '{ema}'\)"
        ):
            load_checkpoint(ModelSource(TINY, state="other"), path)
    save_file(plain, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds no weights under 'model'"):
        load_checkpoint(ModelSource(TINY, state="model"), tmp_path / "a.safetensors")
    itself: dict[str, Any] = {"epoch": 3}
    itself["model"] = itself
    torch.save(itself, tmp_path / "itself.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        load_checkpoint(TINY, tmp_path / "itself.pth")
