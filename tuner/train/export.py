"""A trained adapter as files anybody can load: PEFT's own two, the head, the configuration and a card.

adapter_config.json, adapter_model.safetensors   PEFT, for the encoder tower (absent for the projection alone)
head.safetensors                                 projection, logit scale and bias
trial.yaml                                       what to retrain: `tuner train trial.yaml`
card.json                                        encoders with fingerprints, precision, modules, counts
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from tuner.config import EncoderRef, Precision, RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.encoders.base import AudioEncoder
from tuner.errors import AdapterError
from tuner.lora import adapter as lora_adapter
from tuner.train.losses import ContrastiveLoss
from tuner.train.member import Member
from tuner.train.model import ProjectionHead

CARD_FILE = "card.json"
HEAD_FILE = "head.safetensors"
TRIAL_FILE = "trial.yaml"
FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What an exported adapter was made for; everything that must fit before it is used."""

    trial: str
    encoder: EncoderRef
    encoder_fingerprint: str
    text_encoder: str
    text_fingerprint: str
    text_dim: int
    precision: Precision
    tokens_per_forward: int
    target_modules: tuple[str, ...]
    layers: tuple[int, ...]
    lora_parameters: int
    trainable_parameters: int
    config: TrialConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values for card.json."""
        values = {**asdict(self), "encoder": self.encoder.model_dump(), "config": self.config.model_dump(mode="json")}
        return {"format": FORMAT, **values}


def make_card(member: Member, store: Store, settings: RunSettings, precision: Precision) -> Card:
    """Describe a trained member."""
    placement = member.placement
    return Card(
        trial=member.trial,
        encoder=settings.encoder,
        encoder_fingerprint=member.encoder.spec.fingerprint,
        text_encoder=store.text_encoder,
        text_fingerprint=store.text_fingerprint,
        text_dim=store.text_dim,
        precision=precision,
        tokens_per_forward=settings.tokens_per_forward,
        target_modules=placement.modules if placement else (),
        layers=placement.layers if placement else (),
        lora_parameters=placement.lora_parameters if placement else 0,
        trainable_parameters=member.trainable_parameters,
        config=member.config,
    )


def export_adapter(member: Member, card: Card, settings: RunSettings, folder: Path) -> None:
    """Write the adapter's folder under a temporary name and rename it; an older export of the trial is replaced."""
    staged = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if member.config.lora:
        lora_adapter.save_adapter(member.encoder, member.trial, staged, member.config.lora)
    tensors = {f"head.{name}": tensor for name, tensor in member.head.state_dict().items()}
    tensors |= {f"loss.{name}": tensor for name, tensor in member.loss.state_dict().items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staged / HEAD_FILE)
    retrain = {"trial": member.config.model_dump(mode="json"), "settings": settings.model_dump(mode="json")}
    (staged / TRIAL_FILE).write_text(yaml.safe_dump(retrain, sort_keys=False), encoding="utf-8")
    (staged / CARD_FILE).write_text(json.dumps(card.to_dict(), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staged.replace(folder)


def read_card(folder: Path) -> Card:
    """The card of an exported adapter.

    Raises:
        AdapterError: the folder holds no adapter exported by tuner, or its card is damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: no {CARD_FILE} here; give a folder that `tuner search` wrote under adapters/")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["format"]
        values["encoder"] = EncoderRef.model_validate(values["encoder"])
        values["config"] = TrialConfig.model_validate(values["config"])
        return Card(**{**values, "target_modules": tuple(values["target_modules"]), "layers": tuple(values["layers"])})
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: damaged ({' '.join(str(error).split())}); export the adapter again") from None


def load_head(folder: Path, card: Card, encoder: AudioEncoder) -> tuple[ProjectionHead, ContrastiveLoss]:
    """Head and loss (temperature, bias) of an exported adapter.

    Raises:
        AdapterError: tensors are missing, unexpected or of another shape.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: {HEAD_FILE} is missing; export the adapter again")
    head = ProjectionHead(card.config.head, encoder.spec.hidden_size, card.text_dim)
    loss = ContrastiveLoss(card.config.loss)
    tensors = load_file(path)
    try:
        head.load_state_dict({key.removeprefix("head."): t for key, t in tensors.items() if key.startswith("head.")})
        loss.load_state_dict({key.removeprefix("loss."): t for key, t in tensors.items() if key.startswith("loss.")})
    except RuntimeError as error:
        raise AdapterError(f"{path}: does not fit its card ({' '.join(str(error).split())})") from None
    return head.eval(), loss
