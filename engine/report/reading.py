"""Reading files that may be missing, torn or of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.errors import InputError


def load_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file is not there or holds something else; `hint` says where it comes from.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; it is {hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({brief(error)}); it is {hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def brief(error: Exception) -> str:
    """The first line of an error's text, short enough for one sentence."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
