"""ENCODINGS: what is kept of a layer's attention, and how its maps come back.  <- the seam for a new encoding

An encoding names the arrays that keep a layer (`Part`) and splits what a capture gives into them. The codec chain
behind all is the same (see `store.shards`). It takes 0.75 of raw fp16 on a trained ViT's maps; zstd-1 takes 0.71-0.74
at a third of the speed. Without the CRC-32C, 58 of 60 flipped bits read back wrong in silence; with it, none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.precisions import Array, as_numbers, widen
from store.schema import STORED_MAPS, FactorSchema, LayerSchema, StoreError

Numbers = tuple[Array, str]  # values and their precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What one layer's attention is made of: softmax(scale · query·keyᵀ + bias).

    Args:
        query, key: [image, head, token, head_dim], after any rotary embedding and normalisation.
        scale: factor of q·k.
        bias: additive, or boolean (True = attend), broadcastable to [image, head, query, key]; None: none.
    """

    query: Any
    key: Any
    scale: float
    bias: Any = None


@dataclass(frozen=True, slots=True)
class Part:
    """One array that keeps a part of a layer's attention."""

    name: str  # behind the layer's path; "": the layer is this array
    dims: tuple[str, ...]  # behind `image`
    shape: tuple[int, ...]  # of an image
    precision: str  # see `store.precisions`


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to keep post-softmax attention."""

    name: str  # what a user writes in `capture.encoding`
    precision: str  # of the maps, see `store.schema.STORED_MAPS`
    parts: Callable[[LayerSchema], tuple[Part, ...]]  # a layer's arrays that grow with the images
    split: Callable[[LayerSchema, Any], dict[str, Numbers]]  # attention as captured -> values of each part by name

    @property
    def keeps_factors(self) -> bool:
        """Whether query and key are kept, not the maps."""
        return not self.precision


def resolve_encoding(name: str) -> Encoding:
    """The encoding of that name; StoreError if there is none."""
    if name not in ENCODINGS:
        raise StoreError(f"encoding is {name!r}; expected one of {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def _keeping_maps(name: str, precision: str) -> Encoding:
    def parts(layer: LayerSchema) -> tuple[Part, ...]:
        return (Part("", ("head", "query", "key"), (layer.heads, layer.tokens, layer.tokens), precision),)

    def split(layer: LayerSchema, attention: Any) -> dict[str, Numbers]:
        what = f"attention of layer {layer.layer}"
        if isinstance(attention, Factors):
            raise StoreError(f"{what} is given as query and key; {name} keeps maps [image, head, query, key]")
        return {"": as_numbers(attention, what)}

    return Encoding(name, precision, parts, split)


def factor_schema(factors: Factors, heads: int) -> FactorSchema:
    """What is fixed about a layer's factors, read off those of two images or more (one, if there are no more).

    float16 and bfloat16 are kept as they are; float32 is kept as float16. Raises StoreError for what is not floating
    point, or a bias that is no [image, head, query, key].
    """
    query, precision = as_numbers(factors.query, "query")
    images = query.shape[0]
    kind, shape, bias_precision = "", (), "float32"
    if factors.bias is not None:
        bias, bias_precision = _with_four_axes(factors.bias, "bias")
        if bias.ndim != 4 or bias.shape[0] not in (1, images) or bias.shape[1] not in (1, heads):
            raise StoreError(f"bias has shape {bias.shape}; expected [image, head, query, key], or 1 in place of some")
        # Expanded over the images, it is one bias for all.
        kind = "shared" if bias.shape[0] == 1 or bias.strides[0] == 0 else "image"
        shape = bias.shape[1:]
    return FactorSchema(
        head_dim=query.shape[-1],
        precision="bfloat16" if precision == "bfloat16" else "float16",
        scale=float(factors.scale),
        bias=kind,
        bias_shape=shape,
        bias_precision="bool" if bias_precision == "bool" else "float32",
    )


def bias_dims(layer: LayerSchema) -> tuple[str, ...]:
    """Dimensions of a layer's kept bias behind `image`: those along which it is not constant."""
    return tuple(("head", "query_token", "key_token")[axis] for axis in _varying(_factors(layer).bias_shape))


