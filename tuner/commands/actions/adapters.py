"""`tuner evaluate`, `tuner embed` and `tuner train`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path

import typer

from tuner.commands.actions.stores import find_store
from tuner.commands.console import progress_bar, say
from tuner.commands.options import DEMO, DataChoice
from tuner.config import EncoderRef, RunSettings
from tuner.data.store import META_FILE, Store
from tuner.errors import AdapterError, Field
from tuner.places import is_file
from tuner.storage import is_uri
from tuner.study.points import Scores
from tuner.train.embed import embed_files, find_recordings
from tuner.train.evaluate import load
from tuner.train.export import TRIAL_FILE, Card, read_card
from tuner.train.results import Metrics, bootstrap
from tuner.train.single import read_trial, train_single


def evaluate_adapter(
    adapter: Path, data: str | None, split: str, encoder: str | None, text_encoder: str | None, json: bool
) -> None:
    """Print what the adapter finds in one split, and in which data.

    Raises:
        AdapterError: there is no adapter, or no data are named and those of its training are not here.
    """
    card = read_card(adapter)
    store = _store(adapter, card, data, encoder, text_encoder)
    loaded = load(adapter, _moved(card, encoder))
    result = loaded.evaluate(store, split)
    metrics, intervals = result.metrics(), bootstrap(result)
    clips, captions = metrics["audio_to_text_N"], metrics["text_to_audio_N"]
    if json:
        values = {
            "adapter": str(adapter),
            "data": str(store.folder),
            "split": split,
            "clips": clips,
            "captions": captions,
            **Scores.of(metrics, intervals).to_values(),
        }
        typer.echo(jsonlib.dumps(values, indent=2))
        return
    typer.echo(f"{'data':<28} {store.folder}")
    typer.echo(f"{'split':<28} {split}: {clips:,.0f} clips, {captions:,.0f} captions")
    typer.echo(_table(metrics, intervals))


def embed_recordings(adapter: Path, audio: Sequence[Path], out: Path, encoder: str | None) -> None:
    """Write a Parquet file with the embedding of each recording, and report those that cannot be used."""
    files = find_recordings(audio)
    loaded = load(adapter, _moved(read_card(adapter), encoder))
    with progress_bar("embedding recordings") as progress:
        written, rejects = embed_files(loaded, files, out, progress)
    for path, reason in rejects:
        say(f"{path}: {reason}; omitted")
    typer.echo(f"{out}: {written} embeddings of width {loaded.card.text_dim}")


def train_again(config: Path, out: Path, data: str | None, epochs: int | None, off_path: str | None) -> None:
    """Train the configuration of a trial.yaml into a new folder; what is not given is as in the file."""
    trial, settings = read_trial(config)
    given = {
        "store": None if data is None else str(find_store(DataChoice(data)).resolve()),
        "epochs": epochs,
        "off_path": off_path,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    settings = RunSettings.parse({**settings.model_dump(), **changes}, "tuner train")
    with progress_bar("training") as progress:
        metrics = train_single(trial, settings, out, progress, say)
    typer.echo(f"{out}: validation recall@10 {metrics['recall@10']:.3f}")


def _store(adapter: Path, card: Card, data: str | None, encoder: str | None, text_encoder: str | None) -> Store:
    """The data to measure on: those named, else those that the adapter was trained on."""
    place = data or _trained_on(adapter)
    # A prepared store holds text embeddings, so the text encoder itself need not be where the card says any more.
    prepared = place != DEMO and (is_uri(place) or is_file(Path(place) / META_FILE))
    text = text_encoder or (None if prepared else card.text_encoder)
    source = encoder or (None if data is None else card.encoder.source)
    return Store.open(find_store(DataChoice(place, source, text, data is not None and card.encoder.pad_to_30s)))


def _trained_on(adapter: Path) -> str:
    file = adapter / TRIAL_FILE
    place = read_trial(file)[1].store
    if not is_uri(place) and not is_file(Path(place) / META_FILE):
        raise AdapterError(
            f"{file}: the data of its training, {place}, are not here; name a store with ", Field("data")
        )
    return place


def _moved(card: Card, encoder: str | None) -> EncoderRef | None:
    """The adapter's encoder in another place, if one is named."""
    return card.encoder.model_copy(update={"source": encoder}) if encoder else None


def _table(metrics: Metrics, intervals: dict[str, tuple[float, float]]) -> str:
    lines = []
    for key, value in metrics.items():
        low_high = "  [{:.4f}, {:.4f}]".format(*intervals[key]) if key in intervals else ""
        lines.append(f"{key:<28} {value:>9.4f}{low_high}" if low_high else f"{key:<28} {value:>9g}")
    return "\n".join(lines)
