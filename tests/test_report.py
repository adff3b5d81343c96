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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_folder import HEAD, HOSTILE, write_run

from tuner.errors import StudyError
from tuner.report.answer import headline
from tuner.report.charts import all_charts, save_front_svg
from tuner.report.html import write_report
from tuner.report.run import metric_of, read_run

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


def edit_front(folder: Path, **changes: dict[str, Any]) -> None:
    """Change fields of front points by trial."""
    front = json.loads((folder / "front.json").read_text(encoding="utf-8"))
    for point in front["points"]:
        point.update(changes.get(point["trial"], {}))
    (folder / "front.json").write_text(json.dumps(front), encoding="utf-8")


def test_page_answers_in_its_first_sentence(finished: Path, page: Page) -> None:
    front = json.loads((finished / "front.json").read_text(encoding="utf-8"))
    best = max(front["points"], key=lambda point: point["validation"]["recall@10"])
    worth = best["test_vs_baseline"]["recall@10"]
    low, high = worth["interval"]
    sentence = headline(read_run(finished))[0]
    assert sentence == (
        f"LoRA is worth {worth['difference']:+.3f} recall@10 [{low:+.3f}, {high:+.3f}] "
        f"over the projection alone, at {best['lora_parameters']:,} LoRA parameters "
        f"({best['lora_parameters'] + HEAD:,} trainable in all)."
    )
    assert sentence in page.text


def test_smallest_point_inside_the_interval_of_the_best(finished: Path) -> None:
    points = json.loads((finished / "front.json").read_text(encoding="utf-8"))["points"]
    best = max(points, key=lambda point: point["validation"]["recall@10"])
    inside = [p for p in points if p["test"]["recall@10"] >= best["test"]["intervals"]["recall@10"][0]]
    smallest = min(inside, key=lambda point: point["trainable_parameters"])
    assert smallest is not best
    assert f"is {smallest['trial']} with {smallest['trainable_parameters']:,}" in headline(read_run(finished))[1]


