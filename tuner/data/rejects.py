"""Rows that cannot be used: listed with their reason, tolerated up to a share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tuner.errors import DataError, Field


@dataclass(frozen=True, order=True)
class Reject:
    """One manifest row that is dropped. `reason` is a short phrase shared by all rows with the same fault."""

    row: int
    audio: str
    reason: str
    detail: str = ""


def write_rejects(rejects: Sequence[Reject], path: Path) -> None:
    """Write one JSON object a line, in row order."""
    lines = [json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in sorted(rejects)]
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def check_rejects(rejects: Sequence[Reject], rows: int, limit: float, listing: Path) -> None:
    """Stop when more than the tolerated share of rows is rejected, and leave the list at `listing`.

    Raises:
        DataError: more than `limit` of the rows, or all of them, are rejected.
    """
    if len(rejects) <= limit * rows and len(rejects) < rows:
        return
    write_rejects(rejects, listing)
    commonest = Counter(reject.reason for reject in rejects).most_common(3)
    reasons = ", ".join(f"{count} {reason}" for reason, count in commonest)
    raise DataError(
        f"{len(rejects)} of {rows} rows cannot be used ({reasons}), more than the {limit:.1%} allowed; "
        f"see {listing}, then fix the rows or raise ",
        Field("max_rejects"),
    )
