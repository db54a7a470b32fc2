"""Negative controls: comparisons whose true answer is known to be zero, run in every study.

Both models of a pair see the same batch one after the other, and their maps are compared bit for bit, so nothing is
rounded away by storage. A control that does not hold means that a difference in the report may come from the engine
and not from fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.capture import AttentionSite, SiteAttention, block_of, num_blocks, observe, reached_block
from engine.progress import say
from engine.statistics import Control
from kernels import measure_qk
from train.data import ImageSet

CONTROLS = Path("metrics/controls.json")  # in the outputs folder

_Layer = tuple[AttentionSite, torch.Tensor, Mapping[str, np.ndarray]]  # its maps, and metric -> values


@dataclass(frozen=True)
class LayerDifference:
    """Largest differences of one layer between two models over all images."""

    site: str  # the module's name
    attention: float  # max |A₂ − A₁| over the maps, in the forward pass's own precision
    metrics: dict[str, float]  # metric -> max |m₂ − m₁|
    identical: bool  # every element of every map has the same bits

    @property
    def largest(self) -> float:
        """Of the maps and of the metrics."""
        return max([self.attention, *self.metrics.values()])

    def or_worse(self, other: LayerDifference) -> LayerDifference:
        """Of these images and others."""
        return LayerDifference(
            self.site,
            max(self.attention, other.attention),
            {name: max(value, other.metrics[name]) for name, value in self.metrics.items()},
            self.identical and other.identical,
        )


@dataclass(frozen=True)
class Lockstep:
    """Runs two models of one architecture over the same batches; compares every map and row metric, layer by layer."""

    images: ImageSet
    rows: Sequence[int]
    metrics: Sequence[str]  # by name, or as `module:name` of your own
    batch_size: int
    device: str

    def compare(self, first: torch.nn.Module, second: torch.nn.Module, label: str) -> list[LayerDifference]:
        """One entry per layer, in depth order; `label` stands in the progress bar."""
        worst: dict[int, LayerDifference] = {}
        with tqdm(total=len(self.rows), desc=f"control: {label}", unit="image", disable=None) as progress:
            for start in range(0, len(self.rows), self.batch_size):
                chosen = self.rows[start : start + self.batch_size]
                pixels = self.images.batch(chosen).to(self.device)
                ones, others = (_maps_and_metrics(model, pixels, self.metrics) for model in (first, second))
                for (site, map_1, values_1), (_, map_2, values_2) in zip(ones, others, strict=True):
                    now = LayerDifference(
                        site.name,
                        float((map_2 - map_1).abs().max()),
                        {name: _largest(values_2[name] - values_1[name]) for name in values_1},
                        torch.equal(map_1, map_2),
                    )
                    worst[site.layer] = now.or_worse(worst.get(site.layer, now))
                progress.update(len(chosen))
        return [worst[layer] for layer in sorted(worst)]


def _maps_and_metrics(model: torch.nn.Module, pixels: torch.Tensor, metrics: Sequence[str]) -> list[_Layer]:
    found: list[_Layer] = []

    def keep(attention: SiteAttention) -> None:
        site, scale, bias = attention.site, attention.scale, attention.bias
        measured = measure_qk(attention.query, attention.key, site.layout, tuple(metrics), scale, bias)
        values = {name: torch.as_tensor(of_heads).cpu().numpy() for name, of_heads in measured.items()}
        found.append((site, attention.maps(), values))

    observe(model, pixels, keep)
    return found


def _largest(difference: np.ndarray) -> float:
    """max |difference|; undefined values (NaN in both models) count as equal, since equal maps are undefined alike."""
    return float(np.nanmax(np.abs(difference), initial=0.0))


def same_attention_control(
    name: str, title: str, expectation: str, layers: Sequence[LayerDifference], images: int
) -> Control:
    """A pair that must be the same in every layer: each map's bits, each metric's difference exactly 0."""
    largest = max(layer.attention for layer in layers)
    metric = max((value for layer in layers for value in layer.metrics.values()), default=0.0)
    identical = all(layer.identical for layer in layers)
    detail = (
        f"{len(layers)} layers, {images} images: largest difference of a map {largest:g}, of a metric {metric:g}; "
        f"bits {'identical' if identical else 'different'}"
    )
    return Control(name, title, expectation, max(largest, metric), identical and metric == 0.0, detail)


def hybrid_state(
    lower: Mapping[str, torch.Tensor], upper: Mapping[str, torch.Tensor], first_block: int
) -> dict[str, torch.Tensor]:
    """Weights of `lower` below block `first_block`, of `upper` from there on, and the readout of `lower`.

    No attention depends on the readout, so the two models may have heads of other sizes, or none. Raises ValueError
    where the weights have no `blocks.N.` names, so that "below" has no meaning.
    """
    last = _last_block(lower)
    if last is None:
        raise ValueError("the weights have no blocks.N. names; a hybrid of two models cannot be made")
    if not 0 < first_block <= last:
        raise ValueError(f"first_block is {first_block}; expected 1 to {last}")
    return {key: (upper if (block_of(key) or 0) >= first_block else lower)[key] for key in lower}


def hybrid_control(
    condition: str, against: str, layers: Sequence[LayerDifference], first_block: int, images: int, *, differs: bool
) -> Control:
    """Below its first changed block a hybrid must equal the lower model exactly; from there on, it must differ.

    `differs` says whether any weight from `first_block` on differs at all between the two conditions: only then must
    attention differ somewhere above, which shows that the control is able to fail.
    """
    # The first changed block's own q and k are made by changed weights, so its map differs already.
    same, changed, largest, detail = _divided(layers, first_block, images)
    expectation = (
        f"blocks below {first_block} from {against}, from there on from {condition}: exactly 0 in every layer below "
        f"block {first_block}, and not 0 above it"
    )
    held = same and changed is not None and (changed > 0.0 or not differs)
    title = f"Hybrid of {against} and {condition}"
    return Control(f"hybrid_{condition}", title, expectation, largest, held, detail)


def first_reached_block(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> int:
    """The first block whose attention can differ between two states of one model; past the last where none can.

    Readouts may be of other sizes, or missing; see `reached_block`.
    """
    reached = {key: block for key in one if (block := reached_block(key)) is not None}
    last = _last_block(one)
    past = 0 if last is None else last + 1
    return min((block for key, block in reached.items() if not torch.equal(one[key], other[key])), default=past)


def untouched_control(
    condition: str, against: str, layers: Sequence[LayerDifference], first_block: int, images: int
) -> Control:
    """Blocks that fine-tuning cannot reach must attend as in the other condition, bit for bit; the ones above must not.

    `first_block` is what `first_reached_block` says of the two conditions.
    """
    same, changed, largest, detail = _divided(layers, first_block, images)
    expectation = (
        f"no weight that differs from {against} reaches the attention of blocks 0 to {first_block - 1}: exactly 0 there"
    )
    if changed is not None:
        expectation += ", and not 0 above"
    held = same and (changed is None or changed > 0.0)
    title = f"Blocks that {condition} could not change"
    return Control(f"untouched_{condition}", title, expectation, largest, held, detail)


def _divided(layers: Sequence[LayerDifference], first_block: int, images: int) -> tuple[bool, float | None, float, str]:
    """Whether the layers below a block are the same, the largest difference of a map above (None: no layer is there),
    the largest of all below, and both in words. A site outside of the blocks counts as in block 0.
    """
    below = [layer for layer in layers if (block_of(layer.site) or 0) < first_block]
    above = [layer.attention for layer in layers if (block_of(layer.site) or 0) >= first_block]
    largest = max((layer.largest for layer in below), default=0.0)
    changed = max(above, default=None)
    same = bool(below) and all(layer.identical for layer in below) and largest == 0.0
    detail = (
        f"{images} images: largest difference {largest:g} in the {len(below)} layers below block {first_block}, "
        f"{changed or 0.0:g} in the {len(above)} from there on"
    )
    return same, changed, largest, detail


def negative_controls(
    models: Mapping[str, Callable[[], torch.nn.Module]],
    frozen: Collection[str],
    against: str,
    pretrained: Callable[[], torch.nn.Module],
    lockstep: Lockstep,
) -> list[Control]:
    """Every control a study can make: frozen backbones, each condition against itself, hybrids with `against`, and
    the blocks that a condition could not change.

    `models` loads each condition's model, in evaluation mode on the device; `pretrained` builds the one that the
    backbones of the conditions in `frozen` must equal. Alone, `against` is compared with itself.
    """
    count, controls = len(lockstep.rows), []
    for name in (name for name in models if name in frozen):
        title = f"{name}'s backbone is the pretrained one"
        expectation = "a frozen backbone attends exactly as the pretrained model, bit for bit"
        layers = lockstep.compare(pretrained(), models[name](), f"{name} frozen")
        controls.append(same_attention_control(f"frozen_{name}", title, expectation, layers, count))
    for name, load in models.items():
        if name == against and len(models) > 1:
            continue
        title, expectation = f"{name} against itself", "loaded twice, measured twice: exactly 0 in every layer"
        layers = lockstep.compare(load(), load(), title)
        controls.append(same_attention_control(f"itself_{name}", title, expectation, layers, count))
        if name == against:
            continue
        lower, upper = models[against](), load()
        blocks = num_blocks(lower)
        if blocks < 2:
            say("hybrid control left out: the model has no row of blocks to divide")
            continue
        middle = blocks // 2
        states = lower.state_dict(), upper.state_dict()
        differs = any(
            middle <= block and (reached_block(key) or 0) < blocks and not torch.equal(states[0][key], states[1][key])
            for key in states[0]
            if (block := block_of(key)) is not None
        )
        mixed = models[against]()
        mixed.load_state_dict(hybrid_state(*states, middle))
        layers = lockstep.compare(lower, mixed, f"hybrid with {name}")
        controls.append(hybrid_control(name, against, layers, middle, count, differs=differs))
        if (first := first_reached_block(*states)) > 0:
            layers = lockstep.compare(lower, upper, f"blocks that {name} could not change")
            controls.append(untouched_control(name, against, layers, first, count))
    return controls


def _last_block(weights: Iterable[str]) -> int | None:
    """The greatest number of a block; None without any."""
    return max((block for name in weights if (block := block_of(name)) is not None), default=None)
