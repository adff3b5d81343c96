"""Train and validate a pack of adapters on one frozen encoder. The reference loop: one adapter after another.

Members of a pack at the same epoch see the same mini-batches, so they share batch order, captions, text embeddings and
the frozen prefix; everything else is each member's own (see `member.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.config import RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.encoders.base import AudioEncoder
from tuner.errors import TrialFailed, first_line
from tuner.lora.adapter import activate
from tuner.lora.path import EncodingPath, check_placement, clips_to_trace, trace_path
from tuner.train.batches import Batch, epoch_batches, same_pairs, shard, steps_per_epoch
from tuner.train.member import Member, read_checkpoint
from tuner.train.model import pool_clips
from tuner.train.prefix import LivePrefix, Prefix, PrefixUse, open_prefix, prefix_use, row_lengths
from tuner.train.results import Retrieval
from tuner.train.retrieval import retrieve
from tuner.train.workers import Workers

EpochRow = dict[str, float]
StepProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackContext:
    """What all members of a pack share."""

    encoder: AudioEncoder
    store: Store
    settings: RunSettings
    workers: Workers = field(default_factory=Workers)
    prefix_root: Path | None = None  # None: no cache, the prefix is computed again at each use


class Pack:
    """Up to K adapters on one encoder. Adapter i of a pack equals adapter i alone."""

    def __init__(self, context: PackContext) -> None:
        self.context = context
        self.encoder, self.store, self.settings = context.encoder, context.store, context.settings
        self.device = self.encoder.device
        self.members: dict[str, Member] = {}
        self.train_clips = self.store.split("train")
        self.length_N = row_lengths(self.encoder, self.store)
        self.text_MD = torch.from_numpy(np.array(self.store.text_embeddings)).to(self.device)
        self._prefixes: dict[int, Prefix] = {}
        self._lengths: dict[int, NDArray[np.int64]] = {}
        self._paths: dict[str, EncodingPath] = {}  # by the fingerprint of the part of the encoder that a member runs
        self._frozen_table: Tensor | None = None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of a whole training."""
        return self.settings.epochs * steps_per_epoch(len(self.train_clips), self.settings.batch_size)

    def attach(self, trial: str, config: TrialConfig, checkpoint: Path | None = None) -> Member:
        """Add an adapter, at its start or where `checkpoint` left it.

        Raises:
            PlacementError: a module does not exist, or the embedding does not depend on it (see `check_placement`).
            StudyError: the checkpoint belongs to another configuration.
        """
        member = Member(trial, config, self.encoder, self.store.text_dim, self.total_steps)
        try:
            if member.placement:
                member.warning = check_placement(member.placement, self.path(member.encoder), self.settings.off_path)
            if checkpoint is not None and checkpoint.exists():
                member.load(read_checkpoint(checkpoint))
        except BaseException:
            member.detach()
            raise
        self.members[trial] = member
        return member

    def path(self, encoder: AudioEncoder) -> EncodingPath:
        """Which linear layers the embedding depends on, traced once on two short training clips."""
        key = encoder.spec.fingerprint
        if key not in self._paths:
            clips = self.train_clips[clips_to_trace(self.length_N[self.train_clips])]
            features = [self.store.features(int(clip)) for clip in clips]
            self._paths[key] = trace_path(encoder, features, self.store.frames[clips].tolist())
        return self._paths[key]

    def detach(self, trial: str) -> None:
        """Remove an adapter and everything it held."""
        self.members.pop(trial).detach()

    def prefix(self, depth: int) -> Prefix:
        """Hidden states below block `depth`, from the machine's cache when there is one."""
        if depth not in self._prefixes:
            context, tower = self.context, self.encoder.tower_alone
            # What enters a block of the tower is the tower's own, so studies of either path share its cache.
            encoder = tower if depth < tower.spec.num_layers else self.encoder
            if context.prefix_root is None:
                self._prefixes[depth] = LivePrefix(encoder, self.store, depth)
            else:
                activate(encoder, None)
                budget = self.settings.tokens_per_forward
                self._prefixes[depth] = open_prefix(encoder, self.store, depth, context.prefix_root, budget)
        return self._prefixes[depth]

    @property
    def prefix_use(self) -> PrefixUse:
        """How much this pack has used its prefix caches."""
        return prefix_use(self._prefixes.values())

    def lengths(self, member: Member) -> NDArray[np.int64]:
        """Tokens of each clip of the store that enter the first block which this member runs itself."""
        depth = 0 if member.placement is None else member.depth
        if depth not in self._lengths:
            self._lengths[depth] = row_lengths(self.encoder, self.store, depth)
        return self._lengths[depth]

    def train_epoch(
        self, trials: Sequence[str], progress: StepProgress | None = None
    ) -> dict[str, EpochRow | TrialFailed]:
        """Train one epoch of these members, which must all be at the same epoch; of a member whose checkpoint was
        written within the epoch, train the rest.

        Args:
            progress: called after each step with its number and the total; each member can be saved at that moment. An
                exception that it raises ends the epoch.

        Returns:
            For each member its row (`epoch`, `loss`, `train_seconds`, `clips_per_second`, `logit_scale`), or the
            failure that ended it; a failure does not affect the others.

        Raises:
            RuntimeError: as `contain`.
        """
        members = [self.members[trial] for trial in trials]
        epoch = members[0].epoch + 1
        assert all(member.epoch + 1 == epoch for member in members)
        failures: dict[str, TrialFailed] = {}
        steps = steps_per_epoch(len(self.train_clips), self.settings.batch_size)
        batches = epoch_batches(self.store, self.train_clips, self.settings.batch_size, self.settings.data_seed, epoch)
        for step, batch in enumerate(batches, start=1):
            waiting = [member for member in members if member.trial not in failures and member.steps < step]
            if not waiting:
                continue
            same_BB = torch.from_numpy(same_pairs(self.store, batch)).to(self.device)
            for member in waiting:
                started = time.perf_counter()
                try:
                    member.losses.append(self._step(member, batch, same_BB))
                except TrialFailed as failure:
                    failures[member.trial] = failure
                except RuntimeError as error:
                    failures[member.trial] = self.contain(member.trial, error)
                member.steps = step
                member.seconds += time.perf_counter() - started
            if progress:
                progress(step, steps)
        rows: dict[str, EpochRow | TrialFailed] = {**failures}
        for member in members:
            if member.trial not in failures:
                rows[member.trial] = self._row(member, epoch)
                member.finish_epoch()
        return rows

    def contain(self, trial: str, error: RuntimeError) -> TrialFailed:
        """Turn an error inside a trial's step into the failure of that trial, if this process can go on.

        Raises:
            RuntimeError: `error` itself, if it cannot: other workers wait inside the same step, or the device is
                in an undefined state.
        """
        if self.context.workers.world > 1 or isinstance(error, torch.AcceleratorError):
            raise error
        self.members[trial].optimizer.zero_grad(set_to_none=True)
        if isinstance(error, torch.OutOfMemoryError):
            # Free the cached blocks of the trial that was too large, for its neighbours.
            torch.cuda.empty_cache()
        return TrialFailed(first_line(error))

    def _row(self, member: Member, epoch: int) -> EpochRow:
        return {
            "epoch": epoch,
            "loss": float(torch.stack(member.losses).mean()),
            "train_seconds": member.seconds,
            "clips_per_second": len(self.train_clips) / member.seconds,
            "logit_scale": float(member.loss.logit_scale().detach()),
        }

    def _step(self, member: Member, batch: Batch, same_BB: Tensor) -> Tensor:
        workers = self.context.workers
        lengths_B = self.lengths(member)[batch.clips_B]
        positions = [shard(lengths_B, rank, workers.world) for rank in range(workers.world)]
        own = positions[workers.rank]
        with member.random_stream():
            pooled_bH = self._pool(member, batch.clips_B[own], training=True)
        audio_bD = member.head(pooled_bH)
        audio_BD = workers.join_rows(audio_bD, [torch.from_numpy(rows) for rows in positions])
        loss: Tensor = member.loss(audio_BD, self.text_MD[torch.from_numpy(batch.captions_B).to(self.device)], same_BB)
        value = float(loss.detach())
        if not math.isfinite(value):
            reason = f"the loss became {value} in epoch {member.epoch + 1}; lower the learning rates"
            raise TrialFailed(self._poisoned(batch.clips_B) or reason)
        loss.backward()  # type: ignore[no-untyped-call]
        workers.sum_gradients(member.shared_parameters())
        member.step()
        return loss.detach()

    def _pool(self, member: Member, clips: NDArray[np.int64], training: bool) -> Tensor:
        if member.placement is None:
            pooled = self._frozen_pooled(clips)
            member.activate(training)
            return pooled
        prefix, lengths = self.prefix(member.depth), self.lengths(member)[clips]
        member.activate(training)
        return pool_clips(member.encoder, prefix, clips, lengths, self.settings.tokens_per_forward)

    def _frozen_pooled(self, clips: NDArray[np.int64]) -> Tensor:
        """Pooled states of the frozen tower: without LoRA nothing before the head changes."""
        if self._frozen_table is None:
            encoder, budget, source = self.encoder.tower_alone, self.settings.tokens_per_forward, self.prefix(0)
            activate(encoder, None)
            with torch.no_grad():
                every = np.arange(len(self.store))
                self._frozen_table = pool_clips(encoder, source, every, self.length_N, budget)
        return self._frozen_table[torch.from_numpy(clips).to(self.device)]

    @torch.no_grad()
    def embed(self, trial: str, clips: NDArray[np.int64]) -> Tensor:
        """Embeddings of clips, fp32 [len(clips), D], divided among the workers; every worker gets all rows."""
        member, workers = self.members[trial], self.context.workers
        lengths = self.lengths(member)[clips]
        positions = [shard(lengths, rank, workers.world) for rank in range(workers.world)]
        rows = member.head(self._pool(member, clips[positions[workers.rank]], training=False))
        return workers.join_rows(rows, [torch.from_numpy(part) for part in positions])

    def validate(self, trial: str, split: str = "validation") -> Retrieval:
        """Retrieval of a split's clips against the distinct captions of that split.

        Raises:
            TrialFailed: out of memory, or an embedding is not finite, so nothing can be ranked.
            RuntimeError: as `contain`.
        """
        clips = self.store.split(split)
        try:
            audio_ND = self.embed(trial, clips)
        except RuntimeError as error:
            raise self.contain(trial, error) from None
        broken_N = ~torch.isfinite(audio_ND).all(dim=1).cpu().numpy()
        if broken_N.any():
            reason = f"embeddings of {broken_N.sum()} {split} clips are not finite; lower the learning rates"
            raise TrialFailed(self._poisoned(clips[broken_N]) or reason)
        return retrieve_split(self.store, clips, audio_ND)

    def _poisoned(self, clips: NDArray[np.int64]) -> str | None:
        """A sentence about the first of these clips whose stored features are not finite; None if there is none."""
        for clip in clips.tolist():
            if not np.isfinite(self.store.features(clip)).all():
                name, audio = self.store.clip_ids[clip], self.store.audio[clip]
                return (
                    f"the features of clip {name} ({audio}, row {clip} of {self.store.folder}) are not finite; "
                    "prepare the data again; if that does not help, remove this recording"
                )
        return None


def retrieve_split(store: Store, clips: NDArray[np.int64], audio_ND: Tensor) -> Retrieval:
    """Rank these clips against their own distinct captions."""
    owned = [store.clip_captions(int(clip)) for clip in clips]
    gallery = np.unique(np.concatenate(owned))
    text_MD = torch.from_numpy(np.asarray(store.text_embeddings[gallery])).to(audio_ND.device)
    return retrieve(audio_ND, text_MD, [np.searchsorted(gallery, captions) for captions in owned])
