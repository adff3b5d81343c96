"""Training steps with LoRA in each part of one Qwen2-Audio: which tensors get gradient, and what a step costs.

Shapes: B clips, D width of the text embeddings.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tuner.config import EncoderRef, HeadSpec, LoraSpec, LossSpec, Placed, RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import TrialFailed
from tuner.lora import adapter as lora_adapter
from tuner.lora.cost import Lengths, frozen_flops, training_flops
from tuner.train.batches import epoch_batches, same_pairs
from tuner.train.losses import ContrastiveLoss
from tuner.train.model import ProjectionHead, pool_clips
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import LivePrefix, row_lengths

PLACEMENTS: tuple[Placed, ...] = ("tower", "language_model", "both")
PARTS = {"tower": "tower", "language_model": "language model", "both": "both"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# In a language model fc1 stands for gate_proj and up_proj, fc2 for down_proj.
TARGETS = {"attention": ATTENTION, "attention + MLP": (*ATTENTION, "fc1", "fc2")}
RANK = 16
TRIAL = "t"
UNUSED = "language model, off the path"
WARM_UP = 2  # steps that are not timed: kernels are made, and B leaves zero


def lora_of(placement: Placed, targets: str) -> LoraSpec:
    """The document's LoRA, r=16 and alpha=32, without dropout."""
    return LoraSpec(rank=RANK, placement=placement, targets=TARGETS[targets])