def shared_bias(layer: LayerSchema, bias: Any) -> Array:
    """The bias of all images as it is kept, over `bias_dims`; StoreError for another shape than the schema's."""
    values, precision = _with_four_axes(bias, f"bias of layer {layer.layer}")
    factors = _factors(layer)
    if precision == "bfloat16":
        wide = np.empty(values.shape, np.float32)
        widen(values, precision, wide)
        values = wide
    if values.shape[1:] != factors.bias_shape:
        raise StoreError(f"bias of layer {layer.layer} has shape {values.shape}; expected [1, *{factors.bias_shape}]")
    return np.ascontiguousarray(values[0].astype(factors.bias_precision, copy=False)).reshape(_kept(factors.bias_shape))


def with_all_axes(layer: LayerSchema, kept: Array) -> Array:
    """A kept bias with the axes that were left out, broadcastable to [(image,) head, query, key]."""
    factors = _factors(layer)
    return kept.reshape(*(kept.shape[:1] if factors.bias == "image" else ()), *factors.bias_shape)


def _with_four_axes(bias: Any, what: str) -> Numbers:
    values, precision = as_numbers(bias, what)
    return values[(np.newaxis,) * (4 - values.ndim)], precision


def _factors(layer: LayerSchema) -> FactorSchema:
    assert layer.factors is not None  # StoreSchema refuses such a layer
    return layer.factors


def _varying(shape: tuple[int, ...]) -> list[int]:
    """Axes of (head, query, key) along which a bias is not constant: the others are not kept."""
    return [axis for axis, size in enumerate(shape) if size > 1]


def _kept(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _varying(shape))


def _factor_parts(layer: LayerSchema) -> tuple[Part, ...]:
    factors = _factors(layer)
    shape = (layer.heads, layer.tokens, factors.head_dim)
    dims = ("head", "token", "dim")
    parts = [Part("query", dims, shape, factors.precision), Part("key", dims, shape, factors.precision)]
    if factors.bias == "image":
        parts.append(Part("bias", bias_dims(layer), _kept(factors.bias_shape), factors.bias_precision))
    return tuple(parts)


def _split_factors(layer: LayerSchema, attention: Any) -> dict[str, Numbers]:
    what = f"attention of layer {layer.layer}"
    if not isinstance(attention, Factors):
        raise StoreError(f"{what} is a {type(attention).__name__}; the qk encoding takes Factors(query, key, scale)")
    fixed = _factors(layer)
    if float(attention.scale) != fixed.scale:
        raise StoreError(f"{what} has scale {attention.scale}; the store's schema has {fixed.scale}")
    if (attention.bias is None) != (fixed.bias == ""):
        raise StoreError(f"{what} comes {'without' if attention.bias is None else 'with'} a bias, unlike the first one")
    numbers = {
        name: as_numbers(getattr(attention, name), f"{name} of layer {layer.layer}") for name in ("query", "key")
    }
    for name, (values, precision) in numbers.items():
        if fixed.precision == "float16" and precision in ("float32", "float64"):
            largest = max(float(values.max()), -float(values.min()), 0.0)
            if not largest < 65520:  # NaN too
                raise StoreError(
                    f"{name} of layer {layer.layer} reaches {largest:.3g}, which float16 cannot hold; keep maps with "
                    "encoding fp16 or bf16, or run the model in bfloat16"
                )
    if fixed.bias == "image":
        bias, precision = _with_four_axes(attention.bias, f"bias of layer {layer.layer}")
        images = numbers["query"][0].shape[0]
        bias = np.broadcast_to(bias, (images, *bias.shape[1:])) if bias.shape[0] == 1 else bias
        if bias.shape[1:] != fixed.bias_shape:
            raise StoreError(
                f"bias of layer {layer.layer} has shape {bias.shape}; expected {fixed.bias_shape} per image"
            )
        numbers["bias"] = (bias.reshape(images, *_kept(fixed.bias_shape)), precision)
    return numbers


def softmax_maps(factors: Factors, precision: str, out: Array) -> None:
    """softmax(scale · q kᵀ + bias) of stored factors into `out`, float32 [image, head, query, key], image by image."""
    shape = factors.query.shape[1:]
    query, key = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for image, logits in enumerate(out):
        widen(factors.query[image], precision, query)
        widen(factors.key[image], precision, key)
        np.matmul(query * np.float32(factors.scale), key.swapaxes(-2, -1), out=logits)
        bias = factors.bias[image] if factors.bias is not None and factors.bias.ndim == 4 else factors.bias
        if bias is not None and bias.dtype == bool:
            np.copyto(logits, -np.inf, where=~bias)
        elif bias is not None:
            logits += bias
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)


ENCODINGS = {
    name: _keeping_maps(name, precision) if precision else Encoding(name, "", _factor_parts, _split_factors)
    for name, precision in STORED_MAPS.items()
}
