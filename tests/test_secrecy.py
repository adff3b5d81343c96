"""What a user alone knows is shown to nobody; what others wrote is shown as text; nobody else can connect."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc  # type: ignore[import-untyped]
import huggingface_hub
import psutil
import pytest
import ray
from conftest import Tiny
from scripted_head import Head
from searches import Runs

from tuner import cli
from tuner.config import EncoderRef, LoraSpec, TrialConfig
from tuner.encoders.registry import inspect_encoder
from tuner.errors import ConfigError, EncoderError, StudyError
from tuner.loopback import AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH, TOKEN_FILE, asks_for_token, embedded_ray
from tuner.ray_start import NO_AUTO_INIT
from tuner.report.live import JsonView, PlainView, make_view
from tuner.report.terminal import RichView
from tuner.search.recorder import Recorder
from tuner.service.jobs.cluster import Cluster
from tuner.service.jobs.feed import EventFeed
from tuner.study.events import SAMPLED, EpochDone, Message, StudyStarted, TrialEnded, TrialStarted
from tuner.study.folder import StudyFolder, check_study_name
from tuner.study.journal import Journal
from tuner.study.objectives import DEFAULT_OBJECTIVES, choose_objectives

SECRET = "hunter2hunter2"
URLS = [f"https://me:{SECRET}@127.0.0.1:9", f"s3://KEY:{SECRET}@bucket/x", f"s3://bucket/x?secret_key={SECRET}"]
# Colours, a window title, a line that hides itself, a mark that reorders, and what rich takes for markup.
CONTROLS = "\x1b[31m \x1b]0;pwned\x07 \x9b2K over\rwritten a\u202ecod.exe [link=http://x]click[/link] [bold]"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


# Passwords and keys


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "option", ["--data", "--encoder", "--text-encoder", "--storage", "--runs", "--study", "--space"]
)
def test_no_command_shows_a_secret(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    url: str,
) -> None:
    """Nor leaves it on the disk: whatever option it was given with, the search is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    given = {"--data": tiny.store_folder, "--trials": 1} | {option: url}
    assert run(monkeypatch, "search", *[part for pair in given.items() for part in pair]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert printed.err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if SECRET in str(path)]


@pytest.mark.parametrize("command", ["search --runs /r --data /d", "studies", "status s", "logs s", "stop s"])
def test_an_address_with_a_password_is_not_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody answers there, and the libraries that say so know the whole address."""
    assert run(monkeypatch, *command.split(), "--address", f"http://me:{SECRET}@127.0.0.1:9") == 2
    printed = capsys.readouterr()
    assert "http://***@127.0.0.1:9" in printed.err
    assert SECRET not in printed.out + printed.err


def test_a_hub_that_fails_does_not_tell_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(f"no answer from {URLS[0]}/api with Bearer hf_{SECRET}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(EncoderError, match="the download from the hub failed") as raised:
        inspect_encoder(EncoderRef(source="openai/whisper-tiny"))
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("option", ["--data", "--encoder", "--runs", "--storage", "--objective"])
def test_no_secret_becomes_part_of_a_job(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, url: str
) -> None:
    """Entry point and metadata are on the cluster's dashboard."""
    given = {"--data": "/d", "--runs": "/r", "--study": "s"} | {option: url}
    arguments = [part for pair in given.items() for part in pair]
    assert run(monkeypatch, "search", "--address", "http://head:8265", *arguments) == 2
    assert SECRET not in capsys.readouterr().err
    assert head.submitted == []


def test_what_a_job_would_show_says_what_to_do(head: Head) -> None:
    with pytest.raises(ConfigError, match=r"--encoder .*everybody on the cluster could read; drop it and let the"):
        Cluster(head).submit("s", "full", "e", ["--encoder", URLS[0]], None)  # type: ignore[arg-type]


def test_tokens_stay_out_of_jobs(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, SECRET)
    arguments = ["--data", "/d", "--runs", "/r", "--study", "s"]
    assert run(monkeypatch, "search", "--address", "http://head:8265", *arguments) == 0
    assert SECRET not in repr(head.submitted)


def test_a_name_cannot_leave_its_place_in_a_command(head: Head) -> None:
    arguments = ["--data", "/d; rm -rf ~", "--runs", "/r $(id)", "--space", "a'b.yaml"]
    Cluster(head).submit("s", "full", "e", arguments, None)  # type: ignore[arg-type]
    assert shlex.split(head.submitted[0]["entrypoint"])[-6:] == arguments


