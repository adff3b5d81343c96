"""`tuner prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.options import AudioRoot


def prepare(
    manifest: Annotated[Path, typer.Argument(help="JSON Lines, CSV, Parquet, or a Hugging Face dataset folder")],
    encoder: Annotated[str, typer.Option(help="audio encoder: hub id, folder, or faster-whisper folder")],
    text_encoder: Annotated[str, typer.Option(help="text encoder: hub id or sentence-transformers folder")],
    out: Annotated[str | None, typer.Option(help="store folder, s3:// or gs://; default: in the cache")] = None,
    pad_to_30s: Annotated[bool, typer.Option("--pad-to-30s", help="the original 30 s window for every clip")] = False,
    split: Annotated[
        str, typer.Option(help="shares of train, validation, test where none are given")
    ] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="of drawn splits")] = 0,
    max_rejects: Annotated[float, typer.Option(help="share of rows that may be unusable")] = 0.01,
    audio_root: AudioRoot = None,
) -> None:
    """Decode recordings, extract features, embed captions: a store that searches read."""
    from tuner.commands.inputs import DataChoice, make_store
    from tuner.data.prepare import PrepareOptions
    from tuner.data.remote import upload_store
    from tuner.storage import Storage, is_uri

    remote = Storage.parse(out) if out is not None and is_uri(out) else None
    options = PrepareOptions(_fractions(split), seed, max_rejects, audio_root)
    choice = DataChoice(str(manifest), encoder, text_encoder, pad_to_30s)
    store = make_store(manifest, choice, Path(out) if out is not None and remote is None else None, options)
    if remote is not None:
        upload_store(store, remote)
    typer.echo(store if remote is None else remote.place)


def _fractions(text: str) -> tuple[float, float, float]:
    from tuner.errors import ConfigError

    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--split {text}: give three shares such as 0.7,0.15,0.15") from None
    return train, validation, test
