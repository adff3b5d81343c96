"""The one interface of every audio encoder. A torch module: torch-free code imports it only for type checking.

Shapes: B clips, C feature channels, F frames, T tokens of the longest clip, N tokens of all clips, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuner.encoders.packed import Packing, unpack
from tuner.encoders.spec import EncoderSpec


def real_token_mask(lengths_B: Tensor, tokens: int) -> Tensor:
    """Mask BT, true on the first `lengths_B[b]` of `tokens` places."""
    return torch.arange(tokens, device=lengths_B.device) < lengths_B.unsqueeze(1)


@dataclass(frozen=True)
class Hidden:
    """Clips on their way through the encoder."""

    states_ND: Tensor
    packing: Packing
    frames_B: Tensor  # real feature frames of each clip, on the CPU


class AudioEncoder(nn.Module, ABC):
    """A frozen pretrained encoder, cut where LoRA training needs seams: stem, blocks one by one, finish.

    The stem is constant under LoRA, and so is every block below the first adapted one; callers cache those states.
    `model` is the transformers module that holds all the weights: an audio tower, or a whole model whose language
    model runs after its tower. Adapters are injected there, under names relative to it. Its own parameters need no
    gradient and its own dropout is zero, so `train()` changes only the dropout of adapters.
    """

    spec: EncoderSpec
    model: nn.Module

    def __init__(self, spec: EncoderSpec, model: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.model = model

    @property
    def tower_alone(self) -> AudioEncoder:
        """The encoder that ends at the audio tower and shares its weights; the encoder itself if that is its end."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the frozen weights."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the frozen weights are."""
        return next(self.model.parameters()).device

    @abstractmethod
    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        """Batch BCF of clips' stored features [C, F] in the encoder's number format and on its device.

        Each clip is continued with its own silence, so that a clip in a batch equals the clip alone.
        """

    @abstractmethod
    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0: convolutions and positions. `frames_B` counts the real frames of each clip."""

    def packing(self, lengths: Sequence[int], depth: int = 0) -> Packing:
        """The packing at block `depth` of clips with these numbers of tokens, for `block` and `finish`."""
        return Packing(lengths, self.dtype, self.device)

    def begin(self, features_BCF: Tensor, frames_B: Tensor) -> Hidden:
        """What enters block 0, from a batch of `pad_features`."""
        packing = self.packing([self.spec.sequence_length(frames) for frames in frames_B.tolist()])
        return Hidden(packing.join_batch(self.stem(features_BCF, frames_B.to(self.device))), packing, frames_B)

    def advance(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        """Run blocks `start` to `stop` - 1: from the input of block `start` to the input of block `stop`."""
        for depth in range(start, stop):
            hidden = replace(hidden, states_ND=self.block(depth, hidden.states_ND, hidden.packing))
            stage = self.spec.stage_at(depth + 1)
            if stage != self.spec.stage_at(depth):
                hidden = self.enter_stage(stage, hidden)
        return hidden

    def enter_stage(self, stage: int, hidden: Hidden) -> Hidden:
        """The output of the previous stage as the first block of `stage` reads it: merged, widened, packed again."""
        raise NotImplementedError(f"{type(self).__name__} does not implement the step into stage {stage}")

    @abstractmethod
    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`, of all clips end to end; each clip attends only to its own tokens.

        `packing` is that of the block's stage.

        An encoder padded to 30 s attends to a clip's padding too, as it was trained to.
        """

    @abstractmethod
    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        """What follows the last block: the final layer norm, in some families a pooling over time before it.

        Returns:
            The output tokens that describe the clips, end to end, and their number for each clip: what is pooled.
        """

    def forward(self, features_BCF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Output states BTD of a batch, zero after each clip, and the mask BT of real tokens to pool over."""
        hidden = self.advance(self.begin(features_BCF, frames_B), 0, self.spec.num_layers)
        output_ND, output_lengths = self.finish(hidden.states_ND, hidden.packing, hidden.frames_B)
        output_BTD = unpack(output_ND, output_lengths)
        return output_BTD, real_token_mask(torch.tensor(output_lengths, device=self.device), output_BTD.shape[1])
