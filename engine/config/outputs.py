"""Names in the outputs folder of a study: its stages write them, and the report reads them."""

from pathlib import Path

JOURNAL = Path("run.jsonl")
METRICS_TABLE = Path("metrics/attention_metrics.zarr")
COMPARISON = Path("metrics/attention_comparison.json")
TRAINING = Path("metrics/training.json")
SAMPLES = Path("samples.zarr")
STUDY = Path("study.toml")


def run_name(condition: str, seed: int) -> str:
    """Of a condition at a seed: its checkpoint, its capture and its sample maps are named after it."""
    return f"{condition}_seed{seed}"
