"""`tuner diagnose`: what would go wrong, before anything trains."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.commands.options import AudioRoot

if TYPE_CHECKING:
    from tuner.config import EncoderRef, TrialConfig
    from tuner.data.store import Store
    from tuner.diagnose.findings import Diagnosis
    from tuner.space import SearchSpace

FOUND_ERRORS = 1  # exit code; 2 is what every command answers to input that it cannot read
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def diagnose(
    encoder: Annotated[
        str | None, typer.Option(help="audio encoder; default: the data's, the adapter's, else the demo's")
    ] = None,
    data: Annotated[str | None, typer.Option(help="manifest, prepared store, or 'demo'; default: tones")] = None,
    audio_root: AudioRoot = None,
    space: Annotated[str | None, typer.Option(help="a search space to check and to count")] = None,
    adapter: Annotated[Path | None, typer.Option(help="an adapter's folder, of tuner or of PEFT alone")] = None,
    peft_config: Annotated[Path | None, typer.Option(help="an adapter_config.json to judge by the whole model")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="layers of a LoRA to try; repeat for several")] = None,
    rank: Annotated[int, typer.Option(min=1, help="of this LoRA")] = 16,
    first_layer: Annotated[int, typer.Option(help="its first block; negative counts from the top")] = 0,
    placement: Annotated[
        str | None,
        typer.Option(help="adapt the tower, language_model or both; default: the tower, or as the space says"),
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="audio_tower or full_forward; default: what the space needs, else audio_tower")
    ] = None,
    pad_to_30s: Annotated[bool, typer.Option("--pad-to-30s", help="the original 30 s window for every clip")] = False,
    precision: Annotated[
        str, typer.Option(help="of the frozen encoder: auto (fp32 if it fits), bf16 or fp32")
    ] = "auto",
    trials: Annotated[int, typer.Option(min=1, help="of the search whose cost is told")] = 7,
    epochs: Annotated[int, typer.Option(min=1, help="likewise")] = 3,
    batch_size: Annotated[int, typer.Option(min=2, help="likewise")] = 64,
    json: Annotated[bool, typer.Option("--json", help="all findings and values as JSON")] = False,
) -> None:
    """Check machine, data, encoder and LoRA in seven steps; exit code 1 when one of them found an error."""
    from tuner.commands.inputs import check_audio_root, progress_bar
    from tuner.diagnose.steps import diagnose as run_steps
    from tuner.diagnose.subject import DiagnoseRequest
    from tuner.errors import ConfigError

    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"--precision {precision}: give auto, bf16 or fp32")
    loaded = _space(space, placement)
    store, manifest = _data(data, encoder, pad_to_30s)
    check_audio_root(audio_root, manifest is not None)
    reference = _encoder(encoder, store, adapter, loaded, path, pad_to_30s)
    request = DiagnoseRequest(
        encoder=reference,
        trial=_trial(adapter, {"rank": rank, "first_layer": first_layer, "targets": targets, "placement": placement}),
        store=store,
        manifest=manifest,
        audio_root=audio_root,
        adapter=adapter,
        peft_config=peft_config,
        space=loaded,
        trials=trials,
        epochs=epochs,
        batch_size=batch_size,
    )
    with progress_bar("decoding recordings") as progress:
        diagnosis = run_steps(request, precision, _device(), progress)  # type: ignore[arg-type]
    _tell(diagnosis, json)
    if diagnosis.count("error"):
        raise typer.Exit(FOUND_ERRORS)


def _tell(diagnosis: Diagnosis, json: bool) -> None:
    if json:
        typer.echo(jsonlib.dumps(diagnosis.to_dict(), indent=2, allow_nan=False))
        return
    from tuner.diagnose.terminal import show

    show(diagnosis, sys.stdout)


def _space(name: str | None, placement: str | None) -> SearchSpace | None:
    from tuner.space import load_space

    if name is None:
        return None
    space = load_space(name)
    return space if placement is None else space.with_placement(placement)


def _data(data: str | None, encoder: str | None, pad_to_30s: bool) -> tuple[Store | None, Path | None]:
    """The store, or the manifest as it is: a diagnosis prepares nothing but the demo."""
    from tuner.commands.inputs import DEMO, DataChoice, find_store
    from tuner.data.store import META_FILE, Store
    from tuner.errors import DataError

    if data is None:
        return None, None
    if data == DEMO:
        return Store.open(find_store(DataChoice(DEMO, encoder, None, pad_to_30s))), None
    path = Path(data)
    if not path.exists():
        raise DataError(f"{data}: no such manifest or store; give an existing one, or 'demo'")
    return (Store.open(path), None) if (path / META_FILE).is_file() else (None, path)


def _encoder(
    source: str | None,
    store: Store | None,
    adapter: Path | None,
    space: SearchSpace | None,
    path: str | None,
    pad_to_30s: bool,
) -> EncoderRef:
    """The encoder named, or that of the data, of the adapter or of the demo, with the path that is to run."""
    from tuner.commands.inputs import choose_path
    from tuner.config import EncoderRef
    from tuner.demo import audio_encoder_folder
    from tuner.encoders.checkpoint import CONFIG_PATTERNS, resolve_folder
    from tuner.errors import EncoderError
    from tuner.train.export import CARD_FILE, read_card

    if source is not None:
        reference = EncoderRef(source=source, pad_to_30s=pad_to_30s)
    elif store is not None:
        reference = store.encoder
    elif adapter is not None and (adapter / CARD_FILE).is_file():
        reference = read_card(adapter).encoder
    else:
        reference = EncoderRef(source=str(audio_encoder_folder()), pad_to_30s=pad_to_30s)
    # A name that leads nowhere is a mistake on the command line; a folder that cannot be used is found by step 3.
    resolve_folder(reference.source, CONFIG_PATTERNS)
    if path is not None:
        return EncoderRef.parse({**reference.model_dump(), "path": path}, "--path")
    try:
        return choose_path(reference, None, space) if space is not None else reference
    except EncoderError:
        return reference


def _trial(adapter: Path | None, options: dict[str, Any]) -> TrialConfig:
    """The configuration to train and count: the adapter's own, else the LoRA of the options."""
    from tuner.config import LoraSpec, TrialConfig
    from tuner.errors import AdapterError
    from tuner.train.export import CARD_FILE, read_card

    given = {name: value for name, value in options.items() if value is not None}
    if adapter is not None and not adapter.is_dir():
        raise AdapterError(f"{adapter}: no such folder; give the folder of an adapter")
    if adapter is not None and (adapter / CARD_FILE).is_file() and "targets" not in given:
        config = read_card(adapter).config
        if config.lora is None:
            raise AdapterError(f"{adapter}: the projection alone, without a LoRA to diagnose; use `tuner evaluate`")
        return config
    names = [name for listed in given.pop("targets", ATTENTION) for name in listed.split(",")]
    return TrialConfig(lora=LoraSpec.parse({"dropout": 0.1, **given, "targets": names}, "tuner diagnose"))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
