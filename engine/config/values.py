"""Values of the configuration, from a file or from flags: made into what a key holds, or a sentence on what it holds.

What is said of a mistake comes from the key's type alone: what was found, what is expected, an example.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from annotated_types import Ge, Gt, Le, Lt

from train.errors import InputError, nearest
from train.keys import INT64, TWO, unusual

_Config = TypeVar("_Config")

# Keys of earlier versions, which studies and commands of then still give, and why they are left out.
GONE = {"statistics.bootstrap": "statistics.permutations is the number of resamples, too"}


@dataclass(frozen=True)
class Expected:
    """What a key holds: `words` as the end of "expected …", and an example in TOML."""

    words: str
    example: str

    def sentence(self, *, flag: str = "") -> str:
        """What is expected, with an example as it is written in a file, or behind a flag."""
        if not flag:
            return f"expected {self.words}" + (f", as in {self.example}" if self.example else "")
        text = self.example.strip("[]{}").replace('"', "").replace(" = ", "=").replace(", ", ",")
        return f"expected {self.words}" + (f", as in {flag} {text}" if text else "")


def expected(hint: Any, default: Any = None) -> Expected:
    """What a key of this type holds, `Annotated` with its bounds; its default is the example where there is one."""
    hint, limits = _bounded(hint)
    items = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return Expected("a table of keys", "")
    if hint is bool:
        return Expected("true or false", "true" if default else "false")
    if hint is int or hint is float:
        kind, usual = ("a whole number", 1) if hint is int else ("a number", 0.01)
        return Expected(f"{kind}{_range(limits)}", str(usual if default is None else default))
    if hint is str:
        return Expected("text", f'"{default or "…"}"')
    origin = typing.get_origin(hint)
    if origin is Literal:
        return Expected(f"one of {', '.join(items)}", "")
    if origin in (typing.Union, types.UnionType):
        return Expected(" or ".join(dict.fromkeys(expected(item).words for item in items)), expected(items[0]).example)
    if origin is tuple:
        of_two = items[-1] is not Ellipsis or TWO in limits
        return Expected("a list of 2" if of_two else "a list", _list_example(items[0], default))
    if dataclasses.is_dataclass(items[1]):
        return Expected("a table of tables", "")
    item = expected(items[1])
    return Expected("a table of names and values", f"{{name = {item.example}}}" if item.example else "")


def _bounded(hint: Any) -> tuple[Any, list[Any]]:
    """A type without its bounds, and the bounds."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, []
    bare, *limits = typing.get_args(hint)
    return bare, limits


def _list_example(item: Any, default: Any) -> str:
    if default and len(default) > 1:
        return _toml(default[:2])
    kind, limits = _bounded(item)
    if kind is int:
        low: Any = next((limit.ge for limit in limits if isinstance(limit, Ge)), 0)
        return _toml([low, low + 1])
    return _toml(typing.get_args(kind)[:2]) if typing.get_origin(kind) is Literal else '["a", "b"]'


def _toml(items: Iterable[Any]) -> str:
    return f"[{', '.join(f'{chr(34)}{item}{chr(34)}' if isinstance(item, str) else str(item) for item in items)}]"


def _range(limits: Iterable[Any]) -> str:
    low = high = ""
    for limit in limits:
        if isinstance(limit, Ge):
            low = f" from {_number(limit.ge)}"
        elif isinstance(limit, Gt):
            low = f" above {_number(limit.gt)}"
        elif isinstance(limit, Le) and limit.le != INT64:
            high = f" to {_number(limit.le)}"
        elif isinstance(limit, Lt):
            high = f" and below {_number(limit.lt)}"
    return low + high


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def described(value: Any) -> str:
    """A value as a sentence names it: short, whatever it is, and as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, dict):
        return "a table" if value else "an empty table"
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    if isinstance(value, list) and isinstance(value[0], dict):
        return "a list of tables"
    if hasattr(value, "isoformat"):
        return f"the date or time {value.isoformat()}"
    short = reprlib.Repr()
    short.maxstring = 100
    short.maxlist = short.maxtuple = short.maxdict = 4
    short.maxlevel = 2
    short.maxlong = 50
    return short.repr(value)


def plain_value(text: str) -> str | int | float | bool:
    """A flag's text where any plain value may stand: a whole number, a decimal number, true or false, else text."""
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def validated(
    cls: type[_Config], values: Mapping[str, Any], name: Callable[[str], str], keys: Sequence[str]
) -> _Config:
    """A dataclass of keys and tables, made of plain values: texts are taken for numbers, true and false where they are.

    `name` gives for a dotted key what the sentence calls it: "study.toml: train.epochs" or "--train.epochs"; `keys` are
    the dotted keys that there are. Raises InputError: an unknown key, a value of another type, out of bounds, doubled.
    """
    from pydantic import ValidationError

    try:
        config: _Config = _adapter(cast(Any, cls)).validate_python(values)
    except ValidationError as error:
        raise InputError(_mistake(cls, error.errors(include_url=False)[0], name, keys)) from None
    _refuse_doubled(config, "", name)
    return config


