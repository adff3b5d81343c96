"""Front ends that transformers 5 saves inside one processor_config.json, with and without the older file beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import small_whisper
from test_clap import write_clap

from tuner.config import EncoderRef
from tuner.encoders.registry import inspect_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import EncoderError

OWN, WHOLE = "preprocessor_config.json", "processor_config.json"
WAVEFORM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WAVEFORM |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}


def waveform(name: str, folder: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**WAVEFORM, conv_dim=[16] * 7)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    (folder / OWN).write_text(json.dumps({"do_normalize": True, "feature_size": 1, "sampling_rate": 16000}))


def whisper(folder: Path) -> None:
    transformers.WhisperModel(small_whisper()).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)  # type: ignore[no-untyped-call]


KINDS: dict[str, Callable[[Path], object]] = {
    **{name: partial(waveform, name) for name in ("Wav2Vec2", "Hubert", "WavLM")},
    "Clap": write_clap,
    "Whisper": whisper,
}


def spec_of(folder: Path) -> EncoderSpec:
    return inspect_encoder(EncoderRef(source=str(folder)))


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    KINDS[request.param](tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("key", ["feature_extractor", "audio_processor"])
def test_a_front_end_inside_a_processor(folder: Path, key: str) -> None:
    clip = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)
    before = spec_of(folder)
    expected, frames = load_feature_extractor(before).extract(clip)
    settings = json.loads((folder / OWN).read_text())
    (folder / OWN).rename(folder / "kept")
    (folder / WHOLE).write_text(json.dumps({key: settings, "processor_class": "AnyProcessor"}))
    spec = spec_of(folder)
    found, count = load_feature_extractor(spec).extract(clip)
    assert count == frames and np.array_equal(found, expected)
    assert (spec.stages, spec.max_frames) == (before.stages, before.max_frames)
    (folder / WHOLE).write_text(json.dumps({key: settings | {"more": 1}, "processor_class": "AnyProcessor"}))
    assert len({spec.fingerprint, spec_of(folder).fingerprint, before.fingerprint}) == 3
    # The older file alone counts where both are there, as before.
    (folder / "kept").rename(folder / OWN)
    assert spec_of(folder).fingerprint == before.fingerprint


def test_what_a_front_end_lacks_is_named_by_its_file(folder: Path) -> None:
    settings = json.loads((folder / OWN).read_text())
    (folder / OWN).unlink()
    (folder / WHOLE).write_text(json.dumps({"feature_extractor": settings | {"sampling_rate": 22050}}))
    with pytest.raises(EncoderError, match=r"processor_config\.json: sampling_rate is 22050"):
        load_feature_extractor(spec_of(folder))
    (folder / WHOLE).write_text(json.dumps({"processor_class": "AnyProcessor"}))
    if json.loads((folder / "config.json").read_text())["model_type"] == "whisper":
        spec_of(folder)  # its defaults are those of all Whispers
        return
    with pytest.raises(EncoderError, match=r"preprocessor_config\.json: is missing"):
        spec_of(folder)


def test_a_processor_as_transformers_saves_it(tmp_path: Path) -> None:
    signs = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abc"]
    (tmp_path / "vocab.json").write_text(json.dumps({sign: index for index, sign in enumerate(signs)}))
    waveform("Wav2Vec2", tmp_path)
    (tmp_path / OWN).unlink()
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)  # type: ignore[no-untyped-call]
    tokens = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))  # type: ignore[no-untyped-call]
    transformers.Wav2Vec2Processor(extractor, tokens).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    assert not (tmp_path / OWN).exists()
    clip = np.linspace(0.5, 0.9, 800, dtype=np.float32)
    features, _ = load_feature_extractor(spec_of(tmp_path)).extract(clip)
    assert np.array_equal(features[0], clip), "not normalised, as its processor says"
