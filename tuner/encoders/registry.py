"""Which encoder a folder or hub id holds, and how to load it. No torch at import.

A family is one `Family` record in `_FAMILIES`; no other module knows the families by name. Facts are imported at once.
Towers and front ends need torch and transformers, so they are imported only here, and only when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.config import EncoderRef
from tuner.encoders import ctranslate2
from tuner.encoders.checkpoint import (
    CONFIG_PATTERNS,
    INDEX,
    SINGLE,
    fetch_weights,
    read_json,
    resolve_folder,
    weight_files,
)
from tuner.encoders.clap import facts as clap
from tuner.encoders.family import EncoderSource, Family, FeatureExtractor, Features, Tower
from tuner.encoders.glmasr import facts as glmasr
from tuner.encoders.qwen2_5_omni import facts as qwen2_5_omni
from tuner.encoders.qwen2_audio import facts as qwen2_audio
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.voxtral import facts as voxtral
from tuner.encoders.wav2vec2 import facts as wav2vec2
from tuner.encoders.whisper import facts as whisper
from tuner.errors import EncoderError

if TYPE_CHECKING:
    import torch

    from tuner.encoders.base import AudioEncoder

    Loader = Callable[[EncoderSpec, torch.dtype, str], AudioEncoder]

__all__ = [
    "FeatureExtractor",
    "families",
    "inspect_encoder",
    "load_encoder",
    "load_feature_extractor",
    "tensor_prefixes",
]

_RECORDS = (
    whisper.FAMILY,
    *clap.FAMILIES,
    *glmasr.FAMILIES,
    *qwen2_5_omni.FAMILIES,
    *qwen2_audio.FAMILIES,
    *voxtral.FAMILIES,
    *wav2vec2.FAMILIES,
)
_FAMILIES = {family.model_type: family for family in _RECORDS}


def families() -> tuple[str, ...]:
    """Names of the known families, as `model_type` in config.json gives them."""
    return tuple(sorted(_FAMILIES))


def inspect_encoder(ref: EncoderRef) -> EncoderSpec:
    """Facts of an encoder from its configuration file; no weight is loaded.

    For a hub id it downloads the configuration into the hub's cache, then the weight files that hold the encoder.

    Raises:
        EncoderError: no such folder or hub id, no weights, an unknown family, quantised or pickled weights, or a path
            that the family does not have.
    """
    folder = resolve_folder(ref.source, CONFIG_PATTERNS)
    source = _ctranslate2_source(ref, folder) or _transformers_source(ref, folder)
    family = _family_of(source)
    full = _goes_beyond_tower(ref, family)
    fetch_weights(ref.source, folder, (family.prefixes, *(family.behind_tower if full else ())))
    return family.inspect(source)


def tensor_prefixes(spec: EncoderSpec) -> tuple[tuple[str, ...], ...]:
    """Prefixes of the tensors that `load_encoder` reads, by part; the first that occurs in the checkpoint counts."""
    family = _FAMILIES[spec.family]
    return (family.prefixes, *(family.behind_tower if spec.tower_alone else ()))


def load_encoder(spec: EncoderSpec, dtype: torch.dtype, device: str = "cpu") -> AudioEncoder:
    """The frozen encoder in `eval` mode, its weights as `dtype` on `device`; only the encoder's tensors are read.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    return _tower_loader(_FAMILIES[spec.family].tower, spec.tower_alone is not None)(spec, dtype, device)


def load_feature_extractor(spec: EncoderSpec) -> FeatureExtractor:
    """The front end of an encoder. Imports transformers.

    Raises:
        EncoderError: the folder's preprocessor configuration does not match the encoder.
    """
    return _front_end(_FAMILIES[spec.family].features)(spec)


def _ctranslate2_source(ref: EncoderRef, folder: Path) -> EncoderSource | None:
    path = folder / ctranslate2.FILE_NAME
    # A folder may hold both formats; then the unconverted weights are used.
    if not path.is_file() or (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return None
    name = ctranslate2.read_header(path).name
    for family in _FAMILIES.values():
        if family.ctranslate2_name == name:
            return EncoderSource(ref, folder, "ctranslate2", {"model_type": family.model_type})
    raise EncoderError(f"{path}: holds a {name!r}; give an encoder of a known family ({', '.join(families())})")


def _transformers_source(ref: EncoderRef, folder: Path) -> EncoderSource:
    if not (folder / "config.json").is_file():
        # If both are missing, report the weights first: they are the larger download.
        weight_files(folder)
    return EncoderSource(ref, folder, "transformers", read_json(folder / "config.json"))


def _goes_beyond_tower(ref: EncoderRef, family: Family) -> bool:
    """Whether the requested path goes on after the family's tower."""
    if ref.path == "full_forward" and ref.path not in family.paths:
        able = sorted(name for name, other in _FAMILIES.items() if other.behind_tower)
        raise EncoderError(
            f"{ref.source}: {family.model_type} has no path full_forward, because only its audio encoder is run; "
            f"use path audio_tower ({', '.join(able)} has both)"
        )
    return ref.path == "full_forward"


def _family_of(source: EncoderSource) -> Family:
    model_type = source.config.get("model_type")
    if model_type not in _FAMILIES:
        raise EncoderError(
            f"{source.ref.source}: config.json has the unknown model_type {model_type!r}; "
            f"give an encoder of a known family ({', '.join(families())})"
        )
    return _FAMILIES[model_type]


def _tower_loader(tower: Tower, beyond: bool) -> Loader:
    """The loader of a tower or, `beyond` it, of the language model too. Each import costs seconds and memory."""
    match tower:
        case "clap":
            from tuner.encoders.clap.tower import load_clap

            return load_clap
        case "glmasr":
            from tuner.encoders.glmasr.tower import load_glmasr

            return load_glmasr
        case "qwen2_5_omni":
            from tuner.encoders.qwen2_5_omni.tower import load_omni

            return load_omni
        case "qwen2_audio":
            if beyond:
                from tuner.encoders.qwen2_audio.full_forward import load_full_forward

                return load_full_forward
            from tuner.encoders.qwen2_audio.tower import load_qwen2_audio

            return load_qwen2_audio
        case "voxtral":
            from tuner.encoders.voxtral.tower import load_voxtral

            return load_voxtral
        case "wav2vec2":
            from tuner.encoders.wav2vec2.tower import load_wav2vec2

            return load_wav2vec2
        case "wavlm":
            from tuner.encoders.wav2vec2.wavlm import load_wavlm

            return load_wavlm
        case "whisper":
            from tuner.encoders.whisper.tower import load_whisper

            return load_whisper


def _front_end(features: Features) -> Callable[[EncoderSpec], FeatureExtractor]:
    match features:
        case "clap":
            from tuner.encoders.clap.features import ClapFeatures

            return ClapFeatures
        case "log_mel":
            from tuner.encoders.whisper.features import WhisperFeatures

            return WhisperFeatures
        case "waveform":
            from tuner.encoders.wav2vec2.features import WaveformFeatures

            return WaveformFeatures
