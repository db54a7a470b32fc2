"""Paired comparisons: what is tested, what it is claimed of, and how large it is."""

from engine.statistics.analysis import analyse
from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.association import correlate_over_images
from engine.statistics.bootstrap import FEWEST, bootstrap_interval
from engine.statistics.clusters import layer_clusters
from engine.statistics.comparison import (
    Accuracy,
    Classifier,
    Comparison,
    Control,
    HeadPairing,
    PrimaryFamily,
    parse_comparison,
    write_comparison,
)
from engine.statistics.conditions import check_bounds, check_primary, compare_conditions
from engine.statistics.crossed import (
    CrossedP,
    CrossedTable,
    crossed_interval,
    crossed_table,
    crossed_test,
    images_needed,
    planned_power,
    runs_needed,
)
from engine.statistics.document import SCHEMA, UNLESS_NONE, declaration, parse, write_document
from engine.statistics.matching import match_heads
from engine.statistics.morans import MoransInference, morans_inference
from engine.statistics.multiplicity import may_be_largest
from engine.statistics.multiverse import compare_conventions
from engine.statistics.paired import PairedColumns, compare_columns, compare_paired
from engine.statistics.pairing import ConditionPairs, paired_conditions, series_name
from engine.statistics.patterns import layer_trend
from engine.statistics.power import minimum_detectable_effect
from engine.statistics.rank_correlation import spearman
from engine.statistics.relations import cross_metric_correlation
from engine.statistics.results import (
    IMAGES,
    Cluster,
    CrossedTest,
    Interval,
    Multiverse,
    PairedTest,
    Relation,
    RunControl,
    RunSpread,
    Settings,
    Specification,
    Trend,
    Verdict,
    build,
    finite,
)
from engine.statistics.runs import compare_runs, control_runs

__all__ = [
    "FEWEST",
    "IMAGES",
    "SCHEMA",
    "UNLESS_NONE",
    "Accuracy",
    "Classifier",
    "Cluster",
    "Comparison",
    "ConditionPairs",
    "Control",
    "CrossedP",
    "CrossedTable",
    "CrossedTest",
    "Floats",
    "HeadPairing",
    "Interval",
    "MoransInference",
    "Multiverse",
    "PairedColumns",
    "PairedTest",
    "PrimaryFamily",
    "Relation",
    "RunControl",
    "RunSpread",
    "Settings",
    "Specification",
    "Trend",
    "Verdict",
    "analyse",
    "bootstrap_interval",
    "build",
    "check_bounds",
    "check_primary",
    "compare_columns",
    "compare_conditions",
    "compare_conventions",
    "compare_paired",
    "compare_runs",
    "control_runs",
    "correlate_over_images",
    "cross_metric_correlation",
    "crossed_interval",
    "crossed_table",
    "crossed_test",
    "declaration",
    "defined_mean",
    "finite",
    "images_needed",
    "layer_clusters",
    "layer_trend",
    "match_heads",
    "may_be_largest",
    "minimum_detectable_effect",
    "morans_inference",
    "paired_conditions",
    "parse",
    "parse_comparison",
    "planned_power",
    "runs_needed",
    "series_name",
    "spearman",
    "write_comparison",
    "write_document",
]
