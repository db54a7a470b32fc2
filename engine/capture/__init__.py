"""Attention of every layer, head and image, while the model runs at full speed: seen, measured on the spot, stored.

A name is imported when it is used: the report reads sample maps without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import imported_when_used

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
        attention_weights,
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
    from engine.capture.tap import AttentionTap, capture_attention, evaluating, has_classes, logits_of, observe

__all__, __getattr__, __dir__ = imported_when_used(__name__, __file__)
