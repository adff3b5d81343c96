"""The workers of one lane: what a training step must exchange so that W workers equal one.

Text embeddings are frozen and every worker knows the whole batch, so only audio embeddings travel. Each worker puts
its own rows, with gradient, among the gathered rows of the others and computes the loss of the whole batch; its
gradient is then the part of the true gradient that flows through its rows, and the sum over workers is the true
gradient. (The mean is not, nor are rows that were gathered without regard to whose gradient they have.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """Rank and number of the workers that share every batch; `Workers()` is a single process."""

    rank: int = 0
    world: int = 1

    def join_rows(self, own_bD: Tensor, positions: list[Tensor]) -> Tensor:
        """Rows of all workers in batch order, the own ones with gradient, the others' as constants.

        Args:
            own_bD: this worker's rows.
            positions: for each rank, the places of its rows in the batch; the same on every worker.
        """
        if self.world == 1:
            return own_bD[positions[0].argsort()]
        longest = max(len(rows) for rows in positions)
        padded = own_bD.new_zeros(longest, own_bD.shape[1])
        padded[: len(own_bD)] = own_bD.detach()
        received = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(received, padded)
        parts = [rows[: len(positions[rank])] for rank, rows in enumerate(received)]
        parts[self.rank] = own_bD
        return torch.cat(parts)[torch.cat(positions).to(own_bD.device).argsort()]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of parameters that each worker saw through its own rows only."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
