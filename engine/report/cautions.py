"""The cautions that go with the numbers: limits of the study, what the metrics do not measure, how to read them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.report import text
from engine.report.findings import Comparison, training_runs
from engine.report.inputs import Results
from engine.report.wording import scope_sentences
from engine.statistics import SKEWED


def failed_stages(results: Results) -> tuple[str, ...]:
    """What is not in the report because its stage failed, with the reason."""
    return tuple(
        f"Stage {stage} failed, and nothing of it is in this report: {reason.removesuffix('.')}. "
        "The command that made this folder tries it again."
        for stage, reason in results.failed.items()
    )


def not_measured() -> tuple[str, ...]:
    """What the metrics cannot show, whatever their values."""
    return (
        "Understanding. A compact or coherent map says where weight lies, not that a model recognises what lies there; "
        "local is not the same as on the object, and coherent is not the same as meaningful.",
        "Correctness. No ground truth says which attention is right. Mass on an annotated region says how much weight "
        "falls in a box, not that it belongs there.",
        "Explanation. Attention weights are one factor of a block. Values, output projections, MLPs and the residual "
        "stream shape the prediction too, and a patch with little weight can still decide it.",
        "Cause. Training changed the weights and the attention changed with them; that a change in attention brings "
        "about a change in accuracy is not tested here. It may be incidental.",
        "Quality. More local, more concentrated or more coherent attention is not better attention.",
        "Grad-CAM pictures show where a class score responds to features, for a few images picked by seed. They "
        "illustrate; no claim of this report rests on them.",
    )


def how_to_read() -> tuple[str, ...]:
    """How to use the numbers."""
    return (
        "Read sizes before p-values: with many images the smallest difference is “significant”. The "
        "difference is in the metric's own unit; dz is the mean paired difference over its standard deviation across "
        "images.",
        "A marked cell survives the sign-flip max-T test over its whole family: the chance of even one false mark in "
        "the family is at most α, unless differences are skewed (the limits count them). An unmarked cell is not shown "
        "to be unchanged.",
        "Look at depth: opposite changes in lower and upper layers cancel in a mean over layers.",
        "Look across metrics: distance, entropy and Moran's I of one map are not independent. Agreement between them "
        "is not three pieces of evidence.",
        "Spatial metrics are taken over patches alone, each row renormalised; what goes to class and register tokens "
        "is prefix_mass. Read the two together.",
        "Moran's I is not 0 under no association but −1/(N−1) for N patches.",
        "Check the negative controls first: if one failed, none of the other numbers can be trusted.",
    )


def limits(results: Results, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The limits of this very study."""
    runs = max((training_runs(results, condition) for condition in results.conditions), default=1)
    images = text.count(results.num_images, "image")
    scope = [
        f"One architecture, one data set, {images}, "
        f"{'one checkpoint' if runs == 1 else f'{runs} training runs'} a condition: nothing here carries over to other "
        "models, data or tasks without being measured there.",
        *scope_sentences(results, comparisons),
        "Intervals and image-level tests treat images as independent draws; images of one scene or class are less "
        "independent than that.",
        *_skewed(results),
        "All findings are correlational: the conditions differ in all that training changed, not in attention alone.",
        "Only attention weights after the softmax were analysed, and only of layers whose map is tokens by tokens.",
        "Attention was described after training; it was not a training target.",
    ]
    if len(results.conditions) > 2:
        scope.append(
            f"Each condition is tested against {results.against} in a family of its own: the family-wise "
            "level holds within a comparison, not over all of them."
        )
    return tuple(scope)


def _skewed(results: Results) -> tuple[str, ...]:
    """How many tests lean on a symmetry that their differences have not."""
    tests = [*results.select("head"), *results.select("layer")]
    skewed = sum(test.skewed for test in tests)
    if not skewed:
        return ()
    return (
        f"Sign flips assume differences symmetric about zero. In {text.share(skewed, len(tests))} image-level tests "
        f"they are skewed so much for their number (skewness/√n above {SKEWED:g}) that a small max-T p is too easily "
        "had: read their size and interval.",
    )
