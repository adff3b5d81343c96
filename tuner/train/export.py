"""A trained adapter as files that anybody can load: PEFT's own two, the head, the configuration and a card.

adapter_config.json, adapter_model.safetensors   PEFT, for the encoder tower (absent for the projection alone)
head.safetensors                                 projection, logit scale and bias
trial.yaml                                       what to retrain: `tuner train trial.yaml`
card.json                                        encoders with fingerprints, precision, modules, counts
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.config import EncoderRef, Precision, RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.data.writer import new_folder
from tuner.encoders.base import AudioEncoder
from tuner.errors import AdapterError, ConfigError
from tuner.lora import adapter as lora_adapter
from tuner.plain_json import parse_json
from tuner.train.losses import ContrastiveLoss
from tuner.train.member import Member
from tuner.train.model import ProjectionHead

CARD_FILE = "card.json"
HEAD_FILE = "head.safetensors"
TRIAL_FILE = "trial.yaml"
FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What an exported adapter was made for: everything that must match before it is used."""

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
    """Describe a trained member. The encoder's path is the part that this member runs, which is what loading needs."""
    placement = member.placement
    return Card(
        trial=member.trial,
        encoder=settings.encoder.model_copy(update={"path": member.encoder.spec.path}),
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
    """Write the adapter's folder under a temporary name and rename it; an older export of the trial is replaced.

    Raises:
        AdapterError: the disk is full, or the folder cannot be written.
    """
    try:
        with new_folder(folder) as staged:
            _write(member, card, settings, staged)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}: cannot write the adapter ({error}); free disk space there and run the command again"
        ) from None


def _write(member: Member, card: Card, settings: RunSettings, folder: Path) -> None:
    if member.config.lora:
        lora_adapter.save_adapter(member.encoder, member.trial, folder, member.config.lora)
    tensors = nn.ModuleDict({"head": member.head, "loss": member.loss}).state_dict()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / HEAD_FILE)
    settings = settings.model_copy(update={"encoder": card.encoder})
    retrain = {"trial": member.config.model_dump(mode="json"), "settings": settings.model_dump(mode="json")}
    (folder / TRIAL_FILE).write_text(yaml.safe_dump(retrain, sort_keys=False), encoding="utf-8")
    (folder / CARD_FILE).write_text(json.dumps(card.to_dict(), indent=2) + "\n", encoding="utf-8")


def read_card(folder: Path) -> Card:
    """The card of an exported adapter.

    Raises:
        AdapterError: the folder holds no adapter exported by tuner, or its card is damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: has no {CARD_FILE}; give a folder that `tuner search` wrote below adapters/")
    try:
        values = parse_json(path.read_bytes())
        if (found := values.pop("format")) != FORMAT:
            raise AdapterError(f"{path}: has format {found}, this version reads {FORMAT}; export the adapter again")
        values["encoder"] = EncoderRef.parse(values["encoder"], "encoder")
        values["config"] = TrialConfig.parse(values["config"], "config")
        return Card(**{**values, "target_modules": tuple(values["target_modules"]), "layers": tuple(values["layers"])})
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise AdapterError(f"{path}: is damaged ({' '.join(str(error).split())}); export the adapter again") from None


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
    modules = nn.ModuleDict({"head": head, "loss": loss})
    try:
        modules.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise AdapterError(
            f"{path}: does not match {CARD_FILE} ({' '.join(str(error).split())}); export the adapter again"
        ) from None
    return head.eval(), loss
