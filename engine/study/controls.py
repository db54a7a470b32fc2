"""Negative controls: comparisons whose true answer is known to be zero, run in every study.

Both models of a pair see the same batch one after the other, and their maps are compared bit for bit, so nothing is
rounded away by storage. A control that does not hold means that a difference in the report may come from the engine
and not from fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.capture import AttentionSite, SiteAttention, block_of, num_blocks, observe, reached_block
from engine.progress import say
from kernels import measure_qk
from train.data import ImageSet


@dataclass(frozen=True)
class Control:
    """One control and whether it held.

    Args:
        name: short name, e.g. "frozen_backbone".
        title: heading in the report.
        expectation: what must come out, in words.
        value: the largest absolute difference found where zero is expected.
        held: whether the expectation came true.
        detail: numbers behind it.
    """

    name: str
    title: str
    expectation: str
    value: float
    held: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LayerDifference:
    """Largest differences of one layer between two models over all images.

    Args:
        site: the module's name.
        attention: max |A₂ − A₁| over the maps, in the forward pass's own precision.
        metrics: metric name -> max |m₂ − m₁|.
        identical: every element of every map has the same bits.
    """

    site: str
    attention: float
    metrics: dict[str, float]
    identical: bool


def lockstep(
    first: torch.nn.Module,
    second: torch.nn.Module,
    images: ImageSet,
    rows: Sequence[int],
    *,
    metrics: Sequence[str],
    batch_size: int,
    device: str,
    label: str,
) -> list[LayerDifference]:
    """Run two models over the same images and compare every map and metric, layer by layer.

    Args:
        first, second: models of one architecture.
        images, rows: which images.
        metrics: row metrics to compare beside the maps, by name or as `module:name` of your own.
        batch_size: images a forward pass; both models see the same batches.
        device: where the models run.
        label: name in the progress bar.

    Returns:
        One entry a measurable layer, in depth order.
    """
    worst: dict[int, LayerDifference] = {}
    with tqdm(total=len(rows), desc=label, unit="image", disable=None) as progress:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            pixels = images.batch(chosen).to(device)
            ones, others = (_maps_and_metrics(model, pixels, metrics) for model in (first, second))
            for (site, map_1, values_1), (_, map_2, values_2) in zip(ones, others, strict=True):
                now = LayerDifference(
                    site.name,
                    float((map_2 - map_1).abs().max()),
                    {name: _largest(values_2[name] - values_1[name]) for name in values_1},
                    torch.equal(map_1, map_2),
                )
                worst[site.layer] = _worse(worst.get(site.layer), now)
            progress.update(len(chosen))
    return [worst[layer] for layer in sorted(worst)]


def _maps_and_metrics(
    model: torch.nn.Module, pixels: torch.Tensor, metrics: Sequence[str]
) -> list[tuple[AttentionSite, torch.Tensor, Mapping[str, np.ndarray]]]:
    found: list[tuple[AttentionSite, torch.Tensor, Mapping[str, np.ndarray]]] = []

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


def _worse(before: LayerDifference | None, now: LayerDifference) -> LayerDifference:
    if before is None:
        return now
    return LayerDifference(
        now.site,
        max(before.attention, now.attention),
        {name: max(before.metrics[name], value) for name, value in now.metrics.items()},
        before.identical and now.identical,
    )


def same_attention_control(
    name: str, title: str, expectation: str, layers: Sequence[LayerDifference], images: int
) -> Control:
    """A pair that must be the same in every layer: each map's bits, each metric's difference exactly 0."""
    largest = max(layer.attention for layer in layers)
    metric = max((value for layer in layers for value in layer.metrics.values()), default=0.0)
    identical = all(layer.identical for layer in layers)
    return Control(
        name,
        title,
        expectation,
        max(largest, metric),
        identical and metric == 0.0,
        f"{len(layers)} layers, {images} images: largest difference of a map {largest:g}, of a metric {metric:g}; "
        f"bits {'identical' if identical else 'different'}",
    )


def hybrid_state(
    lower: Mapping[str, torch.Tensor], upper: Mapping[str, torch.Tensor], first_block: int
) -> dict[str, torch.Tensor]:
    """Weights of `lower` below block `first_block`, of `upper` from there on, and the readout of `lower`.

    No attention depends on the readout, so the two models may have heads of other sizes, or none.

    Raises:
        ValueError: the weights have no `blocks.N.` names, so "below" has no meaning.
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
    below, above = _divided(layers, first_block)
    largest = max((max([layer.attention, *layer.metrics.values()]) for layer in below), default=0.0)
    changed = max((layer.attention for layer in above), default=0.0)
    held = bool(below) and bool(above) and all(layer.identical for layer in below) and largest == 0.0
    held = held and (changed > 0.0 or not differs)
    return Control(
        f"hybrid_{condition}",
        f"Hybrid of {against} and {condition}",
        f"blocks below {first_block} from {against}, from there on from {condition}: exactly 0 in every layer below "
        f"block {first_block}, and not 0 above it",
        largest,
        held,
        f"{images} images: largest difference {largest:g} in the {len(below)} layers below block {first_block}, "
        f"{changed:g} in the {len(above)} from there on",
    )


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
    below, above = _divided(layers, first_block)
    largest = max((max([layer.attention, *layer.metrics.values()]) for layer in below), default=0.0)
    changed = max((layer.attention for layer in above), default=0.0)
    held = bool(below) and all(layer.identical for layer in below) and largest == 0.0 and (changed > 0.0 or not above)
    return Control(
        f"untouched_{condition}",
        f"Blocks that {condition} could not change",
        f"no weight that differs from {against} reaches the attention of blocks 0 to {first_block - 1}: exactly 0 there"
        + (", and not 0 above" if above else ""),
        largest,
        held,
        f"{images} images: largest difference {largest:g} in the {len(below)} layers below block {first_block}, "
        f"{changed:g} in the {len(above)} from there on",
    )


