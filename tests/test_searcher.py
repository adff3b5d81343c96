"""The searcher over real Optuna studies in SQLite: fixed trials first, honest states, and nothing lost by a kill."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from tuner.config import LoraSpec, OptimSpec, TrialConfig
from tuner.search.request import RECOMMENDATION, fixed_configurations
from tuner.search.sampling.library import STARTUP_TRIALS, optuna_sampler
from tuner.search.searcher import FINISHED, LOSSES_PER_TRIAL, NOT_NOW, StudySearcher
from tuner.space import SearchSpace, load_space
from tuner.study.config import SAMPLERS, SamplerName
from tuner.study.events import BASELINE, RECOMMENDED
from tuner.study.objectives import TRAINABLE_PARAMETERS, Objective, choose_objectives

optuna.logging.set_verbosity(optuna.logging.WARNING)

BOTH = choose_objectives(["recall@10", TRAINABLE_PARAMETERS])


def known(config: TrialConfig) -> dict[str, float]:
    """Costs that a configuration decides."""
    rank = config.lora.rank if config.lora else 0
    return {TRAINABLE_PARAMETERS: 1000.0 + 10 * rank, "inference_flops": 7.0 + rank}


class Bench:
    """A study's database, and searchers over it one after another as drivers come and go."""

    def __init__(
        self, folder: Path, space: SearchSpace | None = None, objectives: tuple[Objective, ...] = BOTH
    ) -> None:
        self.url = f"sqlite:///{folder / 'study.db'}"
        self.space = space or load_space("attention_only")
        self.objectives = objectives

    def study(self) -> optuna.Study:
        directions = [objective.direction for objective in self.objectives]
        storage = optuna.storages.RDBStorage(self.url)
        return optuna.create_study(storage=storage, study_name="s", directions=directions, load_if_exists=True)

    def searcher(
        self, trials: int = 4, seed: int = 0, sampler: SamplerName = "tpe", max_parameters: int | None = None
    ) -> StudySearcher:
        return StudySearcher(
            self.study(),
            self.space,
            self.objectives,
            known,
            fixed_configurations(),
            trials,
            {"epochs": 2},
            seed,
            sampler,
            max_parameters,
        )


def result_of(suggestion: dict[str, Any]) -> dict[str, Any]:
    """What a trial of this configuration would report at its end: a smooth function of it."""
    config = TrialConfig.model_validate(suggestion["config"])
    rank = config.lora.rank if config.lora else 0
    recall = 0.4 + 0.05 * math.log1p(rank) - 0.1 * abs(math.log(config.optim.lora_lr / OptimSpec().lora_lr))
    return {"epoch": 2, "recall@10": recall, "final": True}


def run(searcher: StudySearcher, most: int = 100) -> list[dict[str, Any]]:
    """Ask and tell until the searcher is finished, or `most` trials."""
    told: list[dict[str, Any]] = []
    while len(told) < most:
        suggestion = searcher.suggest(f"tune-{len(told)}")
        if suggestion == FINISHED:
            break
        searcher.on_trial_complete(f"tune-{len(told)}", result_of(suggestion))
        told.append(suggestion)
    return told


def states(bench: Bench) -> list[TrialState]:
    return [trial.state for trial in bench.study().trials]


def test_every_study_starts_with_the_projection_and_the_recommendation(tmp_path: Path) -> None:
    first, second, third = run(Bench(tmp_path).searcher(trials=3, seed=5))
    assert (first["trial"], first["origin"], first["config"]["lora"]) == ("t0000", BASELINE, None)
    assert (second["trial"], second["origin"]) == ("t0001", RECOMMENDED)
    lora = LoraSpec.model_validate(second["config"]["lora"])
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (third["trial"], third["origin"]) == ("t0002", "sampled")
    assert {suggestion["config"]["seed"] for suggestion in (first, second, third)} == {5}
    assert first["epochs"] == 2, "what the trial needs besides its configuration"


