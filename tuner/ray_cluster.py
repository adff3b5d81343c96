"""Which Ray a command uses, and joining a cluster: a wrong address, or one where nobody answers, is one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tuner.errors import ClusterError
from tuner.ray_start import forbid_auto_init, held_stderr, short_reason

ADDRESS_VARIABLE = "RAY_ADDRESS"
# For a head to answer one small question. Ray itself asks a head that has gone for more than five minutes.
ANSWER_SECONDS = 10.0


def cluster_address(address: str | None = None) -> str | None:
    """The cluster that a command joins: the one of `--address`, else that of RAY_ADDRESS; None: Ray is started inside
    this process, for this command alone.

    All commands follow RAY_ADDRESS, since it is Ray's own convention: Ray sets it for what it runs as a job, which is
    to use the cluster, and a `search` that ignored it would train on one machine the data that its `prepare` spread
    over a cluster. Nothing else makes a command join what it did not start: without the variable, a Ray that happens to
    run on this machine is left alone.

    Args:
        address: what `--address` says.
    """
    named = os.environ.get(ADDRESS_VARIABLE)
    # As Ray does: auto is what the variable says, where there is one.
    found = named if named and address in (None, "auto") else address
    return None if found == "local" else found


@contextmanager
def joined_ray(address: str, **options: Any) -> Iterator[Any]:
    """Connect to a cluster until the block ends, and yield Ray's context; `options` are those of `ray.init`.

    Args:
        address: host:port of a head, or auto.

    Raises:
        ClusterError: it is of another kind, nobody answers there, or the cluster cannot be joined.
    """
    import ray

    address = cluster_address(address) or address
    named, remedy = _named(address)
    if "://" in address:
        raise ClusterError(
            f"{named}: a driver joins a cluster by host:port of its head, such as 10.0.0.1:6379 (http:// is for jobs, "
            f"ray:// for clients); {remedy}"
        )
    forbid_auto_init()
    try:
        with held_stderr("success"):
            _check_answer(named, address, remedy)
            context = ray.init(address, **options)
    except ClusterError:
        raise
    except Exception as error:
        ray.shutdown()
        raise ClusterError(f"{named}: the Ray cluster cannot be joined ({short_reason(error)}); {remedy}") from error
    try:
        yield context
    finally:
        ray.shutdown()


def _named(address: str) -> tuple[str, str]:
    """Who has named the address, and what to do where it is wrong."""
    if address == os.environ.get(ADDRESS_VARIABLE):
        return f"{ADDRESS_VARIABLE} {address}", f"correct {ADDRESS_VARIABLE}, or unset it to use this machine alone"
    return f"--address {address}", "correct it, or start a cluster with `ray up` or `ray start`"


def _check_answer(named: str, address: str, remedy: str) -> None:
    """Ask the head whether it is alive, as Ray would find it.

    Raises:
        ClusterError: no head of Ray answers there.
        ConnectionError, ValueError: there is no Ray on this machine (auto), or the address has no port.
    """
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address

    # None where RAY_ADDRESS is local, and a cluster is asked for.
    head = canonicalize_bootstrap_address(address) or address
    # No proxy of the environment: Ray takes none either.
    with init_grpc_channel(head, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            # It asks for a token, which Ray looks for when it connects.
            if code is not grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(f"{named}: no Ray cluster answers there ({code.name}); {remedy}") from error
