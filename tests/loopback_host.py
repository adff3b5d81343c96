"""A machine to reach by ssh, made of this one: an sshd of our own on a high port of loopback.

Its sessions have a temporary folder for home, and a `ray` whose `stop` ends the processes of that home alone: the real
one ends every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PATIENCE = 30.0  # seconds for sshd to answer
SSHD_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
ForceCommand {folder}/session
"""
# What a login would give: nothing of the test's own environment, and another home.
SESSION = """#!/bin/bash
exec env -i HOME={home} USER={user} LOGNAME={user} SHELL=/bin/bash LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin \\
  RAY_TMPDIR={folder}/r OMP_NUM_THREADS=1 bash -c "$SSH_ORIGINAL_COMMAND"
"""
# The launcher has no option for a port: a proxy command goes to any.
PROXY = """#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/{port}
cat <&3 &
cat >&3
kill $!
"""
RAY = """#!/bin/bash
[ "$1" = stop ] && exec {python} {stop} {home}
exec {ray} "$@"
"""


@dataclass(frozen=True)
class LoopbackHost:
    """Where it listens, who may come in, and what it thinks its home is."""

    folder: Path
    port: int
    user: str

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def key(self) -> Path:
        return self.folder / "user_key"

    @property
    def proxy(self) -> Path:
        return self.folder / "proxy"

    def processes(self) -> list[psutil.Process]:
        """Everything that runs in its home, in whatever session."""
        return processes_of(self.home)


def processes_of(home: Path) -> list[psutil.Process]:
    """Processes whose home folder this is; not the caller and what started it."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in own and _lives_in(process, home):
                found.append(process)
    return found


def _lives_in(process: psutil.Process, home: Path) -> bool:
    if process.environ().get("HOME") == str(home):
        return True
    # Ray's agents and workers write their titles over their environment; their logs lie beside the home.
    is_ray = any(part.startswith("ray::") for part in process.cmdline())
    beside = home.parent.resolve()
    return is_ray and any(Path(file.path).is_relative_to(beside) for file in process.open_files())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def loopback_host(folder: Path) -> Iterator[LoopbackHost]:
    """Start the sshd; at the end stop it and whatever still runs in its home."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if sshd is None or shutil.which("ssh") is None or shutil.which("rsync") is None:
        pytest.fail("`ray up` needs ssh, sshd and rsync; run: apt-get install openssh-server rsync")
    host = LoopbackHost(folder, free_port(), getpass.getuser())
    _furnish(host)
    if os.geteuid() == 0:
        # Where sshd, as root, shuts its unprivileged part in; Debian's service makes it at boot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    daemon = subprocess.Popen([sshd, "-D", "-E", str(folder / "log"), "-f", str(folder / "sshd_config")])
    try:
        _wait(daemon, host)
        yield host
    finally:
        daemon.terminate()
        daemon.wait(timeout=PATIENCE)
        left = host.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=PATIENCE)


def _furnish(host: LoopbackHost) -> None:
    folder = host.folder
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    host.home.mkdir()
    shutil.copy("/etc/skel/.bashrc", host.home / ".bashrc")
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(port=host.port, folder=folder))
    _script(folder / "session", SESSION.format(home=host.home, user=host.user, folder=folder))
    _script(host.proxy, PROXY.format(port=host.port))
    _install(host)


def _install(host: LoopbackHost) -> None:
    """What `make install` would leave, so that it has nothing to do: this environment's own programs."""
    environment = host.home / "tuner/.venv"
    (environment / "bin").mkdir(parents=True)
    for program in (Path(sys.prefix) / "bin").iterdir():
        (environment / "bin" / program.name).symlink_to(program)
    ray = environment / "bin/ray"
    ray.unlink()
    _script(ray, RAY.format(python=sys.executable, stop=__file__, home=host.home, ray=Path(sys.prefix) / "bin/ray"))
    (environment / ".installed").touch()


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _wait(daemon: subprocess.Popen[bytes], host: LoopbackHost) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and daemon.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", host.port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"sshd did not come up: {(host.folder / 'log').read_text()}")


if __name__ == "__main__":
    for doomed in processes_of(Path(sys.argv[1])):
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed.kill()
