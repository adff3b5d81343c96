"""Contrastive losses against frozen text embeddings, computed in fp32.

Shapes: B clips of the whole batch (over all workers), D embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.config import LossSpec

MAX_LOG_SCALE = math.log(100.0)  # CLIP's clamp (Radford et al. 2021, arXiv:2103.00020, section 2.5)
SIGLIP_BIAS = -10.0  # initial bias of Zhai et al. 2023, arXiv:2303.15343, section 3.2


class ContrastiveLoss(nn.Module):
    """The loss of one adapter with its own temperature, and its own bias for SigLIP.

    The temperature is kept as log(1 / temperature); `clamp_` after each optimiser step holds it at ln 100 or below.
    """

    def __init__(self, spec: LossSpec) -> None:
        super().__init__()
        self.spec = spec
        log_scale = torch.tensor(-math.log(spec.temperature), dtype=torch.float32)
        self.log_scale = nn.Parameter(log_scale, requires_grad=spec.learn_temperature)
        if spec.kind == "siglip":
            self.bias = nn.Parameter(torch.tensor(SIGLIP_BIAS, dtype=torch.float32))

    def logit_scale(self) -> Tensor:
        """The factor on cosine similarities."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp the parameter itself: a clamp in the forward pass has zero gradient, so it would never recover."""
        self.log_scale.clamp_(max=MAX_LOG_SCALE)

    def forward(self, audio_BD: Tensor, text_BD: Tensor, same_BB: Tensor) -> Tensor:
        """Mean loss of the batch.

        Args:
            audio_BD: L2-normalised audio embeddings, fp32.
            text_BD: L2-normalised embedding of the caption drawn for each clip, fp32.
            same_BB: True where clip i and caption j belong together; off the diagonal such a pair is neither a
                positive nor a negative (a repeated caption would otherwise be pushed away from its own audio).
        """
        similarity_BB = audio_BD.float() @ text_BD.float().T
        if self.spec.kind == "siglip":
            return siglip(similarity_BB * self.logit_scale() + self.bias, same_BB)
        return info_nce(similarity_BB * self.logit_scale(), same_BB)


def info_nce(logits_BB: Tensor, same_BB: Tensor) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv:1807.03748; both directions as in CLIP)."""
    masked_BB = logits_BB.masked_fill(_off_diagonal(same_BB), -torch.inf)
    labels_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(masked_BB, labels_B) + F.cross_entropy(masked_BB.T, labels_B)) / 2


def siglip(logits_BB: Tensor, same_BB: Tensor) -> Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, algorithm 1), summed over pairs, mean over clips."""
    sign_BB = 2 * torch.eye(len(logits_BB), device=logits_BB.device) - 1
    pairs_BB = -F.logsigmoid(sign_BB * logits_BB).masked_fill(_off_diagonal(same_BB), 0.0)
    return pairs_BB.sum() / len(logits_BB)


def _off_diagonal(same_BB: Tensor) -> Tensor:
    eye_BB = torch.eye(len(same_BB), dtype=torch.bool, device=same_BB.device)
    return same_BB & ~eye_BB
