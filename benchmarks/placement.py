"""Where LoRA belongs in a contrastive audio encoder: what docs/placement.md says, measured.

1. A small Qwen2-Audio with random weights trains on real clips with LoRA in its tower, its language model and both.
   Counted are the LoRA tensors whose gradient is not zero (A has none in the first step, because B starts at zero);
   timed is the whole optimiser step with every part of the path run, nothing cached, as the median over steps that all
   placements take in turn. Memory is the most that torch's tensors take during a step on top of weights, adapters and
   optimiser. Its recall would say nothing, since random weights have heard nothing; that its loss falls says only that
   gradients point the right way, and it falls through the projection alone too.
2. Qwen2-Audio-7B by its configuration, no weights: LoRA tensors as PEFT injects them, operations as
   `tuner.lora.cost` counts them, on clips of 10 s.
3. Whisper tiny.en on a share of the demo, one seed: recall@10 with 95 % intervals. The configuration with LoRA that is
   best on validation is marked; test is measured once, after the last epoch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import peft
import torch
import typer

from benchmarks import run
from benchmarks.placement_recall import ALONE, METRIC, Recalls, interval, measure_recall, queries
from benchmarks.placement_steps import (
    PARTS,
    PLACEMENTS,
    RANK,
    TARGETS,
    StepRow,
    lora_of,
    lora_tensors,
    measure_steps,
)
from benchmarks.qwen2_audio import write_real_size, write_small
from benchmarks.share import Share, make_share
from benchmarks.table import show
from tuner.config import EncoderRef, TrialConfig
from tuner.data.prepare import prepare
from tuner.data.store import Store
from tuner.diagnose.adapted import match
from tuner.diagnose.whole import lora_size, whole_model
from tuner.encoders.checkpoint import read_json
from tuner.encoders.qwen2_audio.full_forward import Qwen2AudioFullForward, empty_qwen2_audio
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.lora import adapter as lora_adapter
from tuner.lora.cost import Lengths, frozen_flops, training_flops

MIB, GB, TERA = 2**20, 10**9, 10**12
BF16_BYTES = 2
CLIPS, FRAMES = 32, 1000  # of the step that is counted at real size: 10 s each
TEXT_DIM = 384  # of the demo's text encoder
# What a plain list adapts where PEFT is given the whole model: the document's, and with the tower's own name.
LISTS = {
    "list q, k, v, o_proj, whole model": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "list q, k, v, out_proj, whole model": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
Counts = tuple[int, int, int, int]  # LoRA tensors and parameters in the tower, the same outside it


def show_steps(rows: list[StepRow], clips: int) -> None:
    """Print where gradient comes, then what the same steps cost."""
    cells = []
    for row in rows:
        (inside, size), (outside, more) = row.count(inside=True), row.count(inside=False)
        first, second = row.gradients
        dead = f"{inside + outside - len(second.arrived)}"
        counts = (f"{inside}", f"{size:,}", f"{outside}", f"{more:,}")
        cells.append((row.name, *counts, f"{len(first.nonzero)}", f"{len(second.nonzero)}", dead))
    title = f"a small Qwen2-Audio, LoRA r={RANK}: tensors and parameters;\n"
    title += "tensors whose gradient is not zero in the first and the second step, and whose gradient is None"
    sizes = ("in tower", "parameters", "outside", "parameters")
    show(title, ("LoRA on", *sizes, "step 1", "step 2", "None"), cells)
    cells = []
    for row in rows:
        times = (f"{1e3 * row.median:.0f}", f"{row.median / rows[0].median:.2f}x", f"{row.flops / rows[0].flops:.2f}x")
        memory = (f"{row.peak / MIB:.0f}", f"{row.peak / rows[0].peak:.2f}x")
        cells.append((row.name, *times, *memory, f"{row.losses[0]:.3f}", f"{row.losses[-1]:.3f}"))
    columns = ("LoRA on", "ms", "time", "operations", "peak MiB", "memory", "first loss", "last loss")
    title = f"a step of {clips} clips, median of {len(rows[0].seconds)}; factors over tower: attention"
    show(title, columns, cells)


def real_size(folder: Path) -> EncoderSpec:
    """Qwen2-Audio-7B by the path through its language model."""
    return inspect_encoder(EncoderRef(source=str(write_real_size(folder)), path="full_forward"))


def count_placements(spec: EncoderSpec) -> dict[str, Counts]:
    """LoRA of every placement on the meta device, as PEFT injects it."""
    whole = Qwen2AudioFullForward(spec, empty_qwen2_audio(read_json(spec.folder / "config.json")))
    found = {}
    for placement in PLACEMENTS:
        for targets in TARGETS:
            lora = lora_of(placement, targets)
            lora_adapter.attach(lora_adapter.on_path(whole, lora), lora, "default")
            tensors = lora_tensors(whole.model)
            inside = [tensor.numel() for name, tensor in tensors.items() if name.startswith("audio_tower.")]
            outside = [tensor.numel() for name, tensor in tensors.items() if not name.startswith("audio_tower.")]
            found[f"{PARTS[placement]}: {targets}"] = (len(inside), sum(inside), len(outside), sum(outside))
            lora_adapter.detach(lora_adapter.on_path(whole, lora), "default")
    return found


def count_lists(spec: EncoderSpec) -> dict[str, Counts]:
    """What PEFT's own matching makes of plain lists over the whole model."""
    whole, found = whole_model(spec), {}
    for name, targets in LISTS.items():
        matched = match(peft.LoraConfig(r=RANK, target_modules=list(targets)), whole)
        sizes = [
            lora_size((whole.linears[module] for module in part), RANK) for part in (matched.tower, matched.outside)
        ]
        found[name] = (2 * len(matched.tower), sizes[0], 2 * len(matched.outside), sizes[1])
    return found


