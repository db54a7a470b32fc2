"""The document as one self-contained HTML page: `report.html`. No network, no framework."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from engine.report.document import (
    Bars,
    Block,
    Bullets,
    Content,
    Figure,
    Group,
    Heading,
    Picture,
    Section,
    Span,
    Table,
    Text,
    Widget,
)
from engine.report.marks import DARK, DARK_PALETTE, LIGHT, PALETTE, style_sheet

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("page.js", "viewer.js", "maps.js")


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element. Content and values that are not markup yet are escaped; an attribute that is None is left out."""
    named = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    opening = "".join(Markup(' {}="{}"').format(key, value) for key, value in named)
    inner = Markup("").join(content)
    return Markup(f"<{name}{opening}>{inner}") + (Markup("") if name in ("img", "meta", "br") else Markup(f"</{name}>"))


def page(
    document: Sequence[Section], *, title: str, heading: str, facts: str, payload: Mapping[str, Any] | None = None
) -> str:
    """The whole page. Names of images, classes and conditions are untrusted text and escaped wherever they go.

    Scripts run under a content security policy that names the one script by its hash and forbids every request; where
    there is no `payload` for them, there are none.
    """
    scripts: list[Markup] = []
    allowed = "'none'"
    if payload is not None:
        script = "".join(_template(name) for name in SCRIPTS)
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        allowed = f"'sha256-{digest}'"
        widgets = [block for section in document for block in section.blocks if isinstance(block, Widget)]
        data = dict(payload) | {widget.name: widget.data for widget in widgets}
        scripts = [tag("script", _json(data), type="application/json", id="payload"), tag("script", Markup(script))]
    return Markup(_template("page.html")).format(
        script=Markup(allowed),
        title=title,
        style=Markup(_style()),
        first=document[0].anchor,
        heading=heading,
        facts=facts,
        links=Markup("").join(tag("li", tag("a", section.name, href=f"#{section.anchor}")) for section in document),
        sections=Markup("").join(map(_section, document)),
        scripts=Markup("").join(scripts),
    )


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _style() -> str:
    """Colours for light and dark, then the page's own rules and those of its charts."""
    themes = []
    for paints, palette in ((LIGHT, PALETTE), (DARK, DARK_PALETTE)):
        named = [*paints.items(), *((f"c{n}", color) for n, color in enumerate(palette))]
        themes.append(":root{" + "".join(f"--{name}:{color};" for name, color in named) + "}")
    light, dark = themes
    return f"{light}\n@media (prefers-color-scheme: dark){{{dark}}}\n{_template('report.css')}{style_sheet()}\n"


def _json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no `<`, `>` or `&`, whatever the names in it hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _section(section: Section) -> Markup:
    title = tag("h2", section.title, id=f"{section.anchor}-title")
    return Markup("\n") + tag(
        "section", title, *_blocks(section.blocks), id=section.anchor, aria_labelledby=f"{section.anchor}-title"
    )


def _blocks(blocks: Sequence[Block]) -> list[Markup]:
    return [Markup("\n") + _block(block) for block in blocks]


def _block(block: Block) -> Markup:
    match block:
        case Text(content, "noscript"):
            return tag("noscript", _block(Text(content, "scope")))
        case Text(content, "verbatim"):
            return tag("pre", _content(content), tabindex="0")
        case Text(content, look):
            return tag("p", _content(content), class_=look or None, role="alert" if look == "alarm" else None)
        case Heading(content, anchor):
            return tag("h3", _content(content), id=anchor or None)
        case Bullets(items, look):
            return tag("ul", *(tag("li", _content(item)) for item in items), class_=look or None)
        case Table():
            return _table(block)
        case Bars(rows):
            return tag("ul", *(_bar(*row) for row in rows), class_="bars")
        case Figure(chart, table):
            unit = (" ", tag("small", f"({chart.unit})")) if chart.unit else ()
            numbers = [tag("details", tag("summary", "Numbers"), _table(table))] if table else []
            note = [tag("p", chart.note, class_="scope")] if chart.note else []
            return tag("figure", tag("figcaption", chart.heading or chart.title, *unit), chart.svg(), *note, *numbers)
        case Picture(source, shows, caption, wide):
            picture = tag("img", src=source, alt=shows, loading="lazy", class_="wide" if wide else None)
            return tag("figure", picture, tag("figcaption", _content(caption)))
        case Group("details", inner, title):
            return tag("details", tag("summary", _content(title)), *_blocks(inner))
        case Group(look, inner, title):
            return tag("div", tag("h3", _content(title)) if title else "", *_blocks(inner), class_=look)
        case Widget(name):
            return Markup(_template(f"{name}.html"))


def _table(table: Table) -> Markup:
    """A table that scrolls by itself; on a narrow screen one of verdicts becomes a list, each cell behind its name."""
    labels = [cell.rstrip("?") if isinstance(cell, str) else None for cell in table.header]
    header = tag("tr", *(tag("th", _content(cell), scope="col") for cell in table.header))
    body = []
    for index, (name, *cells) in enumerate(table.rows):
        named = zip(cells, labels[1:], strict=True)
        shown = [
            tag("td", _content(cell), data_label=label if table.look == "verdicts" else None) for cell, label in named
        ]
        look = table.looks[index] if table.looks else ""
        body.append(tag("tr", tag("th", _content(name), scope="row"), *shown, class_=look or None))
    caption = tag("caption", table.caption)
    whole = tag("table", caption, tag("thead", header), tag("tbody", *body), class_=table.look or None)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=table.caption)


def _bar(name: Span, percent: float, mark: float) -> Markup:
    filled = tag("i", style=f"width:{percent:.2f}%", class_=f"c{name.value}")
    bar = tag("span", filled, tag("em", style=f"left:{mark:.2f}%"), class_="bar", aria_hidden="true")
    return tag("li", tag("span", _content(name)), tag("b", f"{percent:.1f} %"), bar)


def _content(content: Content) -> Markup:
    if isinstance(content, tuple):
        return Markup("").join(_content(part) for part in content)
    if isinstance(content, str):
        return escape(content)
    text, value = content.text, content.value
    match content.look:
        case "swatch":
            return tag("span", class_=f"swatch c{value}", aria_hidden="true") + escape(text)
        case "link":
            return tag("a", text, href=value)
        case "download":
            return tag("a", text, download=text, href=value)
        case "button":
            data = {f"data_{key}": item for key, item in (content.data or {}).items()}
            return tag("button", text, type="button", aria_label=value, **data)
        case "break":
            return tag("br") + escape(text)
        case "dot":
            return tag("b", class_="dot", aria_hidden="true") + escape(text)
        case "alarm":
            return tag("strong", text, class_="bad")
        case "hidden":
            return tag("span", text, class_="hidden")
        case _:
            return tag(content.look, text)