def lora_tensors(tower: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapted layer by name."""
    return {name: parameter for name, parameter in tower.named_parameters() if ".lora_" in name}


@dataclass
class Gradients:
    """LoRA tensors that a backward pass gave a gradient, and those of them whose gradient is not zero, by name."""

    arrived: set[str] = field(default_factory=set)
    nonzero: set[str] = field(default_factory=set)

    def see(self, name: str, parameter: torch.Tensor) -> None:
        """Note a gradient as it comes: the training step throws it away."""
        self.arrived.add(name)
        if parameter.grad is not None and bool(parameter.grad.any()):
            self.nonzero.add(name)


@contextmanager
def watched_gradients(tensors: Mapping[str, nn.Parameter]) -> Iterator[Gradients]:
    """The gradients that these tensors get meanwhile."""
    seen = Gradients()
    tensor_hooks: list[tuple[str, Any]] = list(tensors.items())
    handles = [tensor.register_post_accumulate_grad_hook(partial(seen.see, name)) for name, tensor in tensor_hooks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Training(Protocol):
    """A training whose batch is always the whole training split."""

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """A and B of the LoRA, by their names below the whole model."""

    def step(self) -> tuple[float, float]:
        """One optimiser step: its loss, and the seconds it took."""


class PlacedTraining:
    """A trial as a search trains it, but without the cache of frozen states, so that all of its path runs."""

    def __init__(self, store: Store, reference: EncoderRef, config: TrialConfig, steps: int) -> None:
        encoder = load_encoder(inspect_encoder(reference), torch.float32)
        clips = len(store.split("train"))
        settings = RunSettings(
            store=str(store.folder), encoder=reference, epochs=steps, batch_size=clips, precision="fp32"
        )
        self._pack = Pack(PackContext(encoder, store, settings))
        self._pack.attach(TRIAL, config)
        self.tensors = lora_tensors(encoder.model)

    def step(self) -> tuple[float, float]:
        """See `Training.step`."""
        row = self._pack.train_epoch([TRIAL])[TRIAL]
        if isinstance(row, TrialFailed):
            raise row
        return row["loss"], row["train_seconds"]


class UnusedTraining:
    """LoRA on the language model while the embedding is taken from the tower: what a search here refuses to train."""

    def __init__(self, store: Store, reference: EncoderRef, config: TrialConfig) -> None:
        assert config.lora is not None
        whole = load_encoder(inspect_encoder(reference), torch.float32)
        torch.manual_seed(config.seed)
        lora_adapter.attach(whole, config.lora, TRIAL)
        self.tensors = lora_tensors(whole.model)
        self._store, self._encoder = store, whole.tower_alone
        self._head = ProjectionHead(HeadSpec(), self._encoder.spec.hidden_size, store.text_dim)
        self._loss = ContrastiveLoss(LossSpec())
        groups = [
            {"params": list(self.tensors.values()), "lr": config.optim.lora_lr},
            {"params": [*self._head.parameters(), *self._loss.parameters()], "lr": config.optim.head_lr},
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=config.optim.weight_decay)
        self._steps = 0

    def step(self) -> tuple[float, float]:
        """See `Training.step`."""
        store, encoder = self._store, self._encoder
        self._steps += 1
        clips = store.split("train")
        (batch,) = epoch_batches(store, clips, len(clips), 0, self._steps)
        started = time.perf_counter()
        lengths = row_lengths(encoder, store)[batch.clips_B]
        pooled_BH = pool_clips(encoder, LivePrefix(encoder, store, 0), batch.clips_B, lengths, 8192)
        text_BD = torch.from_numpy(np.asarray(store.text_embeddings)[batch.captions_B])
        loss = self._loss(self._head(pooled_BH), text_BD, torch.from_numpy(same_pairs(store, batch)))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._loss.clamp_()
        return float(loss.detach()), time.perf_counter() - started


@dataclass
class StepRow:
    """One placement: where its LoRA is, which tensors got gradient, and what its steps cost."""

    name: str
    training: Training
    flops: int  # of one step by the formula of `tuner.lora.cost`, frozen blocks included
    gradients: list[Gradients] = field(default_factory=list)  # of the steps that are not timed
    peak: int = 0  # bytes that a step takes on top of weights, adapters and the optimiser's state
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def count(self, inside: bool) -> tuple[int, int]:
        """LoRA tensors and their parameters inside or outside the tower."""
        there = [p for name, p in self.training.tensors.items() if name.startswith("audio_tower.") == inside]
        return len(there), sum(parameter.numel() for parameter in there)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def measure_steps(store: Store, reference: EncoderRef, steps: int, say: Callable[[str], None]) -> list[StepRow]:
    """Train every placement on the training split, all in turn step by step, so that the machine is the same to all.

    Args:
        reference: a Qwen2-Audio by the path `full_forward`.
        steps: of each, the first `WARM_UP` of them not timed.

    Returns:
        Tower, language model and both, each with attention and with attention and MLP; last the language model's
        LoRA with an embedding from the tower.
    """
    say("building seven models")
    rows = _placed_rows(store, reference, steps)
    config = TrialConfig(lora=lora_of("language_model", "attention + MLP"))
    unused = UnusedTraining(store, reference, config)
    rows.append(StepRow(UNUSED, unused, frozen_flops(inspect_encoder(reference), None, _lengths(store))))
    for step in range(steps):
        say(f"step {step + 1} of {steps}, every placement")
        for row in rows:
            _measure(row, step)
    for row in rows:
        row.peak = allocated_peak(row.training.step)
    return rows


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch held at once during a call, over what it held before.

    Counted are the tensors of torch's CPU allocator, exactly; not what libraries below it take for themselves.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None, "the profiler recorded nothing"
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return int(max(np.cumsum([event.nbytes() for event in events], dtype=np.int64), default=0))


def _placed_rows(store: Store, reference: EncoderRef, steps: int) -> list[StepRow]:
    spec, lengths = inspect_encoder(reference), _lengths(store)
    rows = []
    for placement in PLACEMENTS:
        for targets in TARGETS:
            config = TrialConfig(lora=lora_of(placement, targets))
            flops = frozen_flops(spec, config.lora, lengths) + training_flops(spec, config, lengths, store.text_dim)
            training = PlacedTraining(store, reference, config, steps)
            rows.append(StepRow(f"{PARTS[placement]}: {targets}", training, flops))
    return rows


def _lengths(store: Store) -> Lengths:
    return Lengths.of(store.frames[store.split("train")].tolist())


def _measure(row: StepRow, step: int) -> None:
    if step < WARM_UP:
        with watched_gradients(row.training.tensors) as seen:
            loss, _ = row.training.step()
        row.gradients.append(seen)
    else:
        loss, seconds = row.training.step()
        row.seconds.append(seconds)
    row.losses.append(loss)