def loaded_parameters(spec: EncoderSpec) -> dict[str, int]:
    """Frozen parameters that a trial of each placement has to hold; word embeddings are never read."""
    whole = Qwen2AudioFullForward(spec, empty_qwen2_audio(read_json(spec.folder / "config.json")))
    tower, everything = (sum(p.numel() for p in part.parameters()) for part in (whole.tower_alone, whole))
    return {placement: tower if placement == "tower" else everything for placement in PLACEMENTS}


def step_flops(spec: EncoderSpec, config: TrialConfig) -> tuple[int, int]:
    """Operations of a step on `CLIPS` clips: with every part of the path run, and with frozen states cached."""
    lengths = Lengths({FRAMES: CLIPS})
    trained = training_flops(spec, config, lengths, TEXT_DIM)
    return trained + frozen_flops(spec, config.lora, lengths), trained


def show_real_size(spec: EncoderSpec) -> None:
    """Print where LoRA goes in the 7B model, then what a step costs there."""
    counts = count_placements(spec)
    base = counts[f"{PARTS['tower']}: attention"][1]
    cells = []
    for name, (inside, size, outside, more) in (counts | count_lists(spec)).items():
        numbers = (f"{inside}", f"{size / 1e6:.2f}", f"{outside}", f"{more / 1e6:.2f}")
        cells.append((name, *numbers, f"{(size + more) / base:.2f}x"))
    sizes = ("in tower", "million", "outside", "million")
    show(f"Qwen2-Audio-7B, LoRA r={RANK}: tensors and parameters", ("LoRA on", *sizes, "parameters"), cells)
    loaded, cells = loaded_parameters(spec), []
    first = step_flops(spec, TrialConfig(lora=lora_of("tower", "attention")))
    for placement in PLACEMENTS:
        for targets in TARGETS:
            run_all, cached = step_flops(spec, TrialConfig(lora=lora_of(placement, targets)))
            work = (f"{run_all / TERA:.1f}", f"{run_all / first[0]:.2f}x", f"{cached / TERA:.1f}")
            weights = f"{BF16_BYTES * loaded[placement] / GB:.1f}"
            cells.append((f"{PARTS[placement]}: {targets}", weights, *work, f"{cached / first[1]:.2f}x"))
    title = f"Qwen2-Audio-7B, a step of {CLIPS} clips of {FRAMES // 100} s: operations by count, weights in bf16"
    columns = ("LoRA on", "weights GB", "TFLOP, all run", "factor", "TFLOP, frozen cached", "factor")
    show(title, columns, cells)


def show_recall(result: Recalls, clips: int, epochs: int) -> None:
    """Print every configuration, then the differences on test that the document's claims are about."""
    reference = next(row for row in result.rows if row.name == "attention")
    cells = []
    for row in result.rows:
        name = f"{row.name} (chosen)" if row.name == result.chosen else row.name
        time = f"{row.step_seconds / reference.step_seconds:.2f}x"
        train = f"{result.train[row.name].metrics()[METRIC]:.3f}"
        rest = (interval(result.validation[row.name]), interval(result.test[row.name]))
        cells.append((name, f"{row.parameters:,}", time, f"{row.loss:.3f}", train, *rest))
    sizes = [queries(split[ALONE].metrics()) for split in (result.train, result.validation, result.test)]
    title = (
        f"Whisper tiny.en, {clips} training clips, {epochs} epochs, LoRA r={RANK}: {METRIC} [95 %]\n"
        f"N: training share {sizes[0]}; validation {sizes[1]}; test {sizes[2]}; step time over attention"
    )
    show(title, ("LoRA on", "parameters", "step", "loss", "train", "validation", "test"), cells)
    pairs = [("attention", ALONE), ("attention + MLP", "attention"), ("attention", "query, value")]
    pairs += [("MLP", "attention"), ("attention, r=64", "attention"), (result.chosen, ALONE)]
    differences = [
        (f"{left} - {right}", interval(result.test[left], result.test[right])) for left, right in dict.fromkeys(pairs)
    ]
    show(f"paired differences in test {METRIC} [95 %]", ("configurations", "difference"), differences)


def prepared(share: Share, encoder: EncoderRef, folder: Path) -> Store:
    """Features of a share for an encoder."""
    return Store.open(prepare(share.manifest, encoder, str(share.text_encoder), folder).store)


def say(text: str) -> None:
    """Progress, apart from the tables."""
    typer.echo(text, err=True)


def main(steps: int = 12, train: int = 800, held_out: int = 400, epochs: int = 4, quick: bool = False) -> None:
    """Measure; `held_out` recordings are validation, and as many test."""
    if quick:
        steps, train, held_out, epochs = 4, 32, 12, 1
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="tuner-bench-") as name:
        folder = Path(name)
        small = make_share(_made(folder / "small"), {"train": 32, "validation": 8, "test": 8})
        qwen = EncoderRef(source=str(write_small(folder / "qwen2-audio")), path="full_forward")
        rows = measure_steps(prepared(small, qwen, folder / "small-store"), qwen, steps, say)
        show_steps(rows, 32)
        del rows
        show_real_size(real_size(folder / "real-size"))
        share = make_share(_made(folder / "share"), {"train": train, "validation": held_out, "test": held_out})
        store = prepared(share, EncoderRef(source=str(share.audio_encoder)), folder / "store")
        show_recall(measure_recall(store, epochs, 32, say), train, epochs)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    run(main)
