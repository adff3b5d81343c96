"""What is diagnosed, and what each step learns for the later steps."""

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

TEXT_DIM = 384  # of the demo's text encoder; used without a store


@dataclass(frozen=True)
class DiagnoseRequest:
    """What `tuner diagnose` was asked for.

    Attributes:
        store: prepared data, if any.
        manifest: or data that is not prepared yet.
        audio_root: of the manifest, see `read_manifest`.
        adapter: folder of an adapter, exported by tuner or by PEFT.
        peft_config: an adapter_config.json without weights.
        space: a search space, to check every placement and to estimate the cost.
        trial: the configuration that steps 6 and 7 train and count.
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
    """A few clips to try the encoder on.

    Attributes:
        source: their features, as the encoder reads them.
        clips: positions in `source`.
        origin: a description for people.
        waveforms: some of the recordings at the encoder's rate, [S] each; empty if they do not exist any more.
    """

    source: FeatureSource
    clips: NDArray[np.int64]
    origin: str
    waveforms: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class MeasuredStep:
    """Cost of one training step on the sample."""

    seconds: float
    tokens: int  # of all clips, at the input of block 0
    activation_bytes: int  # kept for the backward pass
    loss: float
    setting: str  # number format and device, in words


@dataclass
class Subject:
    """A request and what is known so far; a step is skipped if something that it needs is None."""

    request: DiagnoseRequest
    spec: EncoderSpec | None = None
    spec_error: str | None = None
    recordings: Recordings | None = None
    encoder: AudioEncoder | None = None
    sample: Sample | None = None
    paths: dict[str, EncodingPath] = field(default_factory=dict)  # by the fingerprint of the part that runs
    measured: MeasuredStep | None = None
