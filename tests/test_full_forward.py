"""Qwen2-Audio through its language model: against the padded, masked original, and what is read for it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_encoder
from huggingface_hub.utils._paths import filter_repo_objects
from numpy.typing import NDArray
from safetensors.torch import save_file
from test_qwen2_audio import INDEX, spied, weight_map
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from tuner.config import EncoderRef, LoraSpec, Placed
from tuner.encoders.base import AudioEncoder
from tuner.encoders.qwen2_audio.facts import PARTS
from tuner.encoders.qwen2_audio.full_forward import Qwen2AudioFullForward, empty_qwen2_audio
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import EncoderError
from tuner.lora import adapter as adapters
from tuner.lora.placement import resolve_placement

RATE = 16_000
AUDIO_TOKEN = 150
TOWER_WIDTH, WIDTH = 32, 40
# From one token of the language model to a few hundred: odd and even numbers of frames and of tokens.
SAMPLES = [47_777, 801, 7_000, 20_000, 7_001, 100_001]


@pytest.fixture(scope="module")
def model() -> Qwen2AudioForConditionalGeneration:
    """Two heads of keys and values for four of queries; weights so large that every part matters."""
    audio = {"model_type": "qwen2_audio_encoder", "d_model": TOWER_WIDTH, "encoder_layers": 3}
    audio |= {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 128}
    text = {"model_type": "qwen2", "hidden_size": WIDTH, "intermediate_size": 56, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_TOKEN)
    model: Qwen2AudioForConditionalGeneration
    model = Qwen2AudioForConditionalGeneration(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def folder(model: Qwen2AudioForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2-audio")
    model.save_pretrained(folder, max_shard_size="30KB")  # word embeddings and output layer are shards of their own
    return folder


def inspect(folder: Path, path: Any = "full_forward") -> EncoderSpec:
    return inspect_encoder(EncoderRef(source=str(folder), path=path))


def clips(samples: list[int]) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    return [(random.standard_normal(length) * 0.1).astype(np.float32) for length in samples]


def run(encoder: AudioEncoder, waveforms: list[NDArray[np.float32]]) -> list[Tensor]:
    extractor = load_feature_extractor(encoder.spec)
    features, frames = zip(*map(extractor.extract, waveforms), strict=True)
    with torch.inference_mode():
        hidden_BTD, mask_BT = encoder(encoder.pad_features(features), torch.tensor(frames))
    return [states_TD[mask_T] for states_TD, mask_T in zip(hidden_BTD, mask_BT, strict=True)]


def original(model: Qwen2AudioForConditionalGeneration, spec: EncoderSpec, waveforms: list[Any]) -> list[Tensor]:
    """Slow reference: the whole model on 30 s windows and padded tokens, its last hidden states of the real ones."""
    extractor: Any = load_feature_extractor(spec)
    inputs = extractor.extractor(waveforms, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    frames_B = inputs["attention_mask"].sum(dim=1)
    _, tokens_B = model.model.audio_tower._get_feat_extract_output_lengths(frames_B)
    is_audio_BT = torch.arange(int(tokens_B.max())) < tokens_B[:, None]
    with torch.inference_mode():
        states_BTD = model.model(
            input_ids=is_audio_BT * AUDIO_TOKEN,
            attention_mask=is_audio_BT.long(),
            input_features=inputs["input_features"],
            feature_attention_mask=inputs["attention_mask"],
        ).last_hidden_state
    return [states_TD[mask_T] for states_TD, mask_T in zip(states_BTD, is_audio_BT, strict=True)]


def test_a_pack_of_clips_equals_the_padded_masked_original(
    model: Qwen2AudioForConditionalGeneration, folder: Path
) -> None:
    """Tolerance 1e-5 in fp32, on states of size 1 (the last norm)."""
    spec, waveforms = inspect(folder), clips(SAMPLES)
    expected = original(model, spec, waveforms)
    for ours_TD, theirs_TD in zip(run(load_encoder(spec, torch.float32), waveforms), expected, strict=True):
        assert ours_TD.shape == theirs_TD.shape and ours_TD.shape[1] == WIDTH
        assert (ours_TD - theirs_TD).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_clips_are_causal_and_begin_at_place_zero(
    model: Qwen2AudioForConditionalGeneration, folder: Path, dtype: torch.dtype
) -> None:
    """Against transformers' own language model, one clip at a time: outputs and gradients.

    In fp64 by the fused attention, 1e-9 of the mean square; in bf16 by plain products, 3 % of it.
    """
    encoder, lengths = load_encoder(inspect(folder), dtype), [40, 40, 39, 36, 20, 7, 7, 1]
    hidden_ND = torch.randn(sum(lengths), WIDTH, dtype=dtype).requires_grad_()
    packing = encoder.packing(lengths, depth=3)
    states_ND = packing.join(torch.split(hidden_ND, lengths))
    for index in (3, 4):
        states_ND = encoder.block(index, states_ND, packing)
    frames_B = torch.zeros(len(lengths))
    ours_ND, counts = encoder.finish(states_ND, packing, frames_B)
    whole = copy.deepcopy(model.model.language_model).to(dtype)
    alone = [whole(inputs_embeds=clip[None]).last_hidden_state[0] for clip in torch.split(hidden_ND, lengths)]
    theirs_ND, weight_ND = torch.cat(alone), torch.randn_like(ours_ND)
    gradients = [torch.autograd.grad(states, hidden_ND, weight_ND)[0] for states in (ours_ND, theirs_ND)]
    assert counts == lengths
    for ours, theirs in ((ours_ND, theirs_ND), gradients):
        error = (ours - theirs).double().square().mean() / theirs.double().square().mean()
        assert error.sqrt() <= (1e-9 if dtype == torch.float64 else 0.03)


def test_the_tower_inside_is_the_tower_alone(folder: Path) -> None:
    """Bit for bit; and prepared features belong to both, while what is cached of their states does not."""
    whole, alone = (
        load_encoder(inspect(folder), torch.float32),
        load_encoder(inspect(folder, "audio_tower"), torch.float32),
    )
    assert whole.tower_alone.spec == alone.spec == whole.spec.tower_alone
    assert all(map(torch.equal, run(whole.tower_alone, clips(SAMPLES)), run(alone, clips(SAMPLES))))
    assert whole.spec.features_fingerprint == alone.spec.features_fingerprint == alone.spec.fingerprint
    assert whole.spec.fingerprint != alone.spec.fingerprint
    assert [whole.spec.token_length(frames) for frames in range(300)] == [
        alone.spec.token_length(frames) for frames in range(300)
    ]


def test_lengths_and_widths_follow_the_depth(folder: Path) -> None:
    spec = inspect(folder)
    assert [spec.width(depth) for depth in range(6)] == [TOWER_WIDTH] * 3 + [WIDTH] * 3
    assert [spec.sequence_length(60, depth) for depth in range(6)] == [30] * 3 + [15] * 3
    assert spec.block_names[2:4] == ("audio_tower.layers.2", "language_model.layers.0")


# What is read


def wanted(name: str) -> bool:
    """Names on disk of what the path needs; not the word embeddings and the output layer."""
    return name.startswith(("audio_tower.", "multi_modal_projector.", "language_model.model.layers.")) or (
        name == "language_model.model.norm.weight"
    )


def test_word_embeddings_and_output_layer_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = weight_map(folder)
    assert {name for name in names if not wanted(name)} == {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
    }
    with spied(monkeypatch) as (opened, read):
        encoder = load_encoder(inspect(folder), torch.float32)
    assert read == {name for name in names if wanted(name)}
    assert opened == {shard for name, shard in names.items() if wanted(name)} < set(names.values())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in encoder.parameters())


def test_the_names_of_transformers_5_are_read_too(
    model: Qwen2AudioForConditionalGeneration, folder: Path, tmp_path: Path
) -> None:
    """What lies on disk has the names of its predecessor; a plain state dict has its own."""
    shutil.copy(folder / "config.json", tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    ours, theirs = (load_encoder(inspect(each), torch.float32).model.state_dict() for each in (tmp_path, folder))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()) and set(ours) == set(theirs)


def test_a_hub_id_fetches_the_shards_of_the_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a function here that copies what it is asked for, as the hub's client does."""
    import huggingface_hub

    commit = tmp_path / ("0123456789" * 4)
    commit.mkdir()

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        files = sorted(path.name for path in folder.iterdir())
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(folder / name, commit / name)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetched = []
    for path in ("audio_tower", "full_forward"):
        inspect_encoder(EncoderRef.parse({"source": "owner/name", "path": path}, "test"))
        fetched.append({path.name for path in commit.glob("*.safetensors")})
    names = weight_map(folder)
    assert fetched[0] == {shard for name, shard in names.items() if name.startswith("audio_tower.")}
    assert fetched[1] == {shard for name, shard in names.items() if wanted(name)} > fetched[0]
    assert inspect(commit).fingerprint == inspect(folder).fingerprint