# Reasons of failures, in every record and view


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, str]:
    """A journal's folder and what a view showed, of a trial that failed with the worst of reasons."""
    shown = io.StringIO()
    view, journal = PlainView(shown), Journal(StudyFolder(tmp_path))
    view.show(plan("s"))
    recorder = Recorder(journal, view, choose_objectives(DEFAULT_OBJECTIVES), lambda: True)
    config = TrialConfig().model_dump(mode="json")
    suggested = {"trial": "t0000", "origin": SAMPLED, "config": config, "known": {"trainable_parameters": 1.0}}
    result = {"failed": f"no answer from {URLS[0]} {CONTROLS}"}
    trial: Any = SimpleNamespace(config={**suggested, "epochs": 1}, last_result=result)
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_complete(0, [], trial)
    journal.close()
    return tmp_path, shown.getvalue()


def plan(name: str) -> StudyStarted:
    """A study of this name, space, dashboard and folder."""
    return StudyStarted(
        study=name, space=name, objectives=DEFAULT_OBJECTIVES, trials=2, epochs=2, dashboard_url=name, run_dir=name
    )


def test_a_reason_is_recorded_without_secrets_and_controls(recorded: tuple[Path, str]) -> None:
    folder, shown = recorded
    journal = json.loads(StudyFolder(folder).journal.read_text().splitlines()[-1])["reason"]
    for text in (journal, shown):
        assert "no answer from https://***@127.0.0.1:9 \\x1b[31m" in text
        assert SECRET not in text
        assert not set(text) & set("\x1b\x07\x9b\r\u202e")
    assert not [path for path in folder.iterdir() if SECRET.encode() in path.read_bytes()]


# Words from a cluster


def hostile_events() -> list[str]:
    """A search's output as somebody would write it who is after the terminal that shows it."""
    out = io.StringIO()
    view = JsonView(out)
    config = TrialConfig(lora=LoraSpec(rank=1, targets=(CONTROLS,)))
    for event in (
        plan(CONTROLS),
        TrialStarted(trial="t0000", origin=CONTROLS, config=config, known={CONTROLS: 7.0}),
        EpochDone(trial="t0000", epoch=1, loss=0.5, metrics={CONTROLS: 0.25}, warning=CONTROLS),
        Message(text=CONTROLS),
        TrialEnded(trial="t0000", state="failed", reason=CONTROLS),
    ):
        view.show(event)
    return [*out.getvalue().splitlines(), f"tuner: {CONTROLS}"]


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_cluster_cannot_write_on_this_terminal(kind: str) -> None:
    """Its words arrive, escaped; nothing of them is obeyed by the terminal or by rich."""
    stream = Terminal()
    view = make_view(kind, stream)  # type: ignore[arg-type]
    said: list[str] = []
    feed = EventFeed(view, said.append)
    for line in hostile_events():
        feed.line(line)
    view.close()
    told = stream.getvalue() + "".join(said)
    assert not set(told) & set("\x07\x9b\u202e")
    # What rich itself shows in red.
    told = told.replace("\x1b[31mfailed", "failed")
    assert "\x1b[31m" not in told and "\x1b]" not in told
    assert "\\x1b[31m" in told
    assert "[bold]" in told and "\x1b]8;" not in told, "markup is text, and no link is made"
    assert said[0].startswith("tuner:  \\x1b]0;pwned\\x07 \\x9b2K over"), "colours are taken away before"


def test_rich_shows_markup_of_a_local_search_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    view = RichView(stream)
    view.show(plan("[bold]s[/bold] [link=http://x]there[/link]"))
    config = TrialConfig(lora=LoraSpec(rank=1, targets=("[bold]q_proj[/bold]",)))
    view.show(TrialStarted(trial="t0000", origin=SAMPLED, config=config))
    view.show(TrialEnded(trial="t0000", state="failed", reason="[blink]reason[/blink] [/nothing]"))
    view.close()
    told = stream.getvalue()
    for text in ("[bold]s[/bold]", "[bold]q_proj", "[blink]reason[/blink] [/nothing]", "[link=http://x]there"):
        assert text in told
    assert "\x1b]8;" not in told


