"""Qwen2-Audio's tower against the padded, masked original, from a sharded checkpoint as it lies on a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors
import soundfile
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from tuner.config import EncoderRef, LoraSpec
from tuner.data.worker import WORK_SCHEMA, FeatureWorker
from tuner.encoders.packed import empty_model
from tuner.encoders.qwen2_audio.tower import Qwen2AudioTower
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import EncoderError
from tuner.lora import adapter as adapters
from tuner.lora.placement import resolve_placement

RATE = 16_000
AUDIO_TOKEN = 150
INDEX = "model.safetensors.index.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def small_config() -> Qwen2AudioConfig:
    audio = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 128,
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
        "pad_token_id": 0,
    }
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_TOKEN)


@pytest.fixture(scope="module")
def model() -> Qwen2AudioForConditionalGeneration:
    torch.manual_seed(0)
    model: Qwen2AudioForConditionalGeneration
    model = Qwen2AudioForConditionalGeneration(small_config()).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        # transformers starts so near to zero that attention would hardly matter.
        for parameter in model.model.audio_tower.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def checkpoint(model: Qwen2AudioForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2-audio")
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def weight_map(folder: Path) -> dict[str, str]:
    names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return names


def tower_shards(folder: Path) -> set[str]:
    return {shard for name, shard in weight_map(folder).items() if name.startswith("audio_tower.")}


def inspect(folder: Path) -> EncoderSpec:
    return inspect_encoder(EncoderRef(source=str(folder)))


def assert_same_weights(folder: Path, reference: Qwen2AudioEncoder) -> None:
    loaded = load_encoder(inspect(folder), torch.float32).model.state_dict()
    assert set(loaded) == set(reference.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in reference.state_dict().items())


# The tower's output

# From one token of output to nearly 30 s: odd and even numbers of frames and of tokens.
SAMPLES = [640, 801, 7_000, 20_000, 47_777, 100_001, 30 * RATE - 200]


def clips(samples: list[int]) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    return [(random.standard_normal(length) * 0.1).astype(np.float32) for length in samples]


def original(model: Qwen2AudioForConditionalGeneration, spec: EncoderSpec, waveforms: list[Any]) -> list[Tensor]:
    """Slow reference: the whole model on 30 s windows, what its tower gives for the real tokens of each clip."""
    extractor: Any = load_feature_extractor(spec)
    inputs = extractor.extractor(waveforms, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    frames_B = inputs["attention_mask"].sum(dim=1)
    _, tokens_B = model.model.audio_tower._get_feat_extract_output_lengths(frames_B)
    is_audio_BT = torch.arange(int(tokens_B.max())) < tokens_B[:, None]
    captured: list[Tensor] = []
    hook = model.model.audio_tower.register_forward_hook(
        lambda module, arguments, output: captured.append(output.last_hidden_state)
    )
    with torch.inference_mode():
        model(
            input_ids=is_audio_BT * AUDIO_TOKEN,
            attention_mask=is_audio_BT.long(),
            input_features=inputs["input_features"],
            feature_attention_mask=inputs["attention_mask"],
        )
    hook.remove()
    return [states_TD[:tokens] for states_TD, tokens in zip(captured[0], tokens_B.tolist(), strict=True)]


def run(folder: Path, waveforms: list[NDArray[np.float32]]) -> list[Tensor]:
    encoder = load_encoder(inspect(folder), torch.float32)
    extracted = [load_feature_extractor(encoder.spec).extract(clip) for clip in waveforms]
    frames_B = torch.tensor([frames for _, frames in extracted])
    with torch.inference_mode():
        hidden_BTD, mask_BT = encoder(encoder.pad_features([features for features, _ in extracted]), frames_B)
    assert mask_BT.sum(dim=1).tolist() == [encoder.spec.token_length(frames) for _, frames in extracted]
    return [states_TD[mask_T] for states_TD, mask_T in zip(hidden_BTD, mask_BT, strict=True)]


def test_a_truncated_batch_equals_the_padded_masked_original(
    model: Qwen2AudioForConditionalGeneration, checkpoint: Path
) -> None:
    """Tolerance 1e-5 in fp32, on states of size 1 (the last layer norm)."""
    waveforms = clips(SAMPLES)
    expected = original(model, inspect(checkpoint), waveforms)
    for ours_TD, theirs_TD in zip(run(checkpoint, waveforms), expected, strict=True):
        assert ours_TD.shape == theirs_TD.shape
        assert (ours_TD - theirs_TD).abs().max() <= 1e-5


def test_the_mask_of_the_original_matters(model: Qwen2AudioForConditionalGeneration, checkpoint: Path) -> None:
    """Otherwise equality with the masked run would show nothing about what attends to what."""
    (clip,) = clips([20_000])
    extractor: Any = load_feature_extractor(inspect(checkpoint))
    window = extractor.extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    (masked_TD,) = original(model, inspect(checkpoint), [clip])
    with torch.inference_mode():
        unmasked_TD = model.model.audio_tower(window).last_hidden_state[0, : len(masked_TD)]
    assert (unmasked_TD - masked_TD).abs().max() > 0.1


def test_a_clip_alone_equals_the_clip_in_a_batch(checkpoint: Path) -> None:
    """Tolerance 1e-5 in fp32: other matrix shapes round differently."""
    waveforms = clips(SAMPLES[:5])
    for batched_TD, clip in zip(run(checkpoint, waveforms), waveforms, strict=True):
        torch.testing.assert_close(batched_TD, run(checkpoint, [clip])[0], rtol=0, atol=1e-5)


def test_token_lengths_are_those_of_transformers(checkpoint: Path, model: Qwen2AudioForConditionalGeneration) -> None:
    spec = inspect(checkpoint)
    frames = torch.arange(3, 3001)
    entering, pooled = model.model.audio_tower._get_feat_extract_output_lengths(frames)
    assert entering.tolist() == [spec.sequence_length(count) for count in frames.tolist()]
    assert pooled.tolist() == [spec.token_length(count) for count in frames.tolist()]
    assert [spec.token_length(count) for count in (0, 1, 2, 3, 4, 5)] == [0, 0, 0, 1, 1, 1]


def test_a_clip_of_no_pair_of_tokens_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    """20 ms are one token, and its mean over no pairs would be NaN."""
    rows = []
    for samples in (320, 321):
        path = tmp_path / f"{samples}.wav"
        soundfile.write(path, clips([samples])[0], RATE)
        rows.append({"index": samples, "audio": str(path)})
    unused: Any = None
    results = FeatureWorker(inspect(checkpoint), unused)(pa.Table.from_pylist(rows, schema=WORK_SCHEMA))
    assert results["reason"].to_pylist() == ["too short", None]
    assert results["frames"].to_pylist() == [None, 3]


# What is read


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[set[str], set[str]]]:
    """Files that are opened and tensors that are read meanwhile."""
    opened: set[str] = set()
    read: set[str] = set()
    real = safetensors.safe_open

    class Spy:
        def __init__(self, file: Path, **options: Any) -> None:
            opened.add(Path(file).name)
            self.reader: Any = real(file, **options)

        def __enter__(self) -> Spy:
            self.reader.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.reader.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.reader.keys())

        def get_tensor(self, name: str) -> Tensor:
            read.add(name)
            tensor: Tensor = self.reader.get_tensor(name)
            return tensor

    with monkeypatch.context() as patch:
        patch.setattr("tuner.encoders.weights.safe_open", Spy)
        yield opened, read


def test_nothing_of_the_language_model_is_read_or_built(
    model: Qwen2AudioForConditionalGeneration, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, ours = weight_map(folder), tower_shards(folder)
    shared = {shard for name, shard in names.items() if shard in ours and not name.startswith("audio_tower.")}
    others = set(names.values()) - ours
    assert len(ours) > 1 and shared and others, "the shards of this test do not tell the cases apart"
    for shard in others:  # not even fetched
        (folder / shard).unlink()
    with spied(monkeypatch) as (opened, read):
        encoder = load_encoder(inspect(folder), torch.float32)
    assert opened == ours
    assert read == {name for name in names if name.startswith("audio_tower.")}
    wanted = sum(parameter.numel() for parameter in model.model.audio_tower.parameters())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == wanted


def test_every_layout_gives_the_same_tower(
    model: Qwen2AudioForConditionalGeneration, checkpoint: Path, tmp_path: Path
) -> None:
    reference = model.model.audio_tower
    assert_same_weights(checkpoint, reference)
    reference.save_pretrained(tmp_path / "tower")
    assert json.loads((tmp_path / "tower" / "config.json").read_text())["model_type"] == "qwen2_audio_encoder"
    assert_same_weights(tmp_path / "tower", reference)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    shutil.copy(checkpoint / "config.json", renamed)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, renamed / "model.safetensors")
    assert any(name.startswith("model.audio_tower.") for name in load_file(renamed / "model.safetensors"))
    assert_same_weights(renamed, reference)


def test_a_hub_id_fetches_the_shards_of_the_tower_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a function here that copies what it is asked for, as the hub's client does."""
    import huggingface_hub

    commit = folder.parent / "hub" / ("0123456789" * 4)
    commit.mkdir(parents=True)
    revisions = []

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append(revision)
        files = sorted(path.name for path in folder.iterdir())
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(folder / name, commit / name)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    spec = inspect_encoder(EncoderRef(source="owner/name"))
    assert revisions == [None, commit.name]
    assert (
        {path.name for path in commit.glob("*.safetensors")} == tower_shards(folder) < set(weight_map(folder).values())
    )
    assert not (commit / "pytorch_model.bin").exists()
    assert spec.fingerprint == inspect(folder).fingerprint
    load_encoder(spec, torch.float32)


