"""The report page: what it says, that it is whole at every stage of a search, and that it runs nothing foreign."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from study_folder import HEAD, HOSTILE, edit_journal, edit_json, edit_points, write_run

from tuner.errors import StudyError
from tuner.report.answer import headline
from tuner.report.charts import all_charts, save_front_svg
from tuner.report.html import write_report
from tuner.study.points import ConfirmedFront, Point, Scores
from tuner.study.study import Study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Elements, attributes and text of a page, scripts kept apart from text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.scripts[-1] += data
        elif self._tag != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def charts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(write_report(finished).read_text(encoding="utf-8"))


def charted(spec: dict[str, Any], layer: int | None = None) -> list[dict[str, Any]]:
    """The values behind a chart or one of its layers, which Altair keeps at the top under a name."""
    view = spec if layer is None else spec["layer"][layer]
    values: list[dict[str, Any]] = spec["datasets"][(view.get("data") or spec["data"])["name"]]
    return values


def confirmed(study: Study) -> ConfirmedFront:
    assert study.front is not None
    return study.front


def best_of(study: Study) -> Point:
    return max(confirmed(study).points, key=lambda point: point.validation.value("recall@10") or 0.0)


def test_page_answers_in_its_first_sentence(finished: Path, page: Page) -> None:
    study = Study.open(finished)
    best = best_of(study)
    worth = best.test_vs_baseline["recall@10"]
    low, high = worth.interval
    sentence = headline(study)[0]
    assert sentence == (
        f"LoRA is worth {worth.difference:+.3f} recall@10 [{low:+.3f}, {high:+.3f}] "
        f"over the projection alone, at {best.lora_parameters:,} LoRA parameters "
        f"({best.lora_parameters + HEAD:,} trainable in all)."
    )
    assert sentence in page.text


def test_smallest_point_inside_the_interval_of_the_best(finished: Path) -> None:
    study = Study.open(finished)
    best = best_of(study)
    low = best.test.intervals["recall@10"][0]
    inside = [point for point in confirmed(study).points if (point.test.value("recall@10") or 0.0) >= low]
    smallest = min(inside, key=lambda point: point.trainable_parameters)
    assert smallest is not best
    assert f"is {smallest.trial} with {smallest.trainable_parameters:,}" in headline(study)[1]


def test_answer_admits_what_the_test_gallery_does_not_show(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    best = best_of(Study.open(folder)).trial
    unclear = {"recall@10": {"difference": 0.01, "interval": [-0.01, 0.03]}}
    edit_points(folder, **{best: {"test_vs_baseline": unclear}})
    assert "interval contains zero" in headline(Study.open(folder))[1]
    loss = {"recall@10": {"difference": -0.02, "interval": [-0.03, -0.01]}}
    edit_points(folder, **{best: {"test_vs_baseline": loss}})
    assert "worse on test" in headline(Study.open(folder))[1]
    edit_points(folder, t0000={"validation": {"recall@10": 0.99}})
    assert headline(Study.open(folder)) == [
        "No LoRA configuration was better than the projection alone in recall@10 on validation."
    ]


def test_table_holds_every_point_with_its_measurements(finished: Path, page: Page) -> None:
    for point in confirmed(Study.open(finished)).points:
        low, high = point.test.intervals["recall@10"]
        assert point.adapter is not None
        for shown in (
            point.trial,
            point.adapter,
            f"{point.test.value('recall@10'):.3f}",
            f"[{low:.3f}, {high:.3f}]",
        ):
            assert shown in page.text
    assert "tuner evaluate" in page.text and "--data store/demo" in page.text
    assert "520 audio 410 text" in page.text


def test_failed_trials_give_their_reason(page: Page) -> None:
    section = page.text.split("Failed trials")[1]
    assert section.split("Settings")[0].split()[:4] == ["trial", "epochs", "reason", "t0003"]
    assert "the loss became NaN; lower optim.lora_lr <img src=x onerror=alert(1)>" in section


def test_page_loads_nothing_from_outside(finished: Path, page: Page) -> None:
    policy = next(
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "-src" in value
    )
    assert policy.startswith("default-src 'none';") and ":/" not in policy
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert not [attribute for attribute in page.attributes if attribute[1] in loading]
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "://" not in html.replace(page.scripts[1], ""), "addresses may only stand inside the chart library"
    assert not re.search(r"@import|url\(", html.split("</style>")[0])


def hostile_targets(event: dict[str, Any]) -> None:
    lora = event.get("config", {}).get("lora")
    if lora is not None and lora["targets"] == ["q_proj", "v_proj"]:
        lora["targets"] = [HOSTILE]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo", name=HOSTILE)
    edit_points(folder, t0001={"adapter": HOSTILE, "target_modules": ['"><img src=x>']})
    edit_journal(folder, hostile_targets)
    html = write_report(folder).read_text(encoding="utf-8")
    parsed = Page(html)
    assert len(parsed.scripts) == 3 and not any("alert(" in script for script in parsed.scripts[1:])
    assert not [attribute for attribute in parsed.attributes if attribute[0] == "img"]
    assert HOSTILE in parsed.text
    assert HOSTILE in json.dumps(parsed.charts), "the value itself is still charted"


def test_no_field_of_a_study_becomes_markup(tmp_path: Path) -> None:
    """Whatever a name, a path, a reason or a setting holds, on the page and in the picture."""
    folder = write_run(tmp_path / "demo")

    def record(values: dict[str, Any]) -> None:
        values["study"] = HOSTILE
        values["encoder"] |= dict.fromkeys(("family", "source", "shape"), HOSTILE)
        values["settings"]["store"] = values["settings"]["encoder"]["source"] = HOSTILE
        values["space"] |= {"name": HOSTILE, "description": HOSTILE}
        values["space"]["target_sets"][HOSTILE] = ["q_proj"]

    def events(event: dict[str, Any]) -> None:
        hostile_targets(event)
        if event["trial"] == "t0013" and event["event"] == "trial_started":
            event["origin"] = HOSTILE
        if event["trial"] == "t0013" and event["event"] == "trial_ended":
            event |= {"state": "failed", "reason": HOSTILE}

    edit_json(folder / "study.json", record)
    edit_journal(folder, events)
    edit_points(folder, t0001={"adapter": HOSTILE, "origin": HOSTILE, "target_modules": [HOSTILE]})
    parsed = Page(write_report(folder).read_text(encoding="utf-8"))
    assert len(parsed.scripts) == 3 and not any("alert(" in script for script in parsed.scripts[1:])
    assert parsed.text.count(HOSTILE) > 10
    assert not [value for _, name, value in parsed.attributes if name.startswith("on") or "javascript:" in value]
    save_front_svg(Study.open(folder), folder / "front.svg")
    picture = ElementTree.parse(folder / "front.svg")
    assert not [element for element in picture.iter() if element.tag.endswith("script")]


def test_commands_to_paste_are_quoted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    edit_json(folder / "study.json", lambda record: record["settings"].update(store="store; rm -rf ~"))
    (command,) = re.findall(r"tuner evaluate .*--data .*", unescape(write_report(folder).read_text()))
    assert "--data 'store; rm -rf ~'" in command


def test_charts_hold_the_trials(finished: Path, page: Page) -> None:
    charts = page.charts
    assert {"front", "curves", "progress"} <= set(charts)
    study = Study.open(finished)
    assert sum(key.startswith("dimension-") for key in charts) == len(study.searched) == 4
    steps, points, _, tests = (charted(charts["front"], layer) for layer in range(4))
    assert {item["trial"] for item in points} == {trial.trial for trial in study.measured}
    assert "t0003" not in {item["trial"] for item in points}
    assert {item["trial"] for item in steps} == study.on_front
    assert charts["front"]["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"
    assert {item["trial"] for item in tests} == {point.trial for point in confirmed(study).points}
    assert all(item["low"] < item["test"] < item["high"] for item in tests)
    roles = {item["trial"]: item["role"] for item in points}
    assert (roles["t0000"], roles["t0001"]) == ("projection only", "recommended")


def test_axes_of_counts_have_whole_numbers_alone(finished: Path) -> None:
    charts = all_charts(Study.open(finished))
    assert charts["curves"]["layer"][0]["encoding"]["x"]["axis"]["values"] == [1, 2, 3, 4, 5, 6]
    trials = charts["progress"]["encoding"]["x"]["axis"]["values"]
    assert trials == [1, 3, 5, 7, 9, 11, 13], "of 13 trials with a result, as many as can be read"


def test_a_single_trial_has_room_around_it(tmp_path: Path) -> None:
    """A scale from 0.38 to 0.38 has no ticks that can be read."""
    study = Study.open(write_run(tmp_path / "demo", front=False, trials=1))
    low, high = all_charts(study)["front"]["layer"][1]["encoding"]["y"]["scale"]["domain"]
    assert low < study.measured[0].value("recall@10") < high


def test_searched_values_keep_the_scale_of_the_space(finished: Path) -> None:
    study = Study.open(finished)
    charts = all_charts(study)
    scales = {path: charts[f"dimension-{i}"]["encoding"]["x"] for i, path in enumerate(study.searched)}
    assert scales["lora.rank"]["scale"]["type"] == "log"
    assert scales["lora.dropout"]["scale"]["type"] == "linear"
    assert scales["lora.targets"]["type"] == "nominal"
    values = charted(charts[f"dimension-{study.searched.index('lora.targets')}"])
    assert {item["setting"] for item in values} == {"attention", "query_value"}


def test_dominated_area_counts_parameters_in_decades_and_never_shrinks(finished: Path) -> None:
    """From a corner that is the same for every search: recall 0 at a thousand million parameters."""
    study = Study.open(finished)
    reached = [item["reached"] for item in charted(all_charts(study)["progress"])]
    assert reached == sorted(reached) and reached[-1] > reached[1]
    # The projection alone is one rectangle; the recommendation reaches higher on a narrower one.
    first, second = (trial.value("recall@10") for trial in study.measured[:2])
    wide, narrow = (9 - math.log10(trial.parameters or 0) for trial in study.measured[:2])
    assert first < second and wide > narrow
    assert reached[0] == pytest.approx(first * wide)
    assert reached[1] == pytest.approx(first * wide + (second - first) * narrow)


def test_front_of_a_running_search_is_computed_from_complete_trials(tmp_path: Path) -> None:
    chosen = Study.open(write_run(tmp_path / "confirmed")).on_front
    (tmp_path / "confirmed" / "front.json").unlink()
    assert Study.open(tmp_path / "confirmed").on_front == chosen
    folder = write_run(tmp_path / "running", front=False, trials=6)

    def unbeaten(event: dict[str, Any]) -> None:
        if event["trial"] == "t0005" and event["event"] == "epoch_done":
            event["metrics"]["recall@10"] = 0.99

    edit_journal(folder, unbeaten)
    running = Study.open(folder)
    assert running.trials[-1].state == "running" and running.trials[-1].value("recall@10") == 0.99
    assert "t0005" not in running.on_front


def test_page_of_a_running_search(tmp_path: Path) -> None:
    parsed = Page(write_report(write_run(tmp_path / "demo", front=False, trials=6)).read_text(encoding="utf-8"))
    assert "5 of 6 started trials have ended." in parsed.text
    assert "over the projection alone" in parsed.text and "Points to choose from" not in parsed.text
    assert len(parsed.charts["front"]["layer"]) == 2


@pytest.mark.parametrize("front", [False, True])
def test_page_before_the_first_trial(tmp_path: Path, front: bool) -> None:
    folder = write_run(tmp_path / "demo", front=False, trials=0)
    if front:
        empty = {"study": "demo", "objectives": [], "baseline": "t0000", "points": []}
        (folder / "front.json").write_text(json.dumps(empty), encoding="utf-8")
    parsed = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "No trial has started yet." in parsed.text and parsed.scripts == []


def test_page_of_a_single_objective(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo", objectives=1)
    parsed = Page(write_report(folder).read_text(encoding="utf-8"))
    study = Study.open(folder)
    assert len(study.on_front) == 1
    reached = [item["reached"] for item in charted(parsed.charts["progress"])]
    assert reached[-1] == pytest.approx(max(trial.value("recall@10") for trial in study.measured))
    assert "Best recall@10 on validation so far" in parsed.text


def test_metrics_are_found_at_the_top_and_by_direction() -> None:
    measured = Scores.model_validate(
        {"recall@10": 0.4, "recall@5": "high", "audio_to_text": {"R@10": 0.5}, "text_to_audio": {"R@10": math.nan}}
    )
    assert measured.value("recall@10") == 0.4
    assert measured.value("audio_to_text_R@10") == 0.5
    for absent in ("text_to_audio_R@10", "audio_to_text_R@1", "recall@5", "recall@1"):
        assert measured.value(absent) is None
    flat = {"recall@10": 0.4, "audio_to_text_R@10": 0.5, "text_to_audio_R@10": 0.3}
    assert all(Scores.of(flat).value(name) == value for name, value in flat.items())


@pytest.mark.parametrize("file", ["study.json", "front.json"])
def test_damaged_files_are_named_and_the_old_page_stays(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "demo")
    before = write_report(folder).read_bytes()
    (folder / file).write_text("{ torn", encoding="utf-8")
    with pytest.raises(StudyError, match=rf"{re.escape(file)}: is damaged"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_the_page_is_drawn_from_the_journal_alone(tmp_path: Path) -> None:
    """The table is for other programs; of a torn journal, what can be read is drawn."""
    folder = write_run(tmp_path / "demo")
    (folder / "trials.parquet").write_text("no table")
    before = Page(write_report(folder).read_text(encoding="utf-8"))
    lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "journal.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    after = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "t0013" in before.text.split("All trials")[1] and "running" not in before.text
    assert "t0013" in after.text.split("All trials")[1] and "running" in after.text, "its end was torn off"


def test_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study here"):
        write_report(tmp_path)


def test_front_as_svg(finished: Path, tmp_path: Path) -> None:
    save_front_svg(Study.open(finished), tmp_path / "front.svg")
    root = ElementTree.parse(tmp_path / "front.svg").getroot()
    assert root.tag.endswith("svg") and float(root.attrib["width"]) >= 640
    drawn = "".join(root.itertext())
    assert "trainable parameters" in drawn and "recall@10" in drawn and "recommended" in drawn
    assert [path.name for path in tmp_path.iterdir()] == ["front.svg"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_draws_every_chart_without_a_network(finished: Path, page: Page, tmp_path: Path) -> None:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", (finished / "report.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "Cannot draw this chart" not in drawn.split("<script")[0]
    assert len(re.findall(r"<svg[^>]*class=\"marks\"", drawn)) == len(page.charts)


def test_a_point_says_which_part_it_adapts(tmp_path: Path) -> None:
    """In the table and in the chart's tooltip; of the tower, as most are, nothing is said."""
    folder = write_run(tmp_path / "parts")
    adapted = next(point for point in confirmed(Study.open(folder)).points if point.config.lora)

    def record(values: dict[str, Any]) -> None:
        values["encoder"] |= {"shape": "3 blocks of width 32, then 2 blocks of width 40", "path": "full_forward"}

    def front(values: dict[str, Any]) -> None:
        point = next(point for point in values["points"] if point["trial"] == adapted.trial)
        point["config"]["lora"]["placement"] = "language_model"

    def both(event: dict[str, Any]) -> None:
        if event["event"] == "trial_started" and event["trial"] == adapted.trial:
            event["config"]["lora"]["placement"] = "both"

    edit_json(folder / "study.json", record)
    edit_json(folder / "front.json", front)
    edit_journal(folder, both)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert text.count(" in the language model") == 1
    assert "whisper, 3 blocks of width 32, then 2 blocks of width 40 (full_forward)" in text
    assert json.dumps(all_charts(Study.open(folder))).count(" in tower and language model") >= 1
