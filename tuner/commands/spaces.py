"""`tuner spaces`: what can be searched, and what it would cost, before anything trains."""

from __future__ import annotations

from typing import Annotated

import typer

from tuner.commands.lazy import Command
from tuner.space import list_spaces, load_space

app = typer.Typer(help="List search spaces and show what is in them.", invoke_without_command=True)


@app.callback()
def list_all(context: typer.Context) -> None:
    """List the spaces."""
    if context.invoked_subcommand is not None:
        return
    spaces = list_spaces()
    width = max((len(space.name) for space in spaces), default=0)
    for space in spaces:
        typer.echo(f"{space.name:<{width}}  {space.description}")


@app.command(cls=Command)
def show(
    name: Annotated[str, typer.Argument(help="a space's name, or a YAML file")],
    encoder: Annotated[str | None, typer.Option(help="audio encoder; default: the demo's Whisper tiny.en")] = None,
    text_dim: Annotated[int, typer.Option(help="width of the text embeddings")] = 384,
    placement: Annotated[
        str | None, typer.Option(help="adapt the tower, language_model or both; default: as the space says")
    ] = None,
) -> None:
    """Print each dimension, the number of configurations, and the range of trainable parameters for an encoder."""
    space = load_space(name) if placement is None else load_space(name).with_placement(placement)
    from tuner.commands.actions.spaces import show_space

    show_space(space, encoder, text_dim)
