"""Options of `tuner search --resume` against what the study has fixed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuner.commands.options import Typed
from tuner.errors import ConfigError
from tuner.places import exists
from tuner.study.config import StudyRecord


def refuse_changes(record: StudyRecord, typed: Mapping[str, Typed]) -> None:
    """Refuse options that a study has fixed otherwise.

    Raises:
        ConfigError: names the option, the study's value and what to do.
    """
    settings = record.settings
    fixed: dict[str, object] = {
        "study": record.study,
        "space": record.space.name,
        "data": settings.store,
        "encoder": settings.encoder.source,
        "pad_to_30s": settings.encoder.pad_to_30s,
        "path": settings.encoder.path,
        "objective": [objective.name for objective in record.objectives],
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "off_path": settings.off_path,
        "seed": record.seed,
        "sampler": record.sampler,
        "stopping": record.stopping,
        "max_parameters": record.max_parameters,
        "placement": ", ".join(record.space.placements),
    }
    # What no record keeps: it was used when the data was prepared.
    gone = ("text_encoder", "audio_root")
    for name, option in typed.items():
        if name in gone:
            raise ConfigError(f"{option.flag}: belongs to the data of study {record.study}; drop it to resume")
        if name in fixed and not _same(name, option.value, fixed[name]):
            raise ConfigError(
                f"{option.flag} {_shown(option.value)}: {name} is {_shown(fixed[name])} in study {record.study}; drop "
                "the option to resume, or start a new study with it"
            )


def _listed(value: object) -> list[str]:
    """The values of an option that may be repeated."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _shown(value: object) -> str:
    return ", ".join(_listed(value))


def _same(name: str, typed: object, fixed: object) -> bool:
    if name == "objective":
        return sorted(_listed(typed)) == sorted(_listed(fixed))
    if name == "space":
        return str(typed) == fixed or Path(str(typed)).stem == fixed
    if name in ("data", "encoder"):
        here = Path(str(typed))
        return str(typed) == fixed or (exists(here) and str(here.resolve()) == str(Path(str(fixed)).resolve()))
    return typed == fixed
