"""Sections of the page that stand on files of their own.

A section is a callable that looks at the results and returns what to show, or None where there is nothing. The page
lists them in `engine.report.page.SECTIONS`, the seam for a new one, and gives each an entry in its navigation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from engine.report import text
from engine.report.figures import PALETTE
from engine.report.inputs import Results
from engine.report.kept import GradcamSample
from engine.report.viewer import data_uri

GRADCAM_BUDGET = 1_300_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the page.

    Args:
        anchor: its id in the page: letters, digits and hyphens.
        title: heading; name: the shorter word for the navigation.
        body: what stands below the heading, escaped. No script runs in it but the page's own.
    """

    anchor: str
    title: str
    name: str
    body: Markup


def environment(results: Results) -> jinja2.Environment:
    """The page's template environment: escaping, strict, with the globals that every template may use."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {
        "results": results,
        "text": text,
        "colors": {name: index % len(PALETTE) for index, name in enumerate(results.conditions)},
    }
    return made


def gradcam(results: Results) -> Section | None:
    """Grad-CAM pictures of a few images, for illustration."""
    fitting = _that_fit(results)
    if not fitting:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample, content in fitting:
        groups.setdefault(sample.image, []).append(
            {
                "src": data_uri("image/png", content),
                "condition": sample.condition,
                "target": sample.target,
                "role": sample.role,
                "probability": sample.probability,
            }
        )
    shown = [
        {
            "image": image,
            "rows": [
                [picture for picture in pictures if picture["role"] == role]
                for role in dict.fromkeys(picture["role"] for picture in pictures)
            ],
        }
        for image, pictures in groups.items()
    ]
    body = (
        environment(results)
        .get_template("gradcam.html")
        .render(groups=shown, left_out=len(results.gradcam) - len(fitting))
    )
    return Section(anchor="gradcam", title="Grad-CAM, for illustration", name="Grad-CAM", body=Markup(body))


def _that_fit(results: Results) -> list[tuple[GradcamSample, bytes]]:
    """Pictures of as many images as fit the budget whole: half an image's conditions compare with nothing."""
    fitting: list[tuple[GradcamSample, bytes]] = []
    used = 0
    for image in dict.fromkeys(sample.image for sample in results.gradcam):
        pictures = [(sample, sample.file.read_bytes()) for sample in results.gradcam if sample.image == image]
        used += sum(len(content) for _, content in pictures)
        if used > GRADCAM_BUDGET:
            break
        order = {name: index for index, name in enumerate(results.conditions)}
        roles = list(dict.fromkeys(sample.role for sample, _ in pictures))
        pictures.sort(key=lambda pair: (roles.index(pair[0].role), order.get(pair[0].condition, len(order))))
        fitting += pictures
    return fitting
