"""`tuner spaces show`."""

from __future__ import annotations

import typer

from tuner.commands.actions.stores import choose_path
from tuner.config import EncoderRef
from tuner.demo import audio_encoder_folder
from tuner.encoders.registry import inspect_encoder
from tuner.lora.placement import trainable_parameters
from tuner.space import SearchSpace


def show_space(space: SearchSpace, encoder: str | None, text_dim: int) -> None:
    """Print dimensions, number of configurations and range of trainable parameters for an encoder."""
    reference = EncoderRef(source=encoder or str(audio_encoder_folder()))
    spec = inspect_encoder(choose_path(reference, None, space))
    if encoder is None and set(space.placements) - {"tower"}:
        # The default is a tower alone; for an encoder that the user names, a misfit is reported.
        sizes = "name with --encoder a model that has a language model"
    else:
        smallest, largest = space.parameter_range(lambda config: trainable_parameters(spec, config, text_dim))
        sizes = f"{smallest:,} to {largest:,} (text embeddings of width {text_dim})"
    size = space.size()
    grid = f"{space.size(countable_only=True):,}"
    typer.echo(space.to_yaml())
    typer.echo(f"configurations:        {grid if size is not None else f'{grid} times the continuous dimensions'}")
    typer.echo(f"encoder:               {spec.family}, {spec.shape}")
    typer.echo(f"trainable parameters:  {sizes}")
