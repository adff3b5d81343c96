"""WavLM in torch: wav2vec 2.0's tower with a gated relative position bias in attention. A torch module.

Shapes: N tokens of all clips, G clips of a group, T tokens of the longest of a group, H heads, d head width, D width.

Transformers computes this attention from the weights of its projections and does not call them, so a LoRA on them
would have no effect and no gradient. Here the projections are called. In a plain `WavLMModel` an exported adapter has
an effect only after it is merged.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from tuner.encoders.packed import Group, Packing, empty_model, packed_attention, padded
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.wav2vec2.tower import WaveformEncoder, fill_tower, frozen_config


class PackedWavLMAttention(WavLMAttention):
    """WavLM's attention over the clips of a packing, with the same weights."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Packing, position_bias: Tensor, **more: Any
    ) -> tuple[Tensor, None, Tensor]:
        """Attention of states [1, N, D]; `position_bias` [H, T, T] covers the longest clip."""
        gate_HN1 = self._gate(self._heads(hidden_states))[0]

        def score_bias(group: Group) -> Tensor:
            bias_H1TT = position_bias[:, None, : group.width, : group.width]
            return padded(gate_HN1[:, group.start : group.stop], group) * bias_H1TT

        query, key, value = (self._heads(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        attended_1NHd, _ = packed_attention(
            self, query, key, value, attention_mask, self.scaling, score_bias=score_bias
        )
        return self.out_proj(attended_1NHd.flatten(2)), None, position_bias

    def _heads(self, states_1ND: Tensor) -> Tensor:
        return states_1ND.view(1, -1, self.num_heads, self.head_dim).transpose(1, 2)

    def _gate(self, states_1HNd: Tensor) -> Tensor:
        """The weight of the position bias for each token and head, [1, H, N, 1]."""
        scores: Tensor = self.gru_rel_pos_linear(states_1HNd)
        summed = scores.view(*scores.shape[:3], 2, 4).sum(dim=4)
        update, reset = torch.sigmoid(summed).chunk(2, dim=3)
        return update * (reset * self.gru_rel_pos_const - 1.0) + 2.0


class WavLMEncoder(WaveformEncoder):
    """Transformers' WavLMModel, its attention packed, as an `AudioEncoder`."""

    def __init__(self, spec: EncoderSpec, tower: nn.Module) -> None:
        super().__init__(spec, tower)
        self._widest_bias_HTT: Tensor | None = None

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; see `AudioEncoder.block`."""
        tower: Any = self.model
        position_bias = self._position_bias(max(packing.lengths))
        layer = tower.encoder.layers[index]
        return cast(Tensor, layer(hidden_ND[None], attention_mask=packing, position_bias=position_bias)[0][0])

    def _position_bias(self, width: int) -> Tensor:
        """Bias HTT by distance, shared by all blocks. Distances do not depend on T: a smaller T is a corner of it."""
        if self._widest_bias_HTT is None or self._widest_bias_HTT.shape[1] < width:
            tower: Any = self.model
            with torch.no_grad():
                self._widest_bias_HTT = tower.encoder.layers[0].attention.compute_bias(width, width)
        return self._widest_bias_HTT


def load_wavlm(spec: EncoderSpec, dtype: torch.dtype, device: str) -> WavLMEncoder:
    """The frozen tower, its weights read straight into place.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    config = frozen_config(spec, WavLMConfig)
    tower: Any = empty_model(WavLMModel, config)
    with torch.device("meta"):
        for index, layer in enumerate(tower.encoder.layers):
            layer.attention = PackedWavLMAttention(
                embed_dim=config.hidden_size,
                num_heads=config.num_attention_heads,
                num_buckets=config.num_buckets,
                max_distance=config.max_bucket_distance,
                has_relative_position_bias=index == 0,
            )
    fill_tower(tower, spec, dtype, device)
    return WavLMEncoder(spec, tower).eval()
