"""`benchmarks/placement.py` measures what docs/placement.md says it does: gradients, sizes, work, memory, recall."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import placement_recall
from benchmarks.placement import (
    LISTS,
    count_lists,
    count_placements,
    loaded_parameters,
    real_size,
    show_recall,
    show_steps,
    step_flops,
)
from benchmarks.placement_recall import ALONE, CONFIGS, METRIC, TRIAL, measure_recall
from benchmarks.placement_steps import (
    PLACEMENTS,
    TARGETS,
    WARM_UP,
    StepRow,
    UnusedTraining,
    allocated_peak,
    lora_of,
    measure_steps,
)
from benchmarks.qwen2_audio import write_small
from tuner.config import EncoderRef, TrialConfig
from tuner.encoders import packed
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.lora.cost import Lengths, stem_flops
from tuner.lora.linear import LoraLinear
from tuner.lora.placement import lora_parameters, resolve_placement
from tuner.train.pack import Pack, PackContext

MIB = 2**20
STEPS = 8


def quiet(text: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def full(tiny_qwen: Tiny) -> Tiny:
    return Tiny(tiny_qwen.encoder.model_copy(update={"path": "full_forward"}), tiny_qwen.store_folder)


@pytest.fixture(scope="module")
def rows(full: Tiny) -> list[StepRow]:
    return measure_steps(full.store(), full.encoder, STEPS, quiet)


# Steps


def test_gradient_comes_to_b_first_and_then_to_all(rows: list[StepRow]) -> None:
    for row in rows[:-1]:
        names = set(row.training.tensors)
        first, second = row.gradients
        assert first.arrived == second.arrived == second.nonzero == names
        assert first.nonzero == {name for name in names if ".lora_B." in name}


def test_lora_that_the_embedding_does_not_need_gets_no_gradient_and_stays(full: Tiny, rows: list[StepRow]) -> None:
    """Nor does weight decay move it, while the loss falls through the projection."""
    assert not any(seen.arrived for seen in rows[-1].gradients)
    unused = UnusedTraining(full.store(), full.encoder, TrialConfig(lora=lora_of("language_model", "attention")))
    before = {name: tensor.detach().clone() for name, tensor in unused.tensors.items()}
    losses = [unused.step()[0] for _ in range(STEPS)]
    assert losses[-1] < 0.9 * losses[0]
    assert len(before) == 2 * 4 * 2
    assert all(torch.equal(tensor, unused.tensors[name]) for name, tensor in before.items())


def test_rows_count_the_lora_inside_and_outside_the_tower(full: Tiny, rows: list[StepRow]) -> None:
    spec, placed = inspect_encoder(full.encoder), iter(rows)
    for placement in PLACEMENTS:
        for targets in TARGETS:
            row, lora = next(placed), lora_of(placement, targets)
            (inside, size), (outside, more) = row.count(inside=True), row.count(inside=False)
            assert inside + outside == 2 * len(resolve_placement(spec, lora).modules)
            assert size + more == lora_parameters(spec, lora)
            assert (inside > 0, outside > 0) == (placement != "language_model", placement != "tower")


def test_every_placement_learns_and_is_timed(rows: list[StepRow], capsys: pytest.CaptureFixture[str]) -> None:
    assert all(len(row.seconds) == STEPS - WARM_UP and len(row.losses) == STEPS for row in rows)
    assert all(row.losses[-1] < row.losses[0] for row in rows)
    by_name = {row.name: row.peak for row in rows}
    assert rows[-1].peak < by_name["tower: attention"] < by_name["tower: attention + MLP"]
    assert by_name["language model: attention"] < by_name["both: attention"]
    show_steps(rows, 36)
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)
    unused = next(line for line in printed.splitlines() if line.strip().startswith(rows[-1].name))
    assert unused.split()[-3:] == ["0", "0", str(len(rows[-1].training.tensors))]


def test_the_work_of_a_step_is_what_torch_counts(
    full: Tiny, rows: list[StepRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 2 %: the counter sees the similarity matrix too. PEFT's own layers, whose products it knows.

    Without the convolutions, which run over the padding of a batch here and are counted on real frames.
    """
    monkeypatch.setattr(LoraLinear, "_trained_alone", lambda layer, x: None)
    monkeypatch.setattr(packed, "SHORTEST_IN_GROUP", 1.0)
    store = full.store()
    lengths = Lengths.of(store.frames[store.split("train")].tolist())
    stem = stem_flops(inspect_encoder(full.encoder), lengths)
    for row in rows:
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            row.training.step()
        products = counter.get_total_flops() - counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
        assert products == pytest.approx(row.flops - stem, rel=0.02), row.name


