"""Ray for this machine and this user alone: embedded in this process, on loopback, behind a token, in a private folder.

Ray runs what it is sent, so whoever comes between its processes runs programs as its user.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tuner.errors import ConfigError
from tuner.leftovers import end_leftovers, end_own, lives
from tuner.ray_start import forbid_auto_init, start_patiently

FOLDER_VARIABLE = "RAY_TMPDIR"
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# A process of this machine that ends closes its connections. One that only does not answer is stopped (a suspended
# terminal, a debugger) or waits for its turn; Ray would cut it off after half a minute, and end what it has asked for.
PATIENT = {f"RAY_{side}_keepalive_time_ms": str(24 * 3600 * 1000) for side in ("grpc", "grpc_client")}
# For workers to end after their raylet; they take some tenths of a second.
END_SECONDS = 3.0
# Paths of sockets may have 107 bytes (macOS: 103). Ray's names in the folder of its own that embedded Rays share:
# /ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead
FOLDER_BYTES = 103 - 75
SHORT_TEMPORARY = Path("/tmp")
# Of a user's home: where Ray, and whoever calls a cluster, looks for the token unless the environment has it.
TOKEN_FILE = ".ray/auth_token"


@contextmanager
def embedded_ray(**options: Any) -> Iterator[Any]:
    """Run Ray inside this process until the block ends, and yield its context; `options` are those of `ray.init`.

    Never joins a cluster, no matter what runs on this machine; `ray_cluster.cluster_address` finds out whether one is
    named. Who connects needs its token: one that only its own processes know, or with a dashboard, where somebody
    has to type it, the user's. What the user has set in RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
    RAY_TMPDIR is left as it is. From then on, no call of Ray starts another one (`ray_start.forbid_auto_init`).
    What a killed process of this user has left running of such a Ray is ended first.

    Raises:
        ConfigError: the user's token or Ray's folder cannot be kept from other users.
        ClusterError: Ray does not start.
    """
    import ray

    forbid_auto_init()
    try:
        with environment(_authentication(bool(options.get("include_dashboard"))) | PATIENT):
            _read_authentication()
            folder = _ray_folder()
            if not os.environ.get(FOLDER_VARIABLE):
                options = {"_temp_dir": str(folder)} | options
                end_leftovers(folder)
            context = start_patiently(lambda: _start(options), folder)
        yield context
    finally:
        workers = _workers()
        ray.shutdown()
        _see_off(workers)
        # Where Ray asks for a token anyway, a thread of its own that ends late would end this process without one.
        if AUTH_MODE not in os.environ:
            _read_authentication()


def abandon_ray() -> None:
    """End what runs of this process's own Ray, which cannot end it any more because a server has gone, or does not
    answer."""
    with suppress(ConfigError):
        end_own(_ray_folder())


def _workers() -> list[psutil.Process]:
    """What the raylet below this process has started."""
    found = []
    with suppress(psutil.Error):
        for raylet in psutil.Process().children():
            if raylet.name() == "raylet":
                found += raylet.children(recursive=True)
    return found


def _see_off(workers: list[psutil.Process]) -> None:
    """Wait until they have ended, which they do when their raylet has, and end those that hang in doing so: now and
    then one would stay for good, with the 200 MB of its imports."""
    deadline = time.monotonic() + END_SECONDS
    while (left := [worker for worker in workers if lives(worker)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for worker in left:
        with suppress(psutil.Error):
            worker.kill()


def asks_for_token() -> bool:
    """Whether Ray in this process, which runs or is connected, lets in nobody without a token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    asks: bool = is_token_auth_enabled()
    return asks


def _authentication(dashboard: bool) -> dict[str, str]:
    """Variables that Ray is to be started with. It passes them on to its processes, whose environment is their user's
    alone; command lines are for everybody to see."""
    if os.environ.get(AUTH_MODE, "token").lower() != "token":
        return {}
    if AUTH_TOKEN not in os.environ and AUTH_TOKEN_PATH not in os.environ:
        if not dashboard and AUTH_MODE not in os.environ:
            return {AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32)}
        _keep_private(Path.home() / TOKEN_FILE)
    return {AUTH_MODE: "token"}


def _ray_folder() -> Path:
    """Where Ray keeps its sessions: below the folder that the user has named, or else below one of our own."""
    return Path(os.environ.get(FOLDER_VARIABLE) or _private_folder()) / "ray"


def _private_folder() -> Path:
    """Where Ray keeps sockets, logs and code of its workers, in folders that it opens to all: who may put another
    socket there is whom new workers obey."""
    name = f"tuner-{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(folder)) > FOLDER_BYTES:
        # The temporary folder of a job on a Slurm cluster, or of a user on macOS.
        folder = SHORT_TEMPORARY / name
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made ({error.strerror}); name a folder of yours in RAY_TMPDIR"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder}: is not yours alone; delete it, or name a folder of yours in RAY_TMPDIR")
    return folder


def _keep_private(file: Path) -> None:
    """Make the file with the user's token, or take it away from others: Ray would write it for everybody to read."""
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            # Nobody else may open it from its first moment on.
            handle, staged = tempfile.mkstemp(dir=file.parent)
            try:
                with os.fdopen(handle, "w", encoding="ascii") as out:
                    out.write(secrets.token_hex(32))
                # Unlike a renaming, it leaves the token of another search that came first.
                with suppress(FileExistsError):
                    os.link(staged, file)
            finally:
                Path(staged).unlink()
        elif file.stat().st_mode & 0o077:
            file.chmod(0o600)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be kept from other users ({error.strerror}); put a token of your own into {AUTH_TOKEN}"
        ) from None


def _read_authentication() -> None:
    """Have Ray in this process read the token again; by itself it reads it only once.

    In this order: what still runs of an earlier Ray ends this process where it is asked for a token that is not there.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _start(options: Mapping[str, Any]) -> Any:
    import ray
    from ray._private import ray_constants

    # Ray's servers listen on all interfaces, unless the node's address is 127.0.0.1. `_node_ip_address` cannot say so:
    # Ray replaces loopback there by the machine's own address, except on systems where it makes no clusters.
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Processes of the dashboard connect to the cluster as we do, and would look for it at the machine's address too.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        return ray.init("local", **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment for the processes that Ray starts; what the user has set wins."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own, which no other can reach."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IP address, such as `lo`; None where none has it."""
    for name, owned in psutil.net_if_addrs().items():
        if any(item.address == address for item in owned):
            return name
    return None