@dataclass(frozen=True)
class Contender:
    """One condition as the controls need it.

    Args:
        load: builds its model, in evaluation mode on the controls' device.
        frozen: its backbone was never trained.
    """

    load: Callable[[], torch.nn.Module]
    frozen: bool


def negative_controls(
    contenders: Mapping[str, Contender],
    against: str,
    pretrained: Callable[[], torch.nn.Module],
    images: ImageSet,
    rows: Sequence[int],
    *,
    metrics: Sequence[str],
    batch_size: int,
    device: str,
) -> list[Control]:
    """Every control a study can make: frozen backbones, each condition against itself, hybrids with `against`, and
    the blocks that a condition could not change.

    Args:
        contenders: condition -> its model.
        against: the condition that the others are compared with; alone, it is compared with itself.
        pretrained: builds the model that frozen backbones must equal; called only for those.
        images, rows, metrics, batch_size, device: see `lockstep`.
    """

    def pair(first: torch.nn.Module, second: torch.nn.Module, what: str) -> list[LayerDifference]:
        return lockstep(
            first, second, images, rows, metrics=metrics, batch_size=batch_size, device=device, label=f"control: {what}"
        )

    controls = []
    for name, contender in contenders.items():
        if contender.frozen:
            controls.append(
                same_attention_control(
                    f"frozen_{name}",
                    f"{name}'s backbone is the pretrained one",
                    "a frozen backbone attends exactly as the pretrained model, bit for bit",
                    pair(pretrained(), contender.load(), f"{name} frozen"),
                    len(rows),
                )
            )
    for name, contender in contenders.items():
        if name == against and len(contenders) > 1:
            continue
        controls.append(
            same_attention_control(
                f"itself_{name}",
                f"{name} against itself",
                "loaded twice, measured twice: exactly 0 in every layer",
                pair(contender.load(), contender.load(), f"{name} against itself"),
                len(rows),
            )
        )
        if name == against:
            continue
        lower, upper = contenders[against].load(), contender.load()
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
        mixed = contenders[against].load()
        mixed.load_state_dict(hybrid_state(*states, middle))
        layers = pair(lower, mixed, f"hybrid with {name}")
        controls.append(hybrid_control(name, against, layers, middle, len(rows), differs=differs))
        if (first := first_reached_block(*states)) > 0:
            layers = pair(lower, upper, f"blocks that {name} could not change")
            controls.append(untouched_control(name, against, layers, first, len(rows)))
    return controls


def _last_block(weights: Iterable[str]) -> int | None:
    """The greatest number of a block; None without any."""
    return max((block for name in weights if (block := block_of(name)) is not None), default=None)


def _divided(
    layers: Sequence[LayerDifference], first_block: int
) -> tuple[list[LayerDifference], list[LayerDifference]]:
    """Layers below a block, and those from there on; a site outside of the blocks counts as in block 0."""
    above = [(block_of(layer.site) or 0) >= first_block for layer in layers]
    return (
        [layer for layer, is_above in zip(layers, above, strict=True) if not is_above],
        [layer for layer, is_above in zip(layers, above, strict=True) if is_above],
    )
