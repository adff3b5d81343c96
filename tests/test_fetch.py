"""Reports and adapters brought to a laptop: the lines they travel as, a real cluster, a storage, this disk."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Tiny
from finished_study import STUDY, points_of, write_front, write_study
from ray.job_submission import JobStatus
from safetensors.torch import load_file

from benchmarks.local_head import local_head
from tuner import cli
from tuner.errors import AdapterError, ConfigError, StudyError
from tuner.report.handover import ADAPTER_FILES, choose_points, files_of, write_handover
from tuner.service.jobs import bundle
from tuner.service.jobs.bundle import RECORDS, BundleReader, bundle_lines
from tuner.service.jobs.cluster import Cluster, connect
from tuner.service.jobs.fetch import ClusterSource, StorageSource
from tuner.storage import Storage
from tuner.study.points import Point
from tuner.study.study import Study

FILES = [*RECORDS, *(f"adapters/t0001/{name}" for name in ADAPTER_FILES)]


@pytest.fixture(scope="module")
def study(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the search ran; no test changes it."""
    return write_study(tiny, tmp_path_factory.mktemp("runs") / STUDY)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_lines(folder: Path, lines: list[str]) -> BundleReader:
    reader = BundleReader(folder)
    try:
        for line in lines:
            reader.line(line)
    finally:
        reader.close()
    return reader


# Ray's client says so to aiohttp; what a job printed comes through it.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")


# Lines


