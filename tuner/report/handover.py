"""Points of a front as folders to hand on: adapters with a card to read, the numbers, and checksums."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tuner.errors import AdapterError, ConfigError, StudyError
from tuner.records import FRONT_FILE, write_json
from tuner.report.answer import difference_of, interval_of
from tuner.report.progress import BASELINE
from tuner.report.run import Run, metric_of, placed

# What `tuner.train.export` writes for a trial; the projection alone has no PEFT files.
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = ("card.json", "head.safetensors", "trial.yaml", *PEFT_FILES)
README_FILE = "README.md"
POINTS_FILE = "points.json"
SUMS_FILE = "SHA256SUMS"
_TRIAL = re.compile(r"t\d{4,9}", re.ASCII)

Point = dict[str, Any]


def choose_points(run: Run, trials: Sequence[str] = (), best: bool = False) -> list[Point]:
    """The points that were asked for: named trials, the best one on validation, or by default the whole front.

    Raises:
        StudyError: there is no front yet.
        ConfigError: a trial is no point; names those that there are.
    """
    if run.front is None:
        raise StudyError(
            f"study {run.name}: no front yet, so there are no adapters; let the search end "
            "(`tuner search --resume` if it was stopped)"
        )
    points = {str(point["trial"]): point for point in run.front["points"]}
    for trial in points:
        # They become names of folders, and a front may come from anywhere.
        if not _TRIAL.fullmatch(trial):
            raise StudyError(f"study {run.name}: {FRONT_FILE} names a trial {trial!r}, which none is called")
    for trial in trials:
        if trial not in points:
            raise ConfigError(f"--trial {trial}: no point of study {run.name}, which has {', '.join(points) or 'none'}")
    if trials:
        return [points[trial] for trial in dict.fromkeys(trials)]
    front = [point for point in points.values() if point["on_front"]]
    if not front:
        raise StudyError(f"study {run.name}: no trial finished, so there are no adapters")
    if not best:
        return front
    sign = 1 if run.direction == "maximize" else -1
    return [max(front, key=lambda point: sign * (metric_of(point["validation"], run.metric) or 0.0))]


def files_of(point: Point) -> list[str]:
    """Paths of a point's files below its study's folder."""
    lora = bool((point.get("config") or {}).get("lora"))
    return [f"adapters/{point['trial']}/{name}" for name in ADAPTER_FILES if lora or name not in PEFT_FILES]


def write_handover(run: Run, points: Sequence[Point], source: Path, folder: Path) -> None:
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
                    f"{run.name}/{name}: missing; `tuner search --resume {run.name}` exports the front again"
                )
            target = folder / Path(name).relative_to("adapters")
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target)
        (folder / point["trial"] / README_FILE).write_text(_card(run, point), encoding="utf-8")
    write_json(folder / POINTS_FILE, {"study": run.name, "objectives": run.study["objectives"], "points": points})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    # What `sha256sum --check` reads.
    (folder / SUMS_FILE).write_text("".join(sums), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(run: Run, point: Point) -> str:
    """A model card as model hubs show it: what it is, what it scored, how it is used."""
    trial, lora = point["trial"], point["config"].get("lora")
    encoder = run.study["encoder"]
    header = {
        "library_name": "peft" if lora else "tuner",
        "base_model": encoder["source"],
        "tags": ["lora", "audio", "audio-text-retrieval"] if lora else ["audio", "audio-text-retrieval"],
    }
    what = (
        f"LoRA of rank {lora['rank']} (alpha {lora['alpha_ratio'] * lora['rank']:g}, dropout {lora['dropout']:g}) on "
        f"{placed(', '.join(lora['targets']), lora.get('placement'))}, and a projection"
        if lora
        else "A projection without LoRA"
    )
    parameters = f"{point['trainable_parameters']:,} trainable parameters, {point['lora_parameters']:,} of them LoRA"
    data = run.study["data"]
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        f"# {trial} of study {run.name}",
        "",
        f"{what} into the text embedding space, for the audio encoder `{encoder['source']}` ({encoder['family']}): "
        f"{parameters}. Trained on {data['train']:,} clips.",
        "",
        *_scores(run, point),
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


def _scores(run: Run, point: Point) -> list[str]:
    test, interval = metric_of(point.get("test") or {}, run.metric), interval_of(point, run.metric)
    validation = metric_of(point["validation"], run.metric)
    difference = None if point["origin"] == BASELINE else difference_of(point, run.metric)
    rows = [f"| validation | {_figure(validation)} |", f"| test | {_figure(test, interval)} |"]
    if difference:
        rows.append(f"| test, over the projection alone | {_figure(*difference, sign='+')} |")
    return [f"| | {run.metric} [95 % interval] |", "|---|---|", *rows]


def _figure(value: float | None, interval: tuple[float, float] | None = None, sign: str = "") -> str:
    if value is None:
        return "not measured"
    low_high = f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]" if interval else ""
    return f"{value:{sign}.3f}{low_high}"
