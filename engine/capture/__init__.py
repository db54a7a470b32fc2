"""Attention of every layer, head and image, while the model runs at full speed: seen, measured on the spot, stored."""

from engine.capture.attention_call import AttentionCall, attention_map, read_attention_call
from engine.capture.batch_sinks import discover_factors, stack_layers, stored_layers
from engine.capture.interception import FunctionCall, ModelInterception, named_modules, unwrapped
from engine.capture.layouts import CaptureError, patch_stem, token_layout, vision_module
from engine.capture.metrics import (
    check_metrics,
    chosen_backend,
    definition,
    definitions,
    load_metrics,
    metric_parameters,
    metrics_of_one_capture,
)
from engine.capture.prefix_mass import heads_on_prefix
from engine.capture.samples import FILES, add_sample_maps, choose_samples, require_samples_place, start_samples
from engine.capture.sinks import Capture, capture_to_store
from engine.capture.tap import AttentionSite, AttentionTap, capture_attention, discover_sites, evaluating, has_classes

__all__ = [
    "FILES",
    "AttentionCall",
    "AttentionSite",
    "AttentionTap",
    "Capture",
    "CaptureError",
    "FunctionCall",
    "ModelInterception",
    "add_sample_maps",
    "attention_map",
    "capture_attention",
    "capture_to_store",
    "check_metrics",
    "choose_samples",
    "chosen_backend",
    "definition",
    "definitions",
    "discover_factors",
    "discover_sites",
    "evaluating",
    "has_classes",
    "heads_on_prefix",
    "load_metrics",
    "metric_parameters",
    "metrics_of_one_capture",
    "named_modules",
    "patch_stem",
    "read_attention_call",
    "require_samples_place",
    "stack_layers",
    "start_samples",
    "stored_layers",
    "token_layout",
    "unwrapped",
    "vision_module",
]
