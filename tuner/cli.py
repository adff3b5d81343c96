"""`tuner`: the command line. Turns every error a user can cause into one sentence and exit code 2."""

from __future__ import annotations

import errno
from typing import Annotated

import typer

from tuner import __version__
from tuner.commands import crash
from tuner.commands.console import FAILED, INTERRUPTED, fail
from tuner.commands.lazy import Entry, lazy_group
from tuner.errors import TunerError, disk_reason, first_line

LONGEST_SHOWN = 300  # characters of a place in a message

COMMANDS = {
    "prepare": Entry("prepare:prepare", "Decode recordings, extract features, embed captions: a store for searches."),
    "search": Entry("search:search", "Search LoRA configurations: recall against trainable parameters."),
    "report": Entry("report:report", "Write the report page of a study, or serve it while the search runs."),
    "export": Entry("report:export", "Write the adapters of a front into a folder, each with a card and checksums."),
    "send": Entry("report:send", "Print files of a study as lines of text.", hidden=True),
    "studies": Entry("studies:studies", "List the searches of a cluster, the latest first."),
    "status": Entry("studies:status", "Show how far a search on a cluster is, and its front so far."),
    "logs": Entry("studies:logs", "Follow a search on a cluster from its first event to its end."),
    "stop": Entry("studies:stop", "End a search on a cluster; `tuner search --resume` goes on."),
    "diagnose": Entry("diagnose:diagnose", "Check machine, data, encoder and LoRA in seven steps, before training."),
    "train": Entry("adapters:train", "Train one configuration again, without Ray, and export it."),
    "evaluate": Entry("adapters:evaluate", "Measure an exported adapter: retrieval on one split."),
    "embed": Entry("adapters:embed", "Write embeddings of new recordings."),
    "spaces": Entry("spaces:app", "List search spaces and show what is in them."),
    "cluster": Entry("cluster:app", "Check files that bring up a cluster; monitor one; leave spot machines in time."),
}

app = typer.Typer(
    name="tuner",
    help="Search LoRA configurations for audio encoders: recall against trainable parameters.",
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Entry point of the `tuner` command."""
    try:
        app(standalone_mode=True)
    except TunerError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except Exception as error:
        _fail_unexpectedly(error)


def _fail_unexpectedly(error: Exception) -> None:
    """One sentence for what no command has foreseen: about a place that cannot be used, or where the traceback is."""
    if crash.debugging():
        crash.show_traceback(error)
    reason = disk_reason(error) if isinstance(error, OSError) else None
    if isinstance(error, OSError) and reason:
        place = " ".join(str(error.filename or error.strerror or "a file").split())
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        again = ", then run the same command again (a search: with --resume)" if full else ""
        fail(f"{place if len(place) < LONGEST_SHOWN else place[:LONGEST_SHOWN] + '...'}: {reason}{again}", FAILED)
    log = crash.write_log(error)
    where = f"the traceback is in {log}" if log else f"set {crash.DEBUG}=1 to see the traceback"
    fail(f"unexpected error, {first_line(error)}; {where}", crash.BUG)


if __name__ == "__main__":
    main()