def test_the_nested_configuration_may_leave_out_defaults(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"] = {"model_type": "qwen2_audio_encoder", "d_model": 80}
    (folder / "config.json").write_text(json.dumps(config))
    spec = inspect(folder)
    assert (spec.hidden_size, spec.num_layers, spec.feature_channels, spec.max_frames) == (80, 32, 128, 3000)
    with pytest.raises(EncoderError, match=r"weights do not match config.json: .* missing .* misshaped"):
        load_encoder(spec, torch.float32)


def test_what_cannot_be_used(folder: Path) -> None:
    with pytest.raises(EncoderError, match=r"masks the padding after a clip.* drop pad_to_30s"):
        inspect_encoder(EncoderRef(source=str(folder), pad_to_30s=True))
    missing = min(tower_shards(folder))
    (folder / missing).unlink()
    with pytest.raises(EncoderError, match=f"lists {missing}, which is missing"):
        inspect(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["audio_tower.conv1.bias"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EncoderError, match=r"'../elsewhere.safetensors' outside its folder"):
        inspect(folder)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "audio_tower" not in name}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EncoderError, match=r"no tensor below audio_tower. or model.audio_tower."):
        inspect(folder)


# The strategy document's counts


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    """Qwen2-Audio-7B by its configuration; its weights are never read, so empty files stand for them."""
    folder = tmp_path_factory.mktemp("real-size")
    config = {"model_type": "qwen2_audio", "audio_config": {"model_type": "qwen2_audio_encoder"}}
    (folder / "config.json").write_text(json.dumps(config))
    shard = "model-00001-of-00005.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"audio_tower.conv1.weight": shard}}))
    (folder / shard).touch()
    return inspect(folder)


@pytest.mark.parametrize(
    ("targets", "tensors", "count"),
    [(ATTENTION, 256, 5_242_880), ((*ATTENTION, "fc1", "fc2"), 384, 11_796_480)],
)
def test_lora_on_the_tower_of_qwen2_audio_7b(
    real_size: EncoderSpec, targets: tuple[str, ...], tensors: int, count: int
) -> None:
    encoder = Qwen2AudioTower(real_size, empty_model(Qwen2AudioEncoder, Qwen2AudioEncoderConfig()))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 636_968_960
    lora = LoraSpec(rank=16, targets=targets)
    assert resolve_placement(real_size, lora).lora_parameters == count
    adapters.attach(encoder, lora, "default")
    found = adapters.parameters(encoder, "default")
    assert (len(found), sum(parameter.numel() for parameter in found)) == (tensors, count)
