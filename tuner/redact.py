"""Text made fit to show and to keep: without passwords, keys and tokens, and without what a terminal would obey.

A URL with a password in it is a password. Errors pass through `redact` by themselves (`tuner.errors`); whatever else
comes from a command line, a library or another machine does before it is shown or written.
"""

from __future__ import annotations

import os
import re
import unicodedata

HIDDEN = "***"

# Repetitions have an end, so that a text of any length is searched in a time that its length is proportional to.
_URL = r"(?P<scheme>[a-z][a-z0-9+.-]{1,30}:/{1,2})"  # pathlib makes one slash of two
# What follows a host's colon is a port; a password may hold what should have been escaped, as keys of AWS hold slashes.
_PASSWORD = re.compile(_URL + r"[^\s/?#@:\"'<>]{0,1000}:(?!\d{1,5}(?:[/?#]|$))[^\s\"'<>]{0,2000}@", re.IGNORECASE)
# A name alone is a token on the web; elsewhere it is an account or, on Azure, the container.
_USER = re.compile(r"(?P<scheme>https?:/{1,2})[^\s/?#@:\"'<>]{1,4000}@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"(?P<name>[?&;](?:[\w.-]{0,60}(?:access_?key|api_?key|account_?key|secret|token|passw(?:or)?d|pwd|signature|credential)"
    r"[\w.-]{0,60}|sig|auth)=)[^\s&;#\"'<>]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY)$")
_SHORTEST_SECRET = 8  # a shorter value, such as `none`, would be found in many a word
# Marks that reorder a line, so that it reads otherwise than it is written.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")


def redact(text: str) -> str:
    """The text with passwords, keys and tokens replaced by `***`.

    Hidden are user and password of a URL, parameters of a URL that carry a secret (`secret_key`, `X-Amz-Signature`,
    ...), bearer tokens, and the values of this process's own secrets (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...).
    """
    text = _PASSWORD.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<name>{HIDDEN}", text)
    for secret in _own_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def holds_secret(text: str) -> bool:
    """Whether `redact` would hide something of this text."""
    return redact(text) != text


def printable(text: str) -> str:
    """The text with control characters and marks that break or reorder lines as escapes such as `\\x1b`; line
    ends stay."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    # Zl and Zp: a line and a paragraph end.
    controls = unicodedata.category(character) in ("Cc", "Zl", "Zp") and character not in "\n\t"
    if not controls and character not in _REORDERING:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _own_secrets() -> list[str]:
    """Values of the environment that its names call secret, the longest first: one may begin like another."""
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((value for value in found if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)
