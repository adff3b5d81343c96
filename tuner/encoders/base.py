"""The one surface of every audio encoder. A torch module: torch-free code imports it for type checking alone.

Shapes: B clips, C mel bins, F frames, T tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuner.encoders.spec import EncoderSpec, Window


def shortened(length_B: Tensor, windows: Sequence[Window]) -> Tensor:
    """Lengths after a chain of windows: `Window.outputs` for a whole batch, int64."""
    for window in windows:
        spare_B = length_B + 2 * window.padding - window.kernel
        length_B = (spare_B.div(window.stride, rounding_mode="floor") + 1).clamp(min=0)
    return length_B


def real_token_mask(lengths_B: Tensor, tokens: int) -> Tensor:
    """Mask BT, true on the first `lengths_B[b]` of `tokens` places."""
    return torch.arange(tokens, device=lengths_B.device) < lengths_B.unsqueeze(1)


class AudioEncoder(nn.Module, ABC):
    """A frozen pretrained tower, cut where LoRA training needs seams: stem, blocks one by one, finish.

    The stem is constant under LoRA, and so is every block below the first adapted one; callers cache those states.
    `tower` is where adapters are injected; its own parameters need no gradient and its own dropout is zero, so
    `train()` switches nothing but the dropout of adapters.
    """

    spec: EncoderSpec
    tower: nn.Module

    def __init__(self, spec: EncoderSpec, tower: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.tower = tower

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the frozen weights."""
        return next(self.tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the frozen weights are."""
        return next(self.tower.parameters()).device

    def token_lengths(self, frames_B: Tensor) -> Tensor:
        """Output tokens of each clip for its real frames, int64: what pooling averages. See `spec.token_length`."""
        return shortened(frames_B, (*self.spec.stem_windows, *self.spec.pooling_windows))

    def sequence_lengths(self, frames_B: Tensor) -> Tensor:
        """Tokens that pass through the blocks for each clip, int64. See `spec.sequence_length`."""
        frames_B = torch.full_like(frames_B, self.spec.max_frames) if self.spec.pad_to_30s else frames_B
        return shortened(frames_B, self.spec.stem_windows)

    @abstractmethod
    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        """Batch BCF of clips' stored features [C, F] in the tower's number format and on its device.

        Each clip is continued with its own silence, so that a clip in a batch equals the clip alone.
        """

    @abstractmethod
    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0: convolutions and positions. `frames_B` counts the real frames of each clip."""

    @abstractmethod
    def block(self, index: int, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """States BTD after block `index`.

        `mask_BT` is true on real tokens; None says that all are. An encoder padded to 30 s attends to its padding, as
        it was trained to, and ignores the mask.
        """

    @abstractmethod
    def finish(self, hidden_BTD: Tensor) -> Tensor:
        """What follows the last block: the final layer norm, in some families a pooling over time before it."""

    def forward(self, features_BCF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Output states BTD of a batch, and the mask BT of real tokens to pool over."""
        hidden_BTD = self.stem(features_BCF, frames_B)
        mask_BT = real_token_mask(self.sequence_lengths(frames_B), hidden_BTD.shape[1]).to(hidden_BTD.device)
        for index in range(self.spec.num_layers):
            hidden_BTD = self.block(index, hidden_BTD, mask_BT)
        hidden_BTD = self.finish(hidden_BTD)
        return hidden_BTD, real_token_mask(self.token_lengths(frames_B), hidden_BTD.shape[1]).to(hidden_BTD.device)
