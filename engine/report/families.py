"""Which families of tests a report holds, and how often one in which nothing differs claims something."""

from __future__ import annotations

from engine.relevance import RelevanceResults
from engine.report.inputs import Results


def exploratory_families(results: Results, relevance: RelevanceResults | None) -> list[str]:
    """Names of the families, beside the primary one, that can claim something at the level.

    The t-test over layer means is none: nothing is claimed of it. A family whose least p is above the level, as of sign
    flips over few runs, claims nothing either.
    """
    document = results.document
    names = [
        test.family
        for test in document.tests
        if test.role == "exploratory" and test.level != "layer_means" and (test.p_floor or 0.0) <= results.alpha
    ]
    names += [trend.family for trend in document.trends] + [test.family for test in document.crossed]
    names += [f"{condition} against {against}, clusters" for condition, against in results.comparisons()]
    if relevance is not None:
        for kind in ("methods", "conditions", "classes"):
            names += [f"relevance, {kind}: {test.condition}" for test in getattr(relevance, kind)]
        names += [f"link, {entry.outcome}: {entry.condition}" for entry in relevance.link if entry.family_size]
    return list(dict.fromkeys(names))


def error_sentence(results: Results, relevance: RelevanceResults | None) -> str:
    """How the level holds over the whole report; "" where nothing was compared."""
    if not results.comparisons():
        return ""
    alpha, count = results.alpha, len(exploratory_families(results, relevance))
    said = [f"The primary family holds its level, {alpha:g}, over this whole report"] if results.primary else []
    if said:
        record = results.document.primary
        said[0] += "." if record and record.before else ", provided that it was named before the data were seen."
    if count:
        said.append(
            f"The exploratory families of tests ({count}) hold it each by itself: of reports like this one in which "
            f"nothing differs, {100 * (1 - (1 - alpha) ** count):.0f} % (1 − {1 - alpha:g}^{count}, if families were "
            "independent) claim something exploratory."
        )
    return " ".join(said)
