"""One batch of work of the prepare pipeline: recordings to features, captions to embeddings.

Runs inside Ray Data actors; torch is imported on the first batch. Work and results are Arrow tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuner.data.audio import Recording, UnusableAudioError, at_rate, decode
from tuner.data.plan import Clip
from tuner.data.tables import EmbeddedAudio, read_audio_bytes
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.text_facts import TextSpec

# 32 clips of 30 s are 49 MB at 128 mel bins and 61 MB as waveforms, below Ray Data's block size of 128 MB.
CLIPS_PER_BATCH = 32
CAPTIONS_PER_BATCH = 1024

# A batch of work holds captions (`text`) or recordings (`audio`, with `row` where the bytes are embedded).
_WORK_COLUMNS: list[tuple[str, Any]] = [
    ("index", pa.int64()),
    ("text", pa.string()),
    ("audio", pa.string()),
    ("row", pa.int64()),
]
WORK_SCHEMA = pa.schema(_WORK_COLUMNS)
# `values` is a [C, F] feature map or a [D] embedding, flat; `reason` is null unless the recording is rejected.
_RESULT_COLUMNS: list[tuple[str, Any]] = [
    ("index", pa.int64()),
    ("kind", pa.string()),
    ("values", pa.list_(pa.float32())),
    ("frames", pa.int32()),
    ("seconds", pa.float32()),
    ("digest", pa.string()),
    ("reason", pa.string()),
    ("detail", pa.string()),
]
RESULT_SCHEMA = pa.schema(_RESULT_COLUMNS)


def make_work(clips: Sequence[Clip], captions: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of work, captions first: they load the text encoder while there is other work for the other actors."""
    texts = [{"index": index, "text": text} for index, text in enumerate(captions)]
    recordings = [
        {"index": index, "audio": str(clip.audio), "row": clip.embedded.row if clip.embedded else None}
        for index, clip in enumerate(clips)
    ]
    for items, size in ((texts, CAPTIONS_PER_BATCH), (recordings, CLIPS_PER_BATCH)):
        for start in range(0, len(items), size):
            yield pa.Table.from_pylist(items[start : start + size], schema=WORK_SCHEMA)


class FeatureWorker:
    """Loads the front end and the text encoder once, then turns batches of work into results."""

    def __init__(self, spec: EncoderSpec, text: TextSpec) -> None:
        self._spec = spec
        self._text = text
        self._extractor: Any = None
        self._text_encoder: Any = None

    def __call__(self, work: pa.Table) -> pa.Table:
        """Results of one batch of work, in its order.

        Raises:
            EncoderError: the encoder's front end or the text encoder cannot be loaded.
            DataError: a file with embedded audio is damaged.
        """
        items = work.to_pylist()
        captions = [item for item in items if item["text"] is not None]
        recordings = [item for item in items if item["text"] is None]
        rows = self._embed(captions) if captions else []
        rows += [self._extract(item, source) for item, source in self._sources(recordings)]
        return _result_table(rows)

    def _embed(self, captions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._text_encoder is None:
            from tuner.encoders.text import TextEncoder

            self._text_encoder = TextEncoder(self._text)
        embeddings = self._text_encoder.encode([item["text"] for item in captions])
        return [
            {"index": item["index"], "kind": "caption", "values": embedding}
            for item, embedding in zip(captions, embeddings, strict=True)
        ]

    def _sources(self, recordings: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Path | bytes]]:
        embedded = [item for item in recordings if item["row"] is not None]
        contents = read_audio_bytes([EmbeddedAudio(Path(item["audio"]), item["row"]) for item in embedded])
        found = {item["index"]: content for item, content in zip(embedded, contents, strict=True)}
        for item in recordings:
            yield item, found.get(item["index"], Path(item["audio"]))

    def _extract(self, item: dict[str, Any], source: Path | bytes) -> dict[str, Any]:
        try:
            recording = decode(source, self._spec.max_seconds)
            features, frames = self._features(recording)
        except UnusableAudioError as error:
            return {"index": item["index"], "kind": "clip", "reason": error.reason, "detail": error.detail}
        return {
            "index": item["index"],
            "kind": "clip",
            "values": features,
            "frames": frames,
            "seconds": recording.seconds,
            "digest": recording.digest,
        }

    def _features(self, recording: Recording) -> tuple[np.ndarray, int]:
        if self._extractor is None:
            from tuner.encoders.registry import load_feature_extractor

            self._extractor = load_feature_extractor(self._spec)
        waveform = at_rate(recording, self._spec.sampling_rate, self._spec.max_seconds)
        features, frames = self._extractor.extract(waveform)
        # A pooling encoder makes nothing of the very shortest clips, and a mean over no tokens is NaN.
        if self._spec.token_length(frames) < 1:
            raise UnusableAudioError("too short", f"{len(recording.samples)} samples")
        return np.asarray(features, dtype=np.float32), frames


def _result_table(rows: list[dict[str, Any]]) -> pa.Table:
    values = [row.pop("values", np.empty(0, np.float32)).reshape(-1) for row in rows]
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    flat = np.concatenate(values) if values else np.empty(0, np.float32)
    # Through flat arrays, since from_pylist would box every sample as a Python float.
    starts: Any = pa.array(offsets)
    samples: Any = pa.array(flat)
    lists = pa.ListArray.from_arrays(starts, samples)
    table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    return table.set_column(RESULT_SCHEMA.get_field_index("values"), RESULT_SCHEMA.field("values"), lists)
