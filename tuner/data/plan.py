"""What a manifest asks for, before any audio is decoded: clips, distinct captions, rows that cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.data.manifest import ClipRow
from tuner.data.rejects import Reject
from tuner.data.tables import EmbeddedAudio
from tuner.errors import DataError

FileState = tuple[int, int]  # size in bytes, mtime in ns


@dataclass(frozen=True)
class Clip:
    """One recording to prepare, with the captions of all rows that name it.

    Attributes:
        rows: manifest rows, in order.
        captions: positions in `Plan.captions`.
        identities: keys that it shares with other clips of the same recording.
    """

    audio: Path
    embedded: EmbeddedAudio | None
    rows: tuple[int, ...]
    captions: tuple[int, ...]
    clip_id: str
    split: str | None
    language: str | None
    identities: tuple[str, ...]

    @property
    def name(self) -> str:
        """Where the recording is, for people: a path, or `FILE#ROW`."""
        return f"{self.embedded.file}#{self.embedded.row}" if self.embedded else str(self.audio)


@dataclass(frozen=True)
class Plan:
    """Clips in manifest order, distinct captions in order of appearance, and rows rejected already."""

    clips: tuple[Clip, ...]
    captions: tuple[str, ...]
    rejects: tuple[Reject, ...]
    rows: int


def normalise_caption(text: str) -> str:
    """The form in which two captions are the same gallery entry: case folded, white space collapsed."""
    return " ".join(text.casefold().split())


def file_states(rows: Sequence[ClipRow]) -> dict[Path, FileState | None]:
    """Size and modification time of every file that holds audio; None where it is missing or not a file."""
    states: dict[Path, FileState | None] = {}
    for audio in {row.audio for row in rows if row.problem != "no audio"}:
        try:
            stat = audio.stat()
            states[audio] = (stat.st_size, stat.st_mtime_ns) if audio.is_file() else None
        except OSError:
            states[audio] = None
    return states


def manifest_digest(rows: Sequence[ClipRow], states: dict[Path, FileState | None]) -> str:
    """Digest of all rows and of the state of their files.

    A file counts by path, size and modification time in ns, as build tools do it: 100,000 files are checked in
    seconds, and a recording that was replaced or edited has another modification time.
    """
    digest = hashlib.sha256()
    for row in rows:
        values = (
            row.row, str(row.audio), row.captions, row.clip_id, row.split, row.language, row.problem,
            row.embedded.row if row.embedded else None, states.get(row.audio),
        )  # fmt: skip
        digest.update(json.dumps(values).encode() + b"\n")
    return digest.hexdigest()


def check_clip_ids(rows: Sequence[ClipRow]) -> None:
    """Make sure that no clip id is in two splits: a clip id names a recording, and a recording has one split.

    Raises:
        DataError: names both rows, and what to do about ids that are counted in each split by itself.
    """
    first: dict[str, ClipRow] = {}
    for row in rows:
        if row.split is None or row.problem:
            continue
        known = first.setdefault(row.clip_id, row)
        if known.split != row.split:
            name = " ".join(row.clip_id.split())[:60]
            raise DataError(
                f"rows {known.row} and {row.row} have the clip_id {name} and two splits ({known.split} "
                f"and {row.split}); give each recording a clip_id of its own, or all rows of one recording the same "
                "`split`"
            )


def make_plan(rows: Sequence[ClipRow], states: dict[Path, FileState | None]) -> Plan:
    """Merge rows of one recording into a clip and number the distinct captions.

    Rows that name the same file (or the same embedded row) are one clip with several captions, as in AudioCaps and
    Clotho, so that a gallery holds no recording twice.

    Raises:
        DataError: rows of one recording have different splits.
    """
    clips: dict[str, Clip] = {}
    numbers: dict[str, int] = {}
    spellings: list[str] = []
    rejects: list[Reject] = []
    for row in rows:
        reason = row.problem or ("missing" if states[row.audio] is None else None)
        if reason:
            rejects.append(Reject(row.row, "" if row.problem == "no audio" else str(row.audio), reason))
            continue
        for caption in row.captions:
            if numbers.setdefault(normalise_caption(caption), len(spellings)) == len(spellings):
                spellings.append(caption)
        captions = tuple(dict.fromkeys(numbers[normalise_caption(caption)] for caption in row.captions))
        clip = _clip(row, captions)
        known = clips.get(clip.name)
        clips[clip.name] = clip if known is None else _merge(known, clip)
    return Plan(tuple(clips.values()), tuple(spellings), tuple(rejects), len(rows))


def _clip(row: ClipRow, captions: tuple[int, ...]) -> Clip:
    return Clip(
        audio=row.audio,
        embedded=row.embedded,
        rows=(row.row,),
        captions=captions,
        clip_id=row.clip_id,
        split=row.split,
        language=row.language,
        identities=(f"id:{row.clip_id}",),
    )


def _merge(known: Clip, more: Clip) -> Clip:
    if known.split and more.split and known.split != more.split:
        raise DataError(
            f"rows {known.rows[0]} and {more.rows[0]} are one recording in two splits ({known.split} and "
            f"{more.split}): both name {known.name}; give both rows the same `split`"
        )
    return replace(
        known,
        rows=known.rows + more.rows,
        captions=tuple(dict.fromkeys(known.captions + more.captions)),
        split=known.split or more.split,
        language=known.language or more.language,
        identities=tuple(dict.fromkeys(known.identities + more.identities)),
    )
