"""Embeddings of new recordings with an exported adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from numpy.typing import NDArray

from tuner.data.audio import UnusableAudioError, at_rate, decode
from tuner.data.writer import new_file
from tuner.encoders.registry import load_feature_extractor
from tuner.errors import DataError
from tuner.places import is_file, is_folder
from tuner.train.evaluate import LoadedAdapter

FILES_PER_BATCH = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Clips:
    """Features of a few recordings in memory, read by the encoder like a store."""

    maps: list[NDArray[np.float32]]
    frames: NDArray[np.int32]

    def features(self, clip: int) -> NDArray[np.float32]:
        """Features [C, F] of one clip."""
        return self.maps[clip]


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and in folders everything soundfile can read, sorted.

    Raises:
        DataError: a path does not exist or cannot be read, or there is no recording at all.
    """
    endings = {f".{name.lower()}" for name in soundfile.available_formats()}
    found: list[Path] = []
    for path in paths:
        if is_folder(path):
            try:
                found += sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
            except OSError as error:
                place = error.filename or path
                reason = f"{place}: cannot be read ({error.strerror}); give recordings or folders of recordings"
                raise DataError(reason) from None
        elif is_file(path):
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; give recordings or folders of recordings")
    if not found:
        raise DataError(f"{paths[0]}: no recordings in this folder; it needs audio files such as wav, flac, ogg or mp3")
    return found


def embed_files(
    adapter: LoadedAdapter, files: Sequence[Path], out: Path, progress: Progress
) -> tuple[int, list[tuple[Path, str]]]:
    """Write `path`, `seconds` and `embedding` of each usable recording to a Parquet file.

    Returns:
        Number of recordings written, and the others, each with the reason.

    Raises:
        DataError: the file cannot be written, or none of the recordings can be used.
    """
    width = adapter.card.text_dim
    columns: list[tuple[str, Any]] = [
        ("path", pa.string()),
        ("seconds", pa.float64()),
        ("embedding", pa.list_(pa.float32(), width)),
    ]
    schema = pa.schema(columns)
    reader = _Reader(adapter)
    written = 0
    with new_file(out) as staged:
        with pq.ParquetWriter(staged, schema) as writer:
            for start in range(0, len(files), FILES_PER_BATCH):
                usable, seconds, clips = reader.read(files[start : start + FILES_PER_BATCH])
                if usable:
                    rows = adapter.embed(clips, np.arange(len(usable))).cpu().numpy()
                    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
                    writer.write_table(pa.table([[str(path) for path in usable], seconds, column], schema=schema))
                    written += len(usable)
                progress(min(start + FILES_PER_BATCH, len(files)), len(files))
        if not written:
            path, reason = reader.rejects[0]
            raise DataError(f"{path}: {reason}; none of {len(files)} recordings can be used")
    return written, reader.rejects


class _Reader:
    """Decodes recordings for one encoder and remembers those that cannot be used."""

    def __init__(self, adapter: LoadedAdapter) -> None:
        self.spec = adapter.encoder.spec
        self.extractor = load_feature_extractor(self.spec)
        self.rejects: list[tuple[Path, str]] = []

    def read(self, files: Sequence[Path]) -> tuple[list[Path], list[float], Clips]:
        usable, seconds, maps, frames = list[Path](), list[float](), list[NDArray[np.float32]](), list[int]()
        for path in files:
            try:
                recording = decode(path, self.spec.max_seconds)
            except UnusableAudioError as error:
                self.rejects.append((path, " ".join(filter(None, (error.reason, error.detail)))))
                continue
            features, count = self.extractor.extract(at_rate(recording, self.spec.sampling_rate, self.spec.max_seconds))
            if self.spec.token_length(count) < 1:
                self.rejects.append((path, "too short for this encoder"))
                continue
            usable.append(path)
            seconds.append(recording.seconds)
            maps.append(features)
            frames.append(count)
        return usable, seconds, Clips(maps, np.asarray(frames, dtype=np.int32))
