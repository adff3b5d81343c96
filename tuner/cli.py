"""`tuner`: the command line. Turns every error a user can cause into one sentence and exit code 2."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer

from tuner.commands import adapters, cluster, diagnose, prepare, report, search, spaces, studies
from tuner.commands.options import INTERRUPTED
from tuner.errors import TunerError
from tuner.redact import printable

app = typer.Typer(
    name="tuner",
    help="Search LoRA configurations for audio encoders: recall against trainable parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(prepare.prepare)
app.command()(search.search)
app.command()(report.report)
app.command()(report.export)
app.command(hidden=True)(report.send)
app.command()(studies.studies)
app.command()(studies.status)
app.command()(studies.logs)
app.command()(studies.stop)
app.add_typer(spaces.app, name="spaces")
app.add_typer(cluster.app, name="cluster")
app.command()(diagnose.diagnose)
app.command()(adapters.train)
app.command()(adapters.evaluate)
app.command()(adapters.embed)


def main() -> None:
    """Entry point of the `tuner` command."""
    try:
        app(standalone_mode=True)
    except TunerError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "the disk"
        _fail(f"{place}: no space left; free some and run the same command again (a search: with --resume)", 2)


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"tuner: {printable(message)}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main()
