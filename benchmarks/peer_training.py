"""What one trial of the peer trains: Whisper by transformers, LoRA by PEFT, every clip padded to 30 s, fp32.

Loss, optimiser, schedule and recall are those of this project, so that both train the same thing; how it is computed is
what the documentation of the libraries shows. `tests/test_benchmarks.py` compares the two.

Shapes: B clips, C mel bins, F frames, T tokens, H encoder width, D width of the text embeddings, M captions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModel,
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
    get_cosine_schedule_with_warmup,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tuner.config import OptimSpec, TrialConfig
from tuner.data.audio import decode, resample
from tuner.encoders import ctranslate2
from tuner.train.retrieval import retrieve

SAMPLING_RATE = 16_000  # Hz
MAX_SECONDS = 30.0
MAX_LOG_SCALE = math.log(100.0)


def read_rows(manifest: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines manifest."""
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def read_captions(manifest: Path) -> list[str]:
    """Distinct captions of a manifest, sorted."""
    return sorted({row["caption"] for row in read_rows(manifest)})


class Recordings(Dataset[tuple[np.ndarray, int]]):
    """Waveform and caption number of each recording of a split, decoded each time."""

    def __init__(self, manifest: Path, split: str, captions: list[str]) -> None:
        self.rows = [row for row in read_rows(manifest) if row["split"] == split]
        self.number = {caption: index for index, caption in enumerate(captions)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        row = self.rows[index]
        return resample(decode(Path(row["audio"]), MAX_SECONDS), SAMPLING_RATE), self.number[row["caption"]]


class Collate:
    """Features of a batch, padded to the encoder's window by its own extractor."""

    def __init__(self, encoder: nn.Module) -> None:
        config: Any = encoder.config
        seconds = 2 * config.max_source_positions // 100
        extractor: Any = WhisperFeatureExtractor
        self.extractor = extractor(feature_size=config.num_mel_bins, chunk_length=seconds)

    def __call__(self, items: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Features BCF, mask of real frames BF, caption numbers B."""
        waveforms, captions = zip(*items, strict=True)
        batch = self.extractor(
            list(waveforms), sampling_rate=SAMPLING_RATE, return_attention_mask=True, return_tensors="pt"
        )
        return batch["input_features"], batch["attention_mask"], torch.tensor(captions)


class ContrastiveModel(nn.Module):
    """LoRA on the encoder, mean over real tokens, linear projection, learnt temperature."""

    def __init__(self, encoder: nn.Module, config: TrialConfig, text_dim: int) -> None:
        super().__init__()
        assert config.lora is not None, "the peer trains LoRA"
        lora = config.lora
        targets = ["out_proj" if name == "o_proj" else name for name in lora.targets]
        spec = peft.LoraConfig(
            r=lora.rank, lora_alpha=int(lora.alpha), lora_dropout=lora.dropout, target_modules=targets
        )
        width: int = encoder.config.d_model  # type: ignore[union-attr, assignment]
        self.encoder = peft.get_peft_model(encoder, spec)
        self.head = nn.Linear(width, text_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.loss.temperature)))

    def forward(self, features_BCF: Tensor, mask_BF: Tensor) -> Tensor:
        """L2-normalised embeddings BD."""
        states_BTH = self.encoder(features_BCF).last_hidden_state
        tokens_B1 = (mask_BF.sum(dim=1, keepdim=True) - 1) // 2 + 1
        real_BT = torch.arange(states_BTH.shape[1]) < tokens_B1
        pooled_BH = (states_BTH * real_BT[:, :, None]).sum(dim=1) / tokens_B1
        return F.normalize(self.head(pooled_BH), dim=-1)

    def lora_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the encoder, in the order of its modules."""
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]


def load_audio_encoder(folder: Path) -> nn.Module:
    """Whisper's encoder of transformers, from a Hugging Face or a faster-whisper folder."""
    path = folder / ctranslate2.FILE_NAME
    if not path.is_file():
        return WhisperModel.from_pretrained(folder).encoder
    encoder = WhisperEncoder(WhisperConfig(**ctranslate2.whisper_config(ctranslate2.read_header(path))))
    arrays = ctranslate2.read_whisper_encoder(path)
    encoder.load_state_dict({name: torch.from_numpy(array).float() for name, array in arrays.items()})
    return encoder


@torch.no_grad()
def embed_captions(folder: Path, captions: list[str]) -> Tensor:
    """L2-normalised mean of the text encoder's tokens, MD."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(captions), 64):
        tokens = tokenizer(captions[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        states_MTD, mask_MT1 = model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
        parts.append(F.normalize((states_MTD * mask_MT1).sum(dim=1) / mask_MT1.sum(dim=1), dim=-1))
    return torch.cat(parts)


def contrastive_loss(model: ContrastiveModel, audio_BD: Tensor, text_MD: Tensor, captions_B: Tensor) -> Tensor:
    """Symmetric InfoNCE; a caption that another clip of the batch has too is no negative of it."""
    logits_BB = audio_BD @ text_MD[captions_B].T * model.log_scale.exp()
    same_BB = (captions_B[:, None] == captions_B) & ~torch.eye(len(captions_B), dtype=torch.bool)
    logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
    labels_B = torch.arange(len(captions_B))
    return (F.cross_entropy(logits_BB, labels_B) + F.cross_entropy(logits_BB.T, labels_B)) / 2


class Training:
    """Model, optimiser and schedule of one trial."""

    def __init__(self, model: ContrastiveModel, optim: OptimSpec, text_MD: Tensor, total_steps: int) -> None:
        self.model, self.text_MD, self.max_norm = model, text_MD, optim.max_grad_norm
        groups: list[dict[str, Any]] = [
            {"params": model.lora_parameters(), "lr": optim.lora_lr, "weight_decay": optim.weight_decay},
            {"params": model.head.parameters(), "lr": optim.head_lr, "weight_decay": optim.weight_decay},
            {"params": [model.log_scale], "lr": optim.head_lr, "weight_decay": 0.0},
        ]
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, round(total_steps * optim.warmup_fraction), total_steps
        )

    def step(self, features_BCF: Tensor, mask_BF: Tensor, captions_B: Tensor) -> float:
        """One optimiser step; returns the loss."""
        loss = contrastive_loss(self.model, self.model(features_BCF, mask_BF), self.text_MD, captions_B)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        with torch.no_grad():
            self.model.log_scale.clamp_(max=MAX_LOG_SCALE)
        return float(loss.detach())

    def epoch(self, loader: DataLoader[Any]) -> float:
        """Mean loss over the batches of one epoch."""
        self.model.train()
        return float(np.mean([self.step(*batch) for batch in loader]))


@torch.no_grad()
def recall_at_10(model: ContrastiveModel, loader: DataLoader[Any], text_MD: Tensor) -> float:
    """Mean of both directions over the clips of the loader and their distinct captions."""
    model.eval()
    batches = [(model(features, mask), captions) for features, mask, captions in loader]
    numbers = torch.cat([captions for _, captions in batches]).numpy()
    gallery, own = np.unique(numbers, return_inverse=True)
    found = retrieve(torch.cat([audio for audio, _ in batches]), text_MD[gallery], list(own[:, None]))
    return found.metrics()["recall@10"]
