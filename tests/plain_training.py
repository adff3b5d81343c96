"""One training as docs/architecture.md and the docstrings describe it, in plain PyTorch: an oracle for `tuner.train`.

Nothing of tuner is imported here. Every clip is encoded alone, losses are sums over pairs, and clipping, schedule,
ranks and precisions are written out from their definitions. Slow, and only for a tiny Whisper without dropout.

Shapes: B clips of a batch, C channels, F frames, T tokens, D text width, M captions.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class Clips:
    """A prepared data set, as plain values."""

    features: list[Tensor]  # [C, F] of each clip
    frames: list[int]
    captions: list[list[int]]  # of each clip
    text_MD: Tensor
    train: list[int]
    validation: list[int]


@dataclass(frozen=True)
class Recipe:
    """Everything that a training depends on besides the data. Without modules there is no LoRA."""

    modules: str | None = None  # a pattern of names in the encoder
    rank: int = 4
    alpha: float = 8.0
    lora_lr: float = 1e-2
    plus: float = 1.0  # learning rate of B over that of A
    head_lr: float = 3e-2
    hidden: int | None = None  # of a head of two layers
    weight_decay: float = 0.5
    warmup_fraction: float = 0.25
    max_grad_norm: float = 0.2
    kind: Literal["infonce", "siglip"] = "infonce"
    temperature: float = 0.07
    learn_temperature: bool = True
    seed: int = 0
    data_seed: int = 0
    epochs: int = 4
    batch_size: int = 12


@dataclass
class Outcome:
    """What a training did, step by step, and what came out of it."""

    batches: list[tuple[list[int], list[int]]] = field(default_factory=list)  # clips, and the caption drawn for each
    factors: list[float] = field(default_factory=list)  # of the learning rates
    norms: list[float] = field(default_factory=list)  # of the gradients before clipping
    clamped: int = 0  # steps after which the temperature was at its limit
    losses: list[float] = field(default_factory=list)  # mean of each epoch
    scales: list[float] = field(default_factory=list)  # 1 / temperature after each epoch
    weights: list[Tensor] = field(default_factory=list)  # A and B of each layer, then the head
    metrics: dict[str, float] = field(default_factory=dict)


def train(tower: Any, clips: Clips, recipe: Recipe) -> Outcome:
    """Train a copy of a transformers WhisperEncoder's adapters with a head, and measure it on the validation clips."""
    tower, done = copy.deepcopy(tower).requires_grad_(False), Outcome()
    lora, head = start(tower, clips.text_MD.shape[1], recipe)
    log_scale = torch.tensor(-math.log(recipe.temperature), requires_grad=recipe.learn_temperature)
    bias = torch.tensor(-10.0, requires_grad=recipe.kind == "siglip")
    scalars = [value for value in (log_scale, bias) if value.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora[0::2], "lr": recipe.lora_lr, "weight_decay": recipe.weight_decay},
            {"params": lora[1::2], "lr": recipe.plus * recipe.lora_lr, "weight_decay": recipe.weight_decay},
            {"params": list(head.parameters()), "lr": recipe.head_lr, "weight_decay": recipe.weight_decay},
            {"params": scalars, "lr": recipe.head_lr, "weight_decay": 0.0},
        ][0 if lora else 2 :]
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    total = recipe.epochs * steps(clips, recipe)
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        for batch, captions in batches(clips, recipe, epoch):
            factor = learning_rate_factor(len(done.factors), total, recipe.warmup_fraction)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            audio_BD = torch.stack([embed(tower, head, clips, clip) for clip in batch])
            logits_BB = audio_BD @ clips.text_MD[captions].T * log_scale.exp()
            owned = [clips.captions[clip] for clip in batch]
            loss = info_nce(logits_BB, owned, captions)
            if recipe.kind == "siglip":
                loss = siglip(logits_BB + bias, owned, captions)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            done.norms.append(clip_gradients([*lora, *head.parameters(), *scalars], recipe.max_grad_norm))
            optimizer.step()
            if float(log_scale.detach()) > math.log(100):
                done.clamped += 1
                log_scale.data.fill_(math.log(100))
            done.batches.append((batch, captions))
            done.factors.append(factor)
            losses.append(float(loss.detach()))
        done.losses.append(statistics.fmean(losses))
        done.scales.append(math.exp(float(log_scale.detach())))
    done.weights = [value.detach() for value in (*lora, *head.parameters())]
    with torch.no_grad():
        done.metrics = measure(torch.stack([embed(tower, head, clips, clip) for clip in clips.validation]), clips)
    return done


def start(tower: Any, width: int, recipe: Recipe) -> tuple[list[Tensor], nn.Module]:
    """A and B of every adapted layer (A as PEFT draws it, B zero), then the head, drawn one after another."""
    if recipe.modules:
        config = peft.LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.modules)  # type: ignore[arg-type]
        peft.inject_adapter_in_model(config, tower)
    lora: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for module in tower.modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                nn.init.zeros_(b)
                lora += [a, b]
        inside = tower.config.d_model
        if recipe.hidden is None:
            return lora, nn.Linear(inside, width)
        return lora, nn.Sequential(nn.Linear(inside, recipe.hidden), nn.GELU(), nn.Linear(recipe.hidden, width))


