"""The document as Markdown: `summary.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from engine.report.document import Block, Bullets, Content, Group, Heading, Section, Span, Table, Text

_ESCAPED = str.maketrans({character: f"\\{character}" for character in "\\|`*[]"})


def markdown(document: Sequence[Section]) -> str:
    """The whole text, the first section's title above all; charts, pictures and scripts are left to the page."""
    blocks = []
    for index, section in enumerate(document):
        blocks += [f"{'##' if index else '#'} {_content(section.title)}", *_blocks(section.blocks)]
    return "\n\n".join(blocks) + "\n"


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Text(content):
                yield _content(content)
            case Heading(content):
                yield f"### {_content(content)}"
            case Bullets(items) if items:
                yield "\n".join(f"- {_content(item)}" for item in items)
            case Table(header, rows):
                lines = [_row(header), "|" + " --- |" * len(header), *(_row(row) for row in rows)]
                yield "\n".join(lines)
            case Group(_, inner, title):
                if title:
                    yield f"### {_content(title)}"
                yield from _blocks(inner)
            case _:
                pass


def _row(cells: Sequence[Content]) -> str:
    return "| " + " | ".join(_content(cell) for cell in cells) + " |"


def _content(content: Content) -> str:
    if isinstance(content, Span):
        return f"**{_plain(content.text)}**" if content.look == "strong" else _plain(content.text)
    return _plain(content) if isinstance(content, str) else "".join(_content(part) for part in content)


def _plain(text: str) -> str:
    """Plain text for Markdown: names of images and classes come from file systems and may hold anything."""
    plain = "".join(character if character.isprintable() else " " for character in text).translate(_ESCAPED)
    # A tag or an entity begins with a letter, "/", "!", "?" or "#" right behind; "p < 0.0001" is read as it is.
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=[A-Za-z#])", "&amp;", plain))
    return re.sub(r"^(\s*)>", r"\1\>", plain)  # at the beginning it would make a quotation