@functools.cache
def _adapter(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _mistake(cls: type[Any], error: Any, name: Callable[[str], str], keys: Sequence[str]) -> str:
    """The sentence on one of pydantic's errors."""
    dotted = ".".join(str(part) for part in error["loc"] if isinstance(part, str) and part != "[key]")
    if isinstance(ours := error.get("ctx", {}).get("error"), InputError):
        return f"{name('')}{ours}".removeprefix("--")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{name(shortened(dotted))} is not a key of the configuration{_place(dotted, keys)}"
    hint, default, within = cls, None, ""
    for part in error["loc"][: -1 if error["type"] == "missing" else None]:  # of two sizes, one
        hint = _bounded(hint)[0]
        if dataclasses.is_dataclass(hint) and isinstance(part, str):
            field = next(field for field in dataclasses.fields(hint) if field.name == part)
            default = field.default if field.default is not dataclasses.MISSING else None
            hint = typing.get_type_hints(hint, include_extras=True)[part]
        elif isinstance(part, int):  # an item of a list
            items = typing.get_args(hint)
            hint, default, within = items[0 if items[-1] is Ellipsis else part], None, "holds"
        else:  # a value of a table; of a union, pydantic adds which of its types it tried
            items = typing.get_args(hint)
            if typing.get_origin(hint) not in (dict, Mapping):
                dotted = dotted.removesuffix(f".{part}")
                break
            hint, default = items[1], None
    flag = name(dotted) if name(dotted).startswith("--") else ""
    found = error["input"]
    holds = expected(hint, default)
    if error["type"] == "int_parsing_size" or error.get("ctx", {}).get("le") == INT64:
        holds = replace(holds, words=f"a whole number of at most {INT64:,}")
    elif error["type"] == "finite_number":
        holds = replace(holds, words=holds.words.replace("a number", "a finite number"))
    elif error["type"] in ("too_short", "string_too_short"):
        holds = replace(holds, words=f"{holds.words} that is not empty")
    elif isinstance(found, str) and (fault := unusual(found)) and holds.words == "text":
        path = any(mark in found for mark in "\b\t\n\f\r") and not flag
        tip = " (a Windows path is written in single quotes, where \\ is no escape)" if path else ""
        return f"{name(dotted)} {within or 'is'} {described(found)}; it holds {fault}; expected one line of text{tip}"
    elif isinstance(found, str) and found.startswith("~") and holds.words == "text":
        return f"{name(dotted)} is {described(found)}; write the path in full, as only a shell knows what ~ means"
    end = f"expected {holds.words}" if within else holds.sentence(flag=flag)
    if dataclasses.is_dataclass(hint):
        end += f", as in [{dotted}]"
    elif holds.words == "a table of tables":
        end += f", as in [{dotted}.NAME]"
    return f"{name(dotted)} {within or 'is'} {described(found)}; {end}"


def shortened(name: str) -> str:
    """A name as it is, or in quotes and short where it would break a line or fill many."""
    return name if name.isprintable() and 0 < len(name) <= 100 else described(name)


def _place(dotted: str, keys: Sequence[str]) -> str:
    """Where an unknown key belongs, as the end of a sentence; "" where no key is near."""
    known = list(dict.fromkeys(name for key in keys for name in (key.partition(".")[0], key)))
    table, _, last = dotted.rpartition(".")
    beside = [key.rpartition(".")[2] for key in known if table and key.rpartition(".")[0] == table]
    if near := difflib.get_close_matches(last, beside, n=1, cutoff=0.75):
        return f"; did you mean {table}.{near[0]}?"
    homes = [key.rpartition(".")[0] for key in known if key.rpartition(".")[2] == last]
    if "" in homes:
        return f"; {last} belongs at the top of the file, before the first [table]"
    tables = dict.fromkeys(f"[{re.sub('^conditions[.].*', 'conditions.NAME', home)}]" for home in homes)
    return f"; it belongs in {' or '.join(tables)}" if tables else nearest(dotted, known)


def _refuse_doubled(config: Any, prefix: str, name: Callable[[str], str]) -> None:
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, dotted = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            _refuse_doubled(value, f"{dotted}.", name)
        elif isinstance(value, tuple) and expected(hints[field.name]).words != "a list of 2":  # sizes may be equal
            item, times = Counter(value).most_common(1)[0] if value else (None, 0)
            if times > 1:
                raise InputError(f"{name(dotted)} names {described(item)} more than once; name it once")
