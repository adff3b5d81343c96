"""`tuner.train` against an independent plain PyTorch loop: the same losses, weights, schedule and recall."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import plain_training
import pytest
import torch
from conftest import CAPTIONS, Tiny
from plain_training import Clips, Outcome, Recipe
from transformers import WhisperModel

from tuner.config import HeadSpec, LoraSpec, LossSpec, OptimSpec, TrialConfig
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.train.batches import epoch_batches
from tuner.train.member import WarmupCosine
from tuner.train.pack import Pack, PackContext

LAYERS = r"layers\.[12]\.(self_attn\.q_proj|self_attn\.v_proj|fc1)"
RECIPES = {
    # Colder than a configuration may be, so that the first step leaves it beyond the limit.
    "clamped": Recipe(LAYERS, temperature=0.005, lora_lr=2e-2, head_lr=1e-2, max_grad_norm=2.0, seed=3),
    "LoRA+": Recipe(LAYERS, plus=8.0, lora_lr=2e-3, seed=7),
    "clipped": Recipe(LAYERS, max_grad_norm=0.05, lora_lr=2e-2, seed=5, data_seed=1),
    "siglip": Recipe(LAYERS, kind="siglip", hidden=16, alpha=2.0, seed=1),
    "projection": Recipe(None, learn_temperature=False, weight_decay=0.1),
}
# fp32, other orders of summation: one clip at a time there, packed forward passes here.
TOLERANCE = 2e-4


def plain_clips(tiny: Tiny) -> Clips:
    store = tiny.store()
    every = range(len(store))
    return Clips(
        features=[torch.tensor(store.features(clip)) for clip in every],
        frames=store.frames.tolist(),
        captions=[store.clip_captions(clip).tolist() for clip in every],
        text_MD=torch.tensor(store.text_embeddings),
        train=store.split("train").tolist(),
        validation=store.split("validation").tolist(),
    )


def config_of(recipe: Recipe) -> TrialConfig:
    lora = LoraSpec(
        rank=recipe.rank, alpha_ratio=recipe.alpha / recipe.rank, targets=("q_proj", "v_proj", "fc1"), first_layer=1
    )
    loss = LossSpec(kind=recipe.kind, learn_temperature=recipe.learn_temperature)
    return TrialConfig(
        lora=lora if recipe.modules else None,
        head=HeadSpec(kind="mlp", hidden=recipe.hidden) if recipe.hidden else HeadSpec(),
        optim=OptimSpec(
            lora_lr=recipe.lora_lr,
            lora_plus_ratio=recipe.plus,
            head_lr=recipe.head_lr,
            weight_decay=recipe.weight_decay,
            warmup_fraction=recipe.warmup_fraction,
            max_grad_norm=recipe.max_grad_norm,
        ),
        loss=loss.model_copy(update={"temperature": recipe.temperature}),
        seed=recipe.seed,
    )


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[str, Outcome]:
    model: Any = WhisperModel.from_pretrained(tiny.encoder.source, attn_implementation="eager")
    tower = model.encoder.eval()
    clips = plain_clips(tiny)
    return {name: plain_training.train(tower, clips, recipe) for name, recipe in RECIPES.items()}


def test_the_plain_loop_imports_nothing_of_tuner() -> None:
    tree = ast.parse(Path(plain_training.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.startswith(("tuner", "conftest", "benchmarks"))]


def test_each_recipe_shows_what_it_is_for(expected: dict[str, Outcome]) -> None:
    """Else the comparison would say nothing about the clamp or the clipping."""
    assert expected["clamped"].clamped > 0
    assert min(expected["clipped"].norms) > RECIPES["clipped"].max_grad_norm
    drawn = {caption for _, captions in expected["siglip"].batches for caption in captions}
    assert drawn == set(range(CAPTIONS + 1)), "first and second captions"
    assert all(outcome.losses[-1] < outcome.losses[0] for outcome in expected.values())


@pytest.mark.parametrize("name", RECIPES)
def test_training_equals_the_plain_loop(tiny: Tiny, expected: dict[str, Outcome], name: str) -> None:
    """Losses, temperature and weights (relative 2e-4), then recall, AP and ranks (exact, AP 1e-6)."""
    recipe, wanted = RECIPES[name], expected[name]
    settings = tiny.settings(epochs=recipe.epochs, batch_size=recipe.batch_size, data_seed=recipe.data_seed)
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    pack = Pack(PackContext(encoder, tiny.store(), settings))
    member = pack.attach("t0000", config_of(recipe))
    losses, scales = list[float](), list[float]()
    for _ in range(recipe.epochs):
        row = pack.train_epoch(["t0000"])["t0000"]
        assert isinstance(row, dict)
        losses.append(row["loss"])
        scales.append(row["logit_scale"])
    np.testing.assert_allclose(losses, wanted.losses, rtol=TOLERANCE)
    np.testing.assert_allclose(scales, wanted.scales, rtol=TOLERANCE)
    weights = member.shared_parameters()
    assert len(weights) == len(wanted.weights)
    for ours, theirs in zip(weights, wanted.weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=TOLERANCE, atol=TOLERANCE)
    metrics = pack.validate("t0000").metrics()
    assert metrics == pytest.approx(wanted.metrics, rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_captions_and_schedule_are_those_of_the_plain_loop(
    tiny: Tiny, expected: dict[str, Outcome], name: str
) -> None:
    recipe, wanted, store = RECIPES[name], expected[name], tiny.store()
    batches = [
        (batch.clips_B.tolist(), batch.captions_B.tolist())
        for epoch in range(1, recipe.epochs + 1)
        for batch in epoch_batches(store, store.split("train"), recipe.batch_size, recipe.data_seed, epoch)
    ]
    assert batches == wanted.batches
    factor = WarmupCosine(len(wanted.factors), recipe.warmup_fraction)
    assert [factor(step) for step in range(len(batches))] == pytest.approx(wanted.factors)
