"""A running search seen from outside: every panel of the dashboard by Debian's Prometheus, actors, Train runs and logs
by Ray's own API."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tiny
from loopback_host import free_port
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES  # type: ignore[attr-defined]
from searches import PATIENCE, STUDY, Driver, read_journal

from tuner.loopback import TOKEN_FILE
from tuner.search.driver import ASKS_FOR_TOKEN
from tuner.service.dashboards.monitoring import DASHBOARDS, dashboard, write_monitoring

TOKEN = "c0ffee" * 8
LANE = f"tuner-lane-{STUDY}-0"
# What Ray's agent and a lane would tell of a GPU that this machine need not have.
GPU_LABELS = f'study="{STUDY}",space="attention_only",lane="{LANE}",rank="0"'
DECLARED = f"""
ray_node_gpus_utilization{{ip="10.0.0.9",GpuIndex="0",GpuDeviceName="declared"}} 87
ray_tuner_lane_up{{{GPU_LABELS},ip="10.0.0.9",pid="1",actor="a",GpuIndex="0"}} 1
ray_tuner_lane_gpu_memory_bytes{{{GPU_LABELS},kind="tensors"}} 123456
"""

pytestmark = pytest.mark.timeout(600)


@dataclass
class Watched:
    """A search that runs, its Ray's dashboard, and a Prometheus that scrapes both it and a declared GPU."""

    driver: Driver
    folder: Path
    prometheus: str
    ray: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector of an expression, now."""
        answer = _json(f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expr})}")
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def until(self, ask: Callable[[], Any]) -> Any:
        """What `ask` says as soon as that is not empty; fails when it stays so, or when the search ends."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.driver.process.poll() is None, (self.folder / "err").read_text()
            if said := ask():
                return said
            time.sleep(0.3)
        raise AssertionError("nothing came")

    def api(self, path: str) -> Any:
        """What Ray's dashboard answers."""
        return _json(self.ray + path)

    def actors(self) -> list[dict[str, Any]]:
        """As the state API shows them, those alive."""
        listed = self.api("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
        return [actor for actor in listed if actor["state"] == "ALIVE"]


def _json(url: str, token: str | None = TOKEN) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def watched(tiny: Tiny) -> Iterator[Watched]:
    # pytest's own folders are too deep: Ray's sockets may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="tuner-") as name, declared_gpu() as gpu_port:
        folder = Path(name)
        port = free_port()
        write_monitoring(folder / "m", folder / "ray", port, 3000)
        with search(folder, tiny) as driver, prometheus(folder, port, gpu_port) as address:
            watched = Watched(driver, folder, address, "")
            event = watched.until(lambda: (folder / "out").read_text().partition("\n")[0])
            watched.ray = json.loads(event)["dashboard_url"]
            yield watched


@contextmanager
def search(folder: Path, tiny: Tiny) -> Iterator[Driver]:
    """A search that goes on until it is killed, with two adapters in its lane."""
    token = folder / TOKEN_FILE
    token.parent.mkdir()
    token.write_text(TOKEN)
    # As Ray would have left it.
    token.chmod(0o644)
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    environment = unset | {
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "TUNER_CACHE": str(folder / "cache"),
        # Ray publishes every ten seconds, which is long for a test, and forgets a gauge after two such times.
        "RAY_metrics_report_interval_ms": "5000",
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(folder / "m" / DASHBOARDS),
    }
    given = ["--data", tiny.store_folder, "--batch-size", 12, "--precision", "fp32", "--study", STUDY, "--pack", 2]
    options = [*given, "--trials", 100_000, "--epochs", 3, "--runs", folder / "runs", "--dashboard", "--json"]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "search", *map(str, options)],
            env=environment,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
    driver = Driver(process, folder / "runs" / STUDY)
    try:
        yield driver
    finally:
        driver.kill()


