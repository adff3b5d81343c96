"""Adapters as PEFT saves them: whatever PEFT loads with no tensor missing is sound, and is counted by its tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import small_whisper
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, WhisperForConditionalGeneration

from tuner.config import EncoderRef, LoraSpec, TrialConfig
from tuner.diagnose.findings import Step
from tuner.diagnose.strategy import check_strategy
from tuner.diagnose.subject import DiagnoseRequest, Subject
from tuner.encoders.registry import inspect_encoder

QUERIES = r"model\.encoder\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "saved_modules": {"modules_to_save": ["layer_norm"]},
    "bias": {"bias": "lora_only"},
    "all_biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 32}, "alpha_pattern": {"q_proj": 3}},
    "task": {"task_type": "SEQ_2_SEQ_LM"},
    "tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "convolutions": {"target_modules": r"model\.encoder\.(conv1|conv2|layers\.\d+\.fc1)"},
    "embeddings": {"target_modules": r"model\.encoder\.layers\.\d+\.fc1|model\.decoder\.embed_tokens"},
    "pissa": {"init_lora_weights": "pissa"},
}
LEAKS = ("embeddings",)  # LoRA in the decoder, which never runs


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    WhisperForConditionalGeneration(small_whisper()).save_pretrained(folder)
    return folder


def strategy(encoder: Path, **what: Any) -> Step:
    trial = TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj",)))
    request = DiagnoseRequest(EncoderRef(source=str(encoder)), trial, **what)
    return check_strategy(Subject(request, inspect_encoder(request.encoder)))


def save(model: torch.nn.Module, folder: Path, **options: Any) -> tuple[int, int]:
    """Save an adapter; LoRA tensors and numbers in it by PEFT's own parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, **({"target_modules": QUERIES} | options)))
        adapted.save_pretrained(str(folder))
    sizes = [value.numel() for key, value in adapted.named_parameters() if ".lora_" in key]
    return len(sizes), sum(sizes)


def errors(step: Step) -> list[str]:
    return [finding.text for finding in step.findings if finding.level == "error"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_loads_is_sound(whisper: Path, tmp_path: Path, kind: str) -> None:
    expected = save(WhisperForConditionalGeneration.from_pretrained(whisper), tmp_path, **KINDS[kind])
    step = strategy(whisper, adapter=tmp_path)
    counts = step.values["peft_config"].values()
    assert (sum(each["tensors"] for each in counts), sum(each["parameters"] for each in counts)) == expected
    assert step.values["adapter_file"]["tensors_that_miss"] == 0
    if kind in LEAKS:
        (text,) = errors(step)
        assert "2 to other parts of the model, which the path audio_tower never runs" in text
    else:
        assert not errors(step)
        tensors, parameters = expected
        assert f"{tensors} LoRA tensors ({parameters:,} parameters) in the tower" in str(step.findings)


def test_heads_of_other_families(tmp_path: Path) -> None:
    config = Wav2Vec2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    model.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/preprocessor_config.json").write_text('{"do_normalize": true}')
    save(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    step = strategy(tmp_path / "encoder", adapter=tmp_path / "adapter")
    assert not errors(step) and step.values["peft_config"]["tower"]["tensors"] == 8


def test_all_linear_is_peft_s_word_for_all_linear_layers(whisper: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}')
    step = strategy(whisper, peft_config=tmp_path / "adapter_config.json")
    assert not errors(step) and step.state == "warning"
    # Three blocks of six layers in the encoder, one of ten in the decoder; the head gives the text.
    assert step.values["peft_config"]["tower"]["tensors"] == 2 * 18
    assert step.values["peft_config"]["elsewhere"]["tensors"] == 2 * 10


def test_what_peft_would_leave_untrained_is_an_error(whisper: Path, tmp_path: Path) -> None:
    save(WhisperForConditionalGeneration.from_pretrained(whisper), tmp_path, modules_to_save=["layer_norm"])
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    lacking = {key: value for key, value in whole.items() if "layers.1.self_attn.q_proj" not in key}
    save_file(lacking, path)
    (text,) = errors(strategy(whisper, adapter=tmp_path))
    assert "lacks 2 of the 34 tensors of its configuration" in text
    save_file({key: value[..., :4].contiguous() if "lora_A" in key else value for key, value in whole.items()}, path)
    (text,) = errors(strategy(whisper, adapter=tmp_path))
    assert "6 tensors have another shape than this model asks for" in text
    save_file(whole | {"base_model.model.later.version": torch.zeros(1)}, path)
    assert not errors(strategy(whisper, adapter=tmp_path))


def test_files_that_are_not_read(whisper: Path, tmp_path: Path) -> None:
    save(WhisperForConditionalGeneration.from_pretrained(whisper), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.rename(tmp_path / "adapter_model.bin")
    (text,) = errors(strategy(whisper, adapter=tmp_path))
    assert "adapter_model.bin beside it is not read" in text and "save_pretrained" in text
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (text,) = errors(strategy(whisper, adapter=tmp_path))
    assert "Git LFS pointer" in text


@pytest.mark.parametrize("field", ["megatron_core", "eva_config", "loftq_config", "corda_config", "auto_mapping"])
def test_a_configuration_names_nothing_that_is_imported(whisper: Path, tmp_path: Path, field: str) -> None:
    """PEFT would import the module that `megatron_core` names."""
    (tmp_path / "evil_module.py").write_text(f"raise SystemExit({field!r})")
    values = {"megatron_core": '"evil_module"', "auto_mapping": '{"parent_library": "evil_module"}'}
    more = ', "megatron_config": {"a": 1}' if field == "megatron_core" else ""
    text = f'{{"peft_type": "LORA", "target_modules": ["q_proj"], "{field}": {values.get(field, "{}")}{more}}}'
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        strategy(whisper, peft_config=tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"peft_type": "LORA", "target_modules": "(("}', "match no module"),
        ('{"peft_type": "LORA", "target_modules": "(("' + "[" * 10_000, "is not a PEFT configuration"),
        ('{"peft_type": "LORA", "r": "many", "target_modules": ["q_proj"]}', ""),
        ('{"peft_type": "LORA", "target_modules": ["' + "x" * 1_000_000 + '"]}', "matches no module"),
        ("[]", "is not a PEFT configuration"),
    ],
)
def test_broken_configurations_are_one_sentence(whisper: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    found = errors(strategy(whisper, peft_config=tmp_path / "adapter_config.json"))
    assert found and words in found[0]
    assert all("\n" not in each and len(each) < 1000 for each in found)