def test_answer_admits_what_the_test_gallery_does_not_show(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    best = max(json.loads((folder / "front.json").read_text())["points"], key=lambda p: p["validation"]["recall@10"])
    unclear = {"recall@10": {"difference": 0.01, "interval": [-0.01, 0.03]}}
    edit_front(folder, **{best["trial"]: {"test_vs_baseline": unclear}})
    assert "interval contains zero" in headline(read_run(folder))[1]
    loss = {"recall@10": {"difference": -0.02, "interval": [-0.03, -0.01]}}
    edit_front(folder, **{best["trial"]: {"test_vs_baseline": loss}})
    assert "did not hold on test" in headline(read_run(folder))[1]
    edit_front(folder, t0000={"validation": {"recall@10": 0.99}})
    assert headline(read_run(folder)) == [
        "No LoRA configuration was better than the projection alone in recall@10 on validation."
    ]


def test_table_holds_every_point_with_its_measurements(finished: Path, page: Page) -> None:
    for point in json.loads((finished / "front.json").read_text(encoding="utf-8"))["points"]:
        low, high = point["test"]["intervals"]["recall@10"]
        for shown in (
            point["trial"],
            point["adapter"],
            f"{point['test']['recall@10']:.3f}",
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


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo", name=HOSTILE)
    edit_front(folder, t0001={"adapter": HOSTILE, "target_modules": ['"><img src=x>']})
    table = pq.read_table(folder / "trials.parquet")
    column = [HOSTILE if value == "q_proj,v_proj" else value for value in table["lora.targets"].to_pylist()]
    index = table.schema.get_field_index("lora.targets")
    pq.write_table(table.set_column(index, "lora.targets", [column]), folder / "trials.parquet")
    html = write_report(folder).read_text(encoding="utf-8")
    parsed = Page(html)
    assert len(parsed.scripts) == 3 and not any("alert(" in script for script in parsed.scripts[1:])
    assert not [attribute for attribute in parsed.attributes if attribute[0] == "img"]
    assert HOSTILE in parsed.text
    assert HOSTILE in json.dumps(parsed.charts), "the value itself is still charted"


def test_no_field_of_a_study_becomes_markup(tmp_path: Path) -> None:
    """Whatever a name, a path, a reason, a metric or a setting holds, on the page and in the picture."""
    folder = write_run(tmp_path / "demo")
    record = json.loads((folder / "study.json").read_text())
    record |= {"study": HOSTILE, "created": HOSTILE, "seed": HOSTILE}
    record["encoder"] |= dict.fromkeys(("family", "source", "shape", "path"), HOSTILE)
    record["settings"]["store"] = record["objectives"][0]["metric"] = HOSTILE
    record["space"] |= {"name": HOSTILE, "description": HOSTILE, "target_sets": {HOSTILE: ["q_proj", "v_proj"]}}
    (folder / "study.json").write_text(json.dumps(record))
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    for row in rows:
        row[HOSTILE] = row.pop("recall@10")
    rows[-1] |= {"state": "failed", "reason": HOSTILE, "origin": HOSTILE}
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    edit_front(folder, t0001={"adapter": HOSTILE, "origin": HOSTILE, "target_modules": [HOSTILE]})
    parsed = Page(write_report(folder).read_text(encoding="utf-8"))
    assert len(parsed.scripts) == 3 and not any("alert(" in script for script in parsed.scripts[1:])
    assert parsed.text.count(HOSTILE) > 10
    assert not [value for _, name, value in parsed.attributes if name.startswith("on") or "javascript:" in value]
    save_front_svg(read_run(folder), folder / "front.svg")
    picture = ElementTree.parse(folder / "front.svg")
    assert not [element for element in picture.iter() if element.tag.endswith("script")]
    assert HOSTILE in "".join(picture.getroot().itertext()), "as the title of an axis"


def test_commands_to_paste_are_quoted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    record = json.loads((folder / "study.json").read_text())
    record["settings"]["store"] = "store; rm -rf ~"
    (folder / "study.json").write_text(json.dumps(record))
    (command,) = re.findall(r"tuner evaluate .*--data .*", unescape(write_report(folder).read_text()))
    assert "--data 'store; rm -rf ~'" in command


@pytest.mark.parametrize("adapter", ["../../etc", "/etc", "adapters/../../x", 3])
def test_a_front_names_adapters_of_its_own_study(tmp_path: Path, adapter: object) -> None:
    folder = write_run(tmp_path / "demo")
    edit_front(folder, t0001={"adapter": adapter})
    with pytest.raises(StudyError, match=r"front\.json: damaged"):
        write_report(folder)


def test_charts_hold_the_trials(finished: Path, page: Page) -> None:
    charts = page.charts
    assert {"front", "curves", "progress"} <= set(charts)
    run = read_run(finished)
    assert sum(key.startswith("dimension-") for key in charts) == len(run.searched) == 4
    steps, points, _, tests = (charted(charts["front"], layer) for layer in range(4))
    assert {item["trial"] for item in points} == {trial.trial for trial in run.measured}
    assert "t0003" not in {item["trial"] for item in points}
    assert {item["trial"] for item in steps} == run.on_front
    assert charts["front"]["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"
    confirmed = (run.front or {})["points"]
    assert {item["trial"] for item in tests} == {point["trial"] for point in confirmed}
    assert all(item["low"] < item["test"] < item["high"] for item in tests)
    roles = {item["trial"]: item["role"] for item in points}
    assert (roles["t0000"], roles["t0001"]) == ("projection only", "recommended")


def test_axes_of_counts_have_whole_numbers_alone(finished: Path) -> None:
    charts = all_charts(read_run(finished))
    assert charts["curves"]["layer"][0]["encoding"]["x"]["axis"]["values"] == [1, 2, 3, 4, 5, 6]
    trials = charts["progress"]["encoding"]["x"]["axis"]["values"]
    assert trials == [1, 3, 5, 7, 9, 11, 13], "of 13 trials with a result, as many as can be read"


def test_a_single_trial_has_room_around_it(tmp_path: Path) -> None:
    """A scale from 0.38 to 0.38 has no ticks that can be read."""
    run = read_run(write_run(tmp_path / "demo", front=False, trials=1))
    low, high = all_charts(run)["front"]["layer"][1]["encoding"]["y"]["scale"]["domain"]
    assert low < (run.measured[0].value or 0.0) < high


def test_searched_values_keep_the_scale_of_the_space(finished: Path) -> None:
    run = read_run(finished)
    charts = all_charts(run)
    scales = {path: charts[f"dimension-{i}"]["encoding"]["x"] for i, path in enumerate(run.searched)}
    assert scales["lora.rank"]["scale"]["type"] == "log"
    assert scales["lora.dropout"]["scale"]["type"] == "linear"
    assert scales["lora.targets"]["type"] == "nominal"
    values = charted(charts[f"dimension-{run.searched.index('lora.targets')}"])
    assert {item["setting"] for item in values} == {"attention", "query_value"}


def test_dominated_area_counts_parameters_in_decades_and_never_shrinks(finished: Path) -> None:
    run = read_run(finished)
    reached = [item["reached"] for item in charted(all_charts(run)["progress"])]
    assert reached == sorted(reached) and reached[-1] > reached[1]
    # The projection alone has the worst recall and so no area; the second trial's is one rectangle.
    first, second = run.measured[:2]
    decades = 1 + math.log10(max(trial.parameters or 0 for trial in run.measured) / (second.parameters or 1))
    assert reached[0] == 0.0
    assert reached[1] == pytest.approx(((second.value or 0.0) - (first.value or 0.0)) * decades)


def test_front_of_a_running_search_is_computed_from_finished_trials(tmp_path: Path) -> None:
    confirmed = read_run(write_run(tmp_path / "confirmed"))
    (tmp_path / "confirmed" / "front.json").unlink()
    assert read_run(tmp_path / "confirmed").on_front == confirmed.on_front
    folder = write_run(tmp_path / "running", front=False, trials=6)
    table = pq.read_table(folder / "trials.parquet")
    unbeaten = [
        0.99 if trial == "t0005" else value
        for trial, value in zip(*(table[name].to_pylist() for name in ("trial", "recall@10")), strict=True)
    ]
    index = table.schema.get_field_index("recall@10")
    pq.write_table(table.set_column(index, "recall@10", [unbeaten]), folder / "trials.parquet")
    running = read_run(folder)
    assert running.trials[-1].state == "running" and running.trials[-1].value == 0.99
    assert "t0005" not in running.on_front


def test_page_of_a_running_search(tmp_path: Path) -> None:
    parsed = Page(write_report(write_run(tmp_path / "demo", front=False, trials=6)).read_text(encoding="utf-8"))
    assert "The search has ended 5 of the 6 trials it has started." in parsed.text
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
    assert len(read_run(folder).on_front) == 1
    reached = [item["reached"] for item in charted(parsed.charts["progress"])]
    assert reached[-1] == max(trial.value or 0.0 for trial in read_run(folder).measured)
    assert "Best recall@10 on validation so far" in parsed.text


def test_metrics_are_found_at_the_top_and_by_direction() -> None:
    measured = {"recall@10": 0.4, "audio_to_text": {"R@10": 0.5}, "text_to_audio": {"R@10": float("nan")}}
    assert metric_of(measured, "recall@10") == 0.4
    assert metric_of(measured, "audio_to_text_R@10") == 0.5
    assert metric_of(measured, "text_to_audio_R@10") is None
    assert metric_of(measured, "audio_to_text_R@1") is None


@pytest.mark.parametrize("file", ["study.json", "trials.parquet", "front.json"])
def test_damaged_files_are_named_and_the_old_page_stays(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "demo")
    before = write_report(folder).read_bytes()
    (folder / file).write_text("{ torn", encoding="utf-8")
    with pytest.raises(StudyError, match=rf"{re.escape(file)}: damaged"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study here"):
        write_report(tmp_path)


def test_front_as_svg(finished: Path, tmp_path: Path) -> None:
    save_front_svg(read_run(finished), tmp_path / "front.svg")
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
    assert "could not be drawn" not in drawn.split("<script")[0]
    assert len(re.findall(r"<svg[^>]*class=\"marks\"", drawn)) == len(page.charts)


def test_a_point_says_which_part_it_adapts(tmp_path: Path) -> None:
    """In the table and in the chart's tooltip; of the tower, as most are, nothing is said."""
    folder = write_run(tmp_path / "parts")
    front = json.loads((folder / "front.json").read_text())
    adapted = [point for point in front["points"] if point["config"]["lora"]]
    assert len(adapted) > 1
    adapted[0]["config"]["lora"]["placement"] = "language_model"
    (folder / "front.json").write_text(json.dumps(front))
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    for row in rows:
        row["lora.placement"] = "both" if row["trial"] == adapted[0]["trial"] else "tower"
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials.parquet")
    study = json.loads((folder / "study.json").read_text())
    study["encoder"] |= {"shape": "3 blocks of width 32, then 2 blocks of width 40", "path": "full_forward"}
    (folder / "study.json").write_text(json.dumps(study))
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert text.count(" in the language model") == 1
    assert "whisper, 3 blocks of width 32, then 2 blocks of width 40 (full_forward)" in text
    assert json.dumps(all_charts(read_run(folder))).count(" in tower and language model") >= 1
