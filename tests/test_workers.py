"""W workers that share every batch equal one process: same losses, same weights, same temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import Tiny
from torch import Tensor

from tuner.config import HeadSpec, LoraSpec, LossSpec, RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.train.pack import Pack, PackContext
from tuner.train.workers import Workers

CONFIGS = {
    "projection": TrialConfig(seed=1),
    "infonce": TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj", "v_proj", "o_proj")), seed=2),
    "siglip": TrialConfig(
        lora=LoraSpec(rank=2, targets=("v_proj", "fc1"), first_layer=1),
        head=HeadSpec(kind="mlp", hidden=16),
        loss=LossSpec(kind="siglip"),
        seed=3,
    ),
}
TOLERANCE = 1e-5  # other order of sums
Outcome = dict[str, dict[str, Any]]


def train(settings: RunSettings, workers: Workers) -> Outcome:
    """One epoch of every configuration; batches of nine clips, so that no two workers have the same number."""
    encoder = load_encoder(inspect_encoder(settings.encoder), torch.float32)
    pack = Pack(PackContext(encoder, Store.open(Path(settings.store)), settings, workers))
    for trial, config in CONFIGS.items():
        pack.attach(trial, config)
    rows = pack.train_epoch(list(CONFIGS))
    outcome: Outcome = {}
    for trial in CONFIGS:
        row, member = rows[trial], pack.members[trial]
        assert isinstance(row, dict)
        outcome[trial] = {
            "loss": row["loss"],
            "weights": torch.cat([parameter.detach().flatten() for parameter in member.shared_parameters()]),
            "temperature": torch.stack([parameter.detach() for parameter in member.loss.parameters()]),
            "embeddings": pack.embed(trial, pack.store.split("validation")),
            "metrics": pack.validate(trial).metrics(),
        }
    return outcome


def worker(rank: int, world: int, settings: RunSettings, folder: Path) -> None:
    """Train in the way under test, then without the exchange of gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    exact = train(settings, Workers(rank, world))
    Workers.sum_gradients = lambda self, parameters: None  # type: ignore[method-assign]
    torch.save({"exact": exact, "local": train(settings, Workers(rank, world))}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def settings(tiny: Tiny) -> RunSettings:
    return tiny.settings(epochs=1, batch_size=9)


@pytest.fixture(scope="module")
def alone(settings: RunSettings) -> Outcome:
    return train(settings, Workers())


@pytest.fixture(scope="module", params=[2, 3])
def together(
    request: pytest.FixtureRequest, settings: RunSettings, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Outcome]]:
    """What each rank ended with."""
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        mp.spawn(worker, args=(request.param, settings, folder), nprocs=request.param)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("trial", CONFIGS)
def test_workers_equal_one_process(alone: Outcome, together: list[dict[str, Outcome]], trial: str) -> None:
    for rank in together:
        ours, expected = rank["exact"][trial], alone[trial]
        assert ours["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
        for what in ("weights", "temperature", "embeddings"):
            torch.testing.assert_close(ours[what], expected[what], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("trial", CONFIGS)
def test_workers_agree_to_the_last_bit(together: list[dict[str, Outcome]], trial: str) -> None:
    """Else they would drift apart over the epochs, and only rank 0's weights are kept."""
    first, *others = (rank["exact"][trial] for rank in together)
    for other in others:
        assert torch.equal(first["weights"], other["weights"])
        assert torch.equal(first["temperature"], other["temperature"])
        assert first["metrics"] == other["metrics"]


@pytest.mark.parametrize("trial", CONFIGS)
def test_without_the_exchange_workers_differ(alone: Outcome, together: list[dict[str, Outcome]], trial: str) -> None:
    """The comparison above can fail: each worker's own gradient is not the gradient of the batch."""

    def distance(weights: Tensor) -> float:
        return float((weights - alone[trial]["weights"]).abs().max())

    for rank in together:
        assert distance(rank["local"][trial]["weights"]) > 30 * TOLERANCE
