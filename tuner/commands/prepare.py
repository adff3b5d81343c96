"""`tuner prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.options import AudioRoot, DataChoice
from tuner.commands.paths import check_input
from tuner.errors import ConfigError, Field


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
    """Decode recordings, extract features, embed captions: a store for searches."""
    check_input("manifest", manifest)
    shares = _shares(split)
    choice = DataChoice(str(manifest), encoder, text_encoder, pad_to_30s, audio_root)
    from tuner.commands.actions.prepare import prepare_manifest

    prepare_manifest(manifest, choice, out, shares, seed, max_rejects)


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(Field("split"), f" {text}: give three shares such as 0.7,0.15,0.15") from None
    return train, validation, test
