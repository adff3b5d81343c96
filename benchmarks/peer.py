"""The peer: the same search as a user writes it from the documentation of Ray Tune, Ray Train and PEFT.

Ray Tune with OptunaSearch for two objectives. The function of each trial runs a `TorchTrainer` of its own that reports
through `TuneReportCallback`, the documented form; its worker loads Whisper's encoder, embeds the captions, and trains
on all cores (`peer_training.py`). Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from benchmarks import run
from tuner.config import LoraSpec, OptimSpec, TrialConfig


@dataclass(frozen=True)
class Job:
    """What all trials share: data, encoders, batches and threads."""

    manifest: str
    audio_encoder: str
    text_encoder: str
    batch_size: int
    epochs: int
    threads: int


def train_loop(arguments: dict[str, Any]) -> None:
    """What the Ray Train worker of one trial runs."""
    import ray.train
    import torch
    from torch.utils.data import DataLoader

    from benchmarks import peer_training

    job, config = Job(**arguments["job"]), trial_config(arguments["params"])
    torch.set_num_threads(job.threads)
    torch.manual_seed(config.seed)
    captions = peer_training.read_captions(Path(job.manifest))
    text_MD = peer_training.embed_captions(Path(job.text_encoder), captions)
    encoder = peer_training.load_audio_encoder(Path(job.audio_encoder))
    collate = peer_training.Collate(encoder)
    train, validation = (
        DataLoader(
            peer_training.Recordings(Path(job.manifest), split, captions),
            job.batch_size,
            shuffle=split == "train",
            collate_fn=collate,
        )
        for split in ("train", "validation")
    )
    model = peer_training.ContrastiveModel(encoder, config, text_MD.shape[1])
    training = peer_training.Training(model, config.optim, text_MD, job.epochs * len(train))
    for _ in range(job.epochs):
        started = time.perf_counter()
        loss = training.epoch(train)
        trained = time.perf_counter()
        recall = peer_training.recall_at_10(model, validation, text_MD)
        ray.train.report(
            {
                "loss": loss,
                "recall@10": recall,
                "trainable_parameters": sum(parameter.numel() for parameter in training.parameters),
                "train_seconds": trained - started,
                "validation_seconds": time.perf_counter() - trained,
            }
        )


def run_trial(params: dict[str, Any], job: Job) -> None:
    """The Tune trial: one TorchTrainer, as Ray's guide on tuning with Ray Train has it."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    resources = {"CPU": float(job.threads)}
    callback: Any = TuneReportCallback
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": vars(job), "params": params},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=f"train-{ray.tune.get_context().get_trial_id()}",
            storage_path=str(Path(job.manifest).parent / "peer"),
            callbacks=[callback()],
        ),
    )
    trainer.fit()


def trial_params(config: TrialConfig) -> dict[str, Any]:
    """A configuration as flat search parameters."""
    lora = config.lora
    assert lora is not None, "the peer trains LoRA"
    return {
        "rank": lora.rank,
        "alpha_ratio": lora.alpha_ratio,
        "dropout": lora.dropout,
        "targets": ",".join(lora.targets),
        "lora_lr": config.optim.lora_lr,
        "head_lr": config.optim.head_lr,
    }


def trial_config(params: dict[str, Any]) -> TrialConfig:
    """The inverse of `trial_params`."""
    lora = {name: params[name] for name in ("rank", "alpha_ratio", "dropout")}
    optim = {name: params[name] for name in ("lora_lr", "head_lr")}
    return TrialConfig(lora=LoraSpec(**lora, targets=params["targets"].split(",")), optim=OptimSpec(**optim))


def search(job: Job, configs: list[TrialConfig], storage: Path) -> list[dict[str, Any]]:
    """Run the configurations as trials of an Optuna search; returns the last report of each."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    points = [trial_params(config) for config in configs]
    spread = optuna.distributions.FloatDistribution
    space: dict[str, Any] = {
        "rank": optuna.distributions.IntDistribution(2, 64, log=True),
        "alpha_ratio": optuna.distributions.CategoricalDistribution([1.0, 2.0, 4.0]),
        "dropout": spread(0.0, 0.2),
        "targets": optuna.distributions.CategoricalDistribution(sorted({point["targets"] for point in points})),
        "lora_lr": spread(3e-4, 3e-3, log=True),
        "head_lr": spread(5e-4, 2e-3, log=True),
    }
    searcher = OptunaSearch(
        space, metric=["recall@10", "trainable_parameters"], mode=["max", "min"], points_to_evaluate=points
    )
    # A trial's function holds one CPU, though it only waits for its worker: one more, so that the worker has all cores.
    ray.init(num_cpus=job.threads + 1)
    tuner = tune.Tuner(
        tune.with_parameters(run_trial, job=job),
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=len(points), max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage)),
    )
    results = tuner.fit()
    if results.errors:
        raise results.errors[0]
    ended = [results[index] for index in range(len(results))]
    reports = [{"params": result.config, **(result.metrics or {})} for result in ended]
    kept = ("recall@10", "trainable_parameters", "loss", "train_seconds", "validation_seconds", "time_total_s")
    by_params = {json.dumps(report["params"], sort_keys=True): report for report in reports}
    return [{name: by_params[json.dumps(point, sort_keys=True)][name] for name in kept} for point in points]


def main(
    manifest: Path, audio_encoder: Path, text_encoder: Path, configs: Path, batch_size: int = 24, epochs: int = 1
) -> None:
    """Search the configurations of a JSON file (a list of trial configurations); one JSON line with their reports."""
    job = Job(str(manifest), str(audio_encoder), str(text_encoder), batch_size, epochs, os.cpu_count() or 1)
    wanted = [TrialConfig.model_validate(values) for values in json.loads(configs.read_text(encoding="utf-8"))]
    typer.echo(json.dumps({"event": "peer", "trials": search(job, wanted, manifest.parent / "peer")}))


if __name__ == "__main__":
    run(main)
