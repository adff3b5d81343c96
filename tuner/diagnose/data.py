"""Step 2: the recordings: count, durations, rejected rows, duplicates, and leaks between splits."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tuner.data.splits import SPLITS
from tuner.diagnose.findings import Step
from tuner.diagnose.recordings import Progress, Recordings, manifest_recordings, store_recordings
from tuner.diagnose.subject import Subject

MAX_REJECTS = 0.01  # the share that `tuner prepare` allows by default


def check_data(subject: Subject, progress: Progress) -> Step:
    """Counts, durations, rejects, duplicates by content and leakage between the splits."""
    step = Step("data")
    request = subject.request
    if request.store is not None:
        recordings = store_recordings(request.store)
        if subject.spec and request.store.encoder_fingerprint != subject.spec.features_fingerprint:
            step.error(
                f"{request.store.folder}: prepared for another encoder than {subject.spec.source}",
                f"run `tuner prepare` with --encoder {subject.spec.source}",
            )
    elif request.manifest is not None:
        recordings = manifest_recordings(request.manifest, request.audio_root, subject.spec, progress)
    else:
        step.skipped = "no --data was given"
        return step
    subject.recordings = recordings
    _counts(step, recordings)
    _durations(step, recordings)
    _rejects(step, recordings)
    _silence(step, recordings)
    _duplicates(step, recordings)
    _captions(step, recordings)
    return step


def _counts(step: Step, found: Recordings) -> None:
    counts = Counter(split or "without a split" for split in found.splits)
    captions = {caption for owned in found.captions for caption in owned}
    step.values |= {"clips": len(found.names), "splits": dict(counts), "captions": len(captions)}
    if not found.names:
        step.error("no recording can be used", "fix the rejected rows")
        return
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    step.ok(f"{len(found.names)} clips ({listed}), {len(captions)} distinct captions")
    missing = [name for name in SPLITS if not counts[name]] if None not in found.splits else []
    if missing:
        step.error(
            f"no clips in the splits {', '.join(missing)}",
            "add clips of these splits to the manifest, or remove its column `split` so that tuner draws the splits",
        )


def _durations(step: Step, found: Recordings) -> None:
    if not found.seconds:
        return
    seconds = np.asarray(found.seconds)
    low, middle, high, top = (float(value) for value in np.quantile(seconds, [0, 0.5, 0.95, 1]))
    step.values["seconds"] = {"total": float(seconds.sum()), "min": low, "median": middle, "p95": high, "max": top}
    step.ok(
        f"{seconds.sum() / 3600:.2f} hours; a clip lasts {low:.2f} to {top:.2f} s, "
        f"median {middle:.2f} s, 95 % below {high:.2f} s"
    )


def _rejects(step: Step, found: Recordings) -> None:
    count = sum(found.rejects.values())
    step.values["rejects"] = dict(found.rejects)
    if not count:
        step.ok("every row of the data can be used")
        return
    listed = ", ".join(f"{number} {reason}" for reason, number in found.rejects.most_common())
    text = f"{count} of {found.rows} rows cannot be used: {listed}"
    if count > MAX_REJECTS * found.rows:
        step.warn(text, "fix these rows, or allow them with `tuner prepare --max-rejects`")
    else:
        step.note(text)


def _silence(step: Step, found: Recordings) -> None:
    """Recordings that can be decoded but are silent."""
    silent = len(found.silent) + found.rejects["silent"]
    step.values["silent"] = silent
    if not silent:
        return
    if not set(found.names) - set(found.silent):
        step.error(f"all {silent} recordings are silent", "check how they were recorded or converted")
    elif found.silent:
        step.warn(
            f"{len(found.silent)} clips are silent (for example {found.silent[0]})",
            "remove them and prepare the data again",
        )


def _duplicates(step: Step, found: Recordings) -> None:
    """The same sound twice: within a split it counts double; in two splits the test contains training data."""
    by_key: dict[str, list[int]] = {}
    for position, (content, others) in enumerate(zip(found.contents, found.identities, strict=True)):
        for key in (f"content {content}", *others):
            by_key.setdefault(key, []).append(position)
    leaks: dict[str, list[int]] = {}
    repeats = 0
    for key, group in by_key.items():
        splits = {found.splits[position] for position in group} - {None}
        if len(splits) > 1 and not any(set(group) <= set(known) for known in leaks.values()):
            leaks[key] = group
        elif key.startswith("content ") and len(group) > 1:
            repeats += len(group) - 1
    step.values |= {"leaks": len(leaks), "duplicates": repeats}
    if leaks:
        key, group = next(iter(leaks.items()))
        first = next((p, q) for p in group for q in group if found.splits[p] != found.splits[q])
        pair = " and ".join(f"{found.names[position]} ({found.splits[position]})" for position in first)
        by_id = key.startswith("clip_id ")
        step.error(
            f"recordings in two splits: {len(leaks)}, for example {pair}" + (f", both with the {key}" if by_id else ""),
            ("give each recording a clip_id of its own, or " if by_id else "")
            + "give all rows of one recording the same split and prepare the data again",
        )
    else:
        step.ok("no recording is in two splits, by content, file or clip_id")
    if repeats:
        step.note(f"clips that repeat the sound of another clip of their split: {repeats}")


def _captions(step: Step, found: Recordings) -> None:
    """In a closed catalogue the splits share captions on purpose."""
    splits_of: dict[int, set[str]] = {}
    for split, owned in zip(found.splits, found.captions, strict=True):
        for caption in owned:
            splits_of.setdefault(caption, set()).add(split or "")
    shared = sum(len(splits) > 1 for splits in splits_of.values())
    step.values["shared_captions"] = shared
    if shared:
        step.note(
            f"{shared} of {len(splits_of)} captions are in more than one split: this measures retrieval of known "
            "captions, as in a catalogue, not of new ones"
        )
