"""Search spaces: what they sample, their inverse, their counts, and one clear sentence for each way to be wrong."""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml

from tuner.config import HeadSpec, LoraSpec, LossSpec, OptimSpec, TrialConfig
from tuner.errors import PlacementError, SpaceError
from tuner.search.request import fixed_configurations
from tuner.space import SearchSpace, list_spaces, load_space
from tuner.space.draws import draw, neighbour
from tuner.space.grid import grid

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = ["attention_mlp", "attention_only", "full", "placement", "query_value", "top_layers"]
# The recommendation that every search starts from.
RECOMMENDED = TrialConfig(
    lora=LoraSpec(rank=16, alpha_ratio=2.0, dropout=0.1, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
)
VALID: dict[str, Any] = {
    "name": "small",
    "description": "A small space.",
    "target_sets": {"attention": ["q_proj", "k_proj"], "query": ["q_proj"]},
    "fixed": {"lora.first_layer": 0},
    "dimensions": {
        "lora.rank": {"int": [2, 8], "step": 2},
        "lora.targets": {"choice": ["attention", "query", "k_proj"]},
        "lora.dropout": {"float": [0.0, 0.2], "step": 0.05},
        "head.kind": {"choice": ["linear", "mlp"]},
        "head.hidden": {"choice": [64, 128, 256], "when": {"head.kind": "mlp"}},
    },
}


class RandomTrial:
    """Uniform draws in place of a searcher, recording what was asked."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.params[name] = int(self.rng.integers(0, (high - low) // step + 1)) * step + low
        return int(self.params[name])

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        drawn = self.rng.uniform(low, high)
        self.params[name] = drawn if step is None else low + round((drawn - low) / step) * step
        return float(self.params[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.params[name] = choices[int(self.rng.integers(len(choices)))]
        return self.params[name]


def space(**changes: Any) -> SearchSpace:
    return SearchSpace.from_dict({**VALID, **changes}, "small.yaml")


def with_dimension(path: str, dimension: object) -> dict[str, Any]:
    values = copy.deepcopy(VALID)
    values["dimensions"][path] = dimension
    return values


def count_of(config: TrialConfig) -> int:
    """A parameter count with the real one's shape: grows with rank, modules and layers of 8, and the head's width."""
    head = 10 if config.head.kind == "linear" else 20 * config.head.hidden
    if config.lora is None:
        return head
    first = config.lora.first_layer if config.lora.first_layer >= 0 else 8 + config.lora.first_layer
    return head + config.lora.rank * len(config.lora.targets) * 100 * (8 - first)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_sample_of_a_shipped_space_is_valid_and_invertible(name: str) -> None:
    shipped = load_space(name)
    for seed in range(200):
        trial = RandomTrial(seed)
        config = shipped.sample(trial)
        params = shipped.params_of(config.model_copy(update={"seed": seed}))
        assert params == pytest.approx(trial.params)
        assert params is not None and shipped.build(params) == config


@pytest.mark.parametrize("name", ["attention_only", "attention_mlp", "top_layers", "full"])
def test_recommendation_lies_inside(name: str) -> None:
    shipped = load_space(name)
    params = shipped.params_of(RECOMMENDED)
    assert params is not None and params["lora.rank"] == 16 and params["lora.targets"] == "attention"
    assert shipped.build(params) == RECOMMENDED
    reordered = RECOMMENDED.model_copy(
        update={"lora": LoraSpec(rank=16, dropout=0.1, targets=("o_proj", "v_proj", "k_proj", "q_proj"))}
    )
    assert shipped.params_of(reordered) == params


def test_attention_only_leaves_the_mlp_untouched() -> None:
    shipped = load_space("attention_only")
    sampled = {target for seed in range(50) for target in shipped.sample(RandomTrial(seed)).lora.targets}  # type: ignore[union-attr]
    assert sampled == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_optuna_suggests_and_replays_enqueued_parameters() -> None:
    shipped = load_space("full")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    params = shipped.params_of(RECOMMENDED)
    assert params is not None
    study.enqueue_trial(params)
    first = study.ask()
    assert shipped.sample(first) == RECOMMENDED
    assert first.params == pytest.approx(params)
    kinds = set()
    for _ in range(30):
        trial = study.ask()
        config = shipped.sample(trial)
        assert ("head.hidden" in trial.params) == (config.head.kind == "mlp")
        assert ("loss.temperature" in trial.params) == (not config.loss.learn_temperature)
        kinds.add(config.head.kind)
    assert kinds == {"linear", "mlp"}


def test_conditions_follow_each_other() -> None:
    """A dimension under one that is off is off too, whatever value that one would have had."""
    nested = SearchSpace.from_dict(
        with_dimension("loss.temperature", {"choice": [0.05, 0.1], "when": {"head.hidden": [64, 128]}}), "small.yaml"
    )
    seen = set()
    for seed in range(100):
        trial = RandomTrial(seed)
        config = nested.sample(trial)
        expected = config.head.kind == "mlp" and config.head.hidden in (64, 128)
        assert ("loss.temperature" in trial.params) == expected
        if not expected:
            assert config.loss.temperature == LossSpec().temperature
        seen.add(expected)
    assert seen == {True, False}


def test_stepped_floats_are_written_without_rounding_noise() -> None:
    class Noisy(RandomTrial):
        def suggest_float(self, name: str, *_: float, **__: Any) -> float:
            return 0.15000000000000002

    config = space().sample(Noisy(0))
    assert config.lora is not None and config.lora.dropout == 0.15


@pytest.mark.parametrize(
    "config",
    [
        TrialConfig(),
        TrialConfig(lora=LoraSpec(rank=3, targets=("q_proj",))),
        TrialConfig(lora=LoraSpec(rank=4, targets=("v_proj",))),
        TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",), dropout=0.07)),
        TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",), dropout=0.25)),
        TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",), first_layer=1)),
        TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",)), optim=OptimSpec(lora_lr=0.5)),
        TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",)), head=HeadSpec(kind="linear", hidden=64)),
        TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",)), head=HeadSpec(kind="mlp", hidden=512)),
    ],
    ids=["no lora", "off grid", "module", "off step", "range", "fixed", "default", "inactive", "choice"],
)
def test_configurations_outside_have_no_parameters(config: TrialConfig) -> None:
    inside = TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",)))
    assert space().params_of(inside) is not None
    assert space().params_of(config) is None


def test_size_equals_the_number_of_distinct_samples() -> None:
    """4 ranks x 3 targets x 5 dropouts x (linear or 3 widths): counted, and drawn until all have been seen."""
    assert space().size() == 4 * 3 * 5 * (1 + 3)
    drawn = {space().sample(RandomTrial(seed)).model_dump_json() for seed in range(4_000)}
    assert len(drawn) == space().size()


def test_size_with_a_continuous_dimension() -> None:
    values = with_dimension("optim.lora_lr", {"float": [1e-4, 1e-3], "log": True})
    continuous = SearchSpace.from_dict(values, "small.yaml")
    assert continuous.size() is None
    assert continuous.size(countable_only=True) == space().size()
    assert load_space("attention_only").size() is None


def test_parameter_range_is_that_of_all_samples() -> None:
    values = with_dimension("lora.first_layer", {"choice": [0, -1, 4]})
    del values["fixed"]["lora.first_layer"]
    layered = SearchSpace.from_dict(values, "small.yaml")
    counts = {count_of(layered.sample(RandomTrial(seed))) for seed in range(3_000)}
    assert layered.parameter_range(count_of) == (min(counts), max(counts)) == (2 * 1 * 100 + 10, 8 * 2 * 100 * 8 + 5120)


def test_parameter_range_asks_once_per_combination_that_matters() -> None:
    asked: list[TrialConfig] = []
    load_space("full").parameter_range(lambda config: asked.append(config) or 0)  # type: ignore[func-returns-value]
    placements = 4 * 4 * 2
    heads = 1 + 2
    losses = 2 * 2
    assert len(asked) == placements * heads * losses


def test_validate_for_reaches_every_placement() -> None:
    seen: set[tuple[tuple[str, ...], int]] = set()

    def check(config: TrialConfig) -> None:
        assert config.lora is not None
        seen.add((config.lora.targets, config.lora.first_layer))
        if config.lora.first_layer == 0 and "fc2" in config.lora.targets:
            raise PlacementError("fc2 does not exist in this encoder")

    with pytest.raises(PlacementError, match="fc2"):
        load_space("top_layers").validate_for(check)
    seen.clear()
    load_space("attention_only").validate_for(check)
    assert len(seen) == 4


def test_enumeration_is_bounded() -> None:
    values = with_dimension("lora.first_layer", {"int": [-4000, 4000]})
    del values["fixed"]["lora.first_layer"]
    with pytest.raises(SpaceError, match="more than 10,000 combinations"):
        SearchSpace.from_dict(values, "small.yaml").parameter_range(count_of)


def test_space_of_heads_alone_has_no_lora() -> None:
    heads = SearchSpace.from_dict(
        {"name": "heads", "description": "No LoRA.", "dimensions": {"head.kind": {"choice": ["linear", "mlp"]}}},
        "heads.yaml",
    )
    assert heads.sample(RandomTrial(0)).lora is None
    assert heads.params_of(TrialConfig()) == {"head.kind": "linear"}
    assert heads.params_of(RECOMMENDED) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_yaml_and_dict_round_trip(name: str, tmp_path: Path) -> None:
    shipped = load_space(name)
    (tmp_path / f"{name}.yaml").write_text(shipped.to_yaml(), encoding="utf-8")
    assert SearchSpace.from_file(tmp_path / f"{name}.yaml") == shipped
    assert SearchSpace.from_dict(shipped.to_dict(), "study.json") == shipped


def test_shipped_spaces_are_listed() -> None:
    assert [shipped.name for shipped in list_spaces()] == SHIPPED
    assert {path.stem for path in (REPOSITORY / "search_spaces").glob("*.yaml")} == set(SHIPPED)


def test_unknown_space_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(
        SpaceError, match=r"'atention_only' \(did you mean attention_only\?\); use one of attention_mlp"
    ):
        load_space("atention_only")


def test_own_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {**VALID, "name": "query_value", "description": "Mine."}
    (tmp_path / "query_value.yaml").write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    monkeypatch.setenv("TUNER_SPACES", str(tmp_path))
    assert load_space("query_value").description == "Mine."
    assert [shipped.name for shipped in list_spaces()] == SHIPPED
    monkeypatch.setenv("TUNER_SPACES", str(tmp_path / "absent"))
    with pytest.raises(SpaceError, match=r"TUNER_SPACES=.*absent: is not a folder"):
        load_space("query_value")


def test_path_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(VALID, sort_keys=False), encoding="utf-8")
    assert load_space(str(path)) == space()
    with pytest.raises(SpaceError, match=r"absent.yaml: cannot be read"):
        load_space(str(tmp_path / "absent.yaml"))
    path.rename(tmp_path / "other.yaml")
    with pytest.raises(SpaceError, match=r"name is 'small' but the file is 'other.yaml'"):
        load_space(str(tmp_path / "other.yaml"))
    (tmp_path / "broken.yaml").write_text("name: [", encoding="utf-8")
    with pytest.raises(SpaceError, match=r"broken.yaml: is not valid YAML"):
        load_space(str(tmp_path / "broken.yaml"))


MISTAKES: list[tuple[str, object, str]] = [
    ("not a mapping", ["a"], "is not a search space"),
    ("unknown key", {**VALID, "dimension": {}}, r"unknown key 'dimension' \(did you mean dimensions\?\)"),
    ("missing key", {"name": "small", "description": "x"}, "dimensions is missing"),
    ("no dimension", {**VALID, "dimensions": {}}, "dimensions cannot be {}"),
    (
        "unknown path",
        with_dimension("lora.rnak", {"choice": [1]}),
        r"lora.rnak is not a field of a trial \(did you mean lora.rank",
    ),
    ("seed", with_dimension("seed", {"choice": [1, 2]}), "seed is not a hyperparameter"),
    ("a group", with_dimension("lora", {"choice": [1]}), "lora is not a field"),
    (
        "dimension key",
        with_dimension("lora.rank", {"int": [2, 8], "stp": 2}),
        r"unknown key 'stp' \(did you mean step\?\)",
    ),
    ("step on choice", with_dimension("lora.rank", {"choice": [2], "step": 2}), "lora.rank has the unknown key 'step'"),
    ("two kinds", with_dimension("lora.rank", {"choice": [2], "int": [2, 8]}), "lora.rank: give exactly one of"),
    ("no kind", with_dimension("lora.rank", {"step": 1}), "lora.rank: give exactly one of"),
    ("not a dimension", with_dimension("lora.rank", 8), "lora.rank: give exactly one of"),
    (
        "text for rank",
        with_dimension("lora.rank", {"choice": ["8"]}),
        "lora.rank cannot be '8': input should be a valid int",
    ),
    ("real for rank", with_dimension("lora.rank", {"float": [2.0, 8.0]}), "lora.rank cannot be 2.0"),
    ("real in int", with_dimension("lora.rank", {"int": [2.5, 8]}), "lora.rank int cannot be 2.5"),
    ("bool for rank", with_dimension("lora.rank", {"choice": [True]}), "lora.rank cannot be True"),
    (
        "rank below bound",
        with_dimension("lora.rank", {"int": [0, 8]}),
        "lora.rank cannot be 0: input should be greater",
    ),
    ("dropout at bound", with_dimension("lora.dropout", {"float": [0.0, 1.0]}), "lora.dropout cannot be 1.0"),
    ("yaml number", with_dimension("optim.lora_lr", {"choice": ["1e-3"]}), "write it with a point and without quotes"),
    (
        "not finite",
        with_dimension("optim.lora_lr", {"choice": [float("inf")]}),
        "optim.lora_lr choice cannot be inf: write text, a finite number, true or false",
    ),
    (
        "unknown literal",
        with_dimension("head.kind", {"choice": ["deep"]}),
        "head.kind cannot be 'deep': input should be 'linear'",
    ),
    ("range of flags", with_dimension("lora.rslora", {"int": [0, 1]}), "lora.rslora cannot be 0"),
    ("nested choice", with_dimension("lora.targets", {"choice": [["q_proj"]]}), "lora.targets choice cannot be"),
    ("empty choice", with_dimension("lora.rank", {"choice": []}), "lora.rank has an empty choice"),
    ("repeated choice", with_dimension("lora.rank", {"choice": [2, 4, 2]}), "lora.rank lists a value twice"),
    ("empty range", with_dimension("lora.rank", {"int": [8, 8]}), r"lora.rank has the empty range int: \[8, 8\]"),
    ("reversed range", with_dimension("lora.dropout", {"float": [0.2, 0.1]}), "lora.dropout has the empty range"),
    ("three bounds", with_dimension("lora.rank", {"int": [2, 4, 8]}), r"lora.rank int cannot be \[2, 4, 8\]"),
    ("log from zero", with_dimension("lora.dropout", {"float": [0.0, 0.2], "log": True}), "start the range above 0"),
    ("log and step", with_dimension("lora.rank", {"int": [2, 8], "step": 2, "log": True}), "has both log and step"),
    (
        "log, step of a float",
        with_dimension("lora.dropout", {"float": [0.1, 0.2], "step": 0.1, "log": True}),
        "has both",
    ),
    ("step too large", with_dimension("lora.rank", {"int": [2, 8], "step": 7}), "has step 7; give a step above 0"),
    (
        "step zero",
        with_dimension("lora.dropout", {"float": [0.0, 0.2], "step": 0}),
        "has step 0; give a step above 0",
    ),
    ("step not dividing", with_dimension("lora.dropout", {"float": [0.0, 0.2], "step": 0.03}), "does not divide"),
    ("int step not dividing", with_dimension("lora.rank", {"int": [2, 8], "step": 4}), "does not divide"),
    (
        "undeclared set",
        with_dimension("lora.targets", {"choice": ["atention"]}),
        r"has 'atention'.*did you mean attention",
    ),
    (
        "undeclared fixed set",
        {**VALID, "dimensions": {"lora.rank": {"choice": [2]}}, "fixed": {"lora.targets": "all"}},
        "has 'all'",
    ),
    ("targets of numbers", with_dimension("lora.targets", {"choice": [1]}), "lora.targets cannot be"),
    (
        "same modules twice",
        with_dimension("lora.targets", {"choice": ["query", "q_proj"]}),
        "two names for the same modules",
    ),
    ("empty set", {**VALID, "target_sets": {"attention": []}}, "target_sets: attention is empty"),
    (
        "repeated module",
        {**VALID, "target_sets": {"attention": ["q", "q"]}},
        "target_sets: attention is empty or lists a module twice",
    ),
    ("set of numbers", {**VALID, "target_sets": {"attention": [1]}}, "target_sets: attention 0 cannot be 1"),
    ("fixed and searched", {**VALID, "fixed": {"lora.rank": 8}}, "lora.rank is both under fixed and under dimensions"),
    ("fixed value", {**VALID, "fixed": {"optim.lora_lr": -1.0}}, "fixed: optim.lora_lr cannot be -1.0"),
    ("fixed path", {**VALID, "fixed": {"optim.lr": 1.0}}, "fixed: optim.lr is not a field"),
    ("fixed seed", {**VALID, "fixed": {"seed": 1}}, "fixed: seed is not a hyperparameter"),
    (
        "condition on nothing",
        with_dimension("head.hidden", {"choice": [64], "when": {"head.knd": "mlp"}}),
        r"condition on head.knd, which is not searched \(did you mean head.kind\?\)",
    ),
    (
        "condition never met",
        with_dimension("head.hidden", {"choice": [64], "when": {"head.kind": "deep"}}),
        "head.kind, which is never 'deep'; its values are 'linear', 'mlp'",
    ),
    (
        "empty condition",
        with_dimension("head.hidden", {"choice": [64], "when": {"head.kind": []}}),
        "never any of no values",
    ),
    (
        "condition on a range",
        with_dimension("head.hidden", {"choice": [64], "when": {"lora.rank": 4}}),
        "lora.rank, which is a range",
    ),
    (
        "condition on a later dimension",
        with_dimension("lora.dropout", {"choice": [0.1], "when": {"head.kind": "mlp"}}),
        "lora.dropout has a condition on head.kind, which comes later in the file; move head.kind above lora.dropout",
    ),
    (
        "circle",
        with_dimension("head.kind", {"choice": ["linear", "mlp"], "when": {"head.hidden": 64}}),
        "head.kind has a condition on head.hidden, which itself depends on head.kind; drop one of the two conditions",
    ),
    (
        "own circle",
        with_dimension("head.kind", {"choice": ["mlp"], "when": {"head.kind": "mlp"}}),
        "which itself depends on",
    ),
    (
        "conditional rank",
        with_dimension("lora.rank", {"choice": [2], "when": {"lora.targets": "query"}}),
        "comes later in the file",
    ),
    (
        "conditional targets",
        {
            **VALID,
            "dimensions": {
                "lora.rank": {"choice": [2, 4]},
                "lora.targets": {"choice": ["query"], "when": {"lora.rank": 2}},
            },
        },
        "lora.targets has a condition, but LoRA always needs it",
    ),
    (
        "no targets",
        {**VALID, "dimensions": {"lora.rank": {"choice": [2]}}},
        "lora.targets is missing, but LoRA needs it",
    ),
]


@pytest.mark.parametrize(("values", "message"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_one_sentence_that_names_file_and_field(values: object, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        SearchSpace.from_dict(values, "small.yaml")
    assert str(caught.value).startswith("small.yaml: ") and "\n" not in str(caught.value)


def test_spaces_load_without_torch_or_optuna() -> None:
    code = (
        "import sys, tuner.space as s; s.list_spaces(); sys.exit(bool({'torch', 'optuna', 'ray'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# The user's own configurations

START = {"lora.rank": 4, "lora.targets": "query", "lora.dropout": 0.1, "head.kind": "linear"}


def test_a_space_names_configurations_to_start_with() -> None:
    started = space(start=[START, {**START, "head.kind": "mlp", "head.hidden": 128}])
    first, second = started.starts()
    assert first.lora == LoraSpec(rank=4, dropout=0.1, targets=("q_proj",)) and second.head.hidden == 128
    assert SearchSpace.from_dict(started.to_dict(), "again") == started
    fixed = fixed_configurations(started)
    assert list(fixed) == ["projection_only", "recommended", "start_1", "start_2"] and fixed["start_2"] == second


def test_the_recommended_configuration_is_not_trained_twice() -> None:
    own = load_space("attention_only").to_dict()
    recommended = load_space("attention_only").params_of(RECOMMENDED)
    twice = SearchSpace.from_dict({**own, "start": [recommended, {**(recommended or {}), "lora.rank": 5}]}, "here")
    assert list(fixed_configurations(twice)) == ["projection_only", "recommended", "start_2"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"lora.rank": 4}, "start: entry 1 lacks lora.targets; give a value for each dimension"),
        ({**START, "lora.rank": 5}, "entry 1 has lora.rank 5, which is outside its range or grid; change it"),
        ({**START, "lora.targets": "q_proj"}, "entry 1 has lora.targets 'q_proj', which is outside"),
        ({**START, "head.hidden": 64}, "entry 1 has head.hidden, which is off by its condition; drop it"),
        ({**START, "lora.rnk": 4}, r"entry 1 has 'lora.rnk', which is no dimension (did you mean lora.rank?); put"),
    ],
)
def test_a_start_outside_the_space_is_refused(entry: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpaceError, match=re.escape(sentence)):
        space(start=[entry])


# Random configurations without Optuna


@pytest.mark.parametrize("name", SHIPPED)
def test_random_configurations_are_of_their_space(name: str) -> None:
    """Their values are written as the space itself writes them, and neighbours differ in one or two places."""
    shipped, random = load_space(name), np.random.default_rng(0)
    for _ in range(60):
        params = draw(shipped, random)
        config = shipped.build(params)
        assert shipped.params_of(config) == params
        other = neighbour(shipped, random, params)
        assert shipped.params_of(shipped.build(other)) == other
        free = [path for path in params if not shipped.dimensions[path].when]
        assert sum(params[path] != other[path] for path in free) <= 2


@pytest.mark.parametrize("name", ["query_value", "full"])
def test_the_beginning_of_a_grid_is_spread_over_the_space(name: str) -> None:
    shipped = load_space(name)
    points = list(itertools.islice(grid(shipped, 0), 40))
    assert len({str(point) for point in points}) == 40
    for path, dimension in shipped.dimensions.items():
        values = {point[path] for point in points if path in point}
        assert len(values) >= min(3, dimension.count() or 3), path
    assert all(shipped.params_of(shipped.build(point)) is not None for point in points)


def test_a_grid_has_each_of_its_points_once() -> None:
    points = [tuple(sorted(point.items())) for point in grid(space(), 3)]
    linear = 4 * 3 * 4
    assert len(points) == len(set(points)) == linear * (1 + 3)
