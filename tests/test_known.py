"""Costs that are known before a trial trains, against the files and counts of trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TEXT_DIM, Tiny
from safetensors.numpy import load_file
from trained_adapter import train_and_export

from tuner.config import HeadSpec, LoraSpec, LossSpec, TrialConfig
from tuner.encoders.registry import inspect_encoder
from tuner.lora.cost import Lengths, frozen_flops, training_flops, validation_flops
from tuner.lora.known import CLIP_SECONDS, known_costs
from tuner.study.objectives import KNOWN

LORA = LoraSpec(rank=4, targets=("q_proj", "v_proj"))
CONFIGURATIONS = {
    "projection alone": TrialConfig(),
    "lora": TrialConfig(lora=LORA),
    "mlp head and siglip": TrialConfig(
        lora=LoraSpec(rank=3, targets=("fc1",)), head=HeadSpec(kind="mlp", hidden=24), loss=LossSpec(kind="siglip")
    ),
}


def costs(tiny: Tiny, config: TrialConfig) -> dict[str, float]:
    store = tiny.store()
    training = Lengths.of(store.frames[store.split("train")].tolist())
    return known_costs(inspect_encoder(tiny.encoder), config, TEXT_DIM, training)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bytes_are_those_of_the_exported_tensors(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Without safetensors' own header."""
    train_and_export(tiny, CONFIGURATIONS[name], tmp_path, "t0000")
    files = (tmp_path / "t0000").glob("*.safetensors")
    stored = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    known = costs(tiny, CONFIGURATIONS[name])
    assert known["adapter_bytes"] == stored
    assert known.keys() == set(KNOWN)


def test_counts_are_those_of_the_trained_member(tiny: Tiny, tmp_path: Path) -> None:
    card = train_and_export(tiny, CONFIGURATIONS["lora"], tmp_path, "t0000").card
    known = costs(tiny, CONFIGURATIONS["lora"])
    assert (known["trainable_parameters"], known["lora_parameters"]) == (
        card.trainable_parameters,
        card.lora_parameters,
    )
    assert costs(tiny, CONFIGURATIONS["projection alone"])["lora_parameters"] == 0


def test_operations_are_those_of_an_epoch_and_of_a_clip(tiny: Tiny) -> None:
    """By the formula that `test_cost` holds against torch's counter."""
    spec, store, config = inspect_encoder(tiny.encoder), tiny.store(), CONFIGURATIONS["lora"]
    training = Lengths.of(store.frames[store.split("train")].tolist())
    known = costs(tiny, config)
    assert known["training_flops"] == training_flops(spec, config, training, TEXT_DIM)
    assert spec.max_seconds < CLIP_SECONDS, "the longest clip that this encoder takes stands in for one of 10 s"
    longest = Lengths({spec.max_frames: 1})
    whole = frozen_flops(spec, config.lora, longest) + validation_flops(spec, config, longest, TEXT_DIM)
    assert known["inference_flops"] == pytest.approx(whole / spec.max_seconds)


def test_what_adapts_more_costs_more(tiny: Tiny) -> None:
    alone, small = (costs(tiny, CONFIGURATIONS[name]) for name in ("projection alone", "lora"))
    large = costs(tiny, TrialConfig(lora=LORA.model_copy(update={"rank": 8})))
    for name in KNOWN:
        assert alone[name] < small[name] < large[name], name