def test_lists_of_a_cluster_are_text(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head.status, head.log = "RUNNING", ["\n".join(hostile_events())]
    head.space = CONTROLS
    for command in ("studies", "status s", "stop s"):
        assert run(monkeypatch, *command.split(), "--address", "http://head:8265") == 0
        printed = capsys.readouterr()
        assert not set(printed.out + printed.err) & set("\x1b\x07\x9b\r\u202e")
        assert command == "stop s" or "\\x1b[31m" in printed.out


# Names of studies


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/x", "..", ".", ".hidden", "-x", "", "a\nb", "a\0b", "a\x1b[1m", "x" * 201, "漢" * 67]
)
def test_a_study_has_a_name_and_no_path(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StudyError, match=r"is not a valid name; begin with a letter|is longer than 200 bytes"):
        check_study_name(name)
    if not name:
        return
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(monkeypatch, "search", "--data", tiny.store_folder, f"--study={name}") == 2
    assert re.search("is not a valid name|is longer than 200 bytes", capsys.readouterr().err)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["demo", "full-2", "7 März_v1.2+x@y=z", "漢字", "x" * 200, "漢" * 66])
def test_ordinary_names_are_taken(name: str) -> None:
    assert check_study_name(name) == name


@pytest.mark.parametrize("option", ["--study", "--resume"])
def test_a_job_has_no_path_for_a_name(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    given = ("--address", "http://head:8265", "--data", "/d", "--runs", "/r", option, "../x")
    assert run(monkeypatch, "search", *given) == 2
    assert "study '../x': is not a valid name" in capsys.readouterr().err
    assert head.submitted == []


def test_a_job_is_not_given_a_folder_of_this_machine(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--address", "http://head:8265", "--data", "/d", "--runs", "/r", "--audio-root", "recordings")
    assert run(monkeypatch, "search", *given) == 2
    assert "--audio-root recordings: on a cluster, give a folder that all its nodes see" in capsys.readouterr().err
    assert head.submitted == []


# Who can connect


AUTHENTICATION = (AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user who has set nothing about tokens and folders; returns the home."""
    for name in (*AUTHENTICATION, "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.timeout(600)
def test_a_search_is_for_its_user_alone(unset: Path, tiny: Tiny) -> None:
    """Ray's servers, its workers, and the process group of a lane of two workers, while they train."""
    runs = Runs(unset, tiny)
    with runs.driver(*runs.new("--trials", 2, "--epochs", 40, "--workers", 2)) as driver:
        driver.until(lambda epochs: len(epochs) > 1)
        family = [psutil.Process(driver.process.pid), *driver.descendants()]
        listening = sockets(family)
        servers = {process.name(): process for process in family if process.name() in ASKED}
        tokens = {process.environ()[AUTH_TOKEN] for process in servers.values()}
        (token,) = tokens
        for server in ASKED:
            ports = [port for name, _, port in listening if name == server]
            assert set(answers(server, ports, None)) == {"UNAUTHENTICATED"}
            assert set(answers(server, ports, "c0ffee" * 10)) == {"UNAUTHENTICATED"}
        ports = [port for name, _, port in listening if name == "gcs_server"]
        assert answers("gcs_server", ports, token) == ["OK"]
        commands = [" ".join(process.cmdline()) for process in driver.descendants()]
        session = Path(next(part for part in servers["raylet"].cmdline() if "/sockets/raylet" in part).split("=")[-1])
        (private,) = (folder for folder in session.parents if folder.name == f"tuner-{os.getuid()}")
        told = [
            path for path in session.parents[1].rglob("*") if path.is_file() and token.encode() in path.read_bytes()
        ]
    assert {name.split("::")[0] for name, _, _ in listening} >= {"gcs_server", "raylet", "ray"}
    assert [entry for entry in listening if entry[1] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")] == []
    assert not [command for command in commands if token in command]
    assert told == [] and not (unset / TOKEN_FILE).exists()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


# Calls that change nothing, should they be answered.
ASKED = {"gcs_server": "NodeInfoGcsService/GetAllNodeInfo", "raylet": "NodeManagerService/GetNodeStats"}


def answers(server: str, ports: list[int], token: str | None) -> list[str]:
    """What its ports say to a caller with this token, those that know the call."""
    said = []
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                sent = [("authorization", f"Bearer {token}")] if token else []
                channel.unary_unary(f"/ray.rpc.{ASKED[server]}")(b"", timeout=60, metadata=sent)
                said.append("OK")
            except grpc.RpcError as error:
                said.append(error.code().name)
    return [code for code in said if code != "UNIMPLEMENTED"]


def sockets(processes: list[psutil.Process]) -> list[tuple[str, str, int]]:
    """Name of the process, address and port of each socket that others could connect or write to."""
    found = []
    for process in processes:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.laddr and not connection.raddr):
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def started(unset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a Ray that is not started would be started with: options, and variables about tokens."""
    seen: list[dict[str, Any]] = []

    def init(address: str, **options: Any) -> None:
        seen.append(options | {name: os.environ[name] for name in AUTHENTICATION if name in os.environ})

    monkeypatch.setattr(ray, "init", init)
    # Short: in the folder of a test, Ray's sockets would have names that are too long.
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield seen


def test_each_start_has_a_token_of_its_own(started: list[dict[str, Any]], unset: Path) -> None:
    for _ in range(2):
        before = dict(os.environ) | NO_AUTO_INIT
        with embedded_ray():
            assert dict(os.environ) == before, "processes that a logger starts have no use for it"
            assert asks_for_token()
        assert not asks_for_token(), "a cluster that this process joins later may have none"
    first, second = started
    assert first[AUTH_MODE] == second[AUTH_MODE] == "token"
    assert len(first[AUTH_TOKEN]) == 64 and first[AUTH_TOKEN] != second[AUTH_TOKEN]
    assert not (unset / TOKEN_FILE).exists()


@pytest.mark.parametrize("dashboard", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{AUTH_MODE: "disabled"}, {AUTH_TOKEN: "mine"}, {AUTH_TOKEN_PATH: "/mine"}, {AUTH_MODE: "token", AUTH_TOKEN: "m"}],
)
def test_settings_of_the_user_win(
    started: list[dict[str, Any]],
    unset: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    dashboard: bool,
) -> None:
    for name, value in (settings | {"RAY_TMPDIR": "/mine"}).items():
        monkeypatch.setenv(name, value)
    with embedded_ray(include_dashboard=dashboard):
        pass
    assert started == [{"include_dashboard": dashboard, AUTH_MODE: "token"} | settings]
    assert {name: os.environ[name] for name in AUTHENTICATION if name in os.environ} == settings
    assert not (unset / TOKEN_FILE).exists()


@pytest.mark.parametrize(("mode", "dashboard"), [(None, True), ("token", False)])
def test_a_token_that_somebody_types_is_kept_from_others(
    started: list[dict[str, Any]], unset: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, dashboard: bool
) -> None:
    if mode:
        monkeypatch.setenv(AUTH_MODE, mode)
    file = unset / TOKEN_FILE
    for _ in range(2):
        with embedded_ray(include_dashboard=dashboard):
            pass
        token = file.read_text()
        assert len(token) == 64
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        # As Ray itself leaves it.
        file.chmod(0o644)
    assert file.read_text() == token
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert all(AUTH_TOKEN not in seen for seen in started)


def test_a_token_that_cannot_be_kept_is_one_sentence(
    started: list[dict[str, Any]],
    unset: Path,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is started, and the name of the study stays free."""
    (unset / ".ray").touch()
    given = ("--data", tiny.store_folder, "--runs", unset / "runs", "--study", "s")
    assert run(monkeypatch, "search", *given, "--dashboard") == 2
    said = capsys.readouterr().err
    assert ".ray/auth_token: cannot be kept from other users (" in said
    assert "put a token of your own into RAY_AUTH_TOKEN" in said and said.count("\n") == 1
    assert started == [] and not list((unset / "runs").rglob("study.json"))


@pytest.mark.parametrize("form", ["open to all", "a link"])
def test_a_folder_that_others_have_made_is_not_taken(started: list[dict[str, Any]], form: str) -> None:
    folder = Path(tempfile.gettempdir()) / f"tuner-{os.getuid()}"
    if form == "a link":
        (folder.parent / "theirs").mkdir(mode=0o700)
        folder.symlink_to("theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"tuner-\d+: is not yours alone; delete it, or"), embedded_ray():
        pass
    assert started == []
