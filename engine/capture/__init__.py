"""Attention of every layer, head and image, while the model runs at full speed: seen, measured on the spot, stored.

A name is imported when it is used: the report reads sample maps without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.capture.attention_call import (
        AttentionCall,
        AttentionSite,
        SiteAttention,
        attention_map,
        read_attention_call,
    )
    from engine.capture.discovery import Discovery, discover
    from engine.capture.families import (
        FIRST_NORMS,
        CaptureError,
        block_of,
        first_norm,
        num_blocks,
        patch_stem,
        reached_block,
        token_layout,
        transformer_blocks,
        vision_module,
    )
    from engine.capture.interception import FunctionCall, ModelInterception, named_modules, unwrapped
    from engine.capture.metrics import definitions, metric_parameters, stored_parameters
    from engine.capture.prefix_mass import heads_on_prefix
    from engine.capture.samples import FILES, SampleLayer, SampleMaps, SampleRun, choose_samples, require_samples_place
    from engine.capture.sinks import stack_layers
    from engine.capture.stream import Capture, capture_to_store
    from engine.capture.tap import AttentionTap, capture_attention, evaluating, has_classes, observe

# module of this room -> what it gives to others
_NAMES = {
    "attention_call": "AttentionCall AttentionSite SiteAttention attention_map read_attention_call",
    "discovery": "Discovery discover",
    "families": "FIRST_NORMS CaptureError block_of first_norm num_blocks patch_stem reached_block token_layout"
    " transformer_blocks vision_module",
    "interception": "FunctionCall ModelInterception named_modules unwrapped",
    "metrics": "definitions metric_parameters stored_parameters",
    "prefix_mass": "heads_on_prefix",
    "samples": "FILES SampleLayer SampleMaps SampleRun choose_samples require_samples_place",
    "sinks": "stack_layers",
    "stream": "Capture capture_to_store",
    "tap": "AttentionTap capture_attention evaluating has_classes observe",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "FILES",
    "FIRST_NORMS",
    "AttentionCall",
    "AttentionSite",
    "AttentionTap",
    "Capture",
    "CaptureError",
    "Discovery",
    "FunctionCall",
    "ModelInterception",
    "SampleLayer",
    "SampleMaps",
    "SampleRun",
    "SiteAttention",
    "attention_map",
    "block_of",
    "capture_attention",
    "capture_to_store",
    "choose_samples",
    "definitions",
    "discover",
    "evaluating",
    "first_norm",
    "has_classes",
    "heads_on_prefix",
    "metric_parameters",
    "named_modules",
    "num_blocks",
    "observe",
    "patch_stem",
    "reached_block",
    "read_attention_call",
    "require_samples_place",
    "stack_layers",
    "stored_parameters",
    "token_layout",
    "transformer_blocks",
    "unwrapped",
    "vision_module",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"engine.capture.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
