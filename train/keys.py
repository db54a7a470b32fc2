"""Keys of the configuration: which values they hold, and what is said of each. Nothing heavy is imported."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

INT64 = 2**63 - 1
_LONGEST = 4096  # characters of a path on most systems


@dataclass(frozen=True)
class Rule:
    """A rule beyond the type of a value, which pydantic asks before it looks at the value itself."""

    allows: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        def check(value: Any) -> Any:
            if not self.allows(value):
                raise ValueError
            return value

        return core_schema.no_info_before_validator_function(check, handler(source))


def unusual(text: str) -> str:
    """What keeps text from being one line of UTF-8 of a usual length, as the end of "it holds …"; "" for nothing."""
    kinds = {unicodedata.category(character) for character in text}
    if "Cs" in kinds:
        return "bytes that are not UTF-8"
    if "Cc" in kinds:
        return "a line break, a tab or another control character"
    return f"{len(text):,} characters" if len(text) > _LONGEST else ""


# Python takes true and false for 1 and 0.
_NUMBER = Rule(lambda value: not isinstance(value, bool))
# Text that file names, TOML and a line of a terminal can hold.
_ONE_LINE = Rule(lambda value: not isinstance(value, str) or not unusual(value))
# A path is written out: nobody but a shell knows what ~ stands for.
_WRITTEN_OUT = Rule(lambda value: not isinstance(value, str) or not value.startswith("~"))
# A list is of two sizes, or empty.
TWO = Rule(lambda value: not isinstance(value, list | tuple) or len(value) in (0, 2))

Whole = Annotated[int, _NUMBER, Le(INT64)]
Count = Annotated[Whole, Ge(1)]
Natural = Annotated[Whole, Ge(0)]
Scenes = Annotated[Count, Le(1_000_000)]
Real = Annotated[float, _NUMBER]
Rate = Annotated[Real, Gt(0.0)]
NonNegative = Annotated[Real, Ge(0.0)]
Fraction = Annotated[Real, Ge(0.0), Lt(1.0)]
Text = Annotated[str, _ONE_LINE]
Name = Annotated[Text, MinLen(1)]
Place = Annotated[Text, _WRITTEN_OUT]  # a file, a folder or a URL

# What pydantic refuses in every section.
STRICT = {"extra": "forbid", "allow_inf_nan": False}


def key(default: Any, help: str | Callable[[], str], recipes: tuple[str, ...] = ()) -> Any:
    """A key with its one-line help, or what makes it, and the recipes that read it; none: they have no part in it."""
    metadata = {"help": help, "recipes": recipes}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