def steps(clips: Clips, recipe: Recipe) -> int:
    """Steps of an epoch: batches differ by one clip at most, and none is dropped."""
    return max(1, round(len(clips.train) / recipe.batch_size))


def batches(clips: Clips, recipe: Recipe, epoch: int) -> Iterator[tuple[list[int], list[int]]]:
    """Clips in an order of the data seed and the epoch, and for each one of its captions."""
    random = np.random.default_rng([recipe.data_seed, epoch])
    order = random.permutation(clips.train).tolist()
    uniform = random.random(len(order)).tolist()
    drawn = [clips.captions[clip][int(u * len(clips.captions[clip]))] for clip, u in zip(order, uniform, strict=True)]
    count = steps(clips, recipe)
    sizes = [len(order) // count + (step < len(order) % count) for step in range(count)]
    for step, size in enumerate(sizes):
        first = sum(sizes[:step])
        yield order[first : first + size], drawn[first : first + size]


def learning_rate_factor(step: int, total: int, warmup_fraction: float) -> float:
    """Linear warm-up to 1, then a cosine to 0 at the last step."""
    warmup = round(total * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def embed(tower: Any, head: nn.Module, clips: Clips, clip: int) -> Tensor:
    """Embedding D of one clip: the tokens of its own frames, their mean, the head, unit length."""
    tokens = (clips.frames[clip] - 1) // 2 + 1
    hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(clips.features[clip][None])))).transpose(1, 2)[:, :tokens]
    hidden = hidden + tower.embed_positions.weight[:tokens]
    for layer in tower.layers:
        hidden = layer(hidden, None)
    embedded = head(tower.layer_norm(hidden)[0].mean(dim=0))
    unit: Tensor = embedded / embedded.norm()
    return unit


def info_nce(logits_BB: Tensor, owned: list[list[int]], captions: list[int]) -> Tensor:
    """Both directions; a caption that also belongs to a clip is no negative of it."""
    total, every = torch.tensor(0.0), range(len(captions))
    for i in every:
        texts = [j for j in every if j == i or captions[j] not in owned[i]]
        sounds = [j for j in every if j == i or captions[i] not in owned[j]]
        total = total + torch.logsumexp(logits_BB[i, texts], 0) + torch.logsumexp(logits_BB[sounds, i], 0)
        total = total - 2 * logits_BB[i, i]
    return total / (2 * len(captions))


def siglip(logits_BB: Tensor, owned: list[list[int]], captions: list[int]) -> Tensor:
    """Every pair by itself; the same pairs are left out."""
    total = torch.tensor(0.0)
    for i, own in enumerate(owned):
        for j, caption in enumerate(captions):
            if i == j or caption not in own:
                total = total - F.logsigmoid(logits_BB[i, j] if i == j else -logits_BB[i, j])
    return total / len(captions)


def clip_gradients(values: list[Tensor], limit: float) -> float:
    """Scale all gradients of the adapter together to a global norm of at most `limit`; returns the norm before."""
    gradients = [value.grad for value in values if value.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    for gradient in gradients if norm > limit else []:
        gradient.mul_(limit / norm)
    return norm


def measure(audio_ND: Tensor, clips: Clips) -> dict[str, float]:
    """Recall, AP@10 and median rank of the validation clips among their own distinct captions, both ways."""
    gallery = sorted({caption for clip in clips.validation for caption in clips.captions[clip]})
    score = (audio_ND @ clips.text_MD[gallery].T).tolist()
    wanted = [[caption in clips.captions[clip] for caption in gallery] for clip in clips.validation]
    metrics = direction("audio_to_text", score, wanted)
    turned = (
        [list(column) for column in zip(*score, strict=True)],
        [list(column) for column in zip(*wanted, strict=True)],
    )
    metrics |= direction("text_to_audio", *turned)
    for k in (1, 5, 10):
        metrics[f"recall@{k}"] = (metrics[f"audio_to_text_R@{k}"] + metrics[f"text_to_audio_R@{k}"]) / 2
    return metrics


def direction(name: str, score: list[list[float]], wanted: list[list[bool]]) -> dict[str, float]:
    """Metrics of one direction, a query at a time; a wrong entry of equal score goes first."""
    ranks, precisions = [], []
    for values, right in zip(score, wanted, strict=True):
        hits = [right[i] for i in sorted(range(len(values)), key=lambda i: (-values[i], right[i]))]
        ranks.append(hits.index(True) + 1)
        found = [sum(hits[:place]) / place for place in range(1, min(10, len(hits)) + 1) if hits[place - 1]]
        precisions.append(sum(found) / min(10, sum(hits)))
    shares = {f"{name}_R@{k}": statistics.fmean(rank <= k for rank in ranks) for k in (1, 5, 10)}
    return shares | {
        f"{name}_mAP@10": statistics.fmean(precisions),
        f"{name}_median_rank": float(statistics.median(ranks)),
        f"{name}_N": float(len(ranks)),
    }
