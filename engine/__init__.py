"""Measures how fine-tuning changes the attention structure of Vision Transformers."""

__version__ = "0.1.0"
