"""Models on disk: configuration, which files hold the weights, their fingerprint. No torch, no pickle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.errors import EncoderError
from tuner.lfs import ADVICE, is_pointer
from tuner.places import expanded, is_file, is_folder
from tuner.plain_json import parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files to download from a hub: none that unpickle, and not the fp32 or int8 copies that some repositories also hold.
CONFIG_PATTERNS = ("*.json",)
HUB_PATTERNS = (*CONFIG_PATTERNS, SINGLE, "model-*.safetensors")

_MIB = 1 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def resolve_folder(source: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Local folder of a model: an existing folder as it is, a hub id (`owner/name`) through the hub's cache.

    Args:
        patterns: which files of a hub id to download.
        revision: commit of a hub id; the newest when absent.

    Raises:
        EncoderError: the folder does not exist, or the hub id cannot be downloaded and is not in the cache.
    """
    if not source.strip():
        raise EncoderError("an encoder has no name; give a folder with config.json and weights, or a hub id owner/name")
    folder = expanded(source)
    if is_folder(folder):
        return folder
    if is_file(folder):
        raise EncoderError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise EncoderError(
            f"{source}: no such folder; give a folder with config.json and weights, or a hub id owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    # For an unreachable hub its client raises errors of its own, of httpx or of the operating system.
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise EncoderError(
            f"{source}: is not a local folder, and the download from the hub failed ({type(error).__name__}: "
            f"{reason}); check the name and the network, or give a local folder"
        ) from None


def fetch_weights(source: str, folder: Path, parts: Sequence[Sequence[str]]) -> None:
    """Download the weights of a hub id whose configuration is in `folder`; of a sharded model only the shards needed.

    A local folder is not changed.

    Args:
        parts: prefixes of each part that is needed; the first that occurs counts.

    Raises:
        EncoderError: the index is damaged, or the download fails.
    """
    if is_folder(expanded(source)):
        return
    files = [SINGLE]
    if (folder / INDEX).is_file():
        files = sorted({shard for prefixes in parts for shard in _shards(folder, prefixes)})
    # The name of a snapshot's folder is its commit: the weights must not come from a newer commit than the index.
    resolve_folder(source, (*CONFIG_PATTERNS, *files), revision=folder.name)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        EncoderError: the file is missing or not a JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read ({error.strerror}); the folder is not a complete model") from None
    except ValueError as error:
        refuse_pointers([path])
        raise EncoderError(f"{path}: is not valid JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise EncoderError(f"{path}: is not a JSON object; download the model again")
    return value


def tower_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of an audio tower, from its own config.json or from that of a whole model, where it is nested.

    The nested one may omit fields that equal the defaults of transformers: `defaults` gives the ones used here.
    """
    own = config.get("audio_config", config)
    return dict(defaults) | dict(own or {})


def weight_files(folder: Path, prefixes: Sequence[str] = ("",)) -> list[Path]:
    """The safetensors files that hold tensors below the first of `prefixes` that occurs, sorted.

    Raises:
        EncoderError: there are no weights, only pickled ones, none of the tower, or a shard is missing.
    """
    if (folder / INDEX).is_file():
        names = _shards(folder, prefixes)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise EncoderError(f"{folder}: {INDEX} lists {missing[0]}, which is missing; download the model again")
        return refuse_pointers([folder / name for name in names])
    if (folder / SINGLE).is_file():
        return refuse_pointers([folder / SINGLE])
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise EncoderError(
            f"{folder}: {pickled[0]} may run code when loaded, so it is not read; convert it to {SINGLE} "
            "(save_pretrained of a current transformers does)"
        )
    raise EncoderError(f"{folder}: has no weights; expected {SINGLE}, {INDEX} or a faster-whisper model.bin")


def refuse_pointers(files: list[Path]) -> list[Path]:
    """The files as they are given.

    Raises:
        EncoderError: one of them is a Git LFS pointer.
    """
    for file in files:
        if is_pointer(file):
            raise EncoderError(f"{file}: {ADVICE}")
    return files


def names_below(names: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """The tensor names that begin with the first of `prefixes` that occurs."""
    known = list(names)
    prefix = first_prefix(known, prefixes)
    return [name for name in known if name.startswith(prefix)]


def first_prefix(names: Iterable[str], prefixes: Sequence[str]) -> str:
    """The first of `prefixes` that begins any name; the last one if none does."""
    known = list(names)
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in known)), prefixes[-1])


def fingerprint(configs: Iterable[Path], weights: Iterable[Path], *settings: object) -> str:
    """SHA-256 (hex) over settings, configuration files and a sample of each weight file.

    The sample of a weight file is its size, its first and last MiB and 64 evenly spaced pieces of 64 KiB. That takes
    some milliseconds for any size, and a fine-tuned copy of the same shape differs nearly everywhere. A change of a few
    bytes between the samples is not noticed. Location and file times do not count, so a moved folder keeps its caches.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for path in configs:
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name}:{len(content)}:".encode() + content)
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_MIB))
            for index in range(_SAMPLES):
                file.seek(size * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _MIB))
            digest.update(file.read(_MIB))
    return digest.hexdigest()


def positive(config: Mapping[str, Any], field: str, folder: Path) -> int:
    """A field of config.json that must be a positive whole number.

    Raises:
        EncoderError: it is missing or not a positive whole number.
    """
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise EncoderError(
            f"{folder}: {field} in config.json is {value!r}, expected a positive number; download the model again"
        )
    return value


def _shards(folder: Path, prefixes: Sequence[str]) -> list[str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise EncoderError(f"{folder / INDEX}: has no weight_map; download the model again")
    prefix = first_prefix(weight_map, prefixes)
    shards = sorted({str(file) for name, file in weight_map.items() if name.startswith(prefix)})
    if not shards:
        raise EncoderError(
            f"{folder / INDEX}: lists no tensor below {' or '.join(prefixes)}; "
            "the weights are not of the model in config.json, so download the model again"
        )
    # The names come from a downloaded file, and are joined to the folder: they must not lead out of it.
    stray = next((shard for shard in shards if Path(shard).name != shard), None)
    if stray is not None:
        raise EncoderError(f"{folder / INDEX}: lists the weight file {stray!r} outside its folder; download it again")
    pickled = next((shard for shard in shards if not shard.endswith(".safetensors")), None)
    if pickled is not None:
        raise EncoderError(f"{folder / INDEX}: lists the weight file {pickled!r}, not safetensors; download it again")
    return shards
