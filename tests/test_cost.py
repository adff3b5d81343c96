"""Estimated operations against those that torch counts while a small encoder trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT_DIM, Tiny
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tuner.config import LoraSpec, TrialConfig
from tuner.encoders import packed
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.lora.cost import (
    Lengths,
    frozen_flops,
    stem_flops,
    training_bytes,
    training_flops,
    validation_flops,
)
from tuner.lora.linear import LoraLinear
from tuner.lora.placement import head_parameters
from tuner.train.model import pool_clips
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import LivePrefix

BATCH = 12
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CONFIGURATIONS = {
    "attention": LoraSpec(rank=4, targets=ATTENTION),
    "queries": LoraSpec(rank=8, targets=("q_proj",)),
    "output": LoraSpec(rank=4, targets=("out_proj",)),
    "second of the mlp": LoraSpec(rank=4, targets=("fc2",)),
    "all": LoraSpec(rank=2, targets=(*ATTENTION, "fc1", "fc2")),
    "upper blocks": LoraSpec(rank=4, targets=("v_proj", "fc1"), first_layer=1),
    "last block, wide": LoraSpec(rank=64, targets=("fc1",), first_layer=-1),
}


def counted(run: Any) -> int:
    """Operations of matrix products and convolutions; attention as plain products, which the counter knows."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())


def lengths(frames: NDArray[np.int32]) -> Lengths:
    return Lengths.of(frames.tolist())


@pytest.fixture(scope="module")
def spec(tiny: Tiny) -> EncoderSpec:
    return inspect_encoder(tiny.encoder)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokens only, as the estimate counts them, and PEFT's own layers: the counter misses products in place."""
    monkeypatch.setattr(LoraLinear, "_trained_alone", lambda layer, x: None)
    monkeypatch.setattr(packed, "SHORTEST_IN_GROUP", 1.0)


def make_pack(tiny: Tiny, spec: EncoderSpec, cache: Path) -> Pack:
    encoder = load_encoder(spec, torch.float32)
    return Pack(PackContext(encoder, tiny.store(), tiny.settings(batch_size=BATCH), prefix_root=cache))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_and_validation_cost_what_torch_counts(
    name: str, tiny: Tiny, spec: EncoderSpec, tmp_path: Path
) -> None:
    """Within 3 %: the counter sees the similarity matrix too, and that where one of q, k, v alone is trained in the
    first adapted block, the others have no gradient (fused attention computes them all the same)."""
    config = TrialConfig(lora=CONFIGURATIONS[name])
    pack = make_pack(tiny, spec, tmp_path)
    member = pack.attach("t", config)
    pack.prefix(member.depth)
    store = tiny.store()
    for split, estimate, run in (
        ("train", training_flops, lambda: pack.train_epoch(["t"])),
        ("validation", validation_flops, lambda: pack.embed("t", store.split("validation"))),
    ):
        clips = store.split(split)
        assert estimate(spec, config, lengths(store.frames[clips]), TEXT_DIM) == pytest.approx(counted(run), rel=0.03)


def added_product(_: Any, left: Any, right: Any, **__: Any) -> int:
    """A product that is added to its output in place, which torch's counter does not know."""
    return 2 * int(left[0] * left[1] * right[1])


@pytest.mark.parametrize("first_layer", [0, 1])
def test_attention_costs_exactly_what_torch_counts(
    tiny: Tiny, spec: EncoderSpec, tmp_path: Path, first_layer: int
) -> None:
    """The products of one forward and backward pass, from the cache, on a clip without any padding."""
    config = TrialConfig(lora=LoraSpec(rank=4, targets=ATTENTION, first_layer=first_layer))
    pack = Pack(PackContext(load_encoder(spec, torch.bfloat16), tiny.store(), tiny.settings(), prefix_root=tmp_path))
    pack.attach("t", config)
    prefix, clip = pack.prefix(first_layer), pack.train_clips[:1]
    pack.members["t"].activate(training=True)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        pool_clips(pack.encoder, prefix, clip, pack.length_N[clip], 64).sum().backward()  # type: ignore[no-untyped-call]
    # The bias of an adapted layer is one more column of its low-rank product.
    biases = 3 * (spec.num_layers - first_layer) * 2 * int(pack.length_N[clip][0]) * spec.hidden_size
    # Nothing went through the head.
    head = 3 * 2 * head_parameters(spec.hidden_size, config.head, TEXT_DIM)
    estimate = training_flops(spec, config, lengths(tiny.store().frames[clip]), TEXT_DIM) - head
    assert counter.get_total_flops() == estimate + biases


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_prefix_costs_what_torch_counts(depth: int, tiny: Tiny, spec: EncoderSpec, tmp_path: Path) -> None:
    """Blocks below the first adapted one, all of them for a trial without LoRA, within 1 %; the stem within a quarter,
    since it also looks at the silence behind each of these very short clips."""
    store, encoder = tiny.store(), load_encoder(spec, torch.float32)
    lora = None if depth == spec.num_layers else LoraSpec(rank=2, targets=("fc1",), first_layer=depth)
    every = lengths(store.frames)

    def run(below: int) -> int:
        prefix = LivePrefix(encoder, store, below)
        return counted(lambda: [prefix.hidden(np.array([clip])) for clip in range(len(store))])

    stem = run(0)
    assert stem_flops(spec, every) == pytest.approx(stem, rel=0.25)
    assert frozen_flops(spec, lora, every) - stem_flops(spec, every) == pytest.approx(run(depth) - stem, rel=0.01)


def test_memory_is_what_weights_and_trained_numbers_take_and_bounds_activations(
    tiny: Tiny, spec: EncoderSpec, tmp_path: Path
) -> None:
    config = TrialConfig(lora=CONFIGURATIONS["all"])
    pack = make_pack(tiny, spec, tmp_path)
    member = pack.attach("t", config)
    linears = [m for m in pack.encoder.model.modules() if isinstance(m, torch.nn.Linear)]
    frozen = sum(m.weight.numel() for m in linears if not m.weight.requires_grad)
    trained = sum(p.numel() for p in pack.encoder.model.parameters() if p.requires_grad)
    assert training_bytes(spec, config, 0, 4, pack=3) == 4 * frozen + 3 * 16 * trained
    assert training_bytes(spec, TrialConfig(), 100, 2) == 2 * frozen

    clips = tiny.store().split("train")
    rows = pack.lengths(member)[clips]
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    prefix = pack.prefix(0)
    member.activate(training=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Held until the end: freed storage would be used again and be counted once.
        pooled = pool_clips(member.encoder, prefix, clips, rows, budget=10_000)
    tokens = packed.Packing(sorted(rows, reverse=True), torch.float32, pack.device)
    estimate = training_bytes(spec, config, tokens.tokens, 4) - training_bytes(spec, config, 0, 4)
    assert pooled.requires_grad
    assert 0.3 * estimate < sum(kept.values()) < estimate
