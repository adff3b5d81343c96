"""The record that adds a family of encoders to the registry. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tuner.config import EncoderPath, EncoderRef
from tuner.encoders.checkpoint import fingerprint
from tuner.encoders.preprocessor import preprocessor_file
from tuner.encoders.spec import CheckpointKind, EncoderSpec

# Where a whole model has its audio tower: in transformers, and in checkpoints, of which those of transformers 4 have it
# one level higher.
TOWER_PATH = "model.audio_tower"
TOWER_PREFIXES = ("audio_tower.", "model.audio_tower.")


class FeatureExtractor(Protocol):
    """Turns a waveform into what the encoder reads."""

    def extract(self, waveform: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """Features of one clip.

        Args:
            waveform: mono samples [S] at the encoder's sampling rate, nominally in -1..1.

        Returns:
            Features [C, F] and the number of real frames L. F may be larger than L by the few frames of silence that
            the encoder reads after the clip. For an encoder that reads the waveform, C is 1 and frames are samples.

        Raises:
            DataError: the clip is empty, or longer than the encoder allows.
        """
        ...


@dataclass(frozen=True)
class EncoderSource:
    """A resolved local folder with its parsed `config.json`."""

    ref: EncoderRef
    folder: Path
    checkpoint: CheckpointKind
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """Name of the family, as `config.json` gives it."""
        return str(self.config.get("model_type"))

    def facts(self, weights: Iterable[Path], *settings: object) -> dict[str, Any]:
        """The fields of `EncoderSpec` that are the same for all families.

        Args:
            weights: files that hold the encoder.
            settings: what else its output depends on.
        """
        configs = [self.folder / "config.json", preprocessor_file(self.folder)]
        return {
            "family": self.model_type,
            "source": self.ref.source,
            "folder": self.folder,
            "checkpoint": self.checkpoint,
            "pad_to_30s": self.ref.pad_to_30s,
            "fingerprint": fingerprint(configs, weights, self.model_type, *settings),
        }


# The tower and the front end of a family, by the names under which the registry loads them.
Tower = Literal["clap", "glmasr", "qwen2_5_omni", "qwen2_audio", "voxtral", "wav2vec2", "wavlm", "whisper"]
Features = Literal["clap", "log_mel", "waveform"]


@dataclass(frozen=True)
class Family:
    """How to read one family of encoders. No torch here: only the registry loads towers and front ends."""

    model_type: str  # `model_type` of config.json
    prefixes: tuple[str, ...]  # where the tower's tensors are in a checkpoint; the first that occurs counts
    inspect: Callable[[EncoderSource], EncoderSpec]
    tower: Tower
    features: Features
    ctranslate2_name: str | None = None  # specification name inside a CTranslate2 model.bin
    # The paths that `inspect` knows. If there is only one, an encoder without a tower of its own uses it by default.
    paths: tuple[EncoderPath, ...] = ("audio_tower",)
    behind_tower: tuple[tuple[str, ...], ...] = ()  # like `prefixes`, of each further part that `full_forward` reads
