"""Class-specific relevance maps of any captured Vision Transformer, in batches; how faithful they are.

A name is imported when it is used: results are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engine.relevance.results import (
    CONTROL,
    ILLUSTRATIVE,
    MapMean,
    MapTest,
    PredictionLink,
    RelevanceResults,
    parse_relevance,
)

if TYPE_CHECKING:
    from engine.relevance.choice import choose_classes as choose_classes
    from engine.relevance.explained import samples_folder as samples_folder
    from engine.relevance.link import prediction_link as prediction_link
    from engine.relevance.maps import relevance_maps as relevance_maps
    from engine.relevance.methods import METHODS as METHODS
    from engine.relevance.stage import explain_study as explain_study

_HOMES = {
    "METHODS": "methods",
    "choose_classes": "choice",
    "explain_study": "stage",
    "prediction_link": "link",
    "relevance_maps": "maps",
    "samples_folder": "explained",
}

__all__ = [
    "CONTROL",
    "ILLUSTRATIVE",
    "METHODS",
    "MapMean",
    "MapTest",
    "PredictionLink",
    "RelevanceResults",
    "choose_classes",
    "explain_study",
    "parse_relevance",
    "prediction_link",
    "relevance_maps",
    "samples_folder",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
