"""Qwen2-Audio through its language model in torch: tower, projector, decoder layers. A torch module.

Shapes: B clips, C mel bins, F frames, T tokens of the longest clip, N tokens of all clips, P pairs of all clips (the
tokens of the language model), D width of the stage.

The language model reads only a clip's pairs, from place 0 on. Its attention is causal, so the mean over its last hidden
states gives the early sound of a clip more weight than the late. That is the model as it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen2AudioConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioModel

from tuner.encoders.base import AudioEncoder, Hidden
from tuner.encoders.checkpoint import read_json, tower_config
from tuner.encoders.packed import Packing, Rotation, empty_model
from tuner.encoders.qwen2_audio.facts import DEFAULTS, PARTS, text_config
from tuner.encoders.qwen2_audio.tower import Qwen2AudioTower
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.weights import load_strictly, read_tensors
from tuner.encoders.whisper.tower import NO_DROPOUT

LANGUAGE_MODEL = 1  # stage


class Qwen2AudioFullForward(AudioEncoder):
    """Transformers' Qwen2AudioModel as an `AudioEncoder`; its root is where adapters are injected."""

    def __init__(self, spec: EncoderSpec, model: nn.Module) -> None:
        super().__init__(spec, model)
        assert spec.tower_alone is not None
        whole: Any = model
        self._audio = Qwen2AudioTower(spec.tower_alone, whole.audio_tower)
        self._rotation = Rotation(whole.language_model)

    @property
    def tower_alone(self) -> AudioEncoder:
        """The audio tower by itself, of the same weights."""
        return self._audio

    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        """Batch BCF; see `AudioEncoder.pad_features`."""
        return self._audio.pad_features(features)

    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0 of the tower."""
        return self._audio.stem(features_BCF, frames_B)

    def packing(self, lengths: Sequence[int], depth: int = 0) -> Packing:
        """The packing of clips with these numbers of tokens, causal in the language model."""
        causal = self.spec.stage_at(depth) == LANGUAGE_MODEL
        return Packing(lengths, self.dtype, self.device, causal=causal)

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; see `AudioEncoder.block`."""
        first = self.spec.first_block(LANGUAGE_MODEL)
        if index < first:
            return self._audio.block(index, hidden_ND, packing)
        model: Any = self.model
        layer = model.language_model.layers[index - first]
        rotation = self._rotation.of(packing, hidden_ND)
        return cast(Tensor, layer(hidden_ND[None], attention_mask=packing, position_embeddings=rotation)[0])

    def enter_stage(self, stage: int, hidden: Hidden) -> Hidden:
        """The tower's output, projected into the space of words."""
        model: Any = self.model
        pairs_PD, lengths = self._audio.finish(hidden.states_ND, hidden.packing, hidden.frames_B)
        projected_PD = model.multi_modal_projector(pairs_PD)
        packing = self.packing(lengths, self.spec.first_block(stage))
        return Hidden(packing.join(torch.split(projected_PD, lengths)), packing, hidden.frames_B)

    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        """The final norm of the language model."""
        model: Any = self.model
        return model.language_model.norm(hidden_ND[: packing.tokens]), list(packing.lengths)


def empty_qwen2_audio(config: dict[str, Any]) -> nn.Module:
    """Transformers' Qwen2AudioModel on the meta device, without word embeddings, from a parsed `config.json`."""
    audio = tower_config(config, DEFAULTS) | {"model_type": "qwen2_audio_encoder"} | NO_DROPOUT
    text = text_config(config) | {"model_type": "qwen2", "attention_dropout": 0.0}
    model: Any = empty_model(Qwen2AudioModel, Qwen2AudioConfig(audio_config=audio, text_config=text))
    model.language_model.embed_tokens = None
    return cast(nn.Module, model)


def load_full_forward(spec: EncoderSpec, dtype: torch.dtype, device: str) -> Qwen2AudioFullForward:
    """The frozen model, its weights read straight into place; word embeddings and output layer stay on disk.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    model: Any = empty_qwen2_audio(read_json(spec.folder / "config.json"))
    tensors = {
        part + name: tensor
        for part, prefixes in PARTS.items()
        for name, tensor in read_tensors(spec.folder, prefixes, dtype, device).items()
    }
    load_strictly(model, tensors, spec.folder)
    # Its frequencies are computed, not read, so they are still on the meta device.
    model.language_model.rotary_emb = Qwen2RotaryEmbedding(model.config.text_config).to(device)
    return Qwen2AudioFullForward(spec, model).eval()
