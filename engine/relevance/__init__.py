"""Class-specific relevance maps of any captured Vision Transformer, in batches; how faithful they are."""

from engine.relevance.choice import choose_classes
from engine.relevance.comparison import prediction_link
from engine.relevance.methods import METHODS, relevance_maps
from engine.relevance.samples import samples_folder
from engine.relevance.stage import explain_study

__all__ = ["METHODS", "choose_classes", "explain_study", "prediction_link", "relevance_maps", "samples_folder"]
