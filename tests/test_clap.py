"""What only CLAP has: a window that every clip fills, four stages, a picture of the sound, batch norm in the stem.

The contract that it shares with all families is in test_families.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT_DIM, Tiny, write_store
from numpy.typing import NDArray
from safetensors.torch import save_file
from test_cost import counted
from test_families import CLAP_FRONT_END, clap, clap_features, outputs, sounds
from torch import nn

from tuner.config import EncoderRef, LoraSpec, TrialConfig
from tuner.diagnose.features import check_features
from tuner.diagnose.subject import DiagnoseRequest, Subject
from tuner.encoders.clap.facts import SAMPLING_RATE
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import DataError, EncoderError
from tuner.lora.cost import Lengths, frozen_flops, training_flops
from tuner.lora.linear import LoraLinear
from tuner.lora.placement import resolve_placement
from tuner.train.model import mean_pool
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import LivePrefix, open_prefix

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "fc1", "fc2")
FRAMES = 201  # of the small model's 2 s


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A small CLAP, 64 by 64 instead of 256 by 256, and a store of its features."""
    folder = tmp_path_factory.mktemp("clap")
    write_clap(folder / "encoder")
    reference = EncoderRef(source=str(folder / "encoder"))
    return Tiny(reference, write_store(folder / "store", reference, clips=20))


def write_clap(folder: Path) -> Path:
    torch.manual_seed(0)
    model = clap().eval()
    with torch.no_grad():
        # transformers starts with a position bias of zero and so near to zero that attention would hardly matter.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLAP_FRONT_END))
    return folder


@pytest.fixture(scope="module")
def spec(data: Tiny) -> EncoderSpec:
    return inspect_encoder(data.encoder)


def make_pack(data: Tiny, cache: Path | None = None, **settings: Any) -> Pack:
    encoder = load_encoder(inspect_encoder(data.encoder), torch.float32)
    return Pack(PackContext(encoder, data.store(), data.settings(**settings), prefix_root=cache))


def noise(samples: int) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


# The front end


@pytest.mark.parametrize("samples", [1, 500, 30_000, 70_000, 2 * SAMPLING_RATE - 1, 2 * SAMPLING_RATE])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_features_are_those_of_transformers_bit_for_bit(tmp_path: Path, samples: int, padding: str) -> None:
    folder = write_clap(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLAP_FRONT_END | {"padding": padding}))
    spec = inspect_encoder(EncoderRef(source=str(folder)))
    features, frames = load_feature_extractor(spec).extract(noise(samples))
    theirs = clap_features(spec, noise(samples))
    assert frames == FRAMES and theirs.shape == (1, 1, FRAMES, 16)
    assert np.array_equal(features, theirs[0, 0].numpy().T)


def test_a_short_clip_is_repeated_and_a_long_one_refused(spec: EncoderSpec) -> None:
    extractor = load_feature_extractor(spec)
    half = noise(SAMPLING_RATE)
    assert np.array_equal(extractor.extract(half)[0], extractor.extract(np.tile(half, 2))[0])
    with pytest.raises(DataError, match=r"a clip of 2.5 s is longer than the encoder's 2 s; cut it"):
        extractor.extract(noise(120_000))
    with pytest.raises(DataError, match="must be mono and not empty"):
        extractor.extract(noise(0))


def test_every_clip_has_the_same_number_of_tokens(spec: EncoderSpec) -> None:
    """At every depth, and so has a trial of every length of data."""
    assert [spec.sequence_length(FRAMES, depth) for depth in range(6)] == [256, 256, 64, 16, 16, 16]
    assert [spec.width(depth) for depth in range(6)] == [16, 16, 32, 64, 64, 64]
    assert spec.sequence_length(5, 2) == 64
    assert spec.token_length(FRAMES) == spec.token_length(5) == 16


# The tower


