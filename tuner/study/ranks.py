"""Ranks of validation queries in an epoch's event, so that two trials can be compared query by query.

All trials of a study rank the same queries in the same gallery. The error of a difference between two trials is that of
the paired differences, which is far smaller than that of two separate means.

Shapes: Q queries of one direction.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tuner.study.objectives import WAYS

# Queries of one direction in an event: a larger gallery is thinned out evenly, and the error is that of these.
MAX_QUERIES = 4096
# Later ranks count as this one: no metric here looks beyond the tenth place, and few values compress well.
LAST_RANK = 11
_SEPARATOR = "."


@dataclass(frozen=True)
class QueryRanks:
    """Rank of the best positive of each query, 1 = first, as uint8 [Q] for each direction."""

    audio_to_text: NDArray[np.uint8]
    text_to_audio: NDArray[np.uint8]

    @classmethod
    def of(cls, audio_to_text: NDArray[np.int64], text_to_audio: NDArray[np.int64]) -> Self:
        """From the ranks of all queries."""
        return cls(_thinned(audio_to_text), _thinned(text_to_audio))

    @classmethod
    @lru_cache(maxsize=2048)
    def from_text(cls, text: str) -> Self | None:
        """Read what `to_text` has written; None if it is damaged."""
        try:
            parts = [zlib.decompress(base64.b64decode(part, validate=True)) for part in text.split(_SEPARATOR)]
        except (ValueError, binascii.Error, zlib.error):
            return None
        if len(parts) != len(WAYS) or not all(0 < len(part) <= MAX_QUERIES for part in parts):
            return None
        return cls(*(np.frombuffer(part, np.uint8) for part in parts))

    def to_text(self) -> str:
        """Compressed, for JSON: less than a byte for each query."""
        packed = (zlib.compress(ranks.tobytes(), 9) for ranks in (self.audio_to_text, self.text_to_audio))
        return _SEPARATOR.join(base64.b64encode(part).decode("ascii") for part in packed)

    def per_query(self, metric: str) -> list[NDArray[np.float64]]:
        """The values whose means give the metric, for each direction that it covers.

        `mAP@10` counts the best positive alone, since only its rank is known.

        Raises:
            ValueError: no such metric.
        """
        ways = [way for way in WAYS if metric.startswith(way)] or list(WAYS)
        ranks = [self.audio_to_text if way == "audio_to_text" else self.text_to_audio for way in ways]
        name, depth = _parsed(metric)
        hits = [(each <= depth).astype(np.float64) for each in ranks]
        return hits if name != "mAP" else [hit / each for hit, each in zip(hits, ranks, strict=True)]


def paired_error(ours: QueryRanks, theirs: QueryRanks, metric: str) -> float | None:
    """Standard error of the difference of a metric between two trials; None if they have other queries.

    The two directions count as independent, as where the report resamples them (`tuner.train.results.resample`).
    """
    errors = []
    for one, other in zip(ours.per_query(metric), theirs.per_query(metric), strict=True):
        if len(one) != len(other) or len(one) < 2:
            return None
        errors.append(float(np.std(one - other, ddof=1)) / math.sqrt(len(one)))
    return math.hypot(*errors) / len(errors)


def _thinned(ranks: NDArray[np.int64]) -> NDArray[np.uint8]:
    places = np.linspace(0, len(ranks) - 1, min(len(ranks), MAX_QUERIES)).round().astype(np.int64)
    return np.minimum(ranks[places], LAST_RANK).astype(np.uint8)


def _parsed(metric: str) -> tuple[str, int]:
    found = re.search(r"(?:^|_)(recall|R|mAP)@(\d+)$", metric)
    if found is None:
        raise ValueError(f"metric {metric}: does not follow from ranks")
    return found[1], int(found[2])
