"""Frozen text encoders of the sentence-transformers kind, of any architecture that transformers loads. No torch here
at import."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuner.encoders.text_facts import TextSpec, pooling_of, token_limit
from tuner.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Weights that a model may lack, since no token's last hidden state depends on them.
_HEADS = (".pooler.", ".lm_head.", ".classifier.")


class TextEncoder:
    """A frozen text encoder in fp32: transformer, mean or cls pooling, L2 normalisation."""

    def __init__(self, spec: TextSpec, device: str = "cpu") -> None:
        """Load the weights of `spec` onto `device`.

        Raises:
            EncoderError: the folder cannot be loaded by transformers, or lacks weights that the embedding depends on.
        """
        self.spec, self.device = spec, device
        self.pooling = pooling_of(spec.folder)
        self.tokenizer, model = _load(spec)
        self.model = model.to(device).requires_grad_(False).eval()
        # Some tokenisers give more than the model takes, or know no padding; the mask hides whatever pads.
        takes = inspect.signature(self.model.forward).parameters
        self._inputs = None if any(each.kind is each.VAR_KEYWORD for each in takes.values()) else set(takes)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.max_tokens = token_limit(spec.folder, self.tokenizer.model_max_length, model)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Unit-length embeddings [N, D] of texts, in their order; too long texts are cut to the encoder's limit.

        Texts of like length share a batch, so that little padding is computed; an embedding does not depend on its
        neighbours beyond rounding.

        Raises:
            EncoderError: the model fails on a text, or gives something else than finite vectors of its width.
        """
        embeddings = np.empty((len(texts), self.spec.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            try:
                embeddings[rows] = self._embed([texts[row] for row in rows])
            # Models of many makers run here, and each fails in its own way on what it cannot take.
            except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
                reason = " ".join(str(error).split())
                raise EncoderError(
                    f"{self.spec.folder}: cannot embed a caption as this program runs it ({type(error).__name__}: "
                    f"{reason:.200}); use another text encoder"
                ) from None
        if not np.isfinite(embeddings).all():
            raise EncoderError(f"{self.spec.folder}: gives embeddings that are not finite; use another text encoder")
        return embeddings

    def _embed(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        given = {name: value for name, value in tokens.items() if self._inputs is None or name in self._inputs}
        with torch.inference_mode():
            hidden_NTD = self.model(**given).last_hidden_state
            pooled_ND = self._pool(hidden_NTD, tokens["attention_mask"])
            unit_ND: NDArray[np.float32] = torch.nn.functional.normalize(pooled_ND, dim=-1).cpu().numpy()
        return unit_ND

    def _pool(self, hidden_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden_NTD[:, 0]
        weights_NT1 = mask_NT.unsqueeze(-1).to(hidden_NTD.dtype)
        return (hidden_NTD * weights_NT1).sum(dim=1) / weights_NT1.sum(dim=1).clamp(min=1e-9)


def _load(spec: TextSpec) -> tuple[Any, nn.Module]:
    """The tokeniser, and the model or, of one that writes text too, the part that reads it."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer  # noqa: TID251, safely below

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(spec.folder, **options)
            model, report = AutoModel.from_pretrained(
                spec.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise EncoderError(f"{spec.folder}: transformers cannot load it ({reason:.300})") from None
    two_parts = getattr(model.config, "is_encoder_decoder", False)
    unused = (*_HEADS, ".decoder.") if two_parts else _HEADS
    missing = sorted(name for name in report["missing_keys"] if not any(part in f".{name}." for part in unused))
    if missing:
        # transformers would draw them at random, and the embeddings would mean nothing.
        raise EncoderError(
            f"{spec.folder}: its weights lack {len(missing)} tensors of the model (for example {missing[0]}); "
            "download the model again"
        )
    return tokenizer, model.get_encoder() if two_parts else model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar, which would disturb the caller's own output."""
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