def test_the_mean_of_the_tokens_is_what_transformers_pools(data: Tiny) -> None:
    """`pooler_output` of the whole ClapModel, read by transformers from the same folder; tolerance 1e-5 in fp32."""
    spec = inspect_encoder(data.encoder)
    model = transformers.ClapModel.from_pretrained(spec.folder).eval()  # type: ignore[no-untyped-call]
    ours, clips = outputs(load_encoder(spec, torch.float32), sounds()), sounds()
    theirs = []
    for states_TD, clip in zip(ours, clips, strict=True):
        with torch.no_grad():
            theirs.append(model.audio_model(clap_features(spec, clip)).pooler_output[0])
        pooled_D = mean_pool(states_TD, [len(states_TD)])[0]
        assert (pooled_D - theirs[-1]).abs().max() <= 1e-5 * theirs[-1].abs().max()
    assert (theirs[0] - theirs[2]).abs().max() > 1e-2 * theirs[0].abs().max(), "the clips differ"


def test_training_mode_changes_nothing(data: Tiny) -> None:
    """No dropout, no dropped paths, and the batch norm neither uses nor learns the statistics of a batch."""
    encoder = load_encoder(inspect_encoder(data.encoder), torch.float32)
    before, state = outputs(encoder, sounds()), {k: v.clone() for k, v in encoder.model.state_dict().items()}
    encoder.train()
    assert all(map(torch.equal, outputs(encoder, sounds()), before))
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.model.state_dict().items())


