"""Step 5: embeddings: shape, norm, and whether different recordings give different ones. Traces the encoding path.

Shapes: B clips, D width of the encoder.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from tuner.diagnose.findings import Step
from tuner.diagnose.subject import Sample, Subject
from tuner.encoders.base import AudioEncoder
from tuner.errors import PlacementError
from tuner.lora.adapter import on_path
from tuner.lora.path import EncodingPath, clips_to_trace, describe, trace_path
from tuner.train.model import pool_clips
from tuner.train.prefix import LivePrefix, row_lengths

BUDGET = 8192  # tokens of a forward pass, as a search has by default
COLLAPSED = 0.9999  # above this mean cosine, different clips cannot be told apart
NARROW = 0.99


def check_forward(subject: Subject) -> Step:
    """Embed the sample with the frozen encoder, and find the layers that the embedding depends on."""
    step = Step("forward")
    if subject.encoder is None or subject.sample is None:
        step.skipped = (
            "the encoder is not loaded (step 3)" if subject.encoder is None else "there are no features (step 4)"
        )
        return step
    encoder = as_run(subject.encoder, subject)
    started = time.perf_counter()
    pooled_BD = embed(encoder, subject.sample)
    step.values["seconds"] = time.perf_counter() - started
    _embeddings(step, pooled_BD)
    for part in dict.fromkeys((encoder, subject.encoder, subject.encoder.tower_alone)):
        subject.paths[part.spec.fingerprint] = _trace(part, subject.sample)
    _describe_path(step, subject.paths[encoder.spec.fingerprint])
    return step


def as_run(encoder: AudioEncoder, subject: Subject) -> AudioEncoder:
    """The part of the encoder that the configuration runs; all of it if the configuration does not fit."""
    try:
        return on_path(encoder, subject.request.lora)
    except PlacementError:
        return encoder


@torch.no_grad()
def embed(encoder: AudioEncoder, sample: Sample) -> Tensor:
    """Pooled states BD of the sample, fp32 on the CPU."""
    lengths = row_lengths(encoder, sample.source)[sample.clips]
    prefix = LivePrefix(encoder, sample.source, depth=0)
    return pool_clips(encoder, prefix, sample.clips, lengths, BUDGET).float().cpu()


def _embeddings(step: Step, pooled_BD: Tensor) -> None:
    clips, width = pooled_BD.shape
    step.values |= {"clips": clips, "width": width}
    broken = int((~torch.isfinite(pooled_BD).all(dim=1)).sum())
    if broken:
        step.error(
            f"{broken} of {clips} embeddings have values that are not finite",
            "try --precision fp32; if that does not help, the checkpoint is damaged: download the model again",
        )
        return
    norms = pooled_BD.norm(dim=1)
    step.values |= {"norm_min": float(norms.min()), "norm_max": float(norms.max())}
    if float(norms.min()) == 0:
        step.error("an embedding is zero", "the checkpoint is damaged; download the model again")
        return
    step.ok(f"{clips} embeddings of width {width}, norms {float(norms.min()):.3g} to {float(norms.max()):.3g}")
    if clips > 1:
        _collapse(step, pooled_BD)


def _collapse(step: Step, pooled_BD: Tensor) -> None:
    unit_BD = torch.nn.functional.normalize(pooled_BD, dim=1)
    count = len(unit_BD)
    cosine = float(((unit_BD @ unit_BD.T).sum() - count) / (count * (count - 1)))
    step.values["mean_cosine"] = cosine
    text = f"mean cosine between different clips is {cosine:.5f}"
    if cosine > COLLAPSED:
        step.error(
            f"{text}: all clips have the same embedding",
            "check that the recordings differ; if they do, the encoder's weights are damaged: download the model again",
        )
    elif cosine > NARROW:
        step.note(f"{text}: frozen embeddings are close to each other; the projection has to separate them")
    else:
        step.ok(text)


def _trace(encoder: AudioEncoder, sample: Sample) -> EncodingPath:
    clips = sample.clips[clips_to_trace(row_lengths(encoder, sample.source)[sample.clips])]
    features = [sample.source.features(int(clip)) for clip in clips]
    return trace_path(encoder, features, [int(sample.source.frames[clip]) for clip in clips])


def _describe_path(step: Step, path: EncodingPath) -> None:
    layers = describe(path.on_path)
    step.values |= {"linears": len(path.linears), "linears_on_path": len(path.on_path), "on_path": layers}
    step.ok(f"{len(path.on_path)} of {len(path.linears)} linear layers reach the embedding: {layers}")
    if path.off_path:
        step.note(f"the embedding does not depend on these, so a LoRA there learns nothing: {describe(path.off_path)}")