@contextmanager
def prometheus(folder: Path, port: int, gpu_port: int) -> Iterator[str]:
    """Debian's Prometheus with the file that `tuner cluster monitoring` wrote, in more of a hurry."""
    program = shutil.which("prometheus") or Path(sys.prefix) / "prometheus/usr/bin/prometheus"
    assert Path(program).exists(), "these tests need Debian's prometheus; `make prometheus` brings it"
    file = folder / "m/prometheus.yml"
    values = yaml.safe_load(file.read_text())
    values["global"]["scrape_interval"] = "1s"
    values["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "1s"
    values["scrape_configs"].append(
        {"job_name": "declared", "static_configs": [{"targets": [f"127.0.0.1:{gpu_port}"]}]}
    )
    file.write_text(yaml.safe_dump(values))
    command = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    process = subprocess.Popen(
        [*map(str, command), f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@contextmanager
def declared_gpu() -> Iterator[int]:
    """A node's metrics as they would be with a GPU; yields the port."""

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(DECLARED.lstrip().encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


DASHBOARD = json.loads(dashboard())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("title", "expr"), QUERIES, ids=[title for title, _ in QUERIES])
def test_every_query_of_every_panel_returns_data(title: str, expr: str, watched: Watched) -> None:
    """As Grafana asks, with all studies and an interval of several scrapes."""
    asked = expr.replace("$study", ".*").replace("$__rate_interval", "30s")
    assert "$" not in asked, "a variable that this test does not know"
    for item in watched.until(lambda: watched.query(asked)):
        float(item["value"][1])


def test_the_study_variable_lists_the_study(watched: Watched) -> None:
    (variable,) = (item for item in DASHBOARD["templating"]["list"] if item["name"] == "study")
    assert variable["query"] == "label_values(ray_tuner_trials, study)"
    asked = urllib.parse.urlencode({"match[]": "ray_tuner_trials"})
    values = watched.until(lambda: _json(f"{watched.prometheus}/api/v1/label/study/values?{asked}")["data"])
    assert values == [STUDY]


def test_figures_are_those_of_the_search(watched: Watched) -> None:
    watched.driver.until(lambda epochs: len(epochs) > 12)

    def value(expr: str) -> float:
        (item,) = watched.until(lambda: watched.query(expr))
        return float(item["value"][1])

    complete = value('ray_tuner_trials{state="complete"}')
    ended = [event for event in read_journal(watched.driver.study) if event["event"] == "trial_ended"]
    assert 0 < complete <= len(ended)
    assert value('ray_tuner_trials{state="running"}') <= 2
    assert {item["metric"]["slot"] for item in watched.query("ray_tuner_trial_recall")} <= {"0", "1"}
    epochs = [event for event in read_journal(watched.driver.study) if event["event"] == "epoch_done"]
    assert value("ray_tuner_best_recall") == pytest.approx(max(event["metrics"]["recall@10"] for event in epochs))
    assert 0 < value("ray_tuner_epochs") <= len(epochs)
    assert value("ray_tuner_front_hypervolume") > 1
    assert 50e6 < value(f'ray_tuner_lane_memory_bytes{{lane="{LANE}"}}') < 5e9
    assert value("ray_tuner_prefix_read_bytes_total") > 0


def test_the_declared_gpu_is_named_as_ray_names_a_real_one() -> None:
    """The join of the GPU panel rests on a metric and on labels of Ray's."""
    assert "node_gpus_utilization" in METRICS_GAUGES
    assert {"ip", "GpuIndex"} <= set(GPU_TAG_KEYS)


def test_gpu_use_is_that_of_the_lane(watched: Watched) -> None:
    (panel,) = (panel for panel in PANELS if panel["title"] == "GPU use")
    (item,) = watched.until(lambda: watched.query(panel["targets"][0]["expr"].replace("$study", STUDY)))
    assert (item["metric"]["lane"], item["value"][1]) == (LANE, "87")


def test_grafana_finds_our_dashboard_beside_rays(watched: Watched) -> None:
    """With the folder given to Ray, its own provider shows ours; with our provisioning, both places are shown."""
    session = watched.folder / "ray/session_latest"
    rays_own = yaml.safe_load((session / "metrics/grafana/provisioning/dashboards/default.yml").read_text())
    place = Path(rays_own["providers"][0]["options"]["path"])
    watched.until((place / "default_grafana_dashboard.json").exists)
    assert json.loads((place / "tuner.json").read_text())["uid"] == "tuner"
    ours = yaml.safe_load((watched.folder / "m/grafana/provisioning/dashboards/tuner.yml").read_text())
    places = {provider["name"]: provider["options"]["path"] for provider in ours["providers"]}
    assert places == {"tuner": str(place), "Ray": str(session / "metrics/grafana/dashboards")}


# Ray's own dashboard


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("decaf" * 8, 403)])
def test_the_dashboard_answers_nobody_without_the_users_token(watched: Watched, token: str | None, status: int) -> None:
    """With it, it does so in all other tests."""
    for path in ("/api/jobs/", "/api/v0/actors", "/api/train/v2/runs/v1"):
        with pytest.raises(urllib.error.HTTPError) as raised:
            _json(watched.ray + path, token)
        with raised.value as answer:
            assert answer.code == status


def test_a_search_says_how_to_learn_the_token_and_not_the_token(watched: Watched) -> None:
    lines = (watched.folder / "out").read_text().splitlines(keepends=True)
    said = [json.loads(line) for line in lines if line.endswith("}\n")]
    assert [event["text"] for event in said if "token" in event.get("text", "")] == [ASKS_FOR_TOKEN]
    assert TOKEN not in (watched.folder / "out").read_text() + (watched.folder / "err").read_text()
    assert stat.S_IMODE((watched.folder / TOKEN_FILE).stat().st_mode) == 0o600


def test_actors_say_what_they_are(watched: Watched) -> None:
    watched.driver.until(lambda epochs: len(epochs) > 0)
    shown = {(actor["class_name"], actor["name"], actor["repr_name"]) for actor in watched.actors()}
    assert ("Coordinator", f"tuner-coordinator:{STUDY}", "") in shown
    assert ("Lane", "", LANE) in shown
    assert ("TrialClient", "", f"tuner-trial-client:{STUDY}") in shown


def test_lanes_are_train_runs_under_their_names(watched: Watched) -> None:
    watched.driver.until(lambda epochs: len(epochs) > 0)
    (run,) = watched.until(lambda: watched.api("/api/train/v2/runs/v1")["train_runs"])
    assert (run["name"], run["status"]) == (LANE, "RUNNING")
    (worker,) = run["attempts"][-1]["workers"]
    (lane,) = (actor for actor in watched.actors() if actor["class_name"] == "Lane")
    assert (worker["actor_id"], worker["pid"]) == (lane["actor_id"], lane["pid"])


def test_the_table_of_workers_leads_to_their_logs(watched: Watched) -> None:
    """The actor that Prometheus names is the one in Ray's dashboard, and its log has a line for each epoch."""
    watched.driver.until(lambda epochs: len(epochs) > 0)
    (up,) = watched.until(lambda: watched.query(f'ray_tuner_lane_up{{study="{STUDY}",ip!="10.0.0.9"}}'))
    (lane,) = (actor for actor in watched.actors() if actor["class_name"] == "Lane")
    assert (up["metric"]["actor"], up["metric"]["pid"]) == (lane["actor_id"], str(lane["pid"]))
    (log,) = (watched.folder / "ray/session_latest/logs").glob(f"worker-*-{lane['pid']}.out")
    text = log.read_text()
    assert f"{LANE}, worker 0 of 1: fp32 on cpu" in text
    assert "t0001 attached at epoch 0: {" in text
    assert "t0000 epoch 1: loss " in text