def test_the_sampler_learns_from_a_recommendation_inside_the_space(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    run(bench.searcher(trials=2))
    baseline, recommended = bench.study().trials
    assert baseline.params == {}
    assert recommended.params == bench.space.params_of(TrialConfig(lora=RECOMMENDATION))
    assert recommended.params["lora.rank"] == 16
    assert recommended.values == [pytest.approx(0.4 + 0.05 * math.log1p(16)), 1160]


def test_a_recommendation_outside_the_space_is_measured_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path, load_space("query_value"))
    told = run(bench.searcher(trials=4))
    assert told[1]["config"]["lora"]["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert bench.study().trials[1].params == {}
    assert bench.study().trials[1].state == TrialState.COMPLETE
    assert all(set(suggestion["config"]["lora"]["targets"]) <= {"q_proj", "v_proj"} for suggestion in told[2:])


def test_a_configuration_is_what_its_parameters_say(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for suggestion, trial in zip(run(bench.searcher()), bench.study().trials, strict=True):
        if suggestion["origin"] == "sampled":
            built = bench.space.build(trial.params)
            assert built.model_copy(update={"seed": 0}) == TrialConfig.model_validate(suggestion["config"])


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [
        ({"epoch": 2, "recall@10": 0.5, "final": True}, False, TrialState.COMPLETE),
        ({"epoch": 2, "recall@10": 0.5, "final": False}, False, TrialState.PRUNED),
        ({"epoch": 2, "recall@10": math.nan, "final": True}, False, TrialState.FAIL),
        ({"epoch": 2, "recall@10": math.inf, "final": True}, False, TrialState.FAIL),
        ({"epoch": 2, "final": True}, False, TrialState.FAIL),
        ({"failed": "loss became nan", "final": False}, False, TrialState.FAIL),
        ({"failed": "loss became nan", "epoch": 2, "recall@10": 0.5, "final": True}, False, TrialState.FAIL),
        (None, False, TrialState.PRUNED),  # stopped while it was paused
    ],
)
def test_the_study_is_told_the_truth(
    tmp_path: Path, result: dict[str, Any] | None, error: bool, state: TrialState
) -> None:
    """Ray's own OptunaSearch tells COMPLETE for stopped trials and leaves NaN ones RUNNING."""
    bench = Bench(tmp_path)
    searcher = bench.searcher()
    searcher.suggest("tune-0")
    searcher.on_trial_complete("tune-0", result, error)
    assert states(bench) == [state]
    assert bench.study().trials[0].values == ([0.5, 1000.0] if state == TrialState.COMPLETE else None)
    searcher.on_trial_complete("tune-0", result, error)  # Tune may say so twice


def test_the_search_goes_on_after_stopped_and_failed_trials(tmp_path: Path) -> None:
    """TPE itself must cope with them, also once it models (after its startup trials)."""
    bench = Bench(tmp_path)
    searcher = bench.searcher(trials=STARTUP_TRIALS + 3)
    for number in range(STARTUP_TRIALS + 3):
        suggestion = searcher.suggest(f"tune-{number}")
        outcome = result_of(suggestion) | {"final": number % 3 != 1}
        searcher.on_trial_complete(f"tune-{number}", outcome if number % 4 else {"failed": "out of memory"})
    assert searcher.suggest("tune-99") == FINISHED
    assert set(states(bench)) == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}


def test_a_killed_driver_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.searcher(trials=6)
    finished = run(first, most=2)
    interrupted = [first.suggest("a"), first.suggest("b")]
    assert first.remaining == 4

    second = bench.searcher(trials=6)
    assert second.remaining == 4
    again = [second.suggest("c"), second.suggest("d")]
    assert again == interrupted, "the same trials with the same configurations, in the same order"
    for name, suggestion in zip("cd", again, strict=True):
        second.on_trial_complete(name, result_of(suggestion))
    rest = run(second)
    assert [suggestion["trial"] for suggestion in finished + again + rest] == [f"t{n:04d}" for n in range(6)]
    assert second.remaining == 0
    assert states(bench) == [TrialState.COMPLETE] * 6


