"""What is diagnosed, and what the steps learn of it for the steps behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuner.config import EncoderRef, LoraSpec, TrialConfig
from tuner.data.store import Store
from tuner.diagnose.recordings import Recordings
from tuner.encoders.base import AudioEncoder
from tuner.encoders.spec import EncoderSpec
from tuner.lora.path import EncodingPath
from tuner.space import SearchSpace
from tuner.train.prefix import FeatureSource

TEXT_DIM = 384  # of the demo's text encoder; where no store says it


@dataclass(frozen=True)
class DiagnoseRequest:
    """What `tuner diagnose` was asked for.

    Attributes:
        store: prepared data, if any.
        manifest: or what could be prepared.
        audio_root: of the manifest, see `read_manifest`.
        adapter: folder of an exported adapter, ours or anybody's.
        peft_config: an adapter_config.json alone.
        space: whose every placement is checked, and whose cost is told.
        trial: the configuration that the steps 6 and 7 train and count.
        trials, epochs, batch_size: of a search, for its cost.
    """

    encoder: EncoderRef
    trial: TrialConfig
    store: Store | None = None
    manifest: Path | None = None
    audio_root: Path | None = None
    adapter: Path | None = None
    peft_config: Path | None = None
    space: SearchSpace | None = None
    trials: int = 7
    epochs: int = 3
    batch_size: int = 64

    @property
    def lora(self) -> LoraSpec:
        """The LoRA of the configuration."""
        assert self.trial.lora is not None, "a diagnosis needs a LoRA to look at"
        return self.trial.lora


@dataclass(frozen=True)
class Sample:
    """A few clips that the encoder is tried on.

    Attributes:
        source: their features, as the encoder reads them.
        clips: positions in `source`.
        origin: in words for people.
        waveforms: the recordings of some of them at the encoder's rate, [S] each; empty where they are gone.
    """

    source: FeatureSource
    clips: NDArray[np.int64]
    origin: str
    waveforms: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class MeasuredStep:
    """What one training step of the sample took."""

    seconds: float
    tokens: int  # that entered block 0, of all clips
    activation_bytes: int  # kept for the backward pass
    loss: float
    setting: str  # number format and device, in words


@dataclass
class Subject:
    """A request and what has been learnt of it so far; a step that needs what is None is skipped."""

    request: DiagnoseRequest
    spec: EncoderSpec | None = None
    spec_error: str | None = None
    recordings: Recordings | None = None
    encoder: AudioEncoder | None = None
    sample: Sample | None = None
    paths: dict[str, EncodingPath] = field(default_factory=dict)  # by the fingerprint of the encoder as far as it runs
    measured: MeasuredStep | None = None
