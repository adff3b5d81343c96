"""`tuner diagnose`: what would go wrong, before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tuner.commands.options import DEMO, AudioRoot
from tuner.commands.paths import check_input
from tuner.errors import AdapterError, ConfigError, DataError, Field
from tuner.places import exists, is_folder

PRECISIONS: dict[str, Literal["auto", "bf16", "fp32"]] = {"auto": "auto", "bf16": "bf16", "fp32": "fp32"}
LARGEST = 999_999_999  # of every count, as in `tuner search`
FOUND_ERRORS = 1  # exit code; 2 is what every command answers to input that it cannot read


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
    rank: Annotated[int, typer.Option(min=1, max=LARGEST, help="of this LoRA")] = 16,
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
    trials: Annotated[int, typer.Option(min=1, max=LARGEST, help="of the search whose cost is estimated")] = 7,
    epochs: Annotated[int, typer.Option(min=1, max=LARGEST, help="likewise")] = 3,
    batch_size: Annotated[int, typer.Option(min=2, max=LARGEST, help="likewise")] = 64,
    json: Annotated[bool, typer.Option("--json", help="all findings and values as JSON")] = False,
) -> None:
    """Check machine, data, encoder and LoRA in seven steps; exit code 1 when one of them found an error."""
    if precision not in PRECISIONS:
        raise ConfigError(Field("precision"), f" {precision}: give {', '.join(PRECISIONS)}")
    if adapter is not None and not is_folder(adapter):
        raise AdapterError(f"{adapter}: no such folder; give the folder of an adapter")
    if data is not None and data != DEMO and not exists(Path(data)):
        raise DataError(f"{data}: no such manifest or store; give an existing one, or 'demo'")
    if peft_config is not None:
        check_input("peft_config", peft_config)
    from tuner.commands.actions.diagnose import LoraOptions, Question, diagnose_question

    lora = LoraOptions(rank, first_layer, targets, placement)
    question = Question(
        encoder=encoder,
        data=data,
        audio_root=audio_root,
        space=space,
        adapter=adapter,
        peft_config=peft_config,
        lora=lora,
        path=path,
        pad_to_30s=pad_to_30s,
        precision=PRECISIONS[precision],
        trials=trials,
        epochs=epochs,
        batch_size=batch_size,
    )
    if diagnose_question(question, json):
        raise typer.Exit(FOUND_ERRORS)
