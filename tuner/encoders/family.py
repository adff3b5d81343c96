"""The record that makes a family of encoders known to the registry. No torch here."""

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
            the encoder looks at behind the clip. Of an encoder that reads the waveform, C is 1 and frames are samples.

        Raises:
            DataError: the clip is empty, or longer than the encoder's longest.
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
        """Name of the family that `config.json` gives."""
        return str(self.config.get("model_type"))

    def facts(self, weights: Iterable[Path], *settings: object) -> dict[str, Any]:
        """The fields of `EncoderSpec` that all families fill in one way.

        Args:
            weights: files that hold the encoder.
            settings: what its output depends on besides its files.
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


# Which tower and which front end a family has, by the names under which the registry loads them.
Tower = Literal["clap", "glmasr", "qwen2_5_omni", "qwen2_audio", "voxtral", "wav2vec2", "wavlm", "whisper"]
Features = Literal["clap", "log_mel", "waveform"]


@dataclass(frozen=True)
class Family:
    """How to read one family of encoders. No torch here: the registry alone loads towers and front ends."""

    model_type: str  # `model_type` of config.json
    prefixes: tuple[str, ...]  # where the tower's tensors are in a checkpoint; the first that occurs counts
    inspect: Callable[[EncoderSource], EncoderSpec]
    tower: Tower
    features: Features
    ctranslate2_name: str | None = None  # specification name inside a CTranslate2 model.bin
    # The paths that `inspect` knows; where there is one alone, an encoder without a tower of its own takes it unasked.
    paths: tuple[EncoderPath, ...] = ("audio_tower",)
    behind_tower: tuple[tuple[str, ...], ...] = ()  # like `prefixes`, of each further part that `full_forward` reads
