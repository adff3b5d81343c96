"""The pictures of docs/screenshots: a small real search on a Ray head of this machine, as a headless Chromium sees it.

Chromium is steered through its own DevTools protocol, so that a page can be waited for instead of guessed at.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from benchmarks import run
from benchmarks.local_head import local_head
from benchmarks.share import make_share
from tuner.service.jobs.cluster import StudyJob, connect
from tuner.study.folder import StudyFolder

FOLDER = Path(__file__).resolve().parents[1] / "docs/screenshots"
TUNER = Path(sys.executable).parent / "tuner"
STUDY = "stamps"
CLIPS = {"train": 100, "validation": 50, "test": 50}
WIDTH, HEIGHT = 1280, 800
PATIENCE = 600.0  # seconds for a page to show what it should, on a busy machine
MAX_BYTES = 200_000


class Tab:
    """A page of Chromium's."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    async def open(self, url: str, ready: str, height: int = HEIGHT) -> None:
        """Show a page and wait until an expression about it is true."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False
        )
        # The dashboard is one page: without this, another place in it would keep what the last one had loaded.
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=url)
        await self.wait(ready)

    async def wait(self, ready: str) -> None:
        """Wait until an expression about the page is true."""
        deadline = time.monotonic() + PATIENCE
        while not await self.evaluate(f"Boolean({ready})"):
            if time.monotonic() > deadline:
                shown = await self.evaluate("document.body.innerText")
                raise RuntimeError(f"{ready} did not come true; the page shows {shown!r}")
            await asyncio.sleep(0.5)

    async def save(self, path: Path) -> None:
        """Save what is seen, with few colours, which is enough for text and lines."""
        # Charts fade in, and tables settle.
        await asyncio.sleep(1.5)
        image = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(image["data"]))
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RuntimeError(f"{path}: {size} bytes are too many for a repository")
        typer.echo(f"{path.name}: {size:,} bytes")


@asynccontextmanager
async def chromium() -> AsyncIterator[Tab]:
    """A headless Chromium with one tab, which reaches nothing but this machine."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise RuntimeError("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="tuner-", ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            told = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + PATIENCE
            while not told.exists() or "\n" not in told.read_text():
                assert time.monotonic() < deadline and process.poll() is None, "Chromium did not start"
                await asyncio.sleep(0.2)
            port = told.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    (page,) = [item for item in await answer.json() if item["type"] == "page"]
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            process.terminate()
            process.wait(timeout=30)


def prepare(folder: Path) -> Path:
    """A share of the demo as a store."""
    share = make_share(folder, CLIPS)
    encoders = ["--encoder", str(share.audio_encoder), "--text-encoder", str(share.text_encoder)]
    command = [str(TUNER), "prepare", str(share.manifest), *encoders, "--out", str(folder / "store")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "store"


def submit(address: str, store: Path, runs: Path, trials: int) -> StudyJob:
    """Start the search as a laptop does, and leave it there."""
    options = ["--address", address, "--data", str(store), "--runs", str(runs), "--study", STUDY, "--batch-size", "24"]
    options += ["--trials", str(trials), "--epochs", "3"]
    process = subprocess.Popen([str(TUNER), "search", *options], stdout=subprocess.DEVNULL)
    cluster = connect(address)
    try:
        while not [job for job in cluster.studies() if job.study == STUDY]:
            assert process.poll() is None, "the search was not taken"
            time.sleep(0.5)
        return cluster.find(STUDY)
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def live_report(runs: Path) -> Any:
    """`tuner report --live` of the study; gives its URL."""
    command = [str(TUNER), "report", STUDY, "--runs", str(runs), "--live"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield re.split(r"\s", process.stdout.readline())[0]
        finally:
            process.terminate()


async def take(address: str, runs: Path, job: StudyJob, folder: Path) -> None:
    """All pictures, in the order in which the search gets to what they show."""
    seen = "document.body.innerText.includes"
    async with chromium() as tab:
        journal = StudyFolder(runs / STUDY).journal
        while not journal.exists() or '"epoch_done"' not in journal.read_text():
            await asyncio.sleep(1)
        await tab.open(f"{address}/#/jobs", f"{seen}({json.dumps(job.submission_id)})", 660)
        await tab.save(folder / "jobs.png")
        await tab.open(f"{address}/#/actors", f"{seen}('Coordinator') || {seen}('coordinator')", 1420)
        await tab.save(folder / "actors.png")
        with live_report(runs) as url:
            await tab.open(url, f"{seen}(' of ') && document.querySelectorAll('svg.marks').length >= 3", 1300)
            ended = "Number(/^(\\d+) of/.exec(document.getElementById('live').innerText)?.[1])"
            await tab.wait(f"{ended} >= 2 || {seen}('Points to choose from')")
            await tab.save(folder / "live-report.png")
            listed = connect(address).client.list_jobs()
            (details,) = [item for item in listed if item.submission_id == job.submission_id]
            await tab.open(f"{address}/#/jobs/{details.job_id}", f"{seen}('User-provided metadata')", 900)
            await tab.save(folder / "job.png")
            await tab.open(url, f"{seen}('the search has ended') && {seen}('Points to choose from')", 1300)
            await tab.save(folder / "finished-report.png")


def main(
    folder: Annotated[Path, typer.Option(help="where the pictures go")] = FOLDER,
    trials: Annotated[int, typer.Option(min=4, help="of the search that is seen")] = 5,
) -> None:
    """Run a small search on the demo and take the pictures of docs/screenshots."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tuner-", ignore_cleanup_errors=True) as name, local_head() as address:
        runs = Path(name) / "runs"
        job = submit(address, prepare(Path(name)), runs, trials)
        asyncio.run(take(address, runs, job, folder))
        connect(address).follow(job, lambda line: None)


if __name__ == "__main__":
    run(main)