def test_what_is_read_is_what_was_there(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies between the lines, and in however many pieces a file comes; empty files too."""
    monkeypatch.setattr(bundle, "PIECE_BYTES", 1000)
    lines = [part for line in bundle_lines(study, FILES) for part in ("2026-01-01 INFO job_manager.py", line, "")]
    reader = read_lines(tmp_path, lines)
    assert reader.whole
    assert content(tmp_path) == {name: (study / name).read_bytes() for name in FILES}
    assert len(lines) > 3 * len(FILES)


def test_a_file_that_is_not_there_is_left_out_and_an_empty_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "study.json").touch()
    (out := tmp_path / "out").mkdir()
    assert read_lines(out, list(bundle_lines(tmp_path, RECORDS))).whole
    assert content(out) == {"study.json": b""}


def test_a_journal_that_grows_meanwhile_is_sent_up_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PIECE_BYTES", 10)
    journal, before = tmp_path / "journal.jsonl", b"0123456789" * 5 + b"end"
    journal.write_bytes(before)
    lines = []
    for line in bundle_lines(tmp_path, RECORDS):
        lines.append(line)
        with journal.open("ab") as file:
            file.write(b"more")
    (out := tmp_path / "out").mkdir()
    assert read_lines(out, lines).whole
    assert content(out) == {"journal.jsonl": before}


def test_what_is_too_large_for_lines_is_refused_before_the_first(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_BYTES", 100)
    with pytest.raises(StudyError, match="too much to send as text"):
        next(bundle_lines(study, FILES))


def file_line(name: str, data: bytes, **changes: Any) -> str:
    fields = {"event": "file", "name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return json.dumps(fields | changes)


def data_line(data: bytes) -> str:
    return json.dumps({"event": "data", "piece": base64.b64encode(zlib.compress(data)).decode()})


END = json.dumps({"event": "bundle_end", "files": 1})
WHOLE = [file_line("study.json", b"{}"), data_line(b"{}"), END]
TWICE = [file_line("front.json", b"{}"), data_line(b"{}"), file_line("front.json", b"{}")]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([file_line("../study.json", b"{}")], "no file of a study"),
        ([file_line("/etc/passwd", b"{}")], "no file of a study"),
        ([file_line("adapters/../study.json", b"{}")], "no file of a study"),
        ([file_line("adapters/t0001/../../study.json", b"{}")], "no file of a study"),
        ([file_line("adapters/t0001/tuner.py", b"{}")], "no file of a study"),
        ([file_line("study.json\n", b"{}")], "no file of a study"),
        ([file_line("\x1b[2Jstudy.json", b"{}")], r"\\x1b\[2J"),
        (TWICE, "front.json is no file of a study|twice"),
        ([file_line("study.json", b"{}", bytes=-1)], "larger than"),
        ([file_line("study.json", b"{}", bytes=10**12)], "larger than"),
        ([file_line("study.json", b"{}", bytes="many")], "damaged"),
        ([file_line("study.json", b"{}", sha256="0" * 64), data_line(b"{}")], "another SHA-256"),
        ([file_line("study.json", b"{}"), data_line(b"[]")], "another SHA-256"),
        ([file_line("study.json", b"{}"), data_line(b"{} and more")], "longer than announced"),
        ([file_line("study.json", b"{}"), json.dumps({"event": "data", "piece": "?"})], "damaged"),
        ([file_line("study.json", b"{}"), json.dumps({"event": "data", "piece": "AAAA"})], "damaged"),
        ([file_line("study.json", b"{}"), file_line("front.json", b"{}")], "not whole"),
        ([data_line(b"{}")], "outside its files"),
        ([file_line("study.json", b"{}"), END], "missing"),
        ([END], "missing"),
        ([json.dumps({"event": "file", "name": "study.json"})], "damaged"),
    ],
)
def test_a_head_that_sends_something_else_is_refused(lines: list[str], said: str, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    assert read_lines(out, WHOLE).whole
    (again := tmp_path / "again").mkdir()
    with pytest.raises(StudyError, match=said):
        read_lines(again, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_a_small_piece_does_not_become_large_in_memory(tmp_path: Path) -> None:
    """100 MB in 100 kB, of which no more is unpacked than the file has."""
    reader, bomb = BundleReader(tmp_path), data_line(bytes(100_000_000))
    reader.line(file_line("study.json", b"{}"))
    tracemalloc.start()
    try:
        with pytest.raises(StudyError, match="longer than announced"):
            reader.line(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        reader.close()
    assert peak < 5_000_000


# What is handed over


def recall(point: Point) -> float:
    return point.validation.value("recall@10") or 0.0


def test_the_points_that_are_asked_for(study: Path) -> None:
    found = Study.open(study)

    def chosen(**asked: Any) -> list[str]:
        return [point.trial for point in choose_points(found, **asked)]

    assert chosen() == ["t0000", "t0001"]
    assert chosen(trials=["t0001", "t0001"]) == ["t0001"]
    best = max(points_of(study).values(), key=recall)
    assert chosen(best=True) == [best.trial]
    with pytest.raises(ConfigError, match="trial t0009: no point of study far, which has t0000, t0001"):
        chosen(trials=["t0009"])


def test_a_trial_off_the_front_comes_only_by_name(study: Path, tmp_path: Path) -> None:
    points = points_of(study)
    write_copy(study, tmp_path / STUDY)
    write_front(tmp_path / STUDY, points | {"t0001": points["t0001"].model_copy(update={"on_front": False})})
    found = Study.open(tmp_path / STUDY)
    assert [point.trial for point in choose_points(found)] == ["t0000"]
    assert [point.trial for point in choose_points(found, ["t0001"])] == ["t0001"]


def write_copy(study: Path, folder: Path) -> Path:
    for name, data in content(study).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_front_cannot_name_folders_elsewhere(study: Path, tmp_path: Path) -> None:
    folder = write_copy(study, tmp_path / STUDY)
    text = (folder / "front.json").read_text()
    (folder / "front.json").write_text(text.replace('"trial": "t0001"', '"trial": "../../t0001"'))
    with pytest.raises(StudyError, match=r"front\.json: is damaged \(points\.1\.trial: .*'\.\./\.\./t0001'"):
        choose_points(Study.open(folder))


def test_the_files_of_a_point_are_those_that_an_export_has(study: Path) -> None:
    for point in points_of(study).values():
        assert point.adapter is not None
        there = {f"adapters/{point.trial}/{path.name}" for path in (study / point.adapter).iterdir()}
        assert set(files_of(point)) == there


def tuner(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def check_exported(folder: Path, study: Path, trials: list[str]) -> None:
    """The adapters themselves, cards, numbers, and checksums that coreutils agree with."""
    for trial in trials:
        files = content(folder / trial)
        assert files.pop("README.md").decode().count(f"# {trial} of study {STUDY}") == 1
        assert files == content(study / "adapters" / trial)
    assert {path.name for path in folder.iterdir()} == {*trials, "points.json", "SHA256SUMS"}
    assert [point["trial"] for point in json.loads((folder / "points.json").read_text())["points"]] == trials
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == content(folder).keys() - {"SHA256SUMS"}


def test_export_of_a_study_here(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(study)
    assert tuner(monkeypatch, "export", STUDY, "--runs", study.parent) == 0
    assert capsys.readouterr().out.split() == [f"{STUDY}-adapters/t0000", f"{STUDY}-adapters/t0001"]
    check_exported(tmp_path / f"{STUDY}-adapters", study, ["t0000", "t0001"])
    assert tuner(monkeypatch, "export", study, "--trial", "t0001", "--out", "one") == 0
    check_exported(tmp_path / "one", study, ["t0001"])
    assert content(study) == before
    # An older export is not mixed with a new one.
    assert tuner(monkeypatch, "export", study, "--out", "one") == 2
    assert "--out one: exists; give a new folder" in capsys.readouterr().err
    assert tuner(monkeypatch, "export", study, "--best", "--trial", "t0001", "--out", "two") == 2


def test_an_exported_card_says_what_it_is(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuner(monkeypatch, "export", study, "--out", tmp_path / "out") == 0
    card, plain = ((tmp_path / "out" / trial / "README.md").read_text() for trial in ("t0001", "t0000"))
    point = points_of(study)["t0001"]
    for said in ("library_name: peft", "rank 4 (alpha 8", "q_proj, v_proj", f"{point.lora_parameters:,} of them"):
        assert said in card
    assert f"| validation | {recall(point):.3f} |" in card
    assert f"| test | {point.test.value('recall@10'):.3f} [0.100, 0.900] |" in card
    assert "+0.010 [-0.020, +0.040]" in card
    assert "PeftModel" not in plain and "A projection without LoRA" in plain


@pytest.mark.parametrize("missing", ["adapters/t0001/adapter_model.safetensors", "front.json"])
def test_nothing_is_written_if_something_is_missing(
    study: Path, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_copy(study, tmp_path / STUDY)
    (folder / missing).unlink()
    assert tuner(monkeypatch, "export", folder, "--out", tmp_path / "out") == 2
    assert "tuner search --resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [STUDY]


# Out of a storage


def test_a_study_in_a_storage(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Storage.parse(str(tmp_path / "bucket"))
    place.upload_folder(study, STUDY)
    monkeypatch.chdir(tmp_path)
    assert tuner(monkeypatch, "export", STUDY, "--storage", tmp_path / "bucket") == 0
    check_exported(tmp_path / f"{STUDY}-adapters", study, ["t0000", "t0001"])
    assert tuner(monkeypatch, "report", STUDY, "--storage", tmp_path / "bucket", "--svg", "front.svg") == 0
    page = (tmp_path / f"{STUDY}.html").read_text()
    assert f"tuner export {STUDY} --trial t0001" in page and "recommended" in (tmp_path / "front.svg").read_text()
    assert tuner(monkeypatch, "report", "near", "--storage", tmp_path / "bucket") == 2
    assert f"study near: not in {place}, which has {STUDY}" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        StorageSource(Storage.parse(str(tmp_path / "nothing")), STUDY).records(tmp_path)


# Out of a cluster


class Head:
    """The part of Ray's client that is used: one search, and a job that sends what the test wants."""

    def __init__(self, study: Path, sends: Callable[[], Iterator[str]]) -> None:
        self.study, self.sends = study, sends
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []

    def list_jobs(self) -> list[Any]:
        done = SimpleNamespace(status=JobStatus.SUCCEEDED, start_time=1000, end_time=2000)
        search = SimpleNamespace(submission_id="one", metadata={"study": STUDY}, **vars(done))
        return [search, *(SimpleNamespace(submission_id=name, metadata={}, **vars(done)) for name in self.jobs)]

    def get_job_logs(self, job_id: str) -> str:
        return json_start(self.study) + "\n"

    def submit_job(self, **given: Any) -> str:
        self.jobs[given["submission_id"]] = given
        return str(given["submission_id"])

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for line in self.sends():
            yield line + "\n"
            await asyncio.sleep(0)

    def get_job_status(self, job_id: str) -> JobStatus:
        return JobStatus.FAILED

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def delete_job(self, job_id: str) -> bool:
        return self.jobs.pop(job_id) is not None


def test_the_laptop_says_where_and_the_head_what(study: Path, tmp_path: Path) -> None:
    head = Head(study, lambda: bundle_lines(study, FILES))
    source = ClusterSource(Cluster(head), STUDY)  # type: ignore[arg-type]
    submitted = []

    def delete(job_id: str) -> bool:
        submitted.append(head.jobs.pop(job_id))
        return True

    head.delete_job = delete  # type: ignore[method-assign]
    source.points(tmp_path, ["t0001", "t0004"], best=False)
    assert content(tmp_path).keys() == set(FILES)
    (job,) = submitted
    sent = ["tuner", "send", str(study), "--adapters", "--trial", "t0001", "--trial", "t0004"]
    assert shlex.split(job["entrypoint"]) == sent
    assert "study" not in job["metadata"], "it is no search"
    assert head.stopped == []


@pytest.fixture
def from_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Head], list[object]]:
    """Makes a head that of an address, and gives the options to export from it."""

    def options(head: Head) -> list[object]:
        for action in ("jobs", "places"):
            monkeypatch.setattr(f"tuner.commands.actions.{action}.connect", lambda address: Cluster(head))  # type: ignore[arg-type]
        return ["export", STUDY, "--address", "http://head:8265", "--out", tmp_path / "out"]

    return options


