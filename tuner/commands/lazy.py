"""The commands as a table: the module of a command is imported when the command is called, not to list it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer.main
from typer.core import TyperCommand, TyperGroup

from tuner.errors import ConfigError, TunerError

if TYPE_CHECKING:
    # Typer has its own copy of click and does not export these types.
    from typer._click import Command as AnyCommand
    from typer._click import Context


@dataclass(frozen=True)
class Entry:
    """One command.

    Attributes:
        where: module below `tuner.commands`, and in it a function or a Typer app of several commands.
        help: the line in the list of commands.
    """

    where: str
    help: str
    hidden: bool = False


class Command(TyperCommand):
    """A command whose errors name its options where those of the rooms below name fields."""

    def make_context(  # type: ignore[explicit-any]  # as Click has it
        self, info_name: str | None, args: list[str], parent: Context | None = None, **extra: Any
    ) -> Context:
        """Parse the words of a command line; an empty one, or one that is no text, means nothing to any command."""
        for before, word in zip([info_name or "", *args], args, strict=False):
            if not word.isascii() and any("\ud800" <= sign <= "\udfff" for sign in word):
                shown = word[:60].encode("ascii", "backslashreplace").decode()
                raise ConfigError(f"{shown}: is not UTF-8; rename it, or give another value")
            option, _, value = word.partition("=")
            if word == "" or (option.startswith("--") and not value and "=" in word):
                name = before if word == "" and before.startswith("--") else option or "an argument"
                raise ConfigError(f"{name}: is empty; give a value or omit it")
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Context) -> object:
        """Run it."""
        with options_named(self):
            return super().invoke(ctx)


@contextmanager
def options_named(command: AnyCommand) -> Iterator[None]:
    """Let errors show `max_gpus` as `--max-gpus`, if the command has that option."""
    try:
        yield
    except TunerError as error:
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        error.name_fields({parameter.name: parameter.opts[0] for parameter in options if parameter.name})
        raise


class LazyCommands(Mapping[str, "AnyCommand"]):
    """Commands by name, in the order of the table."""

    def __init__(self, table: Mapping[str, Entry]) -> None:
        self.table = table
        self._loaded: dict[str, AnyCommand] = {}

    def __getitem__(self, name: str) -> AnyCommand:
        if name not in self._loaded:
            self._loaded[name] = _load(name, self.table[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


class LazyGroup(TyperGroup):
    """A group that lists its commands without importing them."""

    table: Mapping[str, Entry] = {}

    def __init__(self, **attributes: Any) -> None:  # type: ignore[explicit-any]  # as Typer has it
        super().__init__(**attributes)
        self.commands = LazyCommands(self.table)  # type: ignore[assignment]

    def list_commands(self, ctx: Context) -> list[str]:
        """Names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: Context, cmd_name: str) -> AnyCommand | None:
        """A command as a list shows it: its name and its line."""
        entry = self.table.get(cmd_name)
        return TyperCommand(cmd_name, help=entry.help, hidden=entry.hidden) if entry else None

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, AnyCommand | None, list[str]]:
        """The command itself, to be run or to show its own help."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, self.commands[name] if name and listed else None, rest


def lazy_group(table: Mapping[str, Entry]) -> type[LazyGroup]:
    """The group of a table, for `typer.Typer(cls=...)`."""
    return type("TableGroup", (LazyGroup,), {"table": table})


def _load(name: str, entry: Entry) -> AnyCommand:
    module, _, attribute = entry.where.partition(":")
    target = getattr(importlib.import_module(f"tuner.commands.{module}"), attribute)
    if isinstance(target, typer.Typer):
        app = target
    else:
        app = typer.Typer(add_completion=False)
        app.command(name, cls=Command, hidden=entry.hidden)(target)
    command = typer.main.get_command(app)
    command.name = name
    return command
