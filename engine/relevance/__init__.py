"""Class-specific relevance maps of any captured Vision Transformer, in batches; how faithful they are.

A name is imported when it is used: results are read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import imported_when_used

if TYPE_CHECKING:
    from engine.relevance.choice import choose_classes
    from engine.relevance.link import prediction_link
    from engine.relevance.maps import relevance_maps
    from engine.relevance.methods import METHODS
    from engine.relevance.results import (
        CONTROL,
        ILLUSTRATIVE,
        MapMean,
        MapTest,
        PredictionLink,
        RelevanceResults,
        parse_relevance,
        samples_folder,
    )
    from engine.relevance.stage import explain_study

__all__, __getattr__, __dir__ = imported_when_used(__name__, __file__)
