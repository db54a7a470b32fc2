"""Secrets in URLs, which are never printed, logged or written: the one place that takes them out of a text."""

from __future__ import annotations

import re

_HIDDEN = "***"

# Behind `https:/` or `https://` (a path drops a slash): what stands before @, up to the last one; passwords may hold
# any letter. One letter is a drive, `localhost:9000/a@b` a port and a path, and `abfs://container@account` no secret.
_USER = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]+:/{1,2})"
    r"(?:[^\s/?#'\"<>:@]*:(?![0-9]+/)[^\s'\"<>]*@|(?<!abfs://)(?<!abfss://)[^\s/?#'\"<>@]+@)"
)
# What stands behind ? or #: signatures and tokens under any name.
_QUERY = re.compile(r"(?P<url>\b[A-Za-z][A-Za-z0-9+.-]+:/{1,2}[^\s?#'\"<>]*[?#])[^\s'\"<>]*[^\s'\"<>),.;:]")


def redacted(text: str) -> str:
    """A text with `***` for what may be secret in the URLs in it: user and password, and all behind ? or #."""
    return _QUERY.sub(rf"\g<url>{_HIDDEN}", _USER.sub(rf"\g<scheme>{_HIDDEN}@", text)) if ":/" in text else text
