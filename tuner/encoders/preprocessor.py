"""The settings of an encoder's own feature extractor, in whichever file its folder has them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.encoders.checkpoint import read_json

PREPROCESSOR = "preprocessor_config.json"
# transformers 5 saves a processor as this one file, with the feature extractor inside.
PROCESSOR = "processor_config.json"
_INSIDE = ("feature_extractor", "audio_processor")


def preprocessor_file(folder: Path) -> Path:
    """The file with the settings; `preprocessor_config.json` also where there is none.

    Raises:
        EncoderError: a file is damaged.
    """
    own, whole = folder / PREPROCESSOR, folder / PROCESSOR
    return whole if not own.is_file() and whole.is_file() and _inside(whole) is not None else own


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """The settings as transformers' `from_dict` takes them, None where no file holds them.

    Raises:
        EncoderError: a file is damaged.
    """
    path = preprocessor_file(folder)
    if not path.is_file():
        return None
    return _inside(path) if path.name == PROCESSOR else read_json(path)


def _inside(path: Path) -> dict[str, Any] | None:
    settings = read_json(path)
    return next((dict(settings[name]) for name in _INSIDE if isinstance(settings.get(name), Mapping)), None)
