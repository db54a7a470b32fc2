"""The study as dataclasses and TOML: every key is a key of `study.toml` and a flag of the command line."""

from engine.config.metrics import (
    TABLE_AXES,
    TABLE_COORDINATES,
    all_metrics,
    chosen_metrics,
    conventions,
    load_metrics,
    metrics_of_one_capture,
)
from engine.config.outputs import COMPARISON, JOURNAL, METRICS_TABLE, SAMPLES, STUDY, TRAINING, run_name
from engine.config.study import (
    BASELINES,
    RELEVANCE_METHODS,
    Baseline,
    RelevanceConfig,
    StatisticsConfig,
    StudyConfig,
    config_keys,
    load_study,
    parse_value,
    study_toml,
)
from engine.config.values import GONE, described, shortened
from train.keys import unusual
from train.settings import ConditionConfig

__all__ = [
    "BASELINES",
    "COMPARISON",
    "GONE",
    "JOURNAL",
    "METRICS_TABLE",
    "RELEVANCE_METHODS",
    "SAMPLES",
    "STUDY",
    "TABLE_AXES",
    "TABLE_COORDINATES",
    "TRAINING",
    "Baseline",
    "ConditionConfig",
    "RelevanceConfig",
    "StatisticsConfig",
    "StudyConfig",
    "all_metrics",
    "chosen_metrics",
    "config_keys",
    "conventions",
    "described",
    "load_metrics",
    "load_study",
    "metrics_of_one_capture",
    "parse_value",
    "run_name",
    "shortened",
    "study_toml",
    "unusual",
]
