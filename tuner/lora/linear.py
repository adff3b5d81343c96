"""A linear layer with its LoRA as one step of training, on a CPU. A torch module.

PEFT's forward is `base(x) + lora_B(lora_A(dropout(x))) * scaling`: three passes over the wide output besides the
products, as many in backward, and a copy of the input after dropout is kept for it. Here the low-rank product is added
inside the matrix product (its `beta`), the scaling goes into the small B, and of dropout only the mask is kept.
Evaluation and exported adapters use PEFT's own forward.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from tuner.lora.dropout import LoraDropout, keep


class LoraLinear(lora.Linear):
    """PEFT's LoRA layer, faster where one adapter trains on a CPU. Parameters, files and evaluation are PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output [..., O] for `x` [..., I], in the number format of `x`."""
        name = self._trained_alone(x)
        if name is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        mask, scaling = None, float(self.scaling[name])
        if isinstance(dropout, LoraDropout) and dropout.training and dropout.threshold:
            mask, scaling = dropout.draw_mask(x), scaling * dropout.scale
        weight_A, weight_B = self.lora_A[name].weight, self.lora_B[name].weight
        output: Tensor = _Joined.apply(x, base.weight, base.bias, weight_A, weight_B, mask, scaling)  # type: ignore[no-untyped-call]
        return output

    def _trained_alone(self, x: Tensor) -> str | None:
        """Name of the adapter, where the fast path holds: gradients on a CPU, one active adapter, a frozen base."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.get_base_layer().weight.requires_grad:
            return None
        return str(active[0]) if isinstance(self.lora_dropout[active[0]], LoraDropout | nn.Identity) else None


class _Joined(torch.autograd.Function):
    """W x + bias + scaling B A kept(x); gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        weight_A: Tensor,
        weight_B: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        mask_NI = None if mask is None else mask.view(x_NI.shape)
        # Masters are fp32; scaled before they are rounded, so that they are rounded once.
        small_rI, small_Or = weight_A.to(x.dtype), (weight_B * scaling).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            low_Nr = (x_NI if mask_NI is None else keep(x_NI, mask_NI)) @ small_rI.T
            output_NO = x_NI @ weight_OI.T
            if bias_O is None:
                output_NO.addmm_(low_Nr, small_Or.T)
            else:
                # The bias is one more column; `addmm` would first copy it to every row.
                ones_N1 = low_Nr.new_ones(len(low_Nr), 1)
                output_NO.addmm_(torch.cat([low_Nr, ones_N1], 1), torch.cat([small_Or, bias_O[:, None]], 1).T)
        ctx.save_for_backward(x_NI, weight_OI, small_rI, small_Or, low_Nr, mask_NI)
        ctx.scaling = scaling
        return output_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, small_rI, small_Or, low_Nr, mask_NI = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        back_Nr = gradient_NO @ small_Or
        kept_NI = x_NI if mask_NI is None else keep(x_NI, mask_NI)
        gradient_A = (back_Nr.T @ kept_NI).float()
        gradient_B = (low_Nr.T @ gradient_NO).T.float() * ctx.scaling
        gradient_x = None
        if ctx.needs_input_grad[0]:
            through_NI = back_Nr @ small_rI
            through_NI = through_NI if mask_NI is None else keep(through_NI, mask_NI)
            gradient_x = through_NI.addmm_(gradient_NO, weight_OI).view(*gradient.shape[:-1], -1)
        return gradient_x, None, None, gradient_A, gradient_B, None, None