def test_a_closed_hand_leaves_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_head: Callable[[Head], list[object]]
) -> None:
    """Ctrl-C in the middle: the head's job is ended, and nothing is where the adapters were to be."""

    def interrupted() -> Iterator[str]:
        yield from list(bundle_lines(study, FILES))[:5]
        signal.raise_signal(signal.SIGINT)
        yield "a line that comes too late"

    head = Head(study, interrupted)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    assert tuner(monkeypatch, *from_head(head)) == 130
    assert len(head.stopped) == 1
    assert content(tmp_path) == {} and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["tuner: /runs/far: no study here"], "tuner: /runs/far: no study here"),
        (["bash: tuner: command not found"], "the head sent nothing; is `tuner` installed there?"),
        ([file_line("adapters/t0001/../../../evil", b"{}")], "is no file of a study; nothing of it was kept"),
        (WHOLE, "journal|damaged|no front"),
    ],
)
def test_a_head_that_cannot_or_will_not(
    lines: list[str],
    said: str,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    from_head: Callable[[Head], list[object]],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Head, "get_job_logs", lambda self, job: "\n".join([json_start(self.study), *lines]))
    assert tuner(monkeypatch, *from_head(Head(study, lambda: iter([json_start(study), *lines])))) == 2
    assert re.search(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def json_start(study: Path) -> str:
    plan = {"study": STUDY, "space": "attention_only", "objectives": ["recall@10"], "trials": 2, "epochs": 2}
    return json.dumps({"event": "study_started", **plan, "run_dir": str(study)})


# A real cluster


@pytest.fixture(scope="module")
def address(study: Path) -> Iterator[str]:
    """A head whose one search is that of the study: it has said where it is, and ended."""
    with local_head() as address:
        cluster = connect(address)
        said = f"print({json_start(study)!r})"
        entrypoint = shlex.join([sys.executable, "-c", said])
        metadata = {"study": STUDY, "space": "attention_only", "encoder": "tiny", "user": "me"}
        cluster.follow(cluster.find(STUDY, cluster.start(entrypoint=entrypoint, metadata=metadata)), lambda line: None)
        yield address


@pytest.mark.timeout(600)
def test_from_a_cluster_to_a_laptop(
    address: str,
    study: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The page says the same as one drawn there; the adapters are the very files, and can be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNER_ADDRESS", address)
    assert tuner(monkeypatch, "report", STUDY) == 0
    page = (tmp_path / f"{STUDY}.html").read_text()
    for point in points_of(study).values():
        assert f"{point.trainable_parameters:,}" in page and f"{point.test.value('recall@10'):.3f}" in page
    assert str(study) not in page, "that folder is not on this machine"

    assert tuner(monkeypatch, "export", STUDY) == 0
    check_exported(tmp_path / f"{STUDY}-adapters", study, ["t0000", "t0001"])
    tensors = load_file(tmp_path / f"{STUDY}-adapters/t0001/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == points_of(study)["t0001"].lora_parameters
    capsys.readouterr()
    adapters = (tmp_path / f"{STUDY}-adapters/t0001", study / "adapters/t0001")
    measured = []
    for adapter in adapters:
        assert tuner(monkeypatch, "evaluate", adapter, "--data", tiny.store_folder, "--split", "validation") == 0
        measured.append(capsys.readouterr().out)
    assert measured[0] == measured[1]

    assert tuner(monkeypatch, "studies") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["STUDY", STUDY]


def test_what_the_head_cannot_find_is_its_sentence(
    address: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["report", "lost", "--address", address]
    assert tuner(monkeypatch, *given) == 2
    assert f"study lost: not on this cluster, which knows {STUDY}" in capsys.readouterr().err
    # A cluster that was started again knows no search, but its disk may have the study.
    assert tuner(monkeypatch, *given, "--runs", study.parent) == 2
    assert f"{study.parent}/lost: no study here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_study_here_is_not_looked_for_there(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """TUNER_ADDRESS is set for `tuner status` and its like."""
    monkeypatch.setenv("TUNER_ADDRESS", "http://127.0.0.1:9")
    assert tuner(monkeypatch, "report", study, "--out", tmp_path / "page.html") == 0
    assert tuner(monkeypatch, "report", study, "--address", "http://127.0.0.1:9") == 2
    assert "no Ray dashboard answers" in capsys.readouterr().err


def test_a_missing_file_names_the_adapter(study: Path, tmp_path: Path) -> None:
    folder = write_copy(study, tmp_path / STUDY)
    (folder / "adapters/t0001/card.json").unlink()
    found = Study.open(folder)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(AdapterError, match=f"{STUDY}/adapters/t0001/card.json: missing"):
        write_handover(found, choose_points(found), folder, out)
