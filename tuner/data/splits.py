"""Training, validation and test clips: given by the user or drawn by recording, never one recording in two splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from tuner.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


def group_recordings(identities: Sequence[Sequence[str]]) -> list[str]:
    """Name the recording of each clip: clips that share any identity (clip id, file, content) share a group.

    Args:
        identities: for each of N clips, the keys that identify its recording; at least one key a clip.

    Returns:
        N group names. A name is the smallest key of the group, so it does not depend on the order of the clips.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for keys in identities:
        first = root(keys[0])
        for key in keys[1:]:
            low, high = sorted((first, root(key)))
            parent[high] = low
            first = low
    return [root(keys[0]) for keys in identities]


def assign_splits(
    groups: Sequence[str],
    given: Sequence[str | None],
    fractions: tuple[float, float, float],
    seed: int,
    rows: Sequence[int] | None = None,
) -> list[str]:
    """Assign each of N clips to train, validation or test.

    A group with a given split takes it whole. The other groups are drawn: they are sorted by a hash of seed and group
    name, laid end to end by their number of clips, and cut at the fractions. So the counts are the fractions up to
    the size of one group, and a group's draw does not depend on the order of the manifest.

    Args:
        groups: the recording of each clip, [N].
        given: the split the user gave each clip, or None, [N].
        fractions: shares of train, validation and test; they sum to 1.
        seed: another seed draws another split.
        rows: manifest row of each clip for error messages, [N]; positions counted from 1 when absent.

    Raises:
        ConfigError: the fractions are negative or do not sum to 1.
        DataError: one recording was given two splits; names both rows.
    """
    check_fractions(fractions)
    fixed = _given_by_group(groups, given, rows if rows is not None else range(1, len(groups) + 1))
    sizes: dict[str, int] = {}
    for group in groups:
        if group not in fixed:
            sizes[group] = sizes.get(group, 0) + 1
    total = sum(sizes.values())
    cuts = (fractions[0] * total, (fractions[0] + fractions[1]) * total)
    drawn, before = dict(fixed), 0
    for group in sorted(sizes, key=lambda name: hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()):
        # The middle of a group decides its side of a cut, so a group across the cut goes where more of it lies.
        middle = before + sizes[group] / 2
        drawn[group] = SPLITS[sum(middle > cut for cut in cuts)]
        before += sizes[group]
    return [drawn[group] for group in groups]


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raises: ConfigError: the three shares are not non-negative numbers that sum to 1."""
    if not all(math.isfinite(share) and share >= 0 for share in fractions) or abs(sum(fractions) - 1) > 1e-6:
        shares = ", ".join(f"{share:g}" for share in fractions)
        raise ConfigError(f"fractions: train, validation and test must be at least 0 and sum to 1 (got {shares})")


def _given_by_group(groups: Sequence[str], given: Sequence[str | None], rows: Sequence[int]) -> dict[str, str]:
    fixed: dict[str, str] = {}
    first_row: dict[str, int] = {}
    for group, split, row in zip(groups, given, rows, strict=True):
        if split is None:
            continue
        if fixed.setdefault(group, split) != split:
            raise DataError(
                f"rows {first_row[group]} and {row} are one recording in two splits ({fixed[group]} and {split}): they "
                "hold the same sound, or share it through other rows; give both rows the same `split`, or drop one"
            )
        first_row.setdefault(group, row)
    return fixed
