"""Relevance methods, one per module: the file's name is the method's, and a value of `relevance.methods`."""

from importlib import import_module

from engine.config import RELEVANCE_METHODS
from engine.relevance.method import METHODS, Method

for _name in RELEVANCE_METHODS:
    import_module(f"{__name__}.{_name}")

__all__ = ["METHODS", "Method"]
