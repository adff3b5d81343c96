"""`tuner search --dry-run`: sums over the very configurations a search would ask for, without training or torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXT_DIM, Tiny

from tuner import cli
from tuner.encoders.registry import inspect_encoder
from tuner.errors import PlacementError
from tuner.lanes.fleet import FleetOptions
from tuner.lora.cost import Lengths, frozen_flops, training_flops, validation_flops
from tuner.search import estimate as module
from tuner.search.estimate import Estimate, estimate_search, measured_rate, planned_configurations
from tuner.search.request import SearchRequest, fixed_configurations
from tuner.space import SearchSpace, load_space
from tuner.study.config import StudyConfig
from tuner.study.folder import StudyFolder

TRIALS = 5
LABELS = ["search", "operations", "one", "time", "at", "memory", "disk", "left"]  # first words of the lines
SPACE: dict[str, Any] = {
    "name": "two_depths",
    "description": "Two first adapted blocks.",
    "target_sets": {"pair": ["q_proj", "v_proj"]},
    "dimensions": {
        "lora.rank": {"int": [2, 64]},
        "lora.targets": {"choice": ["pair"]},
        "lora.first_layer": {"choice": [0, 2]},
    },
}


def request_of(tiny: Tiny, folder: Path, **changes: Any) -> SearchRequest:
    """`fleet` is the driver's, everything else the study's."""
    fleet = changes.pop("fleet", FleetOptions())
    values: dict[str, Any] = {
        "study": "s",
        "space": SearchSpace.from_dict(SPACE, "here"),
        "settings": tiny.settings(epochs=3),
        "trials": TRIALS,
    }
    return SearchRequest(StudyConfig(**values | changes), StudyFolder(folder / "runs" / "s"), fleet=fleet)


@pytest.fixture(scope="module")
def estimate(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Estimate:
    return estimate_search(request_of(tiny, tmp_path_factory.mktemp("e")), 1e9)


def test_the_sums_are_those_of_each_trial(estimate: Estimate, tiny: Tiny, tmp_path: Path) -> None:
    """Trial by trial with the formula that `test_cost` holds against torch's counter."""
    configs = planned_configurations(request_of(tiny, tmp_path))
    spec, store = inspect_encoder(tiny.encoder), tiny.store()
    train, validation = (Lengths.of(store.frames[store.split(name)].tolist()) for name in ("train", "validation"))
    each = [
        (3 * training_flops(spec, config, train, TEXT_DIM), 3 * validation_flops(spec, config, validation, TEXT_DIM))
        for config in configs
    ]
    assert (estimate.trials, estimate.epochs, estimate.training_clips) == (TRIALS, 3, len(store.split("train")))
    assert estimate.training_flops == sum(trained for trained, _ in each)
    assert estimate.validation_flops == sum(validated for _, validated in each)
    assert estimate.dearest_trial_flops == max(map(sum, each))
    assert estimate.cheapest_trial_flops == min(map(sum, each))


def test_frozen_blocks_are_paid_for_once(estimate: Estimate, tiny: Tiny, tmp_path: Path) -> None:
    configs = planned_configurations(request_of(tiny, tmp_path))
    spec, store = inspect_encoder(tiny.encoder), tiny.store()
    every = Lengths.of(store.frames.tolist())
    depths = {-1 if config.lora is None else config.lora.first_layer: config.lora for config in configs}
    assert depths.keys() == {-1, 0, 2}
    assert len(configs) > len(depths)
    assert estimate.shared_flops == sum(frozen_flops(spec, lora, every) for lora in depths.values())
    # States that enter block 0 serve the trial without LoRA too. As wide as the encoder, in fp32.
    files = 2 * every.tokens(spec, 0)[0] * 32 * 4
    assert estimate.cache_bytes == files


def test_hours_follow_from_the_rate_and_the_fleet(estimate: Estimate, tiny: Tiny, tmp_path: Path) -> None:
    assert estimate.worker_hours == pytest.approx(estimate.total_flops / 1e9 / 3600)
    assert estimate.hours == estimate.worker_hours
    wide = estimate_search(request_of(tiny, tmp_path, fleet=FleetOptions(2, 3, 1)), 1e9)
    assert wide.hours == pytest.approx(estimate.hours / 6)
    assert wide.worker_hours == estimate.worker_hours
    # Lanes beyond the number of trials have nothing to do.
    many = estimate_search(request_of(tiny, tmp_path, fleet=FleetOptions(100, 1, 1)), 1e9)
    assert many.hours == pytest.approx(estimate.hours / TRIALS)
    # Lanes for all GPUs that the search may take.
    capped = estimate_search(request_of(tiny, tmp_path, fleet=FleetOptions(workers=2, max_gpus=5)), 1e9)
    assert (capped.lanes, capped.worker_hours) == (2, estimate.worker_hours)
    assert capped.hours == pytest.approx(estimate.hours / 4)
    packed = estimate_search(request_of(tiny, tmp_path, fleet=FleetOptions(1, 1, 4)), 1e9)
    assert packed.worker_bytes > estimate.worker_bytes


def test_the_configurations_are_those_a_search_asks_for(tiny: Tiny, tmp_path: Path) -> None:
    """The fixed ones first; then draws from the space, the same for the same seed."""
    request = request_of(tiny, tmp_path)
    configs = planned_configurations(request)
    assert [config.model_copy(update={"seed": 0}) for config in configs[:2]] == list(fixed_configurations().values())
    assert all(request.config.space.params_of(config) for config in configs[2:])
    assert configs == planned_configurations(request)
    assert configs != planned_configurations(request_of(tiny, tmp_path, seed=1))


def test_the_rate_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.1)
    assert 1e8 < measured_rate() < 1e14


def test_the_command_trains_nothing_writes_nothing_and_imports_no_torch(tiny: Tiny, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom tuner.cli import main\n"
        "try:\n    main()\nfinally:\n    print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, "search", "--dry-run", "--data", str(tiny.store_folder), "--tflops", "0.5"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"TUNER_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert [line.partition(" ")[0] for line in lines] == LABELS
    assert "7 trials of 3 epochs, 36 training clips, space attention_only" in lines[0]
    assert "500 GFLOP/s a worker (declared with --tflops)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(sys, "argv", ["tuner", "search", "--dry-run", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()


def test_programs_get_json(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--data", str(tiny.store_folder), "--trials", "3", "--tflops", "1", "--json"]
    code, printed = run(given, monkeypatch, capsys)
    values = json.loads(printed.out)
    assert (code, values["trials"], values["flops_per_second"], values["declared"]) == (0, 3, 1e12, True)
    parts = ("training_flops", "validation_flops", "shared_flops", "confirmation_flops")
    assert values["total_flops"] == sum(values[part] for part in parts) > 0
    assert values["hours"] == pytest.approx(values["total_flops"] / 1e12 / 3600)


def test_a_study_that_is_there_is_not_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed = run(["--resume", "s"], monkeypatch, capsys)
    assert (code, printed.err) == (2, "tuner: --dry-run estimates new studies only; drop --resume\n")


def test_a_space_that_does_not_fit_is_refused_before_it_is_estimated(tiny: Tiny, tmp_path: Path) -> None:
    space = load_space("attention_only").to_dict() | {"fixed": {"lora.first_layer": 7}}
    request = request_of(tiny, tmp_path, space=SearchSpace.from_dict(space, "here"))
    with pytest.raises(PlacementError, match="first_layer: 7 is outside the 3 blocks"):
        estimate_search(request, 1e9)
