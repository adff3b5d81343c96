"""Strategies: values that nobody foresees, changes of sound values, and bytes as disks and editors leave them."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

# Written in place of a quoted word, since Python itself cannot write them.
RAW = {
    "@digits@": "9" * 5_000,
    "@minus digits@": "-" + "7" * 4_000,
    "@deep list@": "[" * 10_000 + "]" * 10_000,
    "@deep object@": '{"a": ' * 10_000 + "1" + "}" * 10_000,
    "@deepish@": "[" * 900 + "]" * 900,
    "@half@": '"\\ud800"',
    "@huge float@": "1e999",
    "@long word@": '"' + "word" * 250_000 + '"',
}
# What YAML reads as more than text.
YAML_RAW = {
    "@no date@": "2026-02-30",
    "@no time@": "2026-01-01 25:61:61",
    "@date@": "2026-02-28",
    "@no int@": "!!int x",
    "@empty int@": '!!int ""',
    "@no float@": "!!float x",
    "@no bool@": "!!bool x",
    "@no timestamp@": "!!timestamp x",
    "@no binary@": "!!binary é",
    "@python@": "!!python/object/apply:os.system [echo]",
    "@own tag@": "!mine [1]",
    "@itself@": "&a [*a]",
    "@unknown alias@": "*nobody",
    "@hexadecimal@": "0x" + "f" * 5_000,
    "@sexagesimal@": "190:20:30",
    "@infinite@": ".inf",
    "@not a number@": ".nan",
    "@set@": "!!set {a, b}",
    "@pairs@": "!!pairs [a: 1]",
    "@omap@": "!!omap [a: 1]",
    "@list as key@": "{[a]: b}",
    "@merge@": "{<<: 1}",
    "@tab@": "\tx",
    "@laughs@": "[&a [x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b], "
    "&d [*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e], "
    "&g [*f,*f,*f,*f,*f,*f,*f,*f], &h [*g,*g,*g,*g,*g,*g,*g,*g], &i [*h,*h,*h,*h,*h,*h,*h,*h]]",
}
WORDS = (
    "",
    " ",
    "a",
    "é" * 200,
    "x" * 5_000,
    "../../etc/passwd",
    "/dev/null/x",
    "/dev/zero",
    "a\0b",
    "\x1b[31m\u202e",
    "line\nline",
    "<script>alert(1)</script>",
    "\ufeff",
    "\u2028",
    "NaN",
    "-1",
    "1e400",
    "0x10",
    "nan",
    "true",
    "null",
    "%20?#",
    "~nobody/x",
    "file:///x",
    "ftp://x/y",
    "s3://",
    "t0001",
    "train",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400)
FLOATS = (0.0, -0.0, 0.5, 1.5, -2.5, 1e-320, 5e-324, 1e-9, 1e18, 1.7e308, -1.7e308, math.nan, math.inf, -math.inf)


def words() -> st.SearchStrategy[str]:
    """Texts: dangerous ones, and any."""
    return st.sampled_from(WORDS) | st.text(max_size=12)


def scalars(raw: tuple[str, ...] = tuple(RAW)) -> st.SearchStrategy[Any]:
    """Values of JSON without parts."""
    numbers = st.sampled_from(NUMBERS) | st.sampled_from(FLOATS) | st.integers() | st.floats()
    return st.none() | st.booleans() | numbers | words() | st.sampled_from(raw)


def values(raw: tuple[str, ...] = tuple(RAW)) -> st.SearchStrategy[Any]:
    """Values of JSON."""
    return scalars(raw) | st.recursive(
        scalars(raw),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words(), inner, max_size=3),
        max_leaves=5,
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a value."""
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:4]):
            found += _places(item, (*path, index))
    return found


@st.composite
def changed(draw: st.DrawFn, sound: Any, raw: tuple[str, ...] = tuple(RAW), most: int = 3) -> Any:
    """A sound value with a few changes: parts dropped, replaced, renamed, doubled or moved."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.sampled_from(_places(value)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(values(raw))
            continue
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        _change(draw, holder, place[-1], value, raw)
    return value


def _change(draw: st.DrawFn, holder: Any, key: Any, whole: Any, raw: tuple[str, ...]) -> None:
    match draw(st.sampled_from(["replace", "replace", "replace", "near", "drop", "rename", "double", "move"])):
        case "replace":
            holder[key] = draw(values(raw))
        case "near":
            holder[key] = _near(draw, holder[key])
        case "drop":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[draw(words())] = holder.pop(key)
        case "double" if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            other = draw(st.sampled_from(_places(whole)))
            part = whole
            for step in other:
                part = part[step]
            holder[key] = copy.deepcopy(part)


def _near(draw: st.DrawFn, value: Any) -> Any:
    """A value of the same kind, somewhat wrong."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(
            st.sampled_from(
                [-value, value + 1, value * 10, value * 10**6, value / 2 if abs(value) < 2**60 else 0.5, hex(value)]
            )
        )
    if isinstance(value, float):
        return draw(
            st.sampled_from(
                [-value, value * 1e6, value * 1e-9, int(value) if abs(value) < 1e300 else 1, str(value), value + 1e-12]
            )
        )
    if isinstance(value, str):
        return draw(st.sampled_from([value + "x", value[:-1], value.upper(), value * 400, f" {value} ", [value]]))
    return [value]


def to_json(value: Any, raw: dict[str, str] = RAW) -> bytes:
    """JSON text of a value, which is also YAML; words of `raw` are written as what they stand for."""
    text = json.dumps(value)
    for word, meant in raw.items():
        text = text.replace(f'"{word}"', meant)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def torn(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes after a fault of disk, editor or download."""
    where = draw(st.integers(0, max(0, len(content) - 1)))
    length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
    piece = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff"]))
    match draw(st.sampled_from(["flip", "flip", "flip", "cut", "cut", "insert", "remove", "double", "empty", "other"])):
        case "flip":
            return content[:where] + piece + content[where + len(piece) :]
        case "cut":
            return content[:where]
        case "insert":
            return content[:where] + piece + content[where:]
        case "remove":
            return content[:where] + content[where + length :]
        case "double":
            return content[:where] + content[where : where + length] * 2 + content[where + length :]
        case "empty":
            return b""
    return draw(st.binary(max_size=40) | st.sampled_from([b"[" * 10_000, b"\0" * 500, b"\xef\xbb\xbf", b"\xff\xfe{}"]))


def maybe_torn(content: bytes, seldom: int = 4) -> st.SearchStrategy[bytes]:
    """The bytes as they are, or one time in `seldom` torn."""
    return st.integers(1, seldom).flatmap(lambda draw: torn(content) if draw == 1 else st.just(content))
