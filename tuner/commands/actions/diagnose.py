"""`tuner diagnose`: from its options to a request, and the findings on the terminal."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import typer

from tuner.commands.actions.stores import check_audio_root, choose_path, find_store
from tuner.commands.console import progress_bar
from tuner.commands.options import DEMO, DataChoice
from tuner.config import EncoderRef, LoraSpec, TrialConfig
from tuner.data.store import META_FILE, Store
from tuner.demo import audio_encoder_folder
from tuner.diagnose.steps import diagnose
from tuner.diagnose.subject import DiagnoseRequest
from tuner.diagnose.terminal import show
from tuner.encoders.checkpoint import CONFIG_PATTERNS, resolve_folder
from tuner.errors import AdapterError, EncoderError
from tuner.places import absolute_source, is_file
from tuner.space import SearchSpace, load_space
from tuner.train.export import CARD_FILE, read_card

Precision = Literal["auto", "bf16", "fp32"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoraOptions:
    """The LoRA of the command line; an adapter's own takes its place where no targets are named."""

    rank: int
    first_layer: int
    targets: list[str] | None
    placement: str | None

    def trial(self) -> TrialConfig:
        """The configuration.

        Raises:
            ConfigError: a value is out of range.
        """
        names = [name for listed in self.targets or ATTENTION for name in listed.split(",")]
        values = {"dropout": 0.1, "rank": self.rank, "first_layer": self.first_layer, "targets": names}
        if self.placement is not None:
            values["placement"] = self.placement
        return TrialConfig(lora=LoraSpec.parse(values, "tuner diagnose"))


@dataclass(frozen=True)
class Question:
    """The options of `tuner diagnose`, as they were given."""

    encoder: str | None
    data: str | None
    audio_root: Path | None
    space: str | None
    adapter: Path | None
    peft_config: Path | None
    lora: LoraOptions
    path: str | None
    pad_to_30s: bool
    precision: Precision
    trials: int
    epochs: int
    batch_size: int


def diagnose_question(question: Question, json: bool) -> int:
    """Run the seven steps, print what they found, and count the errors.

    Raises:
        TunerError: the options name something that is not there, or contradict each other.
    """
    space = _space(question)
    store, manifest = _data(question)
    check_audio_root(question.audio_root, manifest is not None)
    request = DiagnoseRequest(
        encoder=_encoder(question, store, space),
        trial=_trial(question.adapter, question.lora),
        store=store,
        manifest=manifest,
        audio_root=question.audio_root,
        adapter=question.adapter,
        peft_config=question.peft_config,
        space=space,
        trials=question.trials,
        epochs=question.epochs,
        batch_size=question.batch_size,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress_bar("decoding recordings") as progress:
        diagnosis = diagnose(request, question.precision, device, progress)
    if json:
        typer.echo(jsonlib.dumps(diagnosis.to_dict(), indent=2, allow_nan=False))
    else:
        show(diagnosis, sys.stdout)
    return diagnosis.count("error")


def _space(question: Question) -> SearchSpace | None:
    if question.space is None:
        return None
    space = load_space(question.space)
    return space if question.lora.placement is None else space.with_placement(question.lora.placement)


def _data(question: Question) -> tuple[Store | None, Path | None]:
    """The store, or the manifest as it is: a diagnosis prepares nothing but the demo."""
    if question.data is None:
        return None, None
    if question.data == DEMO:
        choice = DataChoice(DEMO, question.encoder, None, question.pad_to_30s)
        return Store.open(find_store(choice)), None
    path = Path(question.data)
    return (Store.open(path), None) if is_file(path / META_FILE) else (None, path)


def _encoder(question: Question, store: Store | None, space: SearchSpace | None) -> EncoderRef:
    """The encoder named, or that of the data, of the adapter or of the demo, with the path that is to run."""
    adapter, pad = question.adapter, question.pad_to_30s
    if question.encoder is not None:
        reference = EncoderRef(source=absolute_source(question.encoder), pad_to_30s=pad)
    elif store is not None:
        reference = store.encoder
    elif adapter is not None and (adapter / CARD_FILE).is_file():
        reference = read_card(adapter).encoder
    else:
        reference = EncoderRef(source=str(audio_encoder_folder()), pad_to_30s=pad)
    # A name that leads nowhere is a mistake on the command line; a folder that cannot be used is found by step 3.
    resolve_folder(reference.source, CONFIG_PATTERNS)
    if question.path is not None:
        return EncoderRef.parse({**reference.model_dump(), "path": question.path}, "--path")
    try:
        return choose_path(reference, None, space) if space is not None else reference
    except EncoderError:
        return reference


def _trial(adapter: Path | None, lora: LoraOptions) -> TrialConfig:
    """The configuration to train and count: the adapter's own, else the LoRA of the options."""
    if adapter is not None and (adapter / CARD_FILE).is_file() and lora.targets is None:
        config = read_card(adapter).config
        if config.lora is None:
            raise AdapterError(f"{adapter}: the projection alone, without a LoRA to diagnose; use `tuner evaluate`")
        return config
    return lora.trial()
