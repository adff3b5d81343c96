"""What is known of a text encoder from its folder: width, pooling, longest text. No torch unless its width asks for it.

The files of sentence-transformers are read where they are: `modules.json`, the pooling's own config.json in its old
form (a flag for each mode) and the one since 5.4 (`pooling_mode: "mean"`), `sentence_bert_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuner.encoders.checkpoint import HUB_PATTERNS, fingerprint, read_json, resolve_folder, weight_files
from tuner.errors import EncoderError
from tuner.near import shown
from tuner.plain_json import parse_json

if TYPE_CHECKING:
    from torch import nn

POOLING = "1_Pooling/config.json"
# Vocabularies of the tokenisers: plain text and SentencePiece tables, neither runs code.
TEXT_HUB_PATTERNS = (*HUB_PATTERNS, POOLING, "*.txt", "*.model")
# A model without a limit of its own reads no more than this: what attention takes grows with the square of it.
LONGEST = 8192  # tokens
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_CONFIG_FILES = (
    "config.json",
    POOLING,
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)


@dataclass(frozen=True)
class TextSpec:
    """Facts of a text encoder, read from its configuration."""

    source: str
    folder: Path
    fingerprint: str  # of configuration, tokeniser and weights
    dim: int


def inspect_text_encoder(source: str) -> TextSpec:
    """Facts of a text encoder in a folder or behind a hub id; no weight is loaded.

    Raises:
        EncoderError: no such folder or hub id, no safetensors weights, no known width, or a pooling that is not mean or
            cls.
    """
    folder = resolve_folder(source, TEXT_HUB_PATTERNS)
    weights = weight_files(folder)
    dim = _width(folder)
    pooling_of(folder)
    _refuse_further_modules(folder)
    return TextSpec(source, folder, fingerprint([folder / name for name in _CONFIG_FILES], weights), dim)


def _width(folder: Path) -> int:
    """Width of the last hidden state: `hidden_size`, or what the architecture calls it, which transformers knows."""
    path = folder / "config.json"
    config = read_json(path)
    width = config.get("hidden_size")
    if width is None:
        width = _width_by_transformers(folder)
    if not isinstance(width, int) or width < 1:
        kind = shown(config.get("model_type"))
        raise EncoderError(f"{path}: no hidden_size known for model_type {kind}; give a text encoder of transformers")
    return width


def _width_by_transformers(folder: Path) -> object:
    from transformers import AutoConfig  # noqa: TID251, values alone

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return getattr(config, "hidden_size", None)


def pooling_of(folder: Path) -> Literal["mean", "cls"]:
    """Mean where nothing else is said; otherwise what sentence-transformers' pooling module says.

    Raises:
        EncoderError: another pooling, by its name.
    """
    path = folder / POOLING
    if not path.is_file():
        return "mean"
    config = read_json(path)
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    given = config.get("pooling_mode", flags)
    modes = given if isinstance(given, list) else [given]
    if modes in (["mean"], ["pooling_mode_mean_tokens"]):
        return "mean"
    if modes in (["cls"], ["pooling_mode_cls_token"]):
        return "cls"
    wanted = " and ".join(str(mode)[:60] for mode in modes[:6]) or "no pooling"
    raise EncoderError(f"{path}: asks for {wanted}; only mean or cls pooling is supported")


def _refuse_further_modules(folder: Path) -> None:
    """A dense layer behind the pooling would be left out silently, and the embeddings would be wrong."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in parse_json(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        raise EncoderError(f"{path}: not a list of sentence-transformers modules; download the model again") from None
    further = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if further:
        raise EncoderError(f"{path}: has a {further[0][:60]} module; only {', '.join(_KNOWN_MODULES)} are supported")


def token_limit(folder: Path, tokenizer_limit: int, model: nn.Module) -> int:
    """The longest text in tokens: what sentence-transformers or else the tokeniser says, as far as the model can.

    Args:
        tokenizer_limit: an enormous number where the tokeniser has none.
        model: with its configuration; its table of positions counts too, since RoBERTa and its kin begin to count
            behind the padding's own number: 514 positions hold 512 tokens.
    """
    path = folder / "sentence_bert_config.json"
    own = read_json(path).get("max_seq_length") if path.is_file() else None
    config: Any = model.config
    # As in sentence-transformers, its own limit replaces that of the tokeniser; the model's hold in any case.
    limits = [own or tokenizer_limit, getattr(config, "max_position_embeddings", None), *_position_limits(model)]
    return min([LONGEST, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def _position_limits(model: nn.Module) -> list[int]:
    from torch import nn

    return [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
