"""What users see when Ray does not start or nobody answers at an address. No Ray is started here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import psutil
import pytest
import ray
from conftest import Tiny
from ray._private import auto_init_hook
from ray._private.utils import validate_socket_filepath

from tuner import cli, loopback, ray_cluster
from tuner.data.execution import ray_cluster as cluster_of_prepare
from tuner.errors import ClusterError, ConfigError
from tuner.loopback import AUTH_MODE, embedded_ray
from tuner.ray_cluster import ADDRESS_VARIABLE, cluster_address, joined_ray
from tuner.ray_start import NO_AUTO_INIT, forbid_auto_init
from tuner.service.spot import own_node

TIMED_OUT = Exception("The current node timed out during startup. This could happen because")
# What Ray raises, by what is wrong: a dead raylet, a busy dashboard, a setting, a folder.
LASTING = [ValueError("Invalid RAY_x"), PermissionError(13, "Permission denied", "/x"), OSError(28, "No space left")]
PASSING = [TIMED_OUT, RuntimeError("Failed to start GCS.\nLast 0 lines"), ConnectionError("no raylet")]


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One without settings of Ray; those that we make end with the test."""
    for name in (ADDRESS_VARIABLE, "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in NO_AUTO_INIT:
        # Set first: what was not there would not be taken back.
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(AUTH_MODE, "disabled")
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)


class Starts:
    """Stands for `ray.init`: raises these errors one after the other, then starts."""

    def __init__(self, *errors: BaseException, then: Callable[[], None] = lambda: None) -> None:
        self.errors, self.calls, self.then = list(errors), list[dict[str, Any]](), then

    def __call__(self, address: str | None = None, **options: Any) -> None:
        self.calls.append({"address": address} | options)
        self.then()
        os.write(2, b"[C] from C++\n")
        if self.errors:
            raise self.errors.pop(0)


def starting(
    monkeypatch: pytest.MonkeyPatch, *errors: BaseException, then: Callable[[], None] = lambda: None
) -> Starts:
    starts = Starts(*errors, then=then)
    monkeypatch.setattr(ray, "init", starts)
    return starts


def refused() -> ClusterError:
    """What an embedded Ray is refused with."""
    with pytest.raises(ClusterError) as raised, embedded_ray():
        pass
    assert "\n" not in str(raised.value)
    return raised.value


def tuner(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_busy_machine_gets_a_second_try(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    starts = starting(monkeypatch, error)
    with embedded_ray():
        pass
    assert len(starts.calls) == 2
    assert capfd.readouterr().err == "[C] from C++\n", "what the try wrote that succeeded"


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_two_tries_are_enough(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    starts = starting(monkeypatch, error, error, error)
    said = str(refused())
    assert str(error).splitlines()[0] in said and "in two tries" in said and "session_latest/logs" in said
    assert len(starts.calls) == 2
    assert capfd.readouterr().err == "", "the sentence is all"


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_stays_wrong_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    starts = starting(monkeypatch, error, error)
    assert f"Ray cannot start ({type(error).__name__}: " in str(refused())
    assert len(starts.calls) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(15), ValueError("x")], ids=repr)
def test_nothing_is_left_of_a_start_that_failed(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Not of its processes, an interrupt included; another process of ours lives on."""
    children = []

    def spawn(mark: str) -> None:
        children.append(subprocess.Popen(["/bin/bash", "-c", "sleep 600 & wait", mark]))

    def begin() -> None:
        spawn(str(Path(ray.__file__).parent / "core/gcs_server"))
        spawn("another")

    starting(monkeypatch, error, then=begin)
    try:
        expected: Any = ClusterError if isinstance(error, Exception) else type(error)
        with pytest.raises(expected), embedded_ray():
            pass
        assert [child.poll() is None for child in children] == [False, True]
    finally:
        for child in children:
            for process in psutil.Process(child.pid).children() if child.poll() is None else []:
                process.kill()
            child.kill()
            child.wait()


def test_a_long_temporary_folder_is_replaced_by_a_short_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's own check of the longest name of a socket passes."""
    long = tmp_path / ("x" * 80)
    long.mkdir()
    starts = starting(monkeypatch)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        monkeypatch.setattr(loopback, "SHORT_TEMPORARY", Path(short))
        with embedded_ray():
            pass
        folder = Path(starts.calls[0]["_temp_dir"])
        assert folder == Path(short) / f"tuner-{os.getuid()}" / "ray"
        assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert list(long.iterdir()) == []
    names = "session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
    validate_socket_filepath(f"{'/' * loopback.FOLDER_BYTES}/ray/{names}")


def test_a_long_folder_of_the_users_own_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 80)))
    starting(monkeypatch, then=lambda: validate_socket_filepath(str(tmp_path / ("x" * 80))))
    assert str(refused()).endswith("name a shorter folder of yours in RAY_TMPDIR")


