"""From finished trials to a confirmed front: choose on validation, export, reload, measure the test gallery once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
from optuna.trial import FrozenTrial, TrialState

from tuner.config import Precision, RunSettings, TrialConfig
from tuner.errors import TunerError
from tuner.lanes.lane import checkpoint_path
from tuner.pareto import pareto_front
from tuner.search.searcher import Objective, trial_id

Point = dict[str, Any]
BASELINE, RECOMMENDED = "projection_only", "recommended"


@dataclass(frozen=True)
class Selection:
    """Trials worth a confirmation: the validation front, and the two that every search compares with."""

    trials: tuple[FrozenTrial, ...]
    front: frozenset[str]
    baseline: str | None


def select(study: optuna.Study, objectives: Sequence[Objective]) -> Selection:
    """Choose on validation values alone."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return Selection((), frozenset(), None)
    values = np.asarray([trial.values for trial in complete])
    chosen = {int(i) for i in pareto_front(values, [objective.direction for objective in objectives])}
    origins = [trial.user_attrs["origin"] for trial in complete]
    kept = [i for i in range(len(complete)) if i in chosen or origins[i] in (BASELINE, RECOMMENDED)]
    baseline = next((trial_id(complete[i].number) for i in kept if origins[i] == BASELINE), None)
    front = frozenset(trial_id(complete[i].number) for i in chosen)
    return Selection(tuple(complete[i] for i in kept), front, baseline)


def confirm(
    selection: Selection, run_dir: Path, settings: RunSettings, precision: Precision, resources: dict[str, float]
) -> list[Point]:
    """Export the selected trials and measure them from their files, in one process beside the data.

    Returns:
        The points of front.json, by rising number of trainable parameters.

    Raises:
        TunerError: encoder, store or disk are no longer as they were.
    """
    remote = ray.remote(_confirm).options(
        num_cpus=resources.get("CPU", 1.0), num_gpus=resources.get("GPU", 0.0), max_retries=2
    )
    trials = [
        (
            trial_id(trial.number),
            trial.user_attrs["origin"],
            TrialConfig.model_validate_json(trial.user_attrs["config"]),
        )
        for trial in selection.trials
    ]
    threads = int(resources.get("CPU", 1))
    arguments = (trials, selection.baseline, str(run_dir.resolve()), settings, precision, threads)
    try:
        points: list[Point] = ray.get(remote.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        # Ray's own text is the whole traceback of the remote process.
        raise (error.cause if isinstance(error.cause, TunerError) else error) from None
    for point in points:
        point["on_front"] = point["trial"] in selection.front
    return sorted(points, key=lambda point: (point["trainable_parameters"], point["trial"]))


def _confirm(
    trials: list[tuple[str, str, TrialConfig]],
    baseline: str | None,
    run_dir: str,
    settings: RunSettings,
    precision: Precision,
    threads: int,
) -> list[Point]:
    """Runs in a process of its own: the driver never imports torch."""
    import torch

    from tuner.data.store import Store
    from tuner.encoders.registry import inspect_encoder, load_encoder
    from tuner.train.metrics import Retrieval
    from tuner.train.pack import Pack, PackContext
    from tuner.train.precision import dtype_of

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(inspect_encoder(settings.encoder), dtype_of(precision), device)
    store = Store.open(Path(settings.store))
    pack = Pack(PackContext(encoder, store, settings))
    points: list[Point] = []
    tests: dict[str, Retrieval] = {}
    for trial, origin, config in trials:
        point, tests[trial] = _confirm_one(pack, trial, config, Path(run_dir), precision)
        points.append({**point, "origin": origin})
    for point in points:
        point["test_vs_baseline"] = _difference(tests[point["trial"]], tests[baseline]) if baseline else None
    return points


def _confirm_one(pack: Any, trial: str, config: TrialConfig, run_dir: Path, precision: Precision) -> tuple[Point, Any]:
    from tuner.train.evaluate import attach_exported, nested
    from tuner.train.export import export_adapter, make_card
    from tuner.train.metrics import bootstrap

    folder = run_dir / "adapters" / trial
    member = pack.attach(trial, config, checkpoint_path(run_dir, trial))
    card = make_card(member, pack.store, pack.settings, precision)
    export_adapter(member, card, pack.settings, folder)
    pack.detach(trial)
    loaded = attach_exported(folder, card, pack.encoder)
    test = loaded.evaluate(pack.store, "test")
    validation = loaded.evaluate(pack.store, "validation")
    loaded.release()
    point = {
        "trial": trial,
        "config": config.model_dump(mode="json"),
        "target_modules": list(card.target_modules),
        "layers": list(card.layers),
        "lora_parameters": card.lora_parameters,
        "trainable_parameters": card.trainable_parameters,
        "validation": nested(validation.metrics()),
        "test": {**nested(test.metrics()), "intervals": bootstrap(test)},
        "adapter": f"adapters/{trial}",
    }
    return point, test


def _difference(test: Any, baseline: Any) -> dict[str, Any]:
    """Paired differences over the same test queries, with intervals."""
    from tuner.train.metrics import bootstrap

    ours, theirs = test.metrics(), baseline.metrics()
    intervals = bootstrap(test, baseline)
    return {key: {"difference": ours[key] - theirs[key], "interval": interval} for key, interval in intervals.items()}
