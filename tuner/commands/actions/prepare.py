"""`tuner prepare`."""

from __future__ import annotations

from pathlib import Path

import typer

from tuner.commands.actions.stores import make_store
from tuner.commands.options import DataChoice
from tuner.commands.paths import check_output_folder
from tuner.data.prepare import PrepareOptions
from tuner.data.remote import upload_store
from tuner.storage import Storage, is_uri


def prepare_manifest(
    manifest: Path,
    choice: DataChoice,
    out: str | None,
    shares: tuple[float, float, float],
    seed: int,
    max_rejects: float,
) -> None:
    """Prepare a manifest into a folder, a bucket or the cache, and print where the store is.

    Args:
        shares: of train, validation and test, where splits are drawn.
        seed: of that.
        max_rejects: share of rows that may be unusable.
    """
    options = PrepareOptions(shares, seed, max_rejects, choice.audio_root)
    if out is None or not is_uri(out):
        if out is not None:
            check_output_folder("out", Path(out))
        typer.echo(make_store(manifest, choice, None if out is None else Path(out), options))
        return
    remote = Storage.parse(out)
    upload_store(make_store(manifest, choice, None, options), remote)
    typer.echo(remote.place)
