"""Recall of LoRA on different layers of Whisper tiny.en, on a share of the demo's real recordings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tuner.config import LoraSpec, RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import TrialFailed
from tuner.train.batches import steps_per_epoch
from tuner.train.pack import Pack, PackContext, retrieve_split
from tuner.train.precision import dtype_of, measured_precision
from tuner.train.results import Metrics, Retrieval, bootstrap

METRIC = "recall@10"
ALONE = "projection alone"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TRIAL = "t"


def _lora(*targets: str, rank: int = 16) -> TrialConfig:
    return TrialConfig(lora=LoraSpec(rank=rank, targets=targets, dropout=0.1))


# The document's r=16, alpha=32, dropout 0.1, and what it could be exchanged for.
CONFIGS = {
    ALONE: TrialConfig(),
    "query, value": _lora("q_proj", "v_proj"),
    "attention": _lora(*ATTENTION),
    "attention, r=64": _lora(*ATTENTION, rank=64),
    "MLP": _lora("fc1", "fc2"),
    "attention + MLP": _lora(*ATTENTION, "fc1", "fc2"),
}


@dataclass
class RecallRow:
    """One configuration after its last epoch."""

    name: str
    pack: Pack
    seconds: list[float] = field(default_factory=list)  # of a step, by epoch
    loss: float = float("nan")  # mean of the last epoch

    @property
    def parameters(self) -> int:
        """LoRA parameters, without the projection that every row has."""
        return sum(parameter.numel() for parameter in self.pack.members[TRIAL].lora_parameters)

    @property
    def step_seconds(self) -> float:
        """Median over the epochs behind the first, which makes kernels and touches the data for the first time."""
        return statistics.median(self.seconds[1:] or self.seconds)

    def retrieval(self, split: str) -> Retrieval:
        """Over a split; of training clips, whose gallery must be as large to compare, as many as validation has."""
        store = self.pack.store
        clips = store.split(split)[: len(store.split("validation"))] if split == "train" else store.split(split)
        return retrieve_split(store, clips, self.pack.embed(TRIAL, clips))


@dataclass(frozen=True)
class Recalls:
    """Every configuration measured, one of them chosen on validation.

    Attributes:
        train, validation, test: retrieval by name of the configuration.
        chosen: has the best validation recall among those with LoRA; test had no say in it.
    """

    rows: list[RecallRow]
    train: dict[str, Retrieval]
    validation: dict[str, Retrieval]
    test: dict[str, Retrieval]
    chosen: str


def measure_recall(store: Store, epochs: int, batch_size: int, say: Callable[[str], None]) -> Recalls:
    """Train each configuration once on a store, all in turn epoch by epoch; test is measured at the very end."""
    precision = measured_precision(torch.device("cpu"))
    settings = RunSettings(
        store=str(store.folder), encoder=store.encoder, epochs=epochs, batch_size=batch_size, precision=precision
    )
    rows = []
    for name, config in CONFIGS.items():
        encoder = load_encoder(inspect_encoder(store.encoder), dtype_of(precision))
        rows.append(RecallRow(name, Pack(PackContext(encoder, store, settings))))
        rows[-1].pack.attach(TRIAL, config)
    for epoch in range(epochs):
        say(f"epoch {epoch + 1} of {epochs}, every configuration")
        for row in rows:
            _train_epoch(row)
    validation = {row.name: row.retrieval("validation") for row in rows}
    chosen = max((name for name in validation if name != ALONE), key=lambda name: validation[name].metrics()[METRIC])
    train, test = ({row.name: row.retrieval(split) for row in rows} for split in ("train", "test"))
    return Recalls(rows, train, validation, test, chosen)


def _train_epoch(row: RecallRow) -> None:
    result = row.pack.train_epoch([TRIAL])[TRIAL]
    if isinstance(result, TrialFailed):
        raise result
    row.seconds.append(
        result["train_seconds"] / steps_per_epoch(len(row.pack.train_clips), row.pack.settings.batch_size)
    )
    row.loss = result["loss"]


def interval(retrieval: Retrieval, baseline: Retrieval | None = None) -> str:
    """`0.401 [0.372, 0.433]`, or the paired difference to a baseline with signs; 95 % by resampling queries."""
    low, high = bootstrap(retrieval, baseline)[METRIC]
    value = retrieval.metrics()[METRIC] - (baseline.metrics()[METRIC] if baseline else 0.0)
    sign = "+" if baseline else ""
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def queries(metrics: Metrics) -> str:
    """N of both directions: `150 clips, 121 captions`."""
    return f"{metrics['audio_to_text_N']:.0f} clips, {metrics['text_to_audio_N']:.0f} captions"
