"""Frozen text encoders of the sentence-transformers kind. No torch at import."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tuner.encoders.checkpoint import HUB_PATTERNS, fingerprint, read_json, resolve_folder, weight_files
from tuner.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor

# Vocabularies of the tokenisers: plain text and SentencePiece tables, neither runs code.
TEXT_HUB_PATTERNS = (*HUB_PATTERNS, "1_Pooling/config.json", "*.txt", "*.model")
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_CONFIG_FILES = (
    "config.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
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
        EncoderError: no such folder or hub id, no safetensors weights, or a pooling that is not mean or cls.
    """
    folder = resolve_folder(source, TEXT_HUB_PATTERNS)
    weights = weight_files(folder)
    dim = read_json(folder / "config.json").get("hidden_size")
    if not isinstance(dim, int):
        raise EncoderError(f"{folder / 'config.json'}: no hidden_size; give a text encoder in transformers' format")
    _pooling(folder)
    _refuse_further_modules(folder)
    return TextSpec(source, folder, fingerprint([folder / name for name in _CONFIG_FILES], weights), dim)


class TextEncoder:
    """A frozen text encoder in fp32: transformer, mean or cls pooling, L2 normalisation."""

    def __init__(self, spec: TextSpec, device: str = "cpu") -> None:
        """Load the weights of `spec` onto `device`.

        Raises:
            EncoderError: the folder cannot be loaded by transformers.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer  # noqa: TID251, safely below

        self.spec, self.device = spec, device
        self.pooling = _pooling(spec.folder)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with _no_progress_bar():
                self.tokenizer = AutoTokenizer.from_pretrained(spec.folder, **options)
                model = AutoModel.from_pretrained(spec.folder, use_safetensors=True, dtype=torch.float32, **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise EncoderError(f"{spec.folder}: transformers cannot load it ({' '.join(str(error).split())})") from None
        self.model = model.to(device).requires_grad_(False).eval()
        self.max_tokens = _max_tokens(spec.folder, self.tokenizer.model_max_length, model.config)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Unit-length embeddings [N, D] of texts, in their order; longer texts are cut at the encoder's longest.

        Texts of like length share a batch, so that little padding is computed; an embedding does not depend on its
        neighbours beyond rounding.
        """
        import torch

        embeddings = np.empty((len(texts), self.spec.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                hidden_NTD = self.model(**tokens).last_hidden_state
                pooled_ND = self._pool(hidden_NTD, tokens["attention_mask"])
                embeddings[rows] = torch.nn.functional.normalize(pooled_ND, dim=-1).cpu().numpy()
        return embeddings

    def _pool(self, hidden_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden_NTD[:, 0]
        weights_NT1 = mask_NT.unsqueeze(-1).to(hidden_NTD.dtype)
        return (hidden_NTD * weights_NT1).sum(dim=1) / weights_NT1.sum(dim=1).clamp(min=1e-9)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A bar for a second's loading would run across the caller's own output."""
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    """Mean where nothing else is said; otherwise what sentence-transformers' pooling module says."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    modes = [key for key, value in read_json(path).items() if key.startswith("pooling_mode_") and value is True]
    if modes == ["pooling_mode_mean_tokens"]:
        return "mean"
    if modes == ["pooling_mode_cls_token"]:
        return "cls"
    raise EncoderError(f"{path}: asks for {' and '.join(modes) or 'no pooling'}; only mean or cls pooling is supported")


def _refuse_further_modules(folder: Path) -> None:
    """A dense layer behind the pooling would be left out silently, and the embeddings would be wrong."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        raise EncoderError(f"{path}: not a list of sentence-transformers modules; fetch the model again") from None
    further = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if further:
        raise EncoderError(f"{path}: has a {further[0]} module; only {', '.join(_KNOWN_MODULES)} are supported")


def _max_tokens(folder: Path, tokenizer_limit: int, config: Any) -> int:
    """The longest text in tokens: sentence-transformers' own limit, else the smaller one of tokeniser and model."""
    path = folder / "sentence_bert_config.json"
    limit = read_json(path).get("max_seq_length") if path.is_file() else None
    if isinstance(limit, int):
        return limit
    return min(tokenizer_limit, getattr(config, "max_position_embeddings", tokenizer_limit))
