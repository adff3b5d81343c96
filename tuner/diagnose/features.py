"""Step 4: features: shapes, an exact last frame, and whether a clip in a batch gives the same as the clip alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.diagnose.findings import Step
from tuner.diagnose.sample import draw_sample
from tuner.diagnose.subject import Sample, Subject
from tuner.encoders.base import AudioEncoder
from tuner.encoders.family import FeatureExtractor
from tuner.encoders.registry import load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import TunerError
from tuner.train.model import encoder_precision

# Relative to the largest value; other lengths give other matrix shapes, which round differently.
SAME_FRAME = 1e-4
SAME_STATE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
SILENCE_SECONDS = 1.0


def check_features(subject: Subject) -> Step:
    """Extract features of a few clips, draw the sample for the later steps, and check truncation with the encoder."""
    step = Step("features")
    if subject.spec is None:
        step.skipped = "the encoder cannot be used (step 3)"
        return step
    try:
        extractor = load_feature_extractor(subject.spec)
        sample = subject.sample = draw_sample(subject, extractor)
    except TunerError as error:
        step.error(str(error))
        return step
    _shapes(step, subject.spec, sample)
    _last_frame(step, subject.spec, sample, extractor)
    if subject.encoder is None:
        step.note("truncation was not checked: the encoder is not loaded (step 3)")
    else:
        _truncation(step, subject.encoder, sample)
    return step


def _shapes(step: Step, spec: EncoderSpec, sample: Sample) -> None:
    step.values["sample"] = sample.origin
    maps = [sample.source.features(int(clip)) for clip in sample.clips]
    frames = [int(sample.source.frames[clip]) for clip in sample.clips]
    tokens = [spec.token_length(count) for count in frames]
    step.values |= {"channels": spec.feature_channels, "sampling_rate": spec.sampling_rate}
    step.values |= {"frames": frames, "tokens": tokens}
    if not all(np.isfinite(features).all() for features in maps):
        step.error("features have values that are not finite", "prepare the data again")
    if min(tokens) < 1:
        step.error("a clip is too short for a single token", "remove clips of a few milliseconds")
    what = "samples" if spec.feature_channels == 1 else f"frames of {spec.feature_channels} mel bins"
    span = f"{min(frames)} to {max(frames)} {what} give {min(tokens)} to {max(tokens)} tokens"
    step.ok(f"{sample.origin}: {span}, at {spec.sampling_rate:,} Hz")


def _last_frame(step: Step, spec: EncoderSpec, sample: Sample, extractor: FeatureExtractor) -> None:
    """The last frame of a spectrum must be followed by silence, not by the mirrored clip."""
    if spec.feature_channels == 1:
        step.ok("the encoder reads the waveform, so the last frame needs no check")
        return
    if spec.fixed_tokens:
        step.ok("a clip is repeated until it fills the encoder's window, so the last frame needs no check")
        return
    silence = np.zeros(int(SILENCE_SECONDS * spec.sampling_rate), dtype=np.float32)
    room = int(spec.max_seconds * spec.sampling_rate) - silence.size
    differences = [
        _frame_difference(extractor, waveform, silence) for waveform in sample.waveforms if waveform.size <= room
    ]
    if not differences:
        step.note(
            "the last frame was not checked: no recording of the sample is on disk and short enough to add silence"
        )
        return
    worst = step.values["last_frame_difference"] = max(differences)
    if worst <= SAME_FRAME:
        step.ok(f"the last frame is exact: with silence after the clip it changes by at most {worst:.1e}")
    else:
        step.error(
            f"the last frame changes by {worst:.1e} when silence follows the clip",
            "the feature extractor mirrors the end of a clip; add at least one window of zeros after the clip",
        )


def _frame_difference(
    extractor: FeatureExtractor, waveform: NDArray[np.float32], silence: NDArray[np.float32]
) -> float:
    alone, frames = extractor.extract(waveform)
    followed, _ = extractor.extract(np.concatenate([waveform, silence]))
    return float(np.abs(alone[:, :frames] - followed[:, :frames]).max() / max(1.0, float(np.abs(alone).max())))


def _truncation(step: Step, encoder: AudioEncoder, sample: Sample) -> None:
    """The shortest clip, alone and in a batch with the longest: the padding in a batch must not change it."""
    lengths = sample.source.frames[sample.clips]
    shortest, longest = int(sample.clips[lengths.argmin()]), int(sample.clips[lengths.argmax()])
    alone_TD, together_TD = _states(encoder, sample, [shortest]), _states(encoder, sample, [shortest, longest])
    worst = float((alone_TD - together_TD).abs().max() / alone_TD.abs().max())
    step.values["truncation_difference"] = worst
    window = encoder.spec.sequence_length(encoder.spec.max_frames)
    tokens = encoder.spec.sequence_length(int(lengths.min()))
    if not worst <= SAME_STATE[encoder.dtype]:
        step.error(
            f"a clip's states change by {worst:.1e} (relative) in a batch with a longer clip: padding leaks in",
            "do not use this encoder with batches; please report the name of the model",
        )
        return
    saved = f"{tokens} tokens instead of {window}"
    if encoder.spec.pad_to_30s:
        saved = "padded to the encoder's whole window"
    elif encoder.spec.fixed_tokens:
        saved = f"both fill the encoder's whole window, {window} tokens"
    step.ok(f"truncation is exact: in a batch with a longer clip, a clip changes by at most {worst:.1e} ({saved})")


def _states(encoder: AudioEncoder, sample: Sample, clips: list[int]) -> Tensor:
    """Output states TD of the first of these clips."""
    features_BCF = encoder.pad_features([sample.source.features(clip) for clip in clips])
    frames_B = torch.tensor([int(sample.source.frames[clip]) for clip in clips])
    with torch.no_grad(), encoder_precision(encoder):
        hidden_BTD, mask_BT = encoder(features_BCF, frames_B)
    real_TD: Tensor = hidden_BTD[0][mask_BT[0]]
    return real_TD.float()
