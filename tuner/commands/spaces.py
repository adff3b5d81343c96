"""`tuner spaces`: what can be searched, and what it would cost, before anything trains."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List search spaces and show what is in them.", invoke_without_command=True)


@app.callback()
def list_all(context: typer.Context) -> None:
    """List the spaces."""
    if context.invoked_subcommand is not None:
        return
    from tuner.space import list_spaces

    spaces = list_spaces()
    width = max((len(space.name) for space in spaces), default=0)
    for space in spaces:
        typer.echo(f"{space.name:<{width}}  {space.description}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a space's name, or a YAML file")],
    encoder: Annotated[str | None, typer.Option(help="audio encoder; default: the demo's Whisper tiny.en")] = None,
    text_dim: Annotated[int, typer.Option(help="width of the text embeddings")] = 384,
    placement: Annotated[
        str | None, typer.Option(help="adapt the tower, language_model or both; default: as the space says")
    ] = None,
) -> None:
    """Print each dimension, the number of configurations, and the range of trainable parameters for an encoder."""
    from tuner.commands.inputs import choose_path
    from tuner.config import EncoderRef
    from tuner.demo import audio_encoder_folder
    from tuner.encoders.registry import inspect_encoder
    from tuner.lora.placement import trainable_parameters
    from tuner.space import load_space

    space = load_space(name) if placement is None else load_space(name).with_placement(placement)
    reference = EncoderRef(source=encoder or str(audio_encoder_folder()))
    spec = inspect_encoder(choose_path(reference, None, space))
    if encoder is None and set(space.placements) - {"tower"}:
        # The default is a tower alone; whoever names an encoder is told that it does not fit.
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
