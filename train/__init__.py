"""Data, conditions and checkpoints."""

from train.errors import InputError

__all__ = ["InputError"]
