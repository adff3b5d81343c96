"""The traced encoding path: every family against a slow reference, what is bypassed, and what a trial is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from numpy.typing import NDArray
from test_families import ALL, Made, extracted, made, sounds, waveform  # noqa: F401
from torch import Tensor, nn

from tuner.config import LoraSpec, TrialConfig
from tuner.encoders.base import AudioEncoder
from tuner.encoders.packed import Packing
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import PlacementError
from tuner.lora import adapter as adapters
from tuner.lora.path import MIN_TOKENS, EncodingPath, check_placement, clips_to_trace, describe, trace_path
from tuner.lora.placement import resolve_placement
from tuner.search.recorder import Recorder
from tuner.study.events import Event, Message
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal
from tuner.study.objectives import choose_objectives
from tuner.train.pack import Pack, PackContext

SECONDS = (0.83, 0.4)
LORA = TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj", "fc1")))


def trace(encoder: AudioEncoder) -> EncodingPath:
    inputs = extracted(encoder.spec, sounds(SECONDS))
    return trace_path(encoder, inputs.maps, inputs.frames.tolist())


def names(linears: Sequence[Any]) -> list[str]:
    return [linear.name for linear in linears]


# Every family


def test_the_targets_of_every_family_are_on_the_path(made: Made) -> None:  # noqa: F811
    encoder = made.encoder()
    path, placement = trace(encoder), resolve_placement(encoder.spec, made.lora(1, ALL))
    assert set(placement.modules) <= set(names(path.on_path))
    assert check_placement(placement, path, "refuse") is None
    assert path.clips == 2 and path.tokens == sum(
        encoder.spec.token_length(int(frames)) for frames in extracted(encoder.spec, sounds(SECONDS)).frames
    )
    for linear in path.on_path:
        module: Any = encoder.model.get_submodule(linear.name)
        assert (linear.in_features, linear.out_features) == (module.in_features, module.out_features)
        assert linear.calls > 0 and linear.flops == 2 * linear.rows * module.in_features * module.out_features


def test_on_the_path_is_what_changes_the_embedding(made: Made) -> None:  # noqa: F811
    """Slow reference: an output that is disturbed either changes the encoder's output or it does not."""
    encoder = made.encoder()
    inputs = extracted(encoder.spec, sounds(SECONDS))
    frames_B = torch.from_numpy(inputs.frames.astype(np.int64))

    def output() -> Tensor:
        with torch.no_grad():
            hidden_BTD: Tensor = encoder(encoder.pad_features(inputs.maps), frames_B)[0]
            return hidden_BTD

    before, path = output(), trace(encoder)
    assert torch.equal(output(), before), "the hooks are gone"
    for linear in path.linears:
        hook = encoder.model.get_submodule(linear.name).register_forward_hook(disturb)
        assert linear.reached == (not torch.equal(output(), before)), linear.name
        hook.remove()


def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + torch.randn(output.shape, generator=torch.Generator().manual_seed(1))


# What does not reach the embedding


