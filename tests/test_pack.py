"""The pack loop: an adapter in a pack equals it alone, caches equal the live encoder, resuming equals going on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Tiny

from tuner.config import LoraSpec, LossSpec, OptimSpec, TrialConfig
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import DataError, StudyError, TrialFailed
from tuner.lora.adapter import activate, names
from tuner.lora.placement import trainable_parameters
from tuner.train.member import WarmupCosine
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import LivePrefix, open_prefix

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIGS = {
    "t0000": TrialConfig(seed=1),
    "t0001": TrialConfig(lora=LoraSpec(rank=4, dropout=0.1, targets=ATTENTION), seed=2),
    "t0002": TrialConfig(
        lora=LoraSpec(rank=2, dropout=0.3, targets=("fc1", "v_proj"), first_layer=1),
        loss=LossSpec(kind="siglip"),
        optim=OptimSpec(lora_lr=3e-3),
        seed=2,
    ),
}


def make_pack(tiny: Tiny, cache: Path | None = None, dtype: torch.dtype = torch.float32, **settings: object) -> Pack:
    encoder = load_encoder(inspect_encoder(tiny.encoder), dtype)
    return Pack(PackContext(encoder, tiny.store(), tiny.settings(**settings), prefix_root=cache))


def weights(pack: Pack, trial: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in pack.members[trial].shared_parameters()]


def train(pack: Pack, trials: list[str], epochs: int = 2) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {trial: [] for trial in trials}
    for _ in range(epochs):
        for trial, row in pack.train_epoch(trials).items():
            assert isinstance(row, dict)
            losses[trial].append(row["loss"])
    return losses


def test_an_adapter_in_a_pack_equals_the_adapter_alone(tiny: Tiny) -> None:
    """Bit for bit: losses, weights and metrics, with dropout, in a pack of three different adapters."""
    pack = make_pack(tiny)
    for trial, config in CONFIGS.items():
        pack.attach(trial, config)
    together = train(pack, list(CONFIGS))
    for trial, config in CONFIGS.items():
        alone = make_pack(tiny)
        alone.attach(trial, config)
        assert train(alone, [trial])[trial] == together[trial]
        assert all(map(torch.equal, weights(alone, trial), weights(pack, trial)))
        assert alone.validate(trial).metrics() == pack.validate(trial).metrics()


def test_every_member_stays_trainable_whichever_runs(tiny: Tiny) -> None:
    """PEFT freezes the adapters that are not active; one backward pass may reach several of them."""
    pack = make_pack(tiny)
    for trial, config in CONFIGS.items():
        pack.attach(trial, config)
    for active in (None, "t0001", "t0002"):
        activate(pack.encoder, active)
        for member in pack.members.values():
            assert all(parameter.requires_grad for parameter in member.lora_parameters)


def test_dropout_is_on_in_training_and_off_in_validation(tiny: Tiny) -> None:
    """B is zero at first, so dropout shows after a step; the initial weights are the same with and without it."""
    losses = {}
    for dropout in (0.0, 0.5):
        pack = make_pack(tiny)
        config = TrialConfig(lora=LoraSpec(rank=4, dropout=dropout, targets=ATTENTION), optim=OptimSpec(lora_lr=3e-2))
        pack.attach("t0001", config)
        start = weights(pack, "t0001")
        losses[dropout] = start, train(pack, ["t0001"])["t0001"]
        clips = pack.store.split("validation")
        assert torch.equal(pack.embed("t0001", clips), pack.embed("t0001", clips))
    assert all(map(torch.equal, losses[0.0][0], losses[0.5][0]))
    assert losses[0.0][1] != pytest.approx(losses[0.5][1], rel=1e-3)


def test_the_seed_of_a_trial_draws_its_weights(tiny: Tiny) -> None:
    drawn = []
    for trial, seed in (("t0001", 1), ("t0002", 1), ("t0003", 2)):
        pack = make_pack(tiny)
        pack.attach(trial, CONFIGS["t0001"].model_copy(update={"seed": seed}))
        drawn.append(torch.cat([value.flatten() for value in weights(pack, trial)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_training_learns_the_store(tiny: Tiny) -> None:
    pack = make_pack(tiny, epochs=15)
    fast = OptimSpec(lora_lr=1e-2, head_lr=1e-2)
    pack.attach("t0001", TrialConfig(lora=LoraSpec(rank=4, dropout=0.1, targets=ATTENTION), optim=fast))
    before = pack.validate("t0001").metrics()["recall@1"]
    losses = train(pack, ["t0001"], epochs=15)["t0001"]
    assert losses[-1] < 0.7 * losses[0]
    assert pack.validate("t0001").metrics()["recall@1"] > max(0.6, before)


def test_counts_are_known_before_training(tiny: Tiny) -> None:
    pack = make_pack(tiny)
    for trial, config in CONFIGS.items():
        member = pack.attach(trial, config)
        assert member.trainable_parameters == trainable_parameters(pack.encoder.spec, config, pack.store.text_dim)


def test_the_cut_into_forward_passes_does_not_change_the_loss(tiny: Tiny) -> None:
    """Tolerance 1e-5: one clip at a time against the whole batch at once, without dropout."""
    config = TrialConfig(lora=LoraSpec(rank=4, targets=ATTENTION))
    losses = []
    for budget in (1, 100_000):
        pack = make_pack(tiny, tokens_per_forward=budget)
        pack.attach("t0001", config)
        losses.append(train(pack, ["t0001"])["t0001"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_cached_prefix_equals_the_live_one(tiny: Tiny, tmp_path: Path, depth: int) -> None:
    """Tolerance 1e-5 in fp32: other groups, so other matrix shapes."""
    pack = make_pack(tiny)
    cached = open_prefix(pack.encoder, pack.store, depth, tmp_path, tokens_per_forward=50)
    clips = np.array([5, 17, 2, 44])
    live, read = LivePrefix(pack.encoder, pack.store, depth).hidden(clips), cached.hidden(clips)
    assert live.packing.lengths == read.packing.lengths
    assert torch.equal(live.frames_B, read.frames_B)
    torch.testing.assert_close(read.states_ND, live.states_ND, rtol=1e-5, atol=1e-5)


def test_training_from_the_cache_equals_training_live(tiny: Tiny, tmp_path: Path) -> None:
    """Tolerance 1e-4 on the loss after two epochs, for every adapter (each enters at another block)."""
    live, cached = make_pack(tiny), make_pack(tiny, tmp_path)
    for trial, config in CONFIGS.items():
        live.attach(trial, config)
        cached.attach(trial, config)
    ours, theirs = train(cached, list(CONFIGS)), train(live, list(CONFIGS))
    for trial in CONFIGS:
        np.testing.assert_allclose(ours[trial], theirs[trial], rtol=1e-4)


def test_number_formats_do_not_share_a_cache(tiny: Tiny, tmp_path: Path) -> None:
    """Bytes of one read as the other would be noise; each format has its own states (bf16: 2 % of the largest)."""
    clips = np.arange(4)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        pack = make_pack(tiny, dtype=dtype)
        cached = open_prefix(pack.encoder, pack.store, 1, tmp_path, tokens_per_forward=50)
        live = LivePrefix(pack.encoder, pack.store, 1).hidden(clips).states_ND
        assert cached.made
        torch.testing.assert_close(
            cached.hidden(clips).states_ND, live, rtol=0, atol=tolerance * float(live.abs().max())
        )


def test_an_interrupted_cache_is_filled_again(tiny: Tiny, tmp_path: Path) -> None:
    pack = make_pack(tiny)
    every = np.arange(len(pack.store))
    whole = open_prefix(pack.encoder, pack.store, 0, tmp_path, 50).hidden(every).states_ND
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "complete.json").unlink()
    (folder / "tokens.bin").write_bytes(b"half")
    assert torch.equal(open_prefix(pack.encoder, pack.store, 0, tmp_path, 50).hidden(every).states_ND, whole)


def test_a_cache_cut_short_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    pack = make_pack(tiny)
    prefix = open_prefix(pack.encoder, pack.store, 0, tmp_path, 50)
    (tokens,) = tmp_path.glob("*/tokens.bin")
    with tokens.open("r+b") as file:
        file.truncate(tokens.stat().st_size - 1)
    with pytest.raises(DataError, match=r"tokens\.bin: shorter than it was"):
        prefix.hidden(np.arange(len(pack.store)))


def test_a_resumed_adapter_equals_one_that_went_on(tiny: Tiny, tmp_path: Path) -> None:
    """Bit for bit, dropout stream and schedule included."""
    whole, first = make_pack(tiny, epochs=3), make_pack(tiny, epochs=3)
    trial, config = "t0002", CONFIGS["t0002"]
    whole.attach(trial, config)
    expected = train(whole, [trial], epochs=3)[trial]
    first.attach(trial, config)
    train(first, [trial], epochs=1)
    first.members[trial].save(tmp_path / "t0002.pt")
    second = make_pack(tiny, epochs=3)
    member = second.attach(trial, config, tmp_path / "t0002.pt")
    assert member.epoch == 1
    assert train(second, [trial], epochs=2)[trial] == expected[1:]
    assert all(map(torch.equal, weights(second, trial), weights(whole, trial)))


def test_a_checkpoint_of_another_configuration_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    pack = make_pack(tiny)
    pack.attach("t0001", CONFIGS["t0001"]).save(tmp_path / "c.pt")
    pack.detach("t0001")
    with pytest.raises(StudyError, match="another configuration"):
        pack.attach("t0001", CONFIGS["t0002"], tmp_path / "c.pt")
    assert not names(pack.encoder)


def test_a_nan_ends_one_member_only(tiny: Tiny) -> None:
    pack = make_pack(tiny)
    pack.attach("t0000", CONFIGS["t0000"])
    sick = pack.attach("t0001", CONFIGS["t0001"])
    with torch.no_grad():
        sick.lora_parameters[0].fill_(float("nan"))
    rows = pack.train_epoch(["t0000", "t0001"])
    assert isinstance(rows["t0001"], TrialFailed)
    assert "nan" in str(rows["t0001"])
    assert isinstance(rows["t0000"], dict)


def test_detached_adapters_leave_nothing(tiny: Tiny) -> None:
    pack = make_pack(tiny)
    before = [name for name, _ in pack.encoder.named_parameters()]
    for round_ in range(5):
        trial = f"t{round_:04d}"
        pack.attach(trial, CONFIGS["t0001"])
        pack.train_epoch([trial])
        pack.detach(trial)
    assert [name for name, _ in pack.encoder.named_parameters()] == before
    assert all(parameter.grad is None for parameter in pack.encoder.parameters())


def test_lora_gradients_reach_every_tensor_and_the_base_has_none(tiny: Tiny) -> None:
    """A is zero at the first step, since B starts at zero: look after two."""
    pack = make_pack(tiny, dtype=torch.bfloat16)
    member = pack.attach("t0001", CONFIGS["t0001"])
    start = weights(pack, "t0001")
    train(pack, ["t0001"], epochs=1)
    moved = [not torch.equal(a, b) for a, b in zip(start, weights(pack, "t0001"), strict=True)]
    assert all(moved)
    assert all(parameter.dtype == torch.float32 for parameter in member.shared_parameters())


def test_warmup_then_cosine() -> None:
    factor = WarmupCosine(total_steps=100, warmup_fraction=0.1)
    assert factor(0) == pytest.approx(1 / 11)
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0.0)
    assert all(factor(step) > factor(step + 1) for step in range(10, 99))