def test_a_temporary_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starting(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/x")
    with pytest.raises(ConfigError, match=r"/proc/x/tuner-\d+: cannot be made \(.*RAY_TMPDIR"), embedded_ray():
        pass
    assert starts.calls == []


# Addresses


@pytest.mark.parametrize(
    ("typed", "variable", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        (None, "local", None),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
    ],
)
def test_the_option_goes_before_the_variable(
    monkeypatch: pytest.MonkeyPatch, typed: str | None, variable: str | None, joined: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv(ADDRESS_VARIABLE, variable)
    assert cluster_address(typed) == joined


def commands(tiny: Tiny, folder: Path) -> dict[str, list[object]]:
    search = ["search", "--data", tiny.store_folder, "--runs", folder / "runs", "--study", "s"]
    return {"plain": search, "auto": [*search, "--address", "auto"]}


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "nonsense", "a:b:c"])
@pytest.mark.parametrize("command", ["plain", "auto"])
def test_a_search_at_a_wrong_address_is_one_sentence_and_leaves_no_study(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    address: str,
) -> None:
    starts = starting(monkeypatch)
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    assert tuner(monkeypatch, *commands(tiny, tmp_path)[command]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"tuner: {ADDRESS_VARIABLE} {address}: ") and said.count("\n") == 1
    assert "unset it to use this machine alone" in said
    assert ("by host:port of its head" in said) == ("://" in address)
    assert starts.calls == [] and not list((tmp_path / "runs").rglob("study.json"))


@pytest.mark.parametrize("error", [TIMED_OUT, ValueError("x"), KeyboardInterrupt()], ids=repr)
def test_a_search_whose_ray_does_not_start_leaves_no_study(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    starting(monkeypatch, error, error)
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    assert tuner(monkeypatch, *commands(tiny, tmp_path)["plain"]) == code
    assert capfd.readouterr().err.count("\n") == 1
    assert not list((tmp_path / "runs").rglob("study.json"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1:1"])
def test_prepare_follows_the_same_variable(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    starting(monkeypatch)
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    with pytest.raises(ClusterError, match=f"{ADDRESS_VARIABLE} {address}: "), cluster_of_prepare():
        pass


def test_prepare_joins_the_cluster_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = starting(monkeypatch)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 7.0})
    monkeypatch.setenv(ADDRESS_VARIABLE, "10.0.0.1:6379")
    monkeypatch.setattr(ray_cluster, "_check_answer", lambda *_: None)
    with cluster_of_prepare() as cpus:
        assert cpus == 7
    assert [call["address"] for call in starts.calls] == ["10.0.0.1:6379"]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port at which somebody answers, or not, who is no Ray."""
    # Ray looks for this machine at its own address.
    monkeypatch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def place(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def no_answer(address: str) -> str:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"no Ray cluster answers there \(") as raised, joined_ray(address):
        pass
    assert time.monotonic() - began < 10
    return str(raised.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
def test_somebody_else_at_the_address_is_found_out(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, answer: bytes
) -> None:
    """One that is silent, and a server of another kind."""
    starts = starting(monkeypatch)
    monkeypatch.setattr(ray_cluster, "ANSWER_SECONDS", 1.0)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answer)
            while connection.recv(1024):
                pass

    threading.Thread(target=serve, daemon=True).start()
    assert no_answer(place(listener)).startswith(f"--address {place(listener)}: ")
    assert starts.calls == []


def test_a_port_that_nobody_listens_at_is_found_out(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    starting(monkeypatch)
    listener.close()
    monkeypatch.setenv(ADDRESS_VARIABLE, "127.0.0.1:1")
    assert no_answer("127.0.0.1:1").startswith(f"{ADDRESS_VARIABLE} 127.0.0.1:1: ")


@pytest.fixture
def head(listener: socket.socket) -> Iterator[str]:
    """A server that knows one call of Ray's head."""
    listener.close()
    answers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")}
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", answers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_a_head_that_answers_is_joined(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    starts = starting(monkeypatch)
    with joined_ray(head, log_to_driver=False):
        pass
    assert starts.calls == [{"address": head, "log_to_driver": False}]


@pytest.mark.parametrize("error", [*PASSING, *LASTING], ids=repr)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], head: str, error: Exception
) -> None:
    starting(monkeypatch, error)
    with pytest.raises(ClusterError, match=f"--address {head}: the Ray cluster cannot be joined") as raised:
        own_node(head)
    assert type(error).__name__ in str(raised.value) and "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


# Auto-init


def test_no_call_starts_a_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after the end of ours, nor before its start; ray.init alone does."""
    from ray.tune.tune import _ray_auto_init

    starts = starting(monkeypatch)
    with embedded_ray():
        assert NO_AUTO_INIT.items() <= os.environ.items(), "processes of Ray inherit it"
    with pytest.raises(ray.exceptions.RaySystemError, match="has not been started"):
        ray.get_actor("tuner-coordinator:s")
    for call in (lambda: ray.put(1), ray.remote(forbid_auto_init).remote, ray.util.list_named_actors):
        with pytest.raises(Exception, match=r"has not been started|connected"):
            call()
    _ray_auto_init("Tuner.fit()")
    assert len(starts.calls) == 1
    assert not ray.is_initialized()


def test_nor_does_a_process_that_inherits_our_environment() -> None:
    """Ray reads the variable when it is imported."""
    forbid_auto_init()
    program = "import json; from ray._private.auto_init_hook import enable_auto_connect as on; print(json.dumps(on))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