class Odd(nn.Module):
    """Linear layers that are used in every way that a name does not show."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("seen", "dropped", "frozen", "weight_only", "halved", "in_place", "twice", "idle"):
            self.add_module(name, nn.Linear(4, 4))
        self.requires_grad_(False)

    def forward(self, states_BTD: Tensor) -> Tensor:
        part: Any = self
        hidden = part.seen(states_BTD)
        part.dropped(hidden)
        with torch.no_grad():
            hidden = hidden + part.frozen(hidden)
        hidden = nn.functional.linear(hidden, part.weight_only.weight)
        hidden = hidden + part.halved(hidden) * 0.0
        hidden = part.in_place(hidden).relu_()
        part.twice(hidden)
        out_BTD: Tensor = hidden + part.twice(hidden)
        return out_BTD


class Whole(AudioEncoder):
    """Any module that makes states BTD of features BCF, behind the surface that a trace needs."""

    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        return torch.from_numpy(np.stack(features))

    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        raise NotImplementedError

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        raise NotImplementedError

    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        raise NotImplementedError

    def forward(self, features_BCF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD = self.model(features_BCF)
        hidden_BTD = getattr(hidden_BTD, "last_hidden_state", hidden_BTD)
        return hidden_BTD, torch.ones(hidden_BTD.shape[:2], dtype=torch.bool)


def trace_whole(model: nn.Module, features: Sequence[NDArray[np.float32]]) -> EncodingPath:
    spec: Any = SimpleNamespace()
    return trace_path(Whole(spec, model), features, [features[0].shape[-1]] * len(features))


def test_only_what_gradient_reaches_counts() -> None:
    torch.manual_seed(0)
    path = trace_whole(Odd(), [np.random.default_rng(clip).standard_normal((5, 4), np.float32) for clip in range(3)])
    assert names(path.on_path) == ["in_place", "twice"], "`seen` is cut off by no_grad"
    calls = {linear.name: linear.calls for linear in path.linears}
    assert calls == dict.fromkeys(calls, 1) | {"weight_only": 0, "idle": 0, "twice": 2}
    twice = path.linears[names(path.linears).index("twice")]
    assert (twice.rows, twice.flops) == (2 * 3 * 5, 2 * 2 * 3 * 5 * 4 * 4)


def test_nothing_is_on_the_path_of_an_encoder_without_gradient() -> None:
    class Cut(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states.detach()

    path = trace_whole(nn.Sequential(nn.Linear(4, 4), Cut()), [np.ones((5, 4), np.float32)])
    assert names(path.off_path) == ["0"] and path.linears[0].calls == 1


def test_projections_that_transformers_reads_past_are_off_the_path() -> None:
    """WavLM as transformers runs it: PEFT adapts the layers, and nothing changes (see tests/test_families.py)."""
    torch.manual_seed(0)
    model = waveform("WavLM", False)().eval().requires_grad_(False)
    path = trace_whole(model, sounds((0.5,)))
    assert {linear.calls for linear in path.off_path} == {0}
    assert describe(path.off_path) == ", ".join(f"encoder.layers.*.attention.{name}_proj 3" for name in "kvq") + (
        ", encoder.layers.*.attention.out_proj 3"
    )
    assert "encoder.layers.*.feed_forward.output_dense 3" in describe(path.on_path)


# Beside adapters


def test_a_trace_leaves_adapters_alone(tiny: Tiny) -> None:
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    clean = trace_tiny(encoder, tiny)
    adapters.attach(encoder, LoraSpec(rank=2, targets=ALL), "a")
    adapted = trace_tiny(encoder, tiny)
    assert adapted == clean and len(clean.on_path) == 18
    assert adapters.active(encoder) == "a"
    assert not any(module._forward_hooks for module in encoder.modules())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def trace_tiny(encoder: AudioEncoder, tiny: Tiny) -> EncodingPath:
    store = tiny.store()
    return trace_path(encoder, [store.features(0), store.features(1)], store.frames[:2].tolist())


def test_clips_to_trace_are_the_shortest_that_are_long_enough() -> None:
    tokens = np.array([30, MIN_TOKENS, 3, 9, MIN_TOKENS - 1, MIN_TOKENS])
    assert clips_to_trace(tokens).tolist() == [1, 5]
    assert clips_to_trace(np.array([1, 5, 3])).tolist() == [2, 1]
    assert clips_to_trace(np.array([40])).tolist() == [0]


# What a trial is told


@pytest.fixture
def bypassed(tiny: Tiny) -> AudioEncoder:
    """An encoder whose last block calls its first feed-forward layer and makes nothing of it."""
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    tower: Any = encoder.model
    tower.layers[2].fc2.register_forward_pre_hook(lambda module, inputs: (torch.zeros_like(inputs[0]),))
    return encoder


def test_a_trial_off_the_path_is_refused(tiny: Tiny, bypassed: AudioEncoder) -> None:
    pack = Pack(PackContext(bypassed, tiny.store(), tiny.settings()))
    pack.attach("fits", TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj",))))
    with pytest.raises(PlacementError) as caught:
        pack.attach("stray", LORA)
    assert "depend on 1 of 6 modules (layers.2.fc1: called, but its output is not used)" in str(caught.value)
    assert re.search(r"on the encoding path are .*layers\.\*\.fc1 2, .*; remove .* off_path warn", str(caught.value))
    assert list(pack.members) == ["fits"] and adapters.names(bypassed) == ("fits",)


def test_a_trial_off_the_path_is_trained_with_a_warning(tiny: Tiny, bypassed: AudioEncoder) -> None:
    pack = Pack(PackContext(bypassed, tiny.store(), tiny.settings(off_path="warn")))
    assert pack.attach("fits", TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj",)))).warning is None
    member = pack.attach("stray", LORA)
    assert member.warning is not None and "layers.2.fc1: called, but its output is not used" in member.warning
    before = [parameter.detach().clone() for parameter in member.lora_parameters]
    row = pack.train_epoch(["stray"])["stray"]
    assert isinstance(row, dict) and np.isfinite(row["loss"])
    still = [torch.equal(old, new) for old, new in zip(before, member.lora_parameters, strict=True)]
    assert still == [False] * 10 + [True] * 2, "the warning was true"


def test_the_warning_of_a_lane_reaches_the_view(tmp_path: Path) -> None:
    """It travels with the epochs, and is said once for a trial."""
    shown: list[Event] = []
    view: Any = SimpleNamespace(show=shown.append)
    journal = Journal(StudyFolder(tmp_path))
    recorder = Recorder(journal, view, choose_objectives(["recall@10"]), lambda: True)
    row = {"loss": 1.0, "recall@10": 0.5, "train_seconds": 1.0, "validation_seconds": 1.0}
    for trial in ("t0000", "t0001"):
        record: Any = SimpleNamespace(config={"trial": trial, "epochs": 2})
        warning = {"warning": "layers.2.fc1 is off the path"} if trial == "t0001" else {}
        for epoch in (1, 2):
            recorder.on_trial_result(epoch, [], record, {**row, **warning, "epoch": epoch})
    journal.close()
    said = [event.text for event in shown if isinstance(event, Message)]
    assert said == ["t0001: layers.2.fc1 is off the path"]