def hold(*sizes: int) -> Callable[[], None]:
    def run() -> None:
        for size in sizes:
            first = torch.empty(size, dtype=torch.uint8)
            second = first.clone()
            del first, second

    return run


def test_the_peak_is_what_is_held_at_once() -> None:
    """Two tensors at a time, one pair after another; what was held before does not count."""
    before = torch.ones(32 * MIB, dtype=torch.uint8)
    assert allocated_peak(hold(6 * MIB, 9 * MIB, 3 * MIB)) == pytest.approx(18 * MIB, abs=4096)
    assert before.all()


# Sizes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    return real_size(tmp_path_factory.mktemp("real-size") / "model")


def test_lora_at_real_size(whole: EncoderSpec) -> None:
    """The document's 256 tensors, and 7.6 times as many parameters in the language model, not ten."""
    counts = count_placements(whole)
    assert counts["tower: attention"] == (256, 5_242_880, 0, 0)
    assert counts["tower: attention + MLP"] == (384, 11_796_480, 0, 0)
    assert counts["language model: attention"] == (0, 0, 256, 16_777_216)
    assert counts["language model: attention + MLP"] == (0, 0, 448, 39_976_960)
    assert counts["both: attention + MLP"] == (384, 11_796_480, 448, 39_976_960)
    assert counts["language model: attention + MLP"][3] / counts["tower: attention"][1] == 7.625


def test_the_documents_list_misses_the_tower_and_leaks(whole: EncoderSpec) -> None:
    found = count_lists(whole)
    assert [found[name] for name in LISTS] == [
        (192, 3_932_160, 256, 16_777_216),
        (256, 5_242_880, 192, 12_582_912),
    ]


def test_what_is_loaded_and_counted_at_real_size(whole: EncoderSpec) -> None:
    assert loaded_parameters(whole) == {
        "tower": 636_968_960,
        "language_model": 7_118_880_768,
        "both": 7_118_880_768,
    }
    tower, model, both = (step_flops(whole, TrialConfig(lora=lora_of(part, "attention"))) for part in PLACEMENTS)
    # What lies below a LoRA on the language model is the frozen tower, 0.676 TFLOP for a clip of 10 s.
    assert (model[0] - model[1]) / 32 == pytest.approx(0.676e12, rel=0.01)
    assert tower[1] / 32 == pytest.approx(1.398e12, rel=0.02)
    assert tower[0] < model[0] < both[0]


def test_the_small_model_has_the_ratios_of_the_large_one(whole: EncoderSpec, tmp_path: Path) -> None:
    reference = EncoderRef(source=str(write_small(tmp_path / "small")), path="full_forward")
    small = inspect_encoder(reference)
    for placement in PLACEMENTS:
        for targets in TARGETS:
            lora = lora_of(placement, targets)
            # An eighth of the widths, an eighth of the blocks.
            assert 64 * lora_parameters(small, lora) == lora_parameters(whole, lora)


# Recall


def test_recall_is_chosen_on_validation_and_measured_as_a_trial_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement_recall, "measured_precision", lambda device: "fp32")
    result = measure_recall(tiny.store(), 2, 12, quiet)
    assert [row.name for row in result.rows] == list(CONFIGS)
    recalls = {name: retrieval.metrics()[METRIC] for name, retrieval in result.validation.items()}
    assert result.chosen != ALONE
    assert recalls[result.chosen] == max(recall for name, recall in recalls.items() if name != ALONE)
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    pack = Pack(PackContext(encoder, tiny.store(), tiny.settings(tokens_per_forward=4096)))
    pack.attach(TRIAL, CONFIGS["attention"])
    losses: list[Any] = [pack.train_epoch([TRIAL])[TRIAL] for _ in range(2)]
    row = next(row for row in result.rows if row.name == "attention")
    assert row.loss == losses[-1]["loss"]
    assert result.test["attention"].metrics() == pack.validate(TRIAL, "test").metrics()
    assert result.train["attention"].metrics()["audio_to_text_N"] == 12
    show_recall(result, 36, 2)
    printed = capsys.readouterr().out
    assert f"{result.chosen} (chosen)" in printed
    assert "validation 12 clips, 7 captions; test 12 clips, 7 captions" in printed
