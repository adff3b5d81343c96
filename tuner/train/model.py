"""From hidden states to one L2-normalised embedding for each clip: blocks, pooling over real tokens, projection.

Shapes: B clips, N tokens of all clips end to end, H encoder width, D text embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from tuner.config import HeadSpec
from tuner.encoders.base import AudioEncoder
from tuner.train.batches import forward_groups
from tuner.train.prefix import Prefix


class ProjectionHead(nn.Module):
    """Linear or two-layer projection into the text embedding space; fp32 weights, L2-normalised output."""

    def __init__(self, spec: HeadSpec, width: int, text_dim: int) -> None:
        super().__init__()
        if spec.kind == "linear":
            self.layers = nn.Sequential(nn.Linear(width, text_dim))
        else:
            self.layers = nn.Sequential(nn.Linear(width, spec.hidden), nn.GELU(), nn.Linear(spec.hidden, text_dim))

    def forward(self, pooled_BH: Tensor) -> Tensor:
        """Embeddings BD of unit norm."""
        embedded: Tensor = self.layers(pooled_BH.float())
        return F.normalize(embedded, dim=-1)


def mean_pool(tokens_NH: Tensor, lengths: list[int]) -> Tensor:
    """Mean over each clip's own tokens in fp32: BH from the tokens of all clips end to end."""
    lengths_B = torch.tensor(lengths, device=tokens_NH.device)
    return torch.segment_reduce(tokens_NH.float(), "mean", lengths=lengths_B, axis=0, unsafe=True)


@contextmanager
def encoder_precision(encoder: AudioEncoder) -> Iterator[None]:
    """Run the frozen encoder in its own number format with fp32 adapters on it.

    On a bf16 base, autocast rounds the small A and B to bf16 for their products (their master weights and gradients
    stay fp32), and PEFT's own cast is off: it would copy every activation to fp32 and multiply in fp32, which costs
    more than the adapted layer itself.
    """
    reduced = encoder.dtype == torch.bfloat16
    with (
        torch.autocast(encoder.device.type, torch.bfloat16, enabled=reduced),
        disable_input_dtype_casting(encoder.model, active=reduced),
    ):
        yield


def pool_clips(
    encoder: AudioEncoder, prefix: Prefix, clips: NDArray[np.int64], lengths: NDArray[np.int64], budget: int
) -> Tensor:
    """Pooled encoder states BH of clips, in their order, by forward passes of at most `budget` tokens.

    Runs the adapter that is active on the encoder.

    Args:
        lengths: tokens of each of these clips that enter block `prefix.depth`.
    """
    groups = forward_groups(lengths, budget)
    pooled = []
    with encoder_precision(encoder):
        for group in groups:
            entering = prefix.hidden(clips[group])
            leaving = encoder.advance(entering, prefix.depth, encoder.spec.num_layers)
            pooled.append(mean_pool(*encoder.finish(leaving.states_ND, leaving.packing, leaving.frames_B)))
    order = np.argsort(np.concatenate(groups))
    return torch.cat(pooled)[torch.from_numpy(order).to(encoder.device)]
