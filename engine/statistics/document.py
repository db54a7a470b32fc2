"""JSON documents that are dataclasses: one declaration is built, written and read back."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from train.errors import InputError
from train.whole_files import write_atomically

_Document = TypeVar("_Document")

SCHEMA = 1
"""Of all documents."""
UNLESS_NONE = {"unless_none": True}
"""Metadata of a dataclass field that is not written where it is None; others are null."""


def write_document(path: Path, document: Any, *, indent: int) -> None:
    """Write a dataclass as a JSON object: all of it or nothing, the same bytes for the same values; NaN is null.

    Raises:
        ValueError: the document holds infinity, or a value that JSON has no form for.
        DiskError: the folder is not writable or the disk is full.
    """
    text = json.dumps(_plain(document, "document"), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8"))


def parse(kind: type[_Document], document: Mapping[str, Any], path: Path, stage: str) -> _Document:
    """The dataclass that a JSON object, read from `path` and written by `stage`, holds; undeclared keys are left out.

    Raises:
        InputError: another schema, or a value that is missing or not as `kind` declares it; the sentence says which.
    """
    if document.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: schema is {document.get('schema')!r}; this version reads schema {SCHEMA}; "
            f"run the {stage} stage again"
        )
    if missing := [name for name in typing.get_type_hints(kind) if name not in document]:
        raise InputError(f"{path}: has no {missing[0]}; run the {stage} stage again")
    try:
        return TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        mistake = _mistake(kind, document, error.errors(include_url=False)[0]["loc"])
        raise InputError(f"{path}: {mistake}; run the {stage} stage again") from None


def declaration(kind: Any) -> Any:
    """What a document of this kind holds, as JSON: names and types of its fields, and those of what it is made of.

    An input of the stage that writes it: where fields have come or gone since, it is written again.
    """
    if dataclasses.is_dataclass(kind):
        return {name: declaration(hint) for name, hint in typing.get_type_hints(kind).items()}
    return [str(typing.get_origin(kind) or kind), *map(declaration, typing.get_args(kind))]


def _plain(value: Any, where: str) -> Any:
    """The value in JSON's own types; `where` names it in errors."""
    if dataclasses.is_dataclass(value):
        declared = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        value = {f.name: item for f, item in declared if item is not None or not f.metadata.get("unless_none")}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), where)
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"{where} is infinite; JSON has finite numbers and null only")
        return None if math.isnan(value) else value
    if value is None or isinstance(value, (str, int, bool)):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; expected numbers, text, lists and mappings")


def _mistake(hint: Any, value: Any, place: tuple[int | str, ...]) -> str:
    """The sentence on what stands at a place, named down to the last field of a dataclass."""
    parent = here = ""
    for part in place:
        if isinstance(value, Mapping):
            hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else None
            hint, value = hints[str(part)] if hints else typing.get_args(hint)[-1], value.get(str(part))
            parent, here = here, f"{here}.{part}".lstrip(".")
        elif isinstance(part, int) and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            hint, value = typing.get_args(hint)[0], value[part]
            here += f"[{part}]"
        else:
            break
    if value is None and not here.endswith("]"):
        return f"{parent} has no {here.removeprefix(parent).lstrip('.')}; expected {_words(hint)}".lstrip()
    return f"{here} is {value!r:.80}; expected {_words(hint)}"


def _words(hint: Any) -> str:
    """What a field holds, as the end of "expected …"."""
    items = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _words(items[0])
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(items)}"
    if typing.get_origin(hint) is tuple:
        kind = {int: "whole numbers", float: "numbers"}.get(items[0], "a list")
        return kind if items[-1] is Ellipsis else f"two {kind}"
    return {str: "text", int: "a whole number", float: "a number"}.get(hint, "an object")
