"""From a manifest to a store, once: a store with the same fingerprint is opened again instead."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tuner import __version__
from tuner.config import EncoderRef
from tuner.data.cache import cache_root
from tuner.data.execution import run_on_ray
from tuner.data.manifest import read_manifest
from tuner.data.plan import Clip, Plan, check_clip_ids, file_states, make_plan, manifest_digest
from tuner.data.rejects import Reject, check_rejects, write_rejects
from tuner.data.splits import SPLITS, assign_splits, check_fractions, group_recordings
from tuner.data.store import REJECTS_FILE, VERSION, StoreMeta, read_meta
from tuner.data.worker import make_work
from tuner.data.writer import (
    FeatureWriter,
    check_replaceable,
    disk_faults,
    new_folder,
    only_writer,
    write_captions,
    write_clips,
    write_meta,
)
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.text_facts import TextSpec, inspect_text_encoder
from tuner.errors import ConfigError, DataError, Field
from tuner.places import absolute_source

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PrepareOptions:
    """Choices of a prepare run.

    Attributes:
        fractions: shares of train, validation and test where the manifest gives no split.
        seed: of the drawn splits.
        max_rejects: share of rows that may be unusable, 0 to 1.
        audio_root: see `read_manifest`.
    """

    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0
    max_rejects: float = 0.01
    audio_root: Path | None = None


@dataclass(frozen=True)
class PrepareResult:
    """Where the store is and what is in it; `reused` when it was there already."""

    store: Path
    clips: int
    rejects: int
    reused: bool


@dataclass(frozen=True)
class _Recipe:
    """Everything that the contents of a store depend on, under one fingerprint."""

    manifest: Path
    plan: Plan
    encoder: EncoderRef
    spec: EncoderSpec
    text: TextSpec
    options: PrepareOptions
    fingerprint: str


def prepare(
    manifest: Path,
    encoder: EncoderRef,
    text_encoder: str,
    out: Path | None = None,
    options: PrepareOptions = PrepareOptions(),
    progress: Progress = lambda done, total: None,
) -> PrepareResult:
    """Decode, extract and embed everything a manifest names, on Ray Data, and write the store.

    A complete store with the same fingerprint is returned at once, without Ray and without torch.

    Args:
        manifest: file or dataset folder, see `tuner.data.manifest`.
        encoder: whose front end makes the features.
        text_encoder: hub id or folder of the frozen text encoder.
        out: folder of the store; a folder of the cache named by the fingerprint when absent.
        progress: called with recordings done and to do.

    Raises:
        DataError: the manifest or too many of its recordings cannot be used, or the folder cannot be written.
        EncoderError: one of the encoders cannot be used.
        ConfigError: an option is out of range.
    """
    encoder = encoder.model_copy(update={"source": absolute_source(encoder.source)})
    recipe = _recipe(Path(manifest), encoder, absolute_source(text_encoder), options)
    target = (out if out is not None else cache_root() / "stores" / recipe.fingerprint).absolute()
    if not target.name:
        raise DataError(f"{target}: is no place for a store; give a folder with ", Field("out"))
    reused = _reusable(target, recipe)
    if reused is not None:
        return reused
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two searches started together: the second waits here, then finds the store of the first.
        with only_writer(target):
            return _reusable(target, recipe) or _build(target, recipe, progress)


def _recipe(manifest: Path, encoder: EncoderRef, text_encoder: str, options: PrepareOptions) -> _Recipe:
    check_fractions(options.fractions)
    if not (math.isfinite(options.max_rejects) and 0 <= options.max_rejects <= 1):
        raise ConfigError(f"max_rejects: must be a share between 0 and 1 (got {options.max_rejects:g})")
    rows = read_manifest(manifest, options.audio_root)
    states = file_states(rows)
    # A file in two splits is named as such, before the clip id that it has by its name.
    plan = make_plan(rows, states)
    check_clip_ids(rows)
    # Features are made before anything runs: the path that a search takes later is no matter of the store.
    encoder = encoder.model_copy(update={"path": "audio_tower"})
    spec = inspect_encoder(encoder)
    text = inspect_text_encoder(text_encoder)
    parts = {
        "version": VERSION,
        "encoder": spec.fingerprint,
        "text": text.fingerprint,
        "manifest": manifest_digest(rows, states),
        "fractions": options.fractions,
        "seed": options.seed,
    }
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return _Recipe(manifest.absolute(), plan, encoder, spec, text, options, fingerprint)


def _reusable(target: Path, recipe: _Recipe) -> PrepareResult | None:
    values = read_meta(target)
    try:
        meta = None if values is None else StoreMeta.parse(values)
    except ValueError:
        return None
    if meta is None or meta.fingerprint != recipe.fingerprint:
        return None
    if meta.rows is None or meta.clips is None or meta.rejects is None:
        return None
    sizes = {name: (target / name).stat().st_size for name in meta.files if (target / name).is_file()}
    if sizes != meta.files or meta.rejects > recipe.options.max_rejects * meta.rows:
        return None
    return PrepareResult(target, meta.clips, meta.rejects, reused=True)


def _build(target: Path, recipe: _Recipe, progress: Progress) -> PrepareResult:
    check_replaceable(target)
    plan, limit = recipe.plan, recipe.options.max_rejects
    listing = target.with_name(f"{target.name}.{REJECTS_FILE}")
    # Missing files are known already: a wrong folder fails here, before any process is started.
    check_rejects(plan.rejects, plan.rows, limit, listing)
    with new_folder(target) as folder:
        with FeatureWriter(folder) as writer:
            progress(0, len(plan.clips))
            results = _Results(plan, writer, progress)
            work = list(make_work(plan.clips, plan.captions))
            # Closed here, so that Ray stops at once when a result cannot be written.
            with closing(run_on_ray(work, recipe.spec, recipe.text)) as tables:
                results.take(tables)
        rejects = sorted((*plan.rejects, *results.rejects))
        check_rejects(rejects, plan.rows, limit, listing)
        splits = _splits(plan, results, recipe.options)
        write_rejects(rejects, folder / REJECTS_FILE)
        _write_tables(folder, plan, results, writer, splits)
        write_meta(folder, _meta(recipe, results, writer, splits, len(rejects)))
    listing.unlink(missing_ok=True)
    return PrepareResult(target, len(results.clips), len(rejects), reused=False)


class _Results:
    """What came back: features go to disk at once, the rest is small and stays."""

    def __init__(self, plan: Plan, writer: FeatureWriter, progress: Progress) -> None:
        self.rejects: list[Reject] = []
        self.embeddings: dict[int, np.ndarray] = {}
        self._plan = plan
        self._writer = writer
        self._progress = progress
        self._facts: dict[int, tuple[int, float, str]] = {}
        self._done = 0

    @property
    def clips(self) -> list[int]:
        """Plan positions of the usable clips, in manifest order: the clips of the store."""
        return sorted(self._facts)

    def facts(self, clip: int) -> tuple[int, float, str]:
        """Frames, seconds and content digest of a usable clip."""
        return self._facts[clip]

    def take(self, tables: Iterable[pa.Table]) -> None:
        for table in tables:
            captions = table.filter(pc.equal(table["kind"], pa.scalar("caption")))
            for position, index in enumerate(captions["index"].to_numpy()):
                self.embeddings[int(index)] = np.asarray(captions["values"][position].values)
            self._take_clips(table.filter(pc.equal(table["kind"], pa.scalar("clip"))))

    def _take_clips(self, table: pa.Table) -> None:
        usable = table.filter(pc.is_null(table["reason"]))
        for batch in usable.combine_chunks().to_batches():
            columns = batch.select(["index", "frames", "seconds", "digest"]).to_pydict()
            self._writer.add(columns["index"], batch.column("values"))
            self._facts.update(zip(columns["index"], zip(*list(columns.values())[1:], strict=True), strict=True))
        unusable = table.filter(pc.is_valid(table["reason"])).select(["index", "reason", "detail"])
        for item in unusable.to_pylist():
            clip = self._plan.clips[item["index"]]
            self.rejects += [Reject(row, clip.name, item["reason"], item["detail"]) for row in clip.rows]
        self._done += table.num_rows
        if table.num_rows:
            self._progress(self._done, len(self._plan.clips))


def _splits(plan: Plan, results: _Results, options: PrepareOptions) -> list[str]:
    """Split of each usable clip: one recording is one clip id, one file or one content."""
    clips = [plan.clips[index] for index in results.clips]
    digests = [results.facts(index)[2] for index in results.clips]
    groups = group_recordings(
        [(*clip.identities, f"sound:{digest}") for clip, digest in zip(clips, digests, strict=True)]
    )
    given = [clip.split for clip in clips]
    return assign_splits(groups, given, options.fractions, options.seed, [clip.rows[0] for clip in clips])


def _write_tables(folder: Path, plan: Plan, results: _Results, writer: FeatureWriter, splits: list[str]) -> None:
    clips: list[Clip] = [plan.clips[index] for index in results.clips]
    # Captions of rejected recordings alone are no gallery entries.
    kept = sorted({caption for clip in clips for caption in clip.captions})
    number = {caption: position for position, caption in enumerate(kept)}
    write_captions(
        folder, [plan.captions[caption] for caption in kept], np.stack([results.embeddings[item] for item in kept])
    )
    facts = [results.facts(index) for index in results.clips]
    places = writer.places(results.clips)
    write_clips(
        folder,
        {
            "clip_id": [clip.clip_id for clip in clips],
            "audio": [clip.name for clip in clips],
            "language": [clip.language for clip in clips],
            "split": [SPLITS.index(split) for split in splits],
            "frames": [frames for frames, _, _ in facts],
            "seconds": [seconds for _, seconds, _ in facts],
            "captions": [[number[caption] for caption in clip.captions] for clip in clips],
            "shard": places[:, 0],
            "batch": places[:, 1],
            "slot": places[:, 2],
        },
    )


def _meta(recipe: _Recipe, results: _Results, writer: FeatureWriter, splits: list[str], rejects: int) -> dict[str, Any]:
    return {
        "tuner": __version__,
        "fingerprint": recipe.fingerprint,
        "manifest": str(recipe.manifest),
        "encoder": recipe.encoder.model_dump(mode="json"),
        "encoder_fingerprint": recipe.spec.fingerprint,
        "text_encoder": recipe.text.source,
        "text_fingerprint": recipe.text.fingerprint,
        "text_dim": recipe.text.dim,
        "feature_channels": recipe.spec.feature_channels,
        "sampling_rate": recipe.spec.sampling_rate,
        "settings": {"fractions": recipe.options.fractions, "seed": recipe.options.seed},
        "rows": recipe.plan.rows,
        "clips": len(splits),
        "rejects": rejects,
        "hours": sum(results.facts(clip)[1] for clip in results.clips) / 3600,
        "splits": dict(Counter(splits)),
        "shards": writer.shards,
    }
