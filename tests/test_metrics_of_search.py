"""What a search and its lanes tell Ray's metrics, written down by gauges that only remember. Prometheus:
`test_monitoring`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from conftest import Tiny

from tuner.config import LoraSpec, TrialConfig
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.lanes import gauges
from tuner.lanes.gauges import LaneMetrics, LaneTags
from tuner.search import gauges as search_gauges
from tuner.search.gauges import MeteredView
from tuner.service.dashboards.monitoring import dashboard
from tuner.study.events import (
    STATES,
    EndState,
    EpochDone,
    Event,
    FrontChanged,
    Message,
    StudyStarted,
    TrialEnded,
    TrialStarted,
)
from tuner.study.objectives import DEFAULT_OBJECTIVES, choose_objectives
from tuner.study.pareto import hypervolume
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import PrefixUse


def plan(*objectives: str) -> StudyStarted:
    return StudyStarted(study="s", space="full", objectives=objectives, trials=5, epochs=2, run_dir="/runs/s")


@dataclass
class Registry:
    """Ray's gauges and counters by name and labels, and how often each was set."""

    values: dict[str, dict[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)
    scraped: dict[str, set[str]] = field(default_factory=dict)  # labels of each metric, under Prometheus' name for it
    calls: int = 0

    def metric(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Remembering:
        assert name.startswith("tuner_")
        assert description
        self.values.setdefault(name, {})
        self.scraped[f"ray_{name}"] = set(tag_keys)
        return Remembering(self, name, tag_keys)

    def counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Remembering:
        counter = self.metric(name, description, tag_keys)
        self.scraped[f"ray_{name}_total"] = self.scraped.pop(f"ray_{name}")
        return counter

    def value(self, name: str, **tags: str) -> float:
        """The one value with these labels."""
        matching = [value for labels, value in self.values[name].items() if tags.items() <= dict(labels).items()]
        (value,) = matching
        return value


@dataclass
class Remembering:
    registry: Registry
    name: str
    keys: tuple[str, ...]
    default: dict[str, str] = field(default_factory=dict)

    def set_default_tags(self, tags: dict[str, str]) -> Remembering:
        self.default = tags
        return self

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._write(tags, lambda before: float(value))

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray refuses a counter that stands still or falls"
        self._write(tags, lambda before: before + value)

    def _write(self, tags: dict[str, str] | None, change: Callable[[float], float]) -> None:
        labels = {**self.default, **(tags or {})}
        assert labels.keys() == set(self.keys), "Ray refuses labels that were not declared, and missing ones"
        key = tuple(sorted(labels.items()))
        series = self.registry.values[self.name]
        series[key] = change(series.get(key, 0.0))
        self.registry.calls += 1


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    monkeypatch.setattr(search_gauges, "Gauge", registry.metric)
    monkeypatch.setattr(gauges, "Gauge", registry.metric)
    monkeypatch.setattr(gauges, "Counter", registry.counter)
    return registry


# The search


class Remembered:
    """A view that keeps what it was shown."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def show(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def view(registry: Registry) -> MeteredView:
    view = MeteredView(Remembered())
    view.show(plan(*DEFAULT_OBJECTIVES))
    return view


def train(
    view: MeteredView, number: int, recalls: list[float], parameters: int = 1000, end: EndState | None = None
) -> None:
    trial = f"t{number:04d}"
    known = {"trainable_parameters": float(parameters)}
    view.show(TrialStarted(trial=trial, origin="sampled", config=TrialConfig(), known=known))
    for epoch, recall in enumerate(recalls, start=1):
        view.show(EpochDone(trial=trial, epoch=epoch, loss=0.5 / epoch, metrics={"recall@10": recall}, train_seconds=1))
    if end:
        view.show(TrialEnded(trial=trial, state=end))


def test_trials_are_counted_by_state(view: MeteredView, registry: Registry) -> None:
    train(view, 0, [0.1, 0.2], end="complete")
    train(view, 1, [0.3], end="stopped")
    train(view, 2, [], end="failed")
    train(view, 3, [math.nan])
    assert {state: registry.value("tuner_trials", state=state) for state in STATES} == {
        "complete": 1,
        "stopped": 1,
        "failed": 1,
        "running": 1,
    }
    assert registry.value("tuner_trials_planned") == 5
    assert registry.value("tuner_epochs_planned") == 10
    assert registry.value("tuner_epochs") == 4
    assert registry.value("tuner_best_recall", metric="recall@10", study="s", space="full") == 0.3


def test_an_epoch_told_twice_counts_once(view: MeteredView, registry: Registry) -> None:
    """A trial whose actor died starts again and tells its past."""
    train(view, 0, [0.1, 0.2])
    train(view, 0, [0.1, 0.2])
    assert registry.value("tuner_epochs") == 2


def test_a_slot_shows_its_trial_and_is_given_on(view: MeteredView, registry: Registry) -> None:
    train(view, 0, [0.1])
    train(view, 1, [0.2])
    assert registry.value("tuner_trial_number", slot="1") == 1
    assert registry.value("tuner_trial_recall", slot="0") == 0.1
    assert registry.value("tuner_trial_loss", slot="1") == 0.5
    view.show(TrialEnded(trial="t0000", state="complete"))
    assert math.isnan(registry.value("tuner_trial_recall", slot="0"))
    assert math.isnan(registry.value("tuner_trial_number", slot="0"))
    train(view, 2, [0.3])
    assert registry.value("tuner_trial_number", slot="0") == 2
    assert registry.value("tuner_trial_recall", slot="0") == 0.3


def test_a_thousand_trials_have_no_more_series_than_run_at_once(view: MeteredView, registry: Registry) -> None:
    for number in range(1000):
        train(view, number, [0.1, 0.2])
        if number >= 3:
            view.show(TrialEnded(trial=f"t{number - 3:04d}", state="complete"))
    assert {name: len(series) for name, series in registry.values.items() if len(series) > 4} == {}


def test_the_front_is_that_of_all_complete_trials(view: MeteredView, registry: Registry) -> None:
    """Kept up trial by trial, and equal to what all of them at once give."""
    random = np.random.default_rng(0)
    recalls, parameters = random.random(40), random.integers(100, 10**7, 40)
    assert registry.value("tuner_front_hypervolume") == 0
    for number in range(40):
        end: EndState = "complete" if number % 4 else "stopped"
        train(view, number, [float(recalls[number]) / 2, float(recalls[number])], int(parameters[number]), end)
    complete = [number for number in range(40) if number % 4]
    values = np.stack([recalls[complete], parameters[complete]], axis=1)
    volume = hypervolume(values, choose_objectives(DEFAULT_OBJECTIVES))
    assert registry.value("tuner_front_hypervolume") == pytest.approx(volume)
    beaten = sum(any(a[0] >= b[0] and a[1] <= b[1] and (a != b).any() for a in values) for b in values)
    assert registry.value("tuner_front_points") == len(values) - beaten


def test_with_recall_alone_the_front_is_the_best_trial(registry: Registry) -> None:
    view = MeteredView(Remembered())
    view.show(plan("recall@10"))
    train(view, 0, [0.4], 10, "complete")
    train(view, 1, [0.7], 10**8, "complete")
    assert registry.value("tuner_front_points") == 1
    assert registry.value("tuner_front_hypervolume") == pytest.approx(0.7)


def test_the_view_behind_hears_everything(registry: Registry) -> None:
    behind = Remembered()
    view = MeteredView(behind)
    view.show(plan("recall@10"))
    train(view, 0, [0.1], end="complete")
    view.show(FrontChanged(trials=("t0000",)))
    view.show(Message(text="word"))
    view.close()
    kinds = ["study_started", "trial_started", "epoch_done", "trial_ended", "front_changed", "message"]
    assert [event.event for event in behind.events] == kinds
    assert behind.closed


# A lane


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gauges, "time", clock)
    return clock


@pytest.fixture
def lane(registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> LaneMetrics:
    class Context:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": ["3"]}

        def get_actor_id(self) -> str:
            return "a1"

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    return LaneMetrics(LaneTags("s", "full", "tuner-lane-s-0", 0))


def test_a_worker_says_where_it_is(lane: LaneMetrics, registry: Registry) -> None:
    place = {"ip": "10.0.0.7", "GpuIndex": "3", "actor": "a1", "lane": "tuner-lane-s-0", "rank": "0"}
    lane.spent("loading")
    assert registry.value("tuner_lane_up", **place) == 1


def test_every_second_goes_to_one_activity(lane: LaneMetrics, registry: Registry, clock: Clock) -> None:
    clock.now += 5
    lane.spent("waiting")
    for step in range(1, 41):
        clock.now += 0.25
        lane.step(step, 40)
    told = registry.value("tuner_lane_seconds", activity="training")
    assert 8 <= told <= 10, "told while it trains, not at the end alone"
    assert registry.calls < 30, "but about once a second, however many steps there are"
    lane.spent("training")
    clock.now += 2
    lane.spent("validating")
    seconds = {dict(labels)["activity"]: value for labels, value in registry.values["tuner_lane_seconds"].items()}
    assert seconds == pytest.approx({"waiting": 5, "training": 10, "validating": 2})


def row(epoch: int) -> dict[str, float]:
    seconds = {"train_seconds": 4.0, "validation_seconds": 0.5}
    return {"epoch": epoch, "loss": 1.25, "recall@10": 0.5, "clips_per_second": 9.0, **seconds}


def test_an_epoch_leaves_its_figures_and_a_line(
    lane: LaneMetrics, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="tuner"):
        lane.epoch("t0007", row(1), PrefixUse(files=2, made=1, file_bytes=300, read_clips=10, read_bytes=100))
        lane.epoch("t0007", row(2), PrefixUse(files=2, made=1, file_bytes=300, read_clips=10, read_bytes=100))
        lane.epoch("t0007", row(3), PrefixUse(files=3, made=1, file_bytes=400, read_clips=25, read_bytes=250))
    assert registry.value("tuner_lane_epochs") == 3
    assert registry.value("tuner_clips_per_second") == 9.0
    assert registry.value("tuner_epoch_seconds") == 4.0
    assert registry.value("tuner_validation_seconds") == 0.5
    assert registry.value("tuner_lane_memory_bytes") > 10e6
    assert registry.value("tuner_prefix_files", origin="found") == 2
    assert registry.value("tuner_prefix_files", origin="made") == 1
    assert registry.value("tuner_prefix_file_bytes") == 400
    assert registry.value("tuner_prefix_read_clips") == 25
    assert registry.value("tuner_prefix_read_bytes") == 250
    assert "t0007 epoch 2: loss 1.2500, recall@10 0.500, 4.0 s training and 0.5 s validating" in caplog.text


def test_gpu_memory_is_told_where_there_is_a_gpu(
    lane: LaneMetrics, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane.epoch("t0000", row(1), PrefixUse())
    assert (registry.values["tuner_lane_gpu_memory_bytes"] != {}) == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"memory_allocated": 5, "memory_reserved": 8, "max_memory_allocated": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    lane.epoch("t0000", row(2), PrefixUse())
    kinds = {dict(labels)["kind"]: value for labels, value in registry.values["tuner_lane_gpu_memory_bytes"].items()}
    assert kinds == {"tensors": 5, "reserved": 8, "peak": 7}


# Prefix caches


def test_use_of_prefix_caches_is_what_was_read(tiny: Tiny, tmp_path: Path) -> None:
    """Bytes against the file on disk: a pass over all clips reads the whole file once."""
    spec = inspect_encoder(tiny.encoder)
    lora = LoraSpec(rank=2, targets=("q_proj",), first_layer=1)

    def fresh_pack() -> Pack:
        encoder = load_encoder(spec, torch.float32, "cpu")
        return Pack(PackContext(encoder, tiny.store(), tiny.settings(), prefix_root=tmp_path))

    pack = fresh_pack()
    assert pack.prefix_use == PrefixUse()
    pack.attach("t0000", TrialConfig(lora=lora))
    clips = len(pack.store)
    pack.embed("t0000", np.arange(clips))
    (file,) = tmp_path.rglob("tokens.bin")
    size = file.stat().st_size
    assert pack.prefix_use == PrefixUse(files=1, made=1, file_bytes=size, read_clips=clips, read_bytes=size)
    again = fresh_pack()
    again.attach("t0000", TrialConfig(lora=lora))
    again.embed("t0000", np.arange(clips))
    again.embed("t0000", np.arange(clips))
    assert again.prefix_use == PrefixUse(files=1, made=0, file_bytes=size, read_clips=2 * clips, read_bytes=2 * size)


# The dashboard

PANELS = [panel for panel in json.loads(dashboard())["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("title", "target"), QUERIES, ids=[title for title, _ in QUERIES])
def test_the_dashboard_asks_for_what_is_exported(
    title: str, target: dict[str, str], view: MeteredView, lane: LaneMetrics, registry: Registry
) -> None:
    """Metrics by name, and by labels that they have. What Prometheus answers: `test_monitoring`."""
    expr = target["expr"]
    asked = re.findall(r"\b(ray_tuner_\w+)\{([^}]*)\}", expr)
    assert len(asked) == expr.count("ray_tuner_") > 0
    known = set[str]()
    for metric, selector in asked:
        assert metric in registry.scraped
        assert set(re.findall(r"(\w+)=", selector)) <= registry.scraped[metric]
        known |= registry.scraped[metric]
    shown = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
    grouped = {
        label for labels in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", expr) for label in labels.split(", ")
    }
    assert shown | grouped <= known


def test_the_dashboard_lists_studies_of_a_metric_that_is_exported(view: MeteredView, registry: Registry) -> None:
    (study,) = (item for item in json.loads(dashboard())["templating"]["list"] if item["name"] == "study")
    matched = re.fullmatch(r"label_values\((\w+), (\w+)\)", study["query"])
    assert matched is not None
    assert matched[2] in registry.scraped[matched[1]]
