"""The recordings of a store or a manifest, and how to recognise that two of them are the same.

For a manifest every recording is decoded, as `tuner prepare` does, but without features, Ray or a text encoder. For a
store nothing is decoded: clips are the same sound if their features are equal.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tuner.data.audio import UnusableAudioError, decode
from tuner.data.manifest import read_manifest
from tuner.data.plan import Clip, file_states, make_plan
from tuner.data.store import REJECTS_FILE, Store
from tuner.data.tables import EmbeddedAudio, read_audio_bytes
from tuner.encoders.spec import EncoderSpec
from tuner.errors import DataError
from tuner.plain_json import parse_json

# Features of silence have one value everywhere: the floor of a log-mel spectrum, or zero of a waveform.
FLAT = 1e-6
LONGEST = 30.0  # seconds; the limit of all known families, if the encoder is unknown
EMBEDDED_AT_ONCE = 32
Progress = Callable[[int, int], None]  # recordings read, and to read


@dataclass
class Recordings:
    """What is known of N usable recordings, from a store or straight from a manifest."""

    names: list[str] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)  # None: will be drawn
    seconds: list[float] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)  # equal for the same sound
    identities: list[tuple[str, ...]] = field(default_factory=list)  # other signs that two are the same recording
    captions: list[tuple[int, ...]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    audio: list[Path | EmbeddedAudio] = field(default_factory=list)  # where to decode them from
    rows: int = 0  # of the manifest, rejects included


def store_recordings(store: Store) -> Recordings:
    """Recordings of a prepared store, compared by features."""
    found = Recordings(rows=int(store.meta.get("rows", len(store))), rejects=_listed_rejects(store))
    splits = store.split_names
    for clip in range(len(store)):
        features = store.features(clip)
        content = hashlib.blake2b(np.ascontiguousarray(features).data, digest_size=16).hexdigest()
        found.names.append(store.audio[clip])
        found.audio.append(Path(store.audio[clip]))
        found.splits.append(splits[clip])
        found.seconds.append(float(store.seconds[clip]))
        found.contents.append(f"{int(store.frames[clip])}:{content}")
        found.identities.append((f"file {store.audio[clip]}", f"clip_id {store.clip_ids[clip]}"))
        found.captions.append(tuple(int(caption) for caption in store.clip_captions(clip)))
        if float(features.max()) - float(features.min()) < FLAT:
            found.silent.append(store.audio[clip])
    return found


def manifest_recordings(
    manifest: Path, audio_root: Path | None, spec: EncoderSpec | None, progress: Progress
) -> Recordings:
    """All recordings of a manifest, compared by the decoded sound.

    Raises:
        DataError: the manifest cannot be read, gives one file two splits, or names a recording outside `audio_root`.
    """
    rows = read_manifest(manifest, audio_root)
    plan = make_plan(rows, file_states(rows))
    found = Recordings(rows=plan.rows, rejects=Counter(reject.reason for reject in plan.rejects))
    longest = spec.max_seconds if spec else LONGEST
    for done, (clip, source) in enumerate(_sources(plan.clips), start=1):
        try:
            recording = decode(source, longest)
        except UnusableAudioError as error:
            found.rejects[error.reason] += len(clip.rows)
        else:
            found.names.append(clip.name)
            found.audio.append(clip.embedded or clip.audio)
            found.splits.append(clip.split)
            found.seconds.append(recording.seconds)
            found.contents.append(recording.digest)
            found.identities.append(tuple(key.replace("id:", "clip_id ", 1) for key in clip.identities))
            found.captions.append(clip.captions)
        progress(done, len(plan.clips))
    return found


def _sources(clips: tuple[Clip, ...]) -> Iterator[tuple[Clip, Path | bytes]]:
    for start in range(0, len(clips), EMBEDDED_AT_ONCE):
        batch = clips[start : start + EMBEDDED_AT_ONCE]
        contents = iter(read_audio_bytes([clip.embedded for clip in batch if clip.embedded]))
        for clip in batch:
            yield clip, next(contents) if clip.embedded else clip.audio


def _listed_rejects(store: Store) -> Counter[str]:
    path = store.folder / REJECTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return Counter(str(parse_json(line)["reason"]) for line in lines)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason}); prepare the data again") from None
