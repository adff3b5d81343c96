"""CLAP's audio tower, HTSAT, in torch. A torch module.

Shapes: B clips, C mel bins, F frames, T tokens of a clip, N tokens of all clips, D width of the stage.

The output is the last stage's tokens after the final layer norm. Their mean is transformers' `pooler_output`: its
steps before `avgpool` only reorder the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import ClapAudioConfig
from transformers.models.clap.modeling_clap import ClapAudioEncoder

from tuner.encoders.base import AudioEncoder, Hidden
from tuner.encoders.checkpoint import read_json, tower_config
from tuner.encoders.clap.facts import DEFAULTS, PREFIXES
from tuner.encoders.packed import Packing
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.weights import load_strictly, read_tensors

# The tower is frozen: its own dropout would only add noise to features that every adapter shares.
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0}


class HtsatEncoder(AudioEncoder):
    """Transformers' ClapAudioEncoder as an `AudioEncoder`."""

    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        """Batch BCF; every clip fills the window, so there is nothing to pad."""
        return torch.from_numpy(np.stack(features)).to(self.device, self.dtype)

    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0: patches of the folded picture, row by row."""
        tower: Any = self.model
        norm = tower.batch_norm
        # Use the running statistics even in `train()`: the module itself would use and learn those of the batch.
        level_BCF = F.batch_norm(
            features_BCF, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
        return cast(Tensor, tower.patch_embed(tower.reshape_mel2img(level_BCF.transpose(1, 2)[:, None])))

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; each attention window lies in the picture of one clip."""
        tower: Any = self.model
        stage = self.spec.stage_at(index)
        layer = tower.layers[stage].blocks[index - self.spec.first_block(stage)]
        (hidden_BTD,) = layer(_by_clip(hidden_ND, packing), tower.input_resolutions[stage])
        return cast(Tensor, hidden_BTD.flatten(0, 1))

    def enter_stage(self, stage: int, hidden: Hidden) -> Hidden:
        """Neighbours merged two by two, at twice the width."""
        tower: Any = self.model
        states_BTD = _by_clip(hidden.states_ND, hidden.packing)
        merged_BTD = tower.layers[stage - 1].downsample(states_BTD, tower.input_resolutions[stage - 1])
        clips, tokens, _ = merged_BTD.shape
        packing = self.packing([tokens] * clips, self.spec.first_block(stage))
        return Hidden(merged_BTD.flatten(0, 1), packing, hidden.frames_B)

    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        """The final layer norm."""
        tower: Any = self.model
        return cast(Tensor, tower.norm(hidden_ND)), list(packing.lengths)


def _by_clip(hidden_ND: Tensor, packing: Packing) -> Tensor:
    """States BTD: all clips have the same number of tokens."""
    return hidden_ND.view(len(packing.lengths), -1, hidden_ND.shape[1])


def load_clap(spec: EncoderSpec, dtype: torch.dtype, device: str) -> HtsatEncoder:
    """The frozen tower, its weights read straight into place; no other part of a whole model is built or read.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    config = ClapAudioConfig(**(tower_config(read_json(spec.folder / "config.json"), DEFAULTS) | NO_DROPOUT))
    build: Any = ClapAudioEncoder
    with torch.device("meta"):
        tower = build(config)
    load_strictly(tower, read_tensors(spec.folder, PREFIXES[spec.family], dtype, device), spec.folder)
    return HtsatEncoder(spec, tower).eval()
