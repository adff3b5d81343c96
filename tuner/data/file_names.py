"""From what a manifest says to a file: paths as other systems write them, and recordings that are known by an id."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tuner.data.columns import ID_COLUMNS, audio_value
from tuner.errors import DataError, Field
from tuner.places import exists

Row = tuple[int, Mapping[str, object]]
_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")


def recording_path(folder: Path, name: str) -> Path:
    """The file that a manifest means by `name`, absolute if `folder` is; where no form of it exists, as it is written.

    Read are file:// URIs, backslashes of Windows, and names whose accents are composed in the manifest but not on disk
    (macOS writes `e` and an accent) or the other way round.
    """
    if name.startswith("file://"):
        parts = urlsplit(name)
        if parts.netloc in ("", "localhost"):
            name = unquote(parts.path)
    plain = folder / name
    if ("\\" not in name and name.isascii()) or exists(plain):
        return plain
    for form in dict.fromkeys((name, name.replace("\\", "/"))):
        if (found := _any_normal_form(folder, form)) is not None:
            return found
    return plain


def _any_normal_form(folder: Path, name: str) -> Path | None:
    """Part by part, since a folder may have been named on another system than the file in it."""
    path = folder
    for part in PurePosixPath(name).parts:
        forms = dict.fromkeys((part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)))
        found = next((path / form for form in forms if exists(path / form)), None)
        if found is None:
            return None
        path = found
    return path


def name_files_by_id(path: Path, folder: Path, rows: Sequence[Row]) -> list[Row] | None:
    """Rows of AudioCaps or WavCaps as they are published, which give ids, with the files in `folder` as `audio`.

    Of the ways in which these recordings are named after a download, the one that most files have is taken for all.

    Returns:
        None where the ids are of some other kind.

    Raises:
        DataError: rows give ids of videos, and no file in `folder` is named by one.
    """
    try:
        files = {file.stem: file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in _SUFFIXES}
    except OSError:
        files = {}
    named = [_possible_stems(values) for _, values in rows]
    counts = Counter(way for stems in named for way, stem in stems.items() if stem in files)
    if not counts:
        if example := next((stems["video"] for stems in named if "video" in stems), None):
            raise DataError(
                f"{path}: gives ids of videos and no column `audio`, and {folder} holds no recording named by one (for "
                f"example {example[:60]}.wav); add the column, or name the folder of the recordings with ",
                Field("audio_root"),
            )
        return None
    way = max(sorted(counts), key=counts.__getitem__)
    found: list[Row] = []
    for (row, values), stems in zip(rows, named, strict=True):
        stem = stems.get(way)
        audio = files.get(stem, f"{stem}.wav") if stem is not None else None
        # All captions of a video belong to one recording, even where each has a file of its own.
        clip_id = values.get("clip_id") or stems.get("video") or stem
        found.append((row, {**values, "audio": audio, "clip_id": clip_id}))
    return found


def _possible_stems(values: Mapping[str, object]) -> dict[str, str]:
    """What the file of a row may be called, without its suffix, by the way of naming it."""
    given = {name: str(values[name]).strip() for name in ID_COLUMNS if isinstance(values.get(name), str | int | float)}
    stems: dict[str, str] = {}
    if video := given.get("youtube_id"):
        stems |= {"video": video, "Yvideo": f"Y{video}"}
        if start := given.get("start_time"):
            stems["video_start"] = f"{video}_{start}"
        if number := given.get("audiocap_id"):
            stems["number"] = number
    elif identifier := given.get("id"):
        # Ids of WavCaps that come from AudioSet end in .wav, even if the file does not.
        suffix = PurePosixPath(identifier).suffix.lower()
        stems["id"] = identifier[: -len(suffix)] if suffix in _SUFFIXES else identifier
    return stems


def names_files(rows: Sequence[Row]) -> bool:
    """Whether any row says itself where its recording is."""
    return any(audio_value(values) is not None for _, values in rows)
