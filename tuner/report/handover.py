"""Points of a front as folders to hand on: adapters with a card to read, the numbers, and checksums."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from tuner.atomic import write_json
from tuner.errors import AdapterError, ConfigError, StudyError
from tuner.report.answer import best_point
from tuner.study.events import BASELINE
from tuner.study.folder import ADAPTERS, adapter_name
from tuner.study.points import Interval, Point
from tuner.study.study import Study
from tuner.study.wording import placed

# What `tuner.train.export` writes for a trial; the projection alone has no PEFT files.
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = ("card.json", "head.safetensors", "trial.yaml", *PEFT_FILES)
README_FILE = "README.md"
POINTS_FILE = "points.json"
SUMS_FILE = "SHA256SUMS"


def choose_points(study: Study, trials: Sequence[str] = (), best: bool = False) -> list[Point]:
    """The points that were asked for: named trials, the best one on validation, or by default the whole front.

    Raises:
        StudyError: there is no front yet.
        ConfigError: a trial is no point; names those that there are.
    """
    if study.front is None:
        raise StudyError(
            f"study {study.name}: no front yet, so there are no adapters; let the search end "
            "(`tuner search --resume` if it was stopped)"
        )
    points = {point.trial: point for point in study.front.points}
    for trial in trials:
        if trial not in points:
            there = ", ".join(points) or "none"
            raise ConfigError(f"trial {trial}: no point of study {study.name}, which has {there}")
    if trials:
        return [points[trial] for trial in dict.fromkeys(trials)]
    front = study.front.on_front
    if not front:
        raise StudyError(f"study {study.name}: no trial finished, so there are no adapters")
    return [best_point(front, study.metric.name)] if best else front


def files_of(point: Point) -> list[str]:
    """Paths of a point's files below its study's folder."""
    names = (name for name in ADAPTER_FILES if point.config.lora or name not in PEFT_FILES)
    return [f"{adapter_name(point.trial)}/{name}" for name in names]


def write_handover(study: Study, points: Sequence[Point], source: Path, folder: Path) -> None:
    """Fill an empty folder: a folder for each trial, `points.json` with their numbers, `SHA256SUMS` of all of it.

    Args:
        source: the study's folder, or a copy of it that has the files of these points.

    Raises:
        AdapterError: a file of a point is missing.
    """
    for point in points:
        for name in files_of(point):
            if not (source / name).is_file():
                raise AdapterError(
                    f"{study.name}/{name}: missing; `tuner search --resume {study.name}` exports the front again"
                )
            target = folder / Path(name).relative_to(ADAPTERS)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target)
        (folder / point.trial / README_FILE).write_text(_card(study, point), encoding="utf-8")
    values = [point.to_values() for point in points]
    objectives = study.record.model_dump(mode="json", include={"objectives"})
    write_json(folder / POINTS_FILE, {"study": study.name, **objectives, "points": values})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    # What `sha256sum --check` reads.
    (folder / SUMS_FILE).write_text("".join(sums), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(study: Study, point: Point) -> str:
    """A model card as model hubs show it: what it is, what it scored, how it is used."""
    trial, lora, encoder = point.trial, point.config.lora, study.record.encoder
    header = {
        "library_name": "peft" if lora else "tuner",
        "base_model": encoder.source,
        "tags": ["lora", "audio", "audio-text-retrieval"] if lora else ["audio", "audio-text-retrieval"],
    }
    what = (
        f"LoRA of rank {lora.rank} (alpha {lora.alpha:g}, dropout {lora.dropout:g}) on "
        f"{placed(', '.join(lora.targets), lora.placement)}, and a projection"
        if lora
        else "A projection without LoRA"
    )
    parameters = f"{point.trainable_parameters:,} trainable parameters, {point.lora_parameters:,} of them LoRA"
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        f"# {trial} of study {study.name}",
        "",
        f"{what} into the text embedding space, for the audio encoder `{encoder.source}` ({encoder.family}): "
        f"{parameters}. Trained on {study.record.data.train:,} clips.",
        "",
        *_scores(point, study.metric.name),
        "",
        "| file | what |",
        "|---|---|",
        *(["| `adapter_config.json`, `adapter_model.safetensors` | the LoRA, as PEFT reads it |"] if lora else []),
        "| `head.safetensors` | projection, logit scale and bias |",
        "| `trial.yaml` | what to train it again with: `tuner train trial.yaml` |",
        "| `card.json` | encoders with their fingerprints, number format, adapted modules |",
        "",
        "```",
        f"tuner evaluate {trial} --data STORE --encoder ENCODER",
        f"tuner embed {trial} RECORDINGS --out embeddings.parquet --encoder ENCODER",
        "```",
        *(_peft(trial) if lora else ()),
    ]
    return "\n".join(lines) + "\n"


def _peft(trial: str) -> list[str]:
    return [
        "",
        "The LoRA alone, without this project, in the part of the encoder that it adapts (such as "
        "`WhisperModel.from_pretrained(ENCODER).encoder`):",
        "",
        "```python",
        f'peft.PeftModel.from_pretrained(tower, "{trial}")',
        "```",
    ]


def _scores(point: Point, metric: str) -> list[str]:
    test, validation = point.test.value(metric), point.validation.value(metric)
    found = None if point.origin == BASELINE else point.test_vs_baseline.get(metric)
    rows = [f"| validation | {_figure(validation)} |", f"| test | {_figure(test, point.interval(metric))} |"]
    if found:
        rows.append(f"| test, over the projection alone | {_figure(found.difference, found.interval, sign='+')} |")
    return [f"| | {metric} [95 % interval] |", "|---|---|", *rows]


def _figure(value: float | None, interval: Interval | None = None, sign: str = "") -> str:
    if value is None:
        return "not measured"
    low_high = f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]" if interval else ""
    return f"{value:{sign}.3f}{low_high}"
