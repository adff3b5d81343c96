"""Load an exported adapter with plain PEFT and measure it. Every number of a front is measured this way.

Confirmation of a front and `tuner evaluate` are the same call on the same files, so they agree to the last digit on one
machine: same forward passes, same number format, no training-time cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.config import EncoderRef
from tuner.data.store import Store
from tuner.encoders.base import AudioEncoder
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import AdapterError, Field
from tuner.lora.adapter import detach, load_adapter, on_path
from tuner.train.export import Card, load_head, read_card
from tuner.train.model import ProjectionHead, pool_clips
from tuner.train.pack import retrieve_split
from tuner.train.precision import dtype_of
from tuner.train.prefix import FeatureSource, LivePrefix, row_lengths
from tuner.train.results import Retrieval

ADAPTER = "default"


@dataclass(frozen=True)
class LoadedAdapter:
    """An encoder with one exported adapter in it, and its head."""

    card: Card
    encoder: AudioEncoder
    head: ProjectionHead

    @torch.no_grad()
    def embed(self, source: FeatureSource, clips: NDArray[np.int64]) -> Tensor:
        """Embeddings of clips, fp32 [len(clips), D], L2-normalised."""
        lengths = row_lengths(self.encoder, source)[clips]
        prefix = LivePrefix(self.encoder, source, depth=0)
        pooled_NH = pool_clips(self.encoder, prefix, clips, lengths, self.card.tokens_per_forward)
        embedded: Tensor = self.head(pooled_NH)
        return embedded

    def release(self) -> None:
        """Take the adapter out of the encoder again."""
        if self.card.config.lora:
            detach(self.encoder, ADAPTER)

    def evaluate(self, store: Store, split: str) -> Retrieval:
        """Retrieval over one split of a store prepared with the same encoders.

        Raises:
            AdapterError: the store was prepared with another encoder or text encoder.
            DataError: the store has no such split.
        """
        check_store(self.card, self.encoder.spec.features_fingerprint, store)
        clips = store.split(split)
        return retrieve_split(store, clips, self.embed(store, clips))


def load(folder: Path, encoder: EncoderRef | None = None, device: str = "cpu") -> LoadedAdapter:
    """Load encoder, adapter and head; `encoder` gives the encoder's place if it is not the one in the card any more.

    Raises:
        AdapterError: tensors are missing or unexpected, or the adapter was made for another encoder.
        EncoderError: the encoder cannot be loaded.
    """
    card = read_card(folder)
    spec = inspect_encoder(encoder or card.encoder)
    if spec.fingerprint != card.encoder_fingerprint:
        raise AdapterError(
            f"{folder}: this adapter was made for another encoder than {spec.source}; name its own with ",
            Field("encoder"),
        )
    return attach_exported(folder, card, load_encoder(spec, dtype_of(card.precision), device))


def attach_exported(folder: Path, card: Card, encoder: AudioEncoder) -> LoadedAdapter:
    """Put an exported adapter into an encoder that holds none.

    Raises:
        AdapterError: files are missing or damaged, or do not fit the encoder.
        PlacementError: the encoder's path does not reach what the adapter adapts.
    """
    encoder = on_path(encoder, card.config.lora)
    if card.config.lora:
        load_adapter(encoder, folder, ADAPTER)
    head, _ = load_head(folder, card, encoder)
    return LoadedAdapter(card, encoder, head.to(encoder.device))


def check_store(card: Card, features_fingerprint: str, store: Store) -> None:
    """Refuse a store whose features or text embeddings the adapter was not trained on.

    Args:
        features_fingerprint: of the adapter's encoder.

    Raises:
        AdapterError: names which of the two differs.
    """
    for part, made_for, given in (
        ("audio encoder", features_fingerprint, store.encoder_fingerprint),
        ("text encoder", card.text_fingerprint, store.text_fingerprint),
    ):
        if made_for != given:
            raise AdapterError(
                f"adapter {card.trial}: the data was prepared with another {part}; prepare it with the adapter's {part}"
            )
