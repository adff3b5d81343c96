"""What a configuration costs, known before it trains: the objectives of kind `known`. No torch here."""

from __future__ import annotations

from tuner.config import TrialConfig
from tuner.encoders.spec import EncoderSpec
from tuner.lora.cost import Lengths, frozen_flops, training_flops, validation_flops
from tuner.lora.placement import lora_parameters, trainable_parameters

# Adapters and heads are trained and exported in fp32.
EXPORTED_BYTES = 4
# A clip as search by text has them; attention makes longer ones dearer by the second.
CLIP_SECONDS = 10.0


def known_costs(spec: EncoderSpec, config: TrialConfig, text_dim: int, training: Lengths) -> dict[str, float]:
    """Costs by the names of their objectives.

    Args:
        training: clips of the training split.

    Returns:
        `trainable_parameters` and `lora_parameters`; `adapter_bytes`, those of the exported tensors;
        `training_flops` of one epoch behind the cached prefix; `inference_flops` of one second of audio, measured on a
        clip of 10 s or of the encoder's longest input.

    Raises:
        PlacementError: the configuration names a target or layer that this encoder does not have.
    """
    seconds = min(CLIP_SECONDS, spec.max_seconds)
    clip = Lengths({max(1, round(spec.max_frames * seconds / spec.max_seconds)): 1})
    inference = frozen_flops(spec, config.lora, clip) + validation_flops(spec, config, clip, text_dim)
    trainable = trainable_parameters(spec, config, text_dim)
    return {
        "trainable_parameters": float(trainable),
        "lora_parameters": float(lora_parameters(spec, config.lora)) if config.lora else 0.0,
        "adapter_bytes": float(EXPORTED_BYTES * trainable),
        "training_flops": float(training_flops(spec, config, training, text_dim)),
        "inference_flops": inference / seconds,
    }