def change_text_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_run(model: Qwen2AudioForConditionalGeneration, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="drop pad_to_30s"):
        inspect_encoder(EncoderRef(source=str(folder), pad_to_30s=True, path="full_forward"))
    model.model.audio_tower.save_pretrained(tmp_path / "tower")
    for alone in (tmp_path / "tower", write_encoder(tmp_path / "whisper")):
        with pytest.raises(
            EncoderError, match=r"has no path full_forward, because .*; use path audio_tower \(qwen2_audio has both\)"
        ):
            inspect(alone)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / weight_map(folder)["language_model.model.norm.weight"]).unlink()
    inspect(other, "audio_tower")
    with pytest.raises(EncoderError, match="which is missing"):
        inspect(other)
    for change in ({"model_type": "llama"}, {"use_sliding_window": True}):
        changed = Path(shutil.copytree(folder, tmp_path / next(iter(change))))
        change_text_config(changed, **change)
        inspect(changed, "audio_tower")
        with pytest.raises(EncoderError, match="is not of a Qwen2 with full attention"):
            inspect(changed)


# The strategy document's counts


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    """Qwen2-Audio-7B by its configuration; its weights are never read, so empty files stand for them."""
    folder = tmp_path_factory.mktemp("real-size")
    config = {
        "model_type": "qwen2_audio",
        "audio_config": {"model_type": "qwen2_audio_encoder"},
        "text_config": {"model_type": "qwen2", "intermediate_size": 11008},
    }
    (folder / "config.json").write_text(json.dumps(config))
    shard = "model-00001-of-00005.safetensors"
    names = [f"{prefixes[0]}weight" for prefixes in PARTS.values()]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    (folder / shard).touch()
    return inspect(folder)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("placement", "targets", "tensors", "count"),
    [
        ("language_model", ("all-linear",), 448, 39_976_960),
        ("language_model", ATTENTION, 256, 16_777_216),
        ("both", ("all-linear",), 832, 39_976_960 + 11_796_480),
        ("both", ATTENTION, 512, 16_777_216 + 5_242_880),
    ],
)
def test_lora_on_the_language_model_of_qwen2_audio_7b(
    real_size: EncoderSpec, placement: Placed, targets: tuple[str, ...], tensors: int, count: int
) -> None:
    config = json.loads((real_size.folder / "config.json").read_text())
    encoder = Qwen2AudioFullForward(real_size, empty_qwen2_audio(config))
    # The tower, the projector, 32 layers and a norm: 8,397.1M without word embeddings and output layer.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 7_118_880_768
    lora = LoraSpec(rank=16, targets=targets, placement=placement)
    assert resolve_placement(real_size, lora).lora_parameters == count
    adapters.attach(encoder, lora, "default")
    found = adapters.parameters(encoder, "default")
    assert (len(found), sum(parameter.numel() for parameter in found)) == (tensors, count)