def test_real_size_counts(tmp_path: Path) -> None:
    """laion/clap-htsat-unfused by its configuration alone, against transformers' own tower on the meta device."""
    config = transformers.ClapConfig(audio_config={}, text_config={})
    config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"truncation": "rand_trunc"}))
    save_file({"audio_model.audio_encoder.norm.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    spec = inspect_encoder(EncoderRef(source=str(tmp_path)))
    assert (spec.max_frames, spec.max_seconds, spec.feature_channels) == (1001, 10.0, 64)
    assert [(stage.layers, stage.width) for stage in spec.stages] == [(2, 96), (2, 192), (6, 384), (2, 768)]
    assert [spec.sequence_length(1001, spec.first_block(index)) for index in range(4)] == [4096, 1024, 256, 64]
    with torch.device("meta"):
        tower = transformers.ClapModel(config).audio_model.audio_encoder
    for targets, leaves, count, parameters in (
        (ATTENTION, ("query", "key", "value", "attention.output.dense"), 48, 565_248),
        (EVERY, ("query", "key", "value", "dense"), 72, 1_271_808),
    ):
        placement = resolve_placement(spec, LoraSpec(rank=16, targets=targets))
        linears = {name: module for name, module in tower.named_modules() if isinstance(module, nn.Linear)}
        wanted = {name: each for name, each in linears.items() if name.endswith(leaves)}
        assert set(placement.modules) == set(wanted) and len(wanted) == count
        sizes = sum(16 * (each.in_features + each.out_features) for each in wanted.values())
        assert placement.lora_parameters == sizes == parameters


# Stages in training


@pytest.mark.parametrize("depth", range(6))
def test_the_cached_prefix_equals_the_live_one(data: Tiny, tmp_path: Path, depth: int) -> None:
    """In and at the edge of every stage; tolerance 1e-5 of the largest state, in fp32."""
    pack, clips = make_pack(data), np.array([5, 17, 2])
    cached = open_prefix(pack.encoder, pack.store, depth, tmp_path, tokens_per_forward=500)
    live, read = LivePrefix(pack.encoder, pack.store, depth).hidden(clips), cached.hidden(clips)
    assert read.packing.lengths == live.packing.lengths == (pack.encoder.spec.sequence_length(FRAMES, depth),) * 3
    assert read.states_ND.shape == live.states_ND.shape == (live.packing.tokens, pack.encoder.spec.width(depth))
    torch.testing.assert_close(read.states_ND, live.states_ND, rtol=0, atol=1e-5 * float(live.states_ND.abs().max()))


def test_one_pack_trains_adapters_that_begin_in_every_stage(data: Tiny, tmp_path: Path) -> None:
    """From the cache as live: tolerance 1e-3 on the losses of two epochs."""
    losses = []
    for cache in (None, tmp_path):
        pack = make_pack(data, cache, epochs=2, tokens_per_forward=2048)
        for first in (0, 2, 3):
            pack.attach(f"t{first}", TrialConfig(lora=LoraSpec(rank=2, targets=EVERY, first_layer=first)))
        rows = [pack.train_epoch(["t0", "t2", "t3"]) for _ in range(2)]
        losses.append([[row["loss"] for row in epoch.values() if isinstance(row, dict)] for epoch in rows])
    assert np.shape(losses) == (2, 2, 3) and np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_the_cost_is_what_torch_counts(data: Tiny, spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """By windows of attention: a block of the first and of the last stage within 1 %, an epoch within 3 %, as in
    test_cost.py; what merges tokens is known to be left out."""
    monkeypatch.setattr(LoraLinear, "_trained_alone", lambda layer, x: None)
    pack = make_pack(data, tokens_per_forward=2048)
    clips = pack.store.split("train")
    lengths = Lengths.of(pack.store.frames[clips].tolist())

    def frozen(depth: int) -> int:
        return counted(lambda: LivePrefix(pack.encoder, pack.store, depth).hidden(clips))

    for below, above in ((0, 1), (3, 4)):
        first, second = (
            frozen_flops(spec, LoraSpec(rank=1, targets=EVERY, first_layer=n), lengths) for n in (below, above)
        )
        assert second - first == pytest.approx(frozen(above) - frozen(below), rel=0.01)
    config = TrialConfig(lora=LoraSpec(rank=4, targets=EVERY))
    pack.attach("t", config)
    epoch = counted(lambda: pack.train_epoch(["t"])) - frozen(0)
    merging = sum(4 * tokens * width**2 for tokens, width in ((64, 32), (16, 64)))
    # Forward, and backward to its inputs.
    expected = epoch - 2 * len(clips) * merging
    assert training_flops(spec, config, lengths, TEXT_DIM) == pytest.approx(expected, rel=0.03)


def test_a_diagnosis_knows_that_the_window_is_full(data: Tiny) -> None:
    """No silence is put behind a clip: repeated, it would be another sound."""
    spec = inspect_encoder(data.encoder)
    subject = Subject(DiagnoseRequest(encoder=data.encoder, trial=TrialConfig()))
    subject.spec, subject.encoder = spec, load_encoder(spec, torch.float32)
    step = check_features(subject)
    said = [finding.text for finding in step.findings]
    assert step.state == "ok", said
    assert any("repeated until it fills the encoder's window" in text for text in said)
    assert any("both fill the encoder's whole window, 256 tokens" in text for text in said)


# What is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"enable_fusion": True}, "enable_fusion .* asks for four views of a clip, .* use a checkpoint without fusion"),
        ({"depths": []}, r"depths in config.json is \[\], expected a list of positive numbers"),
        ({"depths": [2, 2, 2, 2, 2, 2]}, "spec_size, num_mel_bins, patch_stride, depths and window_size .* do not fit"),
        ({"patch_stride": [4, 2]}, "do not fit together"),
        ({"patch_stride": 0}, "do not fit together"),
        ({"window_size": 8}, "do not fit together"),
        ({"spec_size": 32}, "makes 201 frames, but spec_size and num_mel_bins in config.json allow at most 64"),
        ({"spec_size": None}, "spec_size in config.json is None"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = write_clap(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config["audio_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=match):
        inspect_encoder(EncoderRef(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"truncation": "fusion"}, "truncation is fusion, but this encoder reads rand_trunc"),
        ({"sampling_rate": 16_000}, "sampling_rate is 16000, but this encoder reads 48000"),
        ({"feature_size": 64}, "feature_size is 64, but this encoder reads 16"),
        ({"max_length_s": "10"}, "max_length_s is '10', expected a positive number"),
    ],
)
def test_a_front_end_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = write_clap(tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps(CLAP_FRONT_END | change))
    with pytest.raises(EncoderError, match=match):
        inspect_encoder(EncoderRef(source=str(tmp_path)))
    path.unlink()
    with pytest.raises(EncoderError, match="is missing, but it defines how a clip fills the window"):
        inspect_encoder(EncoderRef(source=str(tmp_path)))


def test_there_is_no_window_of_30_s(data: Tiny) -> None:
    with pytest.raises(EncoderError, match="every clip fills CLAP's own window; drop pad_to_30s"):
        inspect_encoder(EncoderRef(source=data.encoder.source, pad_to_30s=True))
