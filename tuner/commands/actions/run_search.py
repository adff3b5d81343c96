"""What `tuner search` does with its options: start, resume, submit or estimate a study."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

from tuner.commands.actions.dry_run import dry_run
from tuner.commands.actions.fixed_options import refuse_changes
from tuner.commands.actions.jobs import Submitted, submit_search
from tuner.commands.actions.stores import choose_path, encoder_of, find_store, place_of
from tuner.commands.console import INTERRUPTED, say
from tuner.commands.last_words import LastWords
from tuner.commands.options import DataChoice, Typed, study_folder
from tuner.config import RunSettings
from tuner.data.cache import cache_root
from tuner.data.store import Store
from tuner.lanes.fleet import FleetOptions
from tuner.loopback import abandon_ray
from tuner.places import is_folder
from tuner.ray_cluster import cluster_address
from tuner.report.answer import headline
from tuner.report.live import make_view
from tuner.search.driver import run_search
from tuner.search.durable.head_lease import only_head
from tuner.search.loggers import check_loggers
from tuner.search.request import SearchRequest, check_new, kept_in, resumed_request
from tuner.space import SearchSpace, load_space
from tuner.storage import Storage
from tuner.study.config import StudyConfig, StudyRecord
from tuner.study.events import View
from tuner.study.folder import RECORD_FILE, StudyFolder, check_study_name
from tuner.study.objectives import choose_objectives
from tuner.study.points import ConfirmedFront
from tuner.study.study import Study
from tuner.study.wording import counted

LOST = 2


@dataclass(frozen=True)
class DriverOptions:
    """Options of one driver, which the study does not keep."""

    address: str | None
    dashboard: bool
    loggers: tuple[str, ...]
    lanes: int | None
    workers: int
    pack: int
    max_gpus: int | None
    json: bool
    hours: float | None = None

    @property
    def submits(self) -> bool:
        """Whether the search runs as a job of a cluster."""
        return self.address is not None and self.address.startswith(("http://", "https://"))

    @property
    def fleet(self) -> FleetOptions:
        """Lanes and workers; raises ConfigError where they contradict each other."""
        return FleetOptions(self.lanes, self.workers, self.pack, self.max_gpus)

    def check(self) -> None:
        """Refuse what contradicts itself, before any work.

        Raises:
            ConfigError: names the option.
        """
        check_loggers(self.loggers)
        _ = self.fleet

    def request(self, config: StudyConfig, folder: StudyFolder, storage: Storage | None) -> SearchRequest:
        """The request of this driver."""
        address = cluster_address(self.address)
        return SearchRequest(config, folder, address, self.dashboard, self.fleet, self.loggers, storage, self.hours)

    @property
    def view(self) -> View:
        """A new view of the kind that was asked for."""
        return make_view("json" if self.json else "auto")


@dataclass(frozen=True)
class Place:
    """Where studies are: their folders' folder on this machine, and a storage besides, if any."""

    runs: Path
    storage: Storage | None


@dataclass(frozen=True)
class NewStudy:
    """Options of a new study."""

    space: str
    placement: str | None
    data: str
    encoder: str | None
    text_encoder: str | None
    pad_to_30s: bool
    audio_root: Path | None
    path: str | None
    objectives: tuple[str, ...]
    study: str | None
    trials: int
    sampler: str
    stopping: str
    max_parameters: int | None
    epochs: int
    batch_size: int
    precision: str
    off_path: str
    seed: int


def submit(search: Submitted, driver: DriverOptions) -> None:
    """Run the same command as a job of a cluster."""
    assert driver.address is not None
    submit_search(search, driver.address, driver.json)


def place_of_studies(runs: Path, storage: str | None, address: str | None, runs_typed: bool, dry_run: bool) -> Place:
    """Where studies are kept.

    Raises:
        ConfigError: the storage's URI is none.
    """
    if storage and address and not runs_typed:
        # The folder that a job runs in goes with it.
        runs = cache_root() / "runs"
    # What is only estimated is put nowhere.
    return Place(runs, Storage.parse(storage) if storage and not dry_run else None)


