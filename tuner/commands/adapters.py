"""`tuner evaluate`, `tuner embed` and `tuner train`: one adapter at a time, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.paths import check_input, check_output_file, check_output_folder


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="folder of an exported adapter")],
    data: Annotated[
        str | None, typer.Option(help="manifest, prepared store, or 'demo'; default: the store it was trained on")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    encoder: Annotated[str | None, typer.Option(help="where the encoder is now, if not where the card says")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="likewise, to prepare a manifest")] = None,
    json: Annotated[bool, typer.Option("--json", help="metrics with intervals as JSON")] = False,
) -> None:
    """Load an adapter with plain PEFT into a fresh encoder and measure retrieval on one split."""
    check_input("adapter", adapter)
    from tuner.commands.actions.adapters import evaluate_adapter

    evaluate_adapter(adapter, data, split, encoder, text_encoder, json)


def embed(
    adapter: Annotated[Path, typer.Argument(help="folder of an exported adapter")],
    audio: Annotated[list[Path], typer.Argument(help="recordings, or folders of them")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: path, seconds, embedding")],
    encoder: Annotated[str | None, typer.Option(help="where the encoder is now, if not where the card says")] = None,
) -> None:
    """Write embeddings of new recordings; compare them with the text encoder's by dot product."""
    check_input("adapter", adapter)
    for recording in audio:
        check_input("audio", recording)
    check_output_file("out", out)
    from tuner.commands.actions.adapters import embed_recordings

    embed_recordings(adapter, audio, out, encoder)


def train(
    config: Annotated[Path, typer.Argument(help="trial.yaml of an exported adapter")],
    out: Annotated[Path, typer.Option(help="folder of the adapter to write")],
    data: Annotated[str | None, typer.Option(help="manifest or prepared store; default: the one in the file")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=999_999_999, help="default: as in the file")] = None,
    off_path: Annotated[
        str | None,
        typer.Option(help="modules that the embedding does not depend on: refuse or warn; default: as in the file"),
    ] = None,
) -> None:
    """Train one configuration again, without Ray, and export it."""
    check_input("config", config)
    check_output_folder("out", out)
    from tuner.commands.actions.adapters import train_again

    train_again(config, out, data, epochs, off_path)
