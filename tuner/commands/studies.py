"""`tuner studies`, `status`, `logs`, `stop`: searches on a cluster, from a laptop that may be closed meanwhile."""

from __future__ import annotations

from typing import Annotated

import typer

Study = Annotated[str, typer.Argument(help="name of the study")]
Address = Annotated[
    str, typer.Option(envvar="TUNER_ADDRESS", help="the head's dashboard, such as http://127.0.0.1:8265")
]
Json = Annotated[bool, typer.Option("--json", help="events as JSON lines")]


def studies(address: Address) -> None:
    """List the searches of a cluster, the latest first."""
    from tuner.commands.actions.jobs import list_studies

    list_studies(address)


def status(study: Study, address: Address) -> None:
    """Show how far a search is, which trials failed and why, and its front so far."""
    from tuner.commands.actions.jobs import show_status

    show_status(study, address)


def logs(study: Study, address: Address, json: Json = False) -> None:
    """Follow a search from its first event to its end, wherever it was started."""
    from tuner.commands.actions.jobs import follow_logs

    follow_logs(study, address, json)


def stop(study: Study, address: Address) -> None:
    """End a search; what it has trained is kept, and `tuner search --resume` goes on."""
    from tuner.commands.actions.jobs import stop_study

    stop_study(study, address)