def start_study(
    place: Place, wanted: NewStudy, driver: DriverOptions, estimate_only: bool, tflops: float | None
) -> None:
    """Search a new study, or print what that would cost.

    Raises:
        ConfigError, SpaceError: an option is wrong.
        StudyError: a study of this name exists.
    """
    space = load_space(wanted.space)
    if wanted.placement is not None:
        space = space.with_placement(wanted.placement)
    objectives = choose_objectives(wanted.objectives)
    folder = StudyFolder(place.runs / check_study_name(wanted.study or _free_name(place, space.name)))
    check_new(folder, place.storage)
    values = {
        "study": folder.name,
        "space": space,
        "settings": _settings(place, wanted, space),
        "objectives": objectives,
        "trials": wanted.trials,
        "sampler": wanted.sampler,
        "stopping": wanted.stopping,
        "max_parameters": wanted.max_parameters,
        "seed": wanted.seed,
    }
    config = StudyConfig.parse(values, "tuner search")
    request = driver.request(config, folder, place.storage)
    if estimate_only:
        dry_run(request, tflops, driver.json)
    else:
        _run(folder, place.storage, lambda: request, driver, resume=False)


def resume_study(
    place: Place, study: str, trials: int | None, typed: Mapping[str, Typed], driver: DriverOptions
) -> None:
    """Resume a study.

    Args:
        typed: the options on the command line; those that the study has fixed otherwise are refused.

    Raises:
        ConfigError: an option differs from the study's.
        StudyError: there is no such study.
    """
    folder = StudyFolder(study_folder(place.runs, study))
    storage = kept_in(folder, place.storage)

    def request() -> SearchRequest:
        found = resumed_request(folder, trials, storage)
        refuse_changes(StudyRecord.read(folder), typed)
        return driver.request(found.config, folder, storage)

    _run(folder, storage, request, driver, resume=True)


def _settings(place: Place, wanted: NewStudy, space: SearchSpace) -> RunSettings:
    choice = DataChoice(wanted.data, wanted.encoder, wanted.text_encoder, wanted.pad_to_30s, wanted.audio_root)
    store = find_store(choice)
    values: dict[str, object] = {
        "store": place_of(store, wanted.data, place.storage),
        "encoder": choose_path(encoder_of(Store.open(store), choice), wanted.path, space),
        "epochs": wanted.epochs,
        "batch_size": wanted.batch_size,
        "data_seed": wanted.seed,
        "precision": wanted.precision,
        "off_path": wanted.off_path,
    }
    return RunSettings.parse(values, "tuner search")


def _free_name(place: Place, name: str) -> str:
    here = {path.name for path in place.runs.iterdir()} if is_folder(place.runs) else set()
    storage = place.storage
    there = set(storage.folders()) if storage else set()

    def taken(candidate: str) -> bool:
        # A study that could not start has left an empty folder there.
        kept = storage is not None and candidate in there and storage.at(candidate).exists(RECORD_FILE)
        return candidate in here or kept

    numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(here | there) + 2))
    return next(candidate for candidate in numbered if not taken(candidate))


def _run(
    folder: StudyFolder,
    storage: Storage | None,
    prepare: Callable[[], SearchRequest],
    driver: DriverOptions,
    resume: bool,
) -> None:
    """Search as the only head of the study.

    Args:
        storage: where the study is kept besides its folder.
        prepare: called when no other head is searching the study: a resumed one is brought here by it.
    """
    again = f"tuner search --resume {folder.name} --runs {folder.path.parent}"
    again += f" --address {driver.address}" if driver.address else ""
    view, joined = driver.view, cluster_address(driver.address) is not None
    words = LastWords(f"tuner: the search was ended from outside; nothing is lost, resume with `{again}`")

    def end(sentence: str) -> None:
        view.close()
        words.goodbye()
        say(f"tuner: {sentence}")
        if not joined:
            abandon_ray()
        # No exception reaches calls that wait for Ray, and lanes of ours must not upload any more.
        os._exit(LOST)

    def lost(reason: str) -> None:
        end(f"{reason}; nothing is lost, {'bring it up and ' if joined else ''}resume with `{again}`")

    try:
        with only_head(folder.name, storage, say, superseded=end) as lease:
            front = run_search(prepare(), view, resume, lost, lease)
    except KeyboardInterrupt:
        # Printed here: Typer turns the interrupt itself into a silent exit.
        say(f"tuner: interrupted; nothing is lost, resume with `{again}`")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        words.goodbye()
    say(_summary(front, folder))


def _summary(front: ConfirmedFront, folder: StudyFolder) -> str:
    points = counted(len(front.on_front), "point")
    return "\n".join([*headline(Study.open(folder.path)), f"{points} on the front; report: {folder.report}"])