def test_a_trial_killed_before_its_configuration_was_written_is_closed(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    run(bench.searcher(trials=3))
    bench.study().ask()
    told = run(bench.searcher(trials=5))
    assert [suggestion["trial"] for suggestion in told] == ["t0004", "t0005"]
    assert states(bench)[3] == TrialState.FAIL
    assert TrialState.RUNNING not in states(bench)


@pytest.mark.parametrize("moment", ["enqueued", "asked", "origin written"])
def test_the_fixed_trials_survive_a_kill_at_any_moment(tmp_path: Path, moment: str) -> None:
    """Exactly one recommendation runs, and nothing enqueued for it slips into a sampled trial."""
    bench = Bench(tmp_path)
    run(bench.searcher(trials=1))
    study = bench.study()
    params = bench.space.params_of(TrialConfig(lora=RECOMMENDATION))
    assert params is not None
    study.enqueue_trial(params)
    if moment != "enqueued":
        trial = study.ask()
        if moment == "origin written":
            trial.set_user_attr("origin", RECOMMENDED)
    told = run(bench.searcher(trials=4))
    assert [suggestion["origin"] for suggestion in told] == [RECOMMENDED, "sampled", "sampled"]
    ran = [trial.params for trial in bench.study().trials if trial.state == TrialState.COMPLETE]
    assert ran.count(params) == 1


def test_more_trials_extend_a_finished_study(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert len(run(bench.searcher(trials=3))) == 3
    assert run(bench.searcher(trials=3)) == []
    extended = run(bench.searcher(trials=5))
    assert [suggestion["trial"] for suggestion in extended] == ["t0003", "t0004"]
    assert {suggestion["origin"] for suggestion in extended} == {"sampled"}


def test_a_trial_whose_own_actor_died_is_suggested_again(tmp_path: Path) -> None:
    """Nothing was wrong with the trial: the same configuration under the same name, before anything new."""
    bench = Bench(tmp_path)
    searcher = bench.searcher(trials=3)
    first = searcher.suggest("a")
    searcher.on_trial_complete("a", result_of(first), error=True)
    assert (searcher.lost, searcher.is_lost("t0000"), searcher.is_lost("t0001")) == (1, True, False)
    assert states(bench) == [TrialState.RUNNING], "and is resumed if the driver is killed now"
    assert searcher.suggest("b") == first
    assert searcher.lost == 0
    searcher.on_trial_complete("b", result_of(first))
    assert [suggestion["trial"] for suggestion in run(searcher)] == ["t0001", "t0002"]
    assert states(bench) == [TrialState.COMPLETE] * 3


def test_a_trial_whose_actor_dies_again_and_again_fails(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    searcher = bench.searcher(trials=1)
    for attempt in range(LOSSES_PER_TRIAL):
        assert searcher.suggest(str(attempt))["trial"] == "t0000"
        searcher.on_trial_complete(str(attempt), None, error=True)
    assert states(bench) == [TrialState.FAIL]
    assert searcher.suggest("another") == FINISHED


def test_nothing_is_suggested_while_there_is_no_place(tmp_path: Path) -> None:
    searcher = Bench(tmp_path).searcher(trials=2)
    places = [True, False, True, False]
    searcher.has_place = lambda: places.pop(0)
    assert searcher.suggest("a")["trial"] == "t0000"
    assert searcher.suggest("b") == NOT_NOW
    assert searcher.suggest("b")["trial"] == "t0001"
    assert searcher.suggest("c") == FINISHED, "whether or not there is a place"


def test_failed_trials_count_towards_the_total(tmp_path: Path) -> None:
    """Else a space in which everything fails would be searched for ever."""
    bench = Bench(tmp_path)
    searcher = bench.searcher(trials=3)
    for number in range(3):
        searcher.suggest(str(number))
        searcher.on_trial_complete(str(number), {"failed": "loss became nan", "final": False})
    assert searcher.suggest("4") == FINISHED
    assert bench.searcher(trials=3).remaining == 0


TRIALS = STARTUP_TRIALS + 3  # some drawn at random, then some by the model


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> SamplerName:
    name: SamplerName = request.param
    return name


@pytest.fixture(scope="module")
def whole(sampler: SamplerName, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a study of seed 3 suggests that nobody interrupts."""
    return run(Bench(tmp_path_factory.mktemp("whole")).searcher(TRIALS, 3, sampler))


def test_the_same_seed_gives_the_same_suggestions(
    tmp_path: Path, sampler: SamplerName, whole: list[dict[str, Any]]
) -> None:
    for name, seed in (("same", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        told = run(Bench(tmp_path / name).searcher(TRIALS, seed, sampler))
        assert (told == whole) == (name == "same")
    sampled = [[s["config"] | {"seed": 0} for s in suggestions[2:]] for suggestions in (whole, told)]
    assert all(ours != theirs for ours, theirs in zip(*sampled, strict=True))
    assert len({str(config) for config in sampled[0]}) == TRIALS - 2, "no configuration is drawn twice"


@pytest.mark.parametrize("killed_after", [0, 1, STARTUP_TRIALS + 1])
def test_a_resumed_study_draws_what_the_uninterrupted_one_would(
    tmp_path: Path, sampler: SamplerName, whole: list[dict[str, Any]], killed_after: int
) -> None:
    bench = Bench(tmp_path)
    driver = bench.searcher(TRIALS, 3, sampler)
    before = run(driver, most=killed_after)
    driver.suggest("running when it was killed")
    assert before + run(bench.searcher(TRIALS, 3, sampler)) == whole


def test_what_costs_more_than_the_limit_is_not_drawn(tmp_path: Path, sampler: SamplerName) -> None:
    """The fixed configurations are the user's comparison, and are measured whatever they cost."""
    told = run(Bench(tmp_path).searcher(TRIALS, 3, sampler, max_parameters=1100))
    ranks = [suggestion["config"]["lora"]["rank"] for suggestion in told[2:]]
    assert len(ranks) == TRIALS - 2 and max(ranks) <= 10


def test_a_single_objective_needs_no_cost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, objectives=BOTH[:1])
    told = run(bench.searcher(STARTUP_TRIALS + 1))
    best = bench.study().best_trial
    assert len(told) == STARTUP_TRIALS + 1
    assert best.value == max(result_of(suggestion)["recall@10"] for suggestion in told)


def test_three_objectives_are_told_in_the_order_of_the_study(tmp_path: Path) -> None:
    bench = Bench(tmp_path, objectives=choose_objectives(["inference_flops", "recall@10", TRAINABLE_PARAMETERS]))
    first, *_ = run(bench.searcher(STARTUP_TRIALS + 1))
    assert bench.study().trials[0].values == [result_of(first)["recall@10"], 7.0, 1000.0]
    assert first["known"] == known(TrialConfig())


TWO = {
    "name": "two",
    "description": "Two configurations.",
    "target_sets": {"pair": ["q_proj", "v_proj"]},
    "fixed": {"lora.targets": "pair"},
    "dimensions": {"lora.rank": {"choice": [4, 8]}},
}


def test_no_configuration_is_trained_twice_and_a_space_that_is_used_up_ends_the_search(
    tmp_path: Path, sampler: SamplerName
) -> None:
    """A repeat would be bit for bit the trial that is there."""
    bench = Bench(tmp_path, SearchSpace.from_dict(TWO, "here"))
    searcher = bench.searcher(trials=8, sampler=sampler)
    told = run(searcher)
    ranks = [(suggestion["config"]["lora"] or {}).get("rank") for suggestion in told]
    assert [suggestion["origin"] for suggestion in told[:2]] == [BASELINE, RECOMMENDED]
    assert set(ranks[2:]) == {4, 8}
    assert searcher.exhausted == "space two has no further configuration; the search ends after 4 trials"
    assert searcher.remaining == 0
    resumed = bench.searcher(trials=8, sampler=sampler)
    assert run(resumed) == []
    assert resumed.exhausted and resumed.remaining == 0
    assert TrialState.RUNNING not in states(bench)


def test_a_coarse_space_gives_other_configurations_also_once_the_sampler_models(tmp_path: Path) -> None:
    values = TWO | {"dimensions": {"lora.rank": {"int": [1, 30]}}}
    bench = Bench(tmp_path, SearchSpace.from_dict(values, "here"))
    told = run(bench.searcher(trials=28))
    configs = [str(suggestion["config"]) for suggestion in told]
    assert len(set(configs)) == len(configs) == 28


def test_tune_pickles_nothing_of_the_searcher(tmp_path: Path) -> None:
    """Tune snapshots its searcher, but the study's database is the state and grows with every trial."""
    searcher = Bench(tmp_path).searcher()
    assert vars(pickle.loads(pickle.dumps(searcher))) == {}


def test_a_failure_of_the_whole_search_leaves_its_trial_to_be_resumed(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.searcher()
    suggestion = first.suggest("tune-0")
    first.on_trial_complete("tune-0", {"fatal": "the disk is full", "final": False})
    assert bench.study().trials[0].state == TrialState.RUNNING
    assert bench.searcher().suggest("tune-1") == suggestion


# The trials in memory


class MemoryBench(Bench):
    """A study in SQLite that never waits for a disk."""

    def __init__(self, space: SearchSpace) -> None:
        self.space, self.objectives = space, BOTH
        directions = [objective.direction for objective in BOTH]
        storage = optuna.storages.RDBStorage("sqlite:///:memory:")
        self._study = optuna.create_study(storage=storage, study_name="s", directions=directions)

    def study(self) -> optuna.Study:
        return self._study


def directly(bench: Bench, trials: int, side_by_side: int) -> list[dict[str, Any]]:
    """The slow way that the trials in memory stand for: ask Optuna over the database itself."""
    study, told, live = bench.study(), list[dict[str, Any]](), list[int]()
    fixed = list(fixed_configurations().values())
    for number in range(trials):
        study.sampler = optuna_sampler("tpe", 0, number)
        params = bench.space.params_of(fixed[number]) if number < len(fixed) else None
        if params is not None:
            study.enqueue_trial(params)
        trial = study.ask()
        inside = number >= len(fixed) or params is not None
        config = bench.space.sample(trial) if inside else fixed[number]
        told.append(config.model_dump(mode="json"))
        live.append(number)
        if len(live) == side_by_side:
            oldest = live.pop(0)
            config = TrialConfig.model_validate(told[oldest])
            study.tell(oldest, [result_of({"config": told[oldest]})["recall@10"], known(config)[TRAINABLE_PARAMETERS]])
    return told


def test_suggestions_are_those_of_the_database_itself() -> None:
    """With trials running side by side, whose parameters the sampler heeds, and a space with conditions."""
    trials, side_by_side = 3 * STARTUP_TRIALS, 4
    slow, fast = (MemoryBench(load_space("full")) for _ in range(2))
    expected = directly(slow, trials, side_by_side)
    searcher, live, told = fast.searcher(trials), list[str](), list[dict[str, Any]]()
    for number in range(trials):
        told.append(searcher.suggest(str(number)))
        live.append(str(number))
        if len(live) == side_by_side:
            oldest = live.pop(0)
            searcher.on_trial_complete(oldest, result_of(told[int(oldest)]))
    assert [suggestion["config"] for suggestion in told] == expected
    for kept, reference in zip(fast.study().trials, slow.study().trials, strict=True):
        assert (kept.number, kept.state, kept.values) == (reference.number, reference.state, reference.values)
        assert (kept.params, kept.distributions) == (reference.params, reference.distributions)


def test_a_suggestion_reads_nothing_from_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all running trials each time is what made suggestions slow with many of them."""
    searcher = Bench(tmp_path).searcher(trials=STARTUP_TRIALS + 3)
    run(searcher, most=STARTUP_TRIALS + 1)

    def read(*arguments: object, **named: object) -> None:
        raise AssertionError("read from the database")

    monkeypatch.setattr(searcher.study._storage, "get_all_trials", read)
    assert searcher.suggest("one")["trial"] != searcher.suggest("another")["trial"]


def test_a_database_that_is_away_for_a_moment_loses_no_draw(
    tmp_path: Path, sampler: SamplerName, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = Bench(tmp_path).searcher(TRIALS, 3, sampler)
    add, tell, told = searcher.study.add_trial, searcher.study.tell, []

    def away(*arguments: object, **named: object) -> None:
        raise OSError("no space left")

    for number in range(TRIALS):
        monkeypatch.setattr(searcher.study, "add_trial", away)
        with pytest.raises(OSError, match="space"):
            searcher.suggest(str(number))
        monkeypatch.setattr(searcher.study, "add_trial", add)
        told.append(searcher.suggest(str(number)))
        monkeypatch.setattr(searcher.study, "tell", away)
        with pytest.raises(OSError, match="space"):
            searcher.on_trial_complete(str(number), result_of(told[-1]))
        monkeypatch.setattr(searcher.study, "tell", tell)
        searcher.on_trial_complete(str(number), result_of(told[-1]))
    assert told == whole
    assert searcher.remaining == 0


def test_out_of_time_no_new_trial_begins_and_what_runs_ends(tmp_path: Path) -> None:
    """The first configurations always run: without them a front says nothing."""
    bench = Bench(tmp_path)
    searcher = bench.searcher(trials=1000)
    searcher.out_of_time = lambda: "the time is over"
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert [first["origin"], second["origin"]] == [BASELINE, RECOMMENDED]
    assert searcher.remaining == 1000
    assert searcher.suggest("c") == FINISHED and searcher.exhausted == "the time is over"
    assert searcher.remaining == 2, "what runs is still to end"
    for name, suggestion in (("a", first), ("b", second)):
        searcher.on_trial_complete(name, result_of(suggestion))
    assert searcher.remaining == 0
    assert bench.searcher(trials=1000).suggest("d")["origin"] == "sampled", "a resumed search goes on"
