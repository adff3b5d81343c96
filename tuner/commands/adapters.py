"""`tuner evaluate`, `tuner embed` and `tuner train`: one adapter at a time, without Ray."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="folder of an exported adapter")],
    data: Annotated[str, typer.Option(help="manifest, prepared store, or 'demo'")] = "demo",
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    encoder: Annotated[str | None, typer.Option(help="where the encoder is now, if not where the card says")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="likewise, to prepare a manifest")] = None,
    json: Annotated[bool, typer.Option("--json", help="metrics with intervals as JSON")] = False,
) -> None:
    """Load an adapter with plain PEFT into a fresh encoder and measure retrieval on one split."""
    from tuner.commands.inputs import DataChoice, find_store
    from tuner.data.store import META_FILE, Store
    from tuner.study.points import Scores
    from tuner.train.evaluate import load
    from tuner.train.export import read_card
    from tuner.train.results import bootstrap

    card = read_card(adapter)
    pad = card.encoder.pad_to_30s
    # A prepared store holds text embeddings, so the text encoder itself need not be where the card says any more.
    text = text_encoder or (None if (Path(data) / META_FILE).is_file() else card.text_encoder)
    store = Store.open(find_store(DataChoice(data, encoder or card.encoder.source, text, pad)))
    loaded = load(adapter, card.encoder.model_copy(update={"source": encoder}) if encoder else None)
    result = loaded.evaluate(store, split)
    metrics, intervals = result.metrics(), bootstrap(result)
    if json:
        values = {"adapter": str(adapter), "split": split, **Scores.of(metrics, intervals).to_values()}
        typer.echo(jsonlib.dumps(values, indent=2))
    else:
        typer.echo(_table(metrics, intervals))


def embed(
    adapter: Annotated[Path, typer.Argument(help="folder of an exported adapter")],
    audio: Annotated[list[Path], typer.Argument(help="recordings, or folders of them")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: path, seconds, embedding")],
    encoder: Annotated[str | None, typer.Option(help="where the encoder is now, if not where the card says")] = None,
) -> None:
    """Write embeddings of new recordings; compare them with the text encoder's by dot product."""
    from tuner.commands.inputs import progress_bar, say
    from tuner.train.embed import embed_files, find_recordings
    from tuner.train.evaluate import load
    from tuner.train.export import read_card

    files = find_recordings(audio)
    made_for = read_card(adapter).encoder
    loaded = load(adapter, made_for.model_copy(update={"source": encoder}) if encoder else None)
    with progress_bar("embedding recordings") as progress:
        written, rejects = embed_files(loaded, files, out, progress)
    for path, reason in rejects:
        say(f"{path}: {reason}; left out")
    typer.echo(f"{out}: {written} embeddings of width {loaded.card.text_dim}")


def train(
    config: Annotated[Path, typer.Argument(help="trial.yaml of an exported adapter")],
    out: Annotated[Path, typer.Option(help="folder of the adapter to write")],
    data: Annotated[str | None, typer.Option(help="manifest or prepared store; default: the one in the file")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: as in the file")] = None,
    off_path: Annotated[
        str | None,
        typer.Option(help="modules that the embedding does not depend on: refuse or warn; default: as in the file"),
    ] = None,
) -> None:
    """Train one configuration again, without Ray, and export it."""
    from tuner.commands.inputs import DataChoice, find_store, progress_bar, say
    from tuner.config import RunSettings
    from tuner.train.single import read_trial, train_single

    trial, settings = read_trial(config)
    changes: dict[str, Any] = {"epochs": epochs} if epochs else {}
    if data is not None:
        changes["store"] = str(find_store(DataChoice(data)).resolve())
    if off_path is not None:
        changes["off_path"] = off_path
    settings = RunSettings.parse({**settings.model_dump(), **changes}, "tuner train")
    with progress_bar("training") as progress:
        metrics = train_single(trial, settings, out, progress, say)
    typer.echo(f"{out}: validation recall@10 {metrics['recall@10']:.3f}")


def _table(metrics: dict[str, float], intervals: dict[str, tuple[float, float]]) -> str:
    lines = []
    for key, value in metrics.items():
        low_high = "  [{:.4f}, {:.4f}]".format(*intervals[key]) if key in intervals else ""
        lines.append(f"{key:<28} {value:>9.4f}{low_high}" if low_high else f"{key:<28} {value:>9g}")
    return "\n".join(lines)
