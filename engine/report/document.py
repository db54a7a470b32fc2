"""The report as one document: sections of text, tables, charts and pictures, which Markdown and HTML render.

A section is a function from the study to blocks, declared by `section` with its place on the page, in the summary or in
both; one that returns no block is left out. Texts are plain: names of images, classes and conditions may hold
anything, and the renderers escape them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from engine.report.findings import PairFindings, comparisons
from engine.report.inputs import Results
from engine.report.plots import Chart
from engine.report.viewer import viewer_payload


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text with a look of its own; `value` is a link's target or a swatch's colour."""

    text: str
    look: Literal["strong", "small", "alarm", "hidden", "dot", "swatch", "link", "download", "break", "button"]
    value: str | int = ""
    data: Mapping[str, str] | None = None


Content = str | Span | tuple[str | Span, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `look` says what it is for. What is for readers without scripts is not shown to others."""

    content: Content
    look: Literal["", "scope", "alarm", "headline", "big", "noscript", "verbatim"] = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading within a section."""

    content: Content
    anchor: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; `legend` and `files` are laid out in a row."""

    items: Sequence[Content]
    look: Literal["", "legend", "files"] = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names the rows; `look` is the table's, `looks` those of its rows where they differ."""

    header: Sequence[Content]
    rows: Sequence[Sequence[Content]]
    caption: str = ""
    look: Literal["", "verdicts", "long"] = ""
    looks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Bars:
    """Shares in percent as bars: name with its colour, share, and the level marked on its bar."""

    rows: Sequence[tuple[Span, float, float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart under its title, with a note and its numbers."""

    chart: Chart
    table: Table | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a data URI, what it shows in words, and the text below it."""

    source: str
    shows: str
    caption: Content
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that belong together: under a title, closed until asked for, or side by side."""

    look: Literal["card", "cards", "column", "columns", "charts", "gallery", "group", "pictures", "details"]
    blocks: Sequence[Block]
    title: Content = ""


@dataclass(frozen=True, slots=True)
class Widget:
    """A part of the page that a script draws: `templates/<name>.html` and `.js`, with its data. Page only."""

    name: str
    data: Any


Block = Text | Heading | Bullets | Table | Bars | Figure | Picture | Group | Widget


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the document; `name` is the short title for the navigation, `anchor` the address in the page."""

    title: str
    name: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True, eq=False)
class ReportedStudy:
    """What the sections are made from; `summary` is the summary's own text, which the page offers as a file."""

    results: Results
    summary: str = ""

    @cached_property
    def comparisons(self) -> tuple[PairFindings, ...]:
        return tuple(comparisons(self.results))

    @cached_property
    def viewer(self) -> dict[str, Any] | None:
        return viewer_payload(self.results)

    def swatch(self, condition: str) -> Span:
        """A condition's name behind its colour and shape."""
        return Span(condition, "swatch", self.results.color(condition))

    def legend(self) -> Bullets:
        return Bullets([self.swatch(name) for name in self.results.conditions], look="legend")


Place = Literal["page", "summary"]
Make = Callable[[ReportedStudy], Iterable[Block]]
SECTIONS: dict[Place, dict[int, tuple[Section, Make]]] = {"page": {}, "summary": {}}


def section(
    title: str, *, page: int | None = None, summary: int | None = None, anchor: str = "", name: str = ""
) -> Callable[[Make], Make]:
    """Declares a section. `page` and `summary` are its places there; the page needs an `anchor` of letters."""

    def declare(make: Make) -> Make:
        for at, place in ((page, SECTIONS["page"]), (summary, SECTIONS["summary"])):
            if at is not None:
                assert at not in place, f"two sections have the place {at}"
                place[at] = Section(title, name or title, anchor, ()), make
        return make

    return declare


def sections(study: ReportedStudy, place: Place) -> list[Section]:
    """The sections of the page or the summary, in their order, without those that have nothing to say."""
    made = [replace(empty, blocks=tuple(make(study))) for _, (empty, make) in sorted(SECTIONS[place].items())]
    return [section for section in made if section.blocks]
