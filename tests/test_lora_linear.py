"""The fast layer of training against PEFT's own forward: outputs, gradients, dropout, and when it steps aside."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from tuner.lora.dropout import LoraDropout
from tuner.lora.linear import LoraLinear

ROWS, INPUTS, OUTPUTS, RANK = 70, 48, 32, 4


def layer_with(dropout: float, bias: bool = True, rslora: bool = False) -> LoraLinear:
    """A trained-looking adapted layer, its base in fp32 and frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias))
    config = peft.LoraConfig(r=RANK, lora_alpha=6, lora_dropout=dropout, use_rslora=rslora, target_modules=["0"])
    config._register_custom_module({nn.Linear: LoraLinear})
    peft.inject_adapter_in_model(config, model, "default")
    layer: Any = model[0]
    assert type(layer) is LoraLinear
    nn.init.normal_(weight(layer.lora_B["default"]))
    if dropout:
        layer.lora_dropout["default"] = LoraDropout(dropout).train()
    return layer


def is_fast(output: Tensor) -> bool:
    """Whether the output came from the joined step; a reshape may lie above it."""
    node = output.grad_fn
    while node is not None and "_Joined" not in node.name():
        node = node.next_functions[0][0] if "View" in node.name() else None
    return node is not None


def weight(part: nn.Module) -> Tensor:
    parameter: Any = part.weight
    return parameter  # type: ignore[no-any-return]


def gradients(forward: Any, layer: LoraLinear, x: Tensor, seed: int = 5) -> list[Tensor]:
    """Output, and the gradients of x, A and B under a fixed output gradient."""
    torch.manual_seed(seed)
    output = forward(x)
    weights = (weight(layer.lora_A["default"]), weight(layer.lora_B["default"]))
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return [output, *torch.autograd.grad(output, (x, *weights), upstream)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(ROWS, INPUTS), (1, ROWS, INPUTS)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_it_is_pefts_forward(dropout: float, shape: tuple[int, ...], bias: bool, rslora: bool) -> None:
    """In fp32 within 2e-6 of the norm: the sums are taken in another order."""
    layer = layer_with(dropout, bias, rslora)
    x = torch.randn(shape, requires_grad=True)
    fast = gradients(layer, layer, x)
    plain = gradients(lambda x: lora.Linear.forward(layer, x), layer, x)
    assert is_fast(fast[0])
    for ours, theirs in zip(fast, plain, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_bf16_it_is_no_farther_from_fp32_than_peft(dropout: float) -> None:
    """Against the fp32 layer on the same rounded numbers; the tolerance is PEFT's own error and a fifth more."""
    layer = layer_with(dropout)
    x = torch.randn(ROWS, INPUTS).bfloat16()
    layer.base_layer.to(torch.bfloat16)
    reduced = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), peft.helpers.disable_input_dtype_casting(layer):
        fast = gradients(layer, layer, reduced)
        plain = gradients(lambda x: lora.Linear.forward(layer, x), layer, reduced)
    layer.base_layer.to(torch.float32)
    exact = gradients(lambda x: lora.Linear.forward(layer, x), layer, x.float().requires_grad_())
    assert fast[0].dtype == torch.bfloat16 and fast[2].dtype == fast[3].dtype == torch.float32
    for ours, theirs, truth in zip(fast, plain, exact, strict=True):
        error, peft_error = ((part.float() - truth).norm() / truth.norm() for part in (ours, theirs))
        assert error <= 1.2 * peft_error and peft_error < 0.02


def test_without_gradients_the_forward_is_pefts_to_the_bit() -> None:
    """What is validated, exported and evaluated elsewhere must be one function."""
    layer = layer_with(0.3).eval()
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(ROWS, INPUTS).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), peft.helpers.disable_input_dtype_casting(layer):
        assert torch.equal(layer(x), lora.Linear.forward(layer, x))


def test_a_dora_layer_is_left_to_peft() -> None:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    config = peft.LoraConfig(r=RANK, use_dora=True, target_modules=["0"])
    config._register_custom_module({nn.Linear: LoraLinear})
    peft.inject_adapter_in_model(config, model, "default")
    layer: Any = model[0]
    x = torch.randn(ROWS, INPUTS)
    assert torch.equal(layer(x), lora.Linear.forward(layer, x))
    assert not is_fast(layer(x))


def test_two_active_adapters_are_left_to_peft() -> None:
    layer = layer_with(0.0)
    layer.update_layer("second", RANK, 6, config=peft.LoraConfig(r=RANK, lora_alpha=6))
    nn.init.normal_(weight(layer.lora_B["second"]))
    layer.set_adapter(["default", "second"])
    x = torch.randn(ROWS, INPUTS)
    torch.testing.assert_close(layer(x), lora.Linear.forward(layer, x), rtol=0, atol=0)


def test_dropout_keeps_the_mean_and_the_share() -> None:
    """Of 2**20 elements the kept share is binomial: five standard deviations."""
    dropout = LoraDropout(0.1).train()
    torch.manual_seed(2)
    output = dropout(torch.ones(2**20))
    kept = output != 0
    expected = 1 - round(0.1 * 256) / 256
    assert abs(float(kept.float().mean()) - expected) < 5 * (expected * (1 - expected) / 2**20) ** 0.5
    assert torch.all(output[kept] == 1 / expected)


def test_a_restored_stream_draws_the_same_masks() -> None:
    dropout = LoraDropout(0.5).train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first, second = dropout(torch.ones(999)), dropout(torch.ones(999))
    torch.set_rng_state(state)
    assert torch.equal(dropout(torch.ones(999)), first) and torch.equal(dropout(torch.ones(999)), second)
    assert not torch.equal(first, second)
