"""One adapter of a pack with its own state: weights, temperature, optimiser, schedule, random stream.

A member shares only the frozen encoder and the mini-batches with its neighbours, so it trains in a pack exactly as it
would alone.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251, torch raises it
from typing import Any

import torch
from torch import Tensor, nn

from tuner.config import OptimSpec, TrialConfig
from tuner.encoders.base import AudioEncoder
from tuner.errors import StudyError
from tuner.lora import adapter as lora_adapter
from tuner.train.losses import ContrastiveLoss
from tuner.train.model import ProjectionHead

CHECKPOINT_FORMAT = 1


class Member:
    """An adapter attached to a shared encoder, at the start of its training or where a checkpoint left it.

    Its `encoder` is the part of the shared one that this trial runs: the tower, unless its LoRA goes beyond.
    """

    def __init__(self, trial: str, config: TrialConfig, encoder: AudioEncoder, text_dim: int, total_steps: int) -> None:
        encoder = lora_adapter.on_path(encoder, config.lora)
        self.trial, self.config, self.encoder = trial, config, encoder
        self.epoch = 0
        # Of the current epoch.
        self.steps, self.seconds = 0, 0.0
        self.losses: list[Tensor] = []
        self.history: list[dict[str, Any]] = []
        self.warning: str | None = None  # of modules that the embedding does not depend on
        self.device = encoder.device
        self._random: list[Tensor] = []
        self._seed = config.seed
        with self.random_stream():
            self.placement = lora_adapter.attach(encoder, config.lora, trial) if config.lora else None
            self.head = ProjectionHead(config.head, encoder.spec.hidden_size, text_dim).to(self.device)
        self.loss = ContrastiveLoss(config.loss).to(self.device)
        self.lora_parameters = lora_adapter.parameters(encoder, trial) if config.lora else []
        self._dropouts = lora_adapter.dropouts(encoder, trial) if config.lora else []
        self.optimizer = _optimizer(
            config.optim, self.lora_parameters, list(self.head.parameters()), list(self.loss.parameters())
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, WarmupCosine(total_steps, config.optim.warmup_fraction)
        )

    @property
    def depth(self) -> int:
        """First block that this adapter changes; the number of blocks when it changes none."""
        return min(self.placement.layers) if self.placement else self.encoder.spec.num_layers

    @property
    def trainable_parameters(self) -> int:
        """Number of values that the optimiser changes: LoRA, head, learned temperature and bias."""
        return sum(parameter.numel() for parameter in self.shared_parameters() + self._loss_parameters())

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradient each worker sees only through its own clips."""
        return [*self.lora_parameters, *self.head.parameters()]

    def _loss_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    @contextmanager
    def random_stream(self) -> Iterator[None]:
        """Draw from this member's own random stream (initialisation, dropout) and leave the global one unchanged."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self._random:
                _set_random_state(self._random)
            else:
                torch.manual_seed(self._seed)
            yield
            self._random = _random_state(self.device)

    def activate(self, training: bool) -> None:
        """Make this the adapter that the encoder runs, with or without its dropout."""
        lora_adapter.activate(self.encoder, self.trial if self.config.lora else None)
        for module in self._dropouts:
            module.train(training)
        self.head.train(training)

    def finish_epoch(self) -> None:
        """All steps of an epoch are done."""
        self.epoch += 1
        self.steps, self.seconds, self.losses = 0, 0.0, []

    def step(self) -> None:
        """Clip this member's gradients by their own global norm, update, and advance its schedule."""
        parameters = self.shared_parameters() + self._loss_parameters()
        nn.utils.clip_grad_norm_(parameters, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.loss.clamp_()

    def detach(self) -> None:
        """Remove the adapter from the encoder and forget the optimiser."""
        if self.config.lora:
            lora_adapter.detach(self.encoder, self.trial)
        self.optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: tensors and plain values only."""
        return {
            "format": CHECKPOINT_FORMAT,
            "trial": self.trial,
            "config": self.config.model_dump(mode="json"),
            "epoch": self.epoch,
            "within_epoch": {"steps": self.steps, "seconds": self.seconds, "losses": [x.cpu() for x in self.losses]},
            "history": self.history,
            "lora": [parameter.detach().cpu() for parameter in self.lora_parameters],
            "head": self.head.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.last_epoch,
            "random": self._random,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            StudyError: the checkpoint belongs to another configuration, or its tensors do not match this adapter.
        """
        try:
            self._restore(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise StudyError(
                f"checkpoint of {self.trial}: is damaged ({reason}); delete it to start the trial again"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
        # Compared as configurations: a field that is newer than the checkpoint gets its default.
        config = TrialConfig.parse(state["config"], f"checkpoint of {self.trial}")
        if state["format"] != CHECKPOINT_FORMAT or config != self.config:
            raise StudyError(
                f"checkpoint of {self.trial}: is of another configuration or version; delete it to restart the trial"
            )
        with torch.no_grad():
            for parameter, saved in zip(self.lora_parameters, state["lora"], strict=True):
                parameter.copy_(saved)
        self.head.load_state_dict(state["head"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]
        self._random = state["random"]
        self.epoch, self.history = state["epoch"], list(state["history"])
        # Older checkpoints were written at the end of an epoch only.
        within = state.get("within_epoch", {"steps": 0, "seconds": 0.0, "losses": []})
        self.steps, self.seconds = within["steps"], within["seconds"]
        self.losses = [loss.to(self.device) for loss in within["losses"]]

    def save(self, path: Path) -> None:
        """Write a checkpoint under a temporary name and rename it: a killed worker leaves the last one intact."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        try:
            torch.save(self.state(), staged)
            staged.replace(path)
        except BaseException:
            # Half a file would use the space that is missing.
            staged.unlink(missing_ok=True)
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint written by `Member.save`; tensors and plain values only, nothing is executed.

    Raises:
        StudyError: the file is cut off, is no checkpoint, or holds objects that would have to be executed.
    """
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251, tensors alone
    # The error that torch raises depends on where the file is damaged.
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        state = None
    except OSError as error:
        # A file that ends too early is an invalid seek; anything else is the disk.
        if error.errno != errno.EINVAL:
            raise
        state = None
    if not isinstance(state, dict):
        raise StudyError(f"{path}: not a checkpoint of tensors and plain values; remove it to train the trial again")
    return state


class WarmupCosine:
    """Learning-rate factor: linear warm-up from 0 to 1, then a cosine to 0 at the last step. Steps count from 0."""

    def __init__(self, total_steps: int, warmup_fraction: float) -> None:
        self.total = total_steps
        self.warmup = round(total_steps * warmup_fraction)

    def __call__(self, step: int) -> float:
        """The factor for optimiser step `step`; the first step is already above zero."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _optimizer(
    spec: OptimSpec, lora: list[nn.Parameter], head: list[nn.Parameter], loss: list[nn.Parameter]
) -> torch.optim.AdamW:
    groups = [
        {"params": head, "lr": spec.head_lr, "weight_decay": spec.weight_decay},
        # Weight decay would pull the temperature towards 1, which nobody asked for.
        {"params": loss, "lr": spec.head_lr, "weight_decay": 0.0},
    ]
    # A and B of each layer follow each other; as one group they are what checkpoints of every version hold.
    parts = [(lora, 1.0)] if spec.lora_plus_ratio == 1.0 else [(lora[0::2], 1.0), (lora[1::2], spec.lora_plus_ratio)]
    for part, ratio in parts if lora else ():
        groups.append({"params": part, "lr": ratio * spec.lora_lr, "weight_decay": spec.weight_decay})
    return torch.optim.AdamW(groups, fused=True)


def _random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
