"""Step 6: two real training steps: every LoRA tensor and the projection must have gradient, the base none.

In the first step A has no gradient, because B is zero. So gradients are checked after the first step.

Shapes: B clips, D width of the text embeddings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tuner.diagnose.findings import Step, duration, gib
from tuner.diagnose.forward import BUDGET
from tuner.diagnose.subject import TEXT_DIM, MeasuredStep, Sample, Subject
from tuner.encoders.base import AudioEncoder
from tuner.errors import PlacementError
from tuner.train.member import Member
from tuner.train.model import pool_clips
from tuner.train.prefix import LivePrefix, row_lengths

TRIAL = "diagnose"
ATTEMPTS, ENOUGH_SECONDS = 3, 5.0
NAMED = 3  # tensors without gradient that a message lists


def check_backward(subject: Subject) -> Step:
    """Attach a fresh LoRA of the configuration, train two steps on the sample, and check every gradient."""
    step = Step("backward")
    if subject.encoder is None or subject.sample is None:
        step.skipped = (
            "the encoder is not loaded (step 3)" if subject.encoder is None else "there are no features (step 4)"
        )
        return step
    store = subject.request.store
    try:
        member = Member(TRIAL, subject.request.trial, subject.encoder, store.text_dim if store else TEXT_DIM, 2)
    except PlacementError as error:
        step.error(str(error))
        return step
    try:
        subject.measured = try_training(step, member, subject.sample)
    finally:
        member.detach()
    return step


def try_training(step: Step, member: Member, sample: Sample) -> MeasuredStep:
    """Train a step, then check the gradients of another forward and backward pass, and measure its time and memory."""
    text_BD = _text(sample, member)
    first = _backward(member, sample, text_BD)
    names = [name for name, _ in _lora(member)]
    member.step()
    # Kernels are compiled for each new shape, so the fastest of a few steps is closest to a search.
    attempts = [_backward(member, sample, text_BD)]
    while len(attempts) < ATTEMPTS and sum(attempt.seconds for attempt in attempts) < ENOUGH_SECONDS:
        attempts.append(_backward(member, sample, text_BD))
    measured = min(attempts, key=lambda attempt: attempt.seconds)
    dead = [name for name, parameter in _lora(member) if not _has_gradient(parameter)] + _frozen_projection(member)
    strays = [
        name for name, parameter in member.encoder.model.named_parameters() if name not in names and _moves(parameter)
    ]
    member.optimizer.zero_grad(set_to_none=True)
    step.values |= {"lora_tensors": len(names), "dead": dead, "base_with_gradient": strays, "clips": len(sample.clips)}
    step.values |= {"seconds": measured.seconds, "tokens": measured.tokens, "loss": [first.loss, measured.loss]}
    step.values["activation_bytes"] = measured.activation_bytes
    if not math.isfinite(first.loss):
        step.error("the loss is not finite", "try --precision fp32, or download the model again")
    _tell(step, len(names), dead, strays)
    step.ok(
        f"a training step of {len(sample.clips)} clips ({measured.tokens} tokens) took {duration(measured.seconds)} "
        f"as {measured.setting} and kept {gib(measured.activation_bytes)} of activations"
    )
    return measured


def _tell(step: Step, tensors: int, dead: list[str], strays: list[str]) -> None:
    if dead:
        more = f" and {len(dead) - NAMED} more" if len(dead) > NAMED else ""
        frozen = [name for name in dead if name.startswith("projection")]
        step.error(
            f"{len(dead)} trainable tensors get no gradient: {', '.join(dead[:NAMED])}{more}",
            "set requires_grad on the projection, which is frozen"
            if frozen
            else "choose modules that the embedding depends on; step 5 lists them",
        )
    else:
        step.ok(f"all {tensors} LoRA tensors and the projection have gradient after one step")
    if strays:
        step.error(
            f"{len(strays)} tensors of the frozen base would be trained: {', '.join(strays[:NAMED])}",
            "freeze the base (requires_grad_(False)) before adapters are attached",
        )
    else:
        step.ok("no tensor of the frozen base has gradient")


def _text(sample: Sample, member: Member) -> Tensor:
    """Unit vectors BD, a different one for each clip; their values do not matter."""
    width = next(reversed(list(member.head.parameters()))).shape[0]
    text_BD = torch.randn(len(sample.clips), width, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(text_BD, dim=1).to(member.device)


def _backward(member: Member, sample: Sample, text_BD: Tensor) -> MeasuredStep:
    """Forward and backward of all clips of the sample by the code of a search."""
    started = time.perf_counter()
    encoder = member.encoder
    member.activate(training=True)
    lengths = row_lengths(encoder, sample.source, member.depth)[sample.clips]
    prefix = LivePrefix(encoder, sample.source, member.depth)
    with _kept_for_backward(encoder.parameters()) as kept:
        pooled_BH = pool_clips(encoder, prefix, sample.clips, lengths, BUDGET)
        same_BB = torch.eye(len(sample.clips), dtype=torch.bool, device=member.device)
        loss = member.loss(member.head(pooled_BH), text_BD, same_BB)
    loss.backward()
    if member.device.type == "cuda":
        torch.cuda.synchronize(member.device)
    tokens = int(row_lengths(encoder, sample.source)[sample.clips].sum())
    seconds = time.perf_counter() - started
    return MeasuredStep(seconds, tokens, sum(kept.values()), float(loss.detach()), _setting(encoder))


def _setting(encoder: AudioEncoder) -> str:
    dtype = str(encoder.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'' if threads == 1 else 's'}"
    return f"{dtype} on {cpu if encoder.device.type == 'cpu' else 'the GPU'}"


@contextmanager
def _kept_for_backward(weights: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, without the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _lora(member: Member) -> list[tuple[str, nn.Parameter]]:
    parts = (f".lora_A.{member.trial}.", f".lora_B.{member.trial}.")
    named = member.encoder.model.named_parameters()
    return [(name, parameter) for name, parameter in named if any(part in name for part in parts)]


def _frozen_projection(member: Member) -> list[str]:
    return [f"projection {name}" for name, parameter in member.head.named_parameters() if not _has_gradient(parameter)]


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _moves(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad or parameter.grad is not None
