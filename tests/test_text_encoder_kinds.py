"""Text encoders of every kind that transformers loads: widths, limits and poolings, against a plain forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, T5EncoderModel

from tuner.encoders.text import TextEncoder
from tuner.encoders.text_facts import LONGEST, TextSpec, inspect_text_encoder
from tuner.errors import EncoderError

WIDTH, LAYERS = 24, 1
LONG = "birds sing in the morning " * 60
# What each architecture calls its sizes, and how many tokens it takes of 66 positions.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "bert": ({}, 66),
    "roberta": ({}, 65),  # counts from padding_idx + 1, which is 1 here
    "xlm-roberta": ({}, 65),
    "camembert": ({}, 65),
    "mpnet": ({}, 64),  # whatever the number of its padding
    "electra": ({"embedding_size": WIDTH}, 66),
    "albert": ({"embedding_size": 16}, 66),
    "distilbert": ({"dim": WIDTH, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, 66),
    "gpt2": ({"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 66}, 66),
    "t5": ({"d_model": WIDTH, "d_kv": 12, "num_heads": 2, "d_ff": 32, "num_layers": 1}, LONGEST),
    "bart": (
        {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2}, 66),
    "clip_text_model": ({"bos_token_id": 2, "eos_token_id": 3}, 66),
}  # fmt: skip


def tokenizer(special: bool = True, **options: Any) -> tuple[PreTrainedTokenizerFast, int]:
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *" .,'", *("##" + letter for letter in letters)]
    made = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    if special:
        template: Any = processors.TemplateProcessing
        made.post_processor = template(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        names["pad_token"] = "[PAD]"
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=made, **names, **options), len(words)


def write_model(folder: Path, kind: str, special: bool = True, **options: Any) -> Path:
    tokens, count = tokenizer(special, **options)
    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 66,
    }  # fmt: skip
    own = KINDS[kind][0]
    if {"dim", "n_embd", "d_model"} & own.keys():
        sizes = {"max_position_embeddings": 66} if kind in ("distilbert", "bart") else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **own, vocab_size=count, pad_token_id=0)
    auto: Any = AutoModel
    auto.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def add_pooling(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    return folder


def by_hand(folder: Path, text: str, limit: int, kind: str, pooling: str = "mean") -> np.ndarray:
    made = PreTrainedTokenizerFast.from_pretrained(folder)
    model = (T5EncoderModel if kind == "t5" else AutoModel).from_pretrained(folder).eval()
    ids = torch.tensor([made(text, truncation=True, max_length=limit)["input_ids"]])
    run = model.get_encoder() if kind == "bart" else model
    with torch.inference_mode():
        hidden_TD = run(input_ids=ids).last_hidden_state[0].numpy()
    pooled_D = hidden_TD.mean(axis=0) if pooling == "mean" else hidden_TD[0]
    return np.asarray(pooled_D / np.linalg.norm(pooled_D))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_embeds_short_and_long_captions(tmp_path: Path, kind: str) -> None:
    folder, limit = write_model(tmp_path / "model", kind), KINDS[kind][1]
    spec = inspect_text_encoder(str(folder))
    assert spec.dim == WIDTH
    encoder = TextEncoder(spec)
    assert encoder.max_tokens == limit
    short, long = encoder.encode(["a dog barks", LONG])
    assert np.abs(short - by_hand(folder, "a dog barks", limit, kind)).max() < 1e-5
    assert np.abs(long - by_hand(folder, LONG, limit, kind)).max() < 1e-5


def test_tokenisers_without_padding_or_on_the_left(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "gpt2", "gpt2", special=False)
    encoder = TextEncoder(inspect_text_encoder(str(folder)))
    assert np.abs(encoder.encode(["rain", "a dog barks"])[0] - by_hand(folder, "rain", 66, "gpt2")).max() < 1e-5
    folder = add_pooling(write_model(tmp_path / "bert", "bert", padding_side="left"), {"pooling_mode": "cls"})
    encoder = TextEncoder(inspect_text_encoder(str(folder)))
    expected = by_hand(folder, "rain", 66, "bert", "cls")
    assert np.abs(encoder.encode(["rain", "a dog barks"])[0] - expected).max() < 1e-5


def test_the_limit_of_sentence_transformers_holds_within_the_models(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "roberta", model_max_length=16)
    assert TextEncoder(inspect_text_encoder(str(folder))).max_tokens == 16
    for own, expected in ((32, 32), (66, 65), (10_000, 65)):
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": own}))
        encoder = TextEncoder(inspect_text_encoder(str(folder)))
        assert encoder.max_tokens == expected
        assert encoder.encode([LONG]).shape == (1, WIDTH)


def test_poolings_of_sentence_transformers_since_5_4(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bert")
    for name in ("mean", "cls"):
        add_pooling(folder, {"embedding_dimension": WIDTH, "pooling_mode": name, "include_prompt": True})
        assert TextEncoder(inspect_text_encoder(str(folder))).pooling == name
    for config, words in (
        ({"pooling_mode": "lasttoken"}, "asks for lasttoken; only mean or cls"),
        ({"pooling_mode": ["mean", "max"]}, "asks for mean and max"),
        ({"pooling_mode": None}, "asks for None"),
        ({"embedding_dimension": WIDTH}, "asks for no pooling"),
    ):
        with pytest.raises(EncoderError, match=words):
            inspect_text_encoder(str(add_pooling(folder, config)))


def test_what_a_model_lacks_is_not_drawn_at_random(tmp_path: Path) -> None:
    """transformers fills missing weights with random ones, and says so in a table on the terminal alone."""
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "model", "bert")
    tensors = load_file(folder / "model.safetensors")
    whole = {name: value for name, value in tensors.items() if not name.startswith("pooler.")}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    TextEncoder(inspect_text_encoder(str(folder)))
    cut = {name: value for name, value in whole.items() if "attention.output" not in name}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"lack 4 tensors of the model \(for example encoder"):
        TextEncoder(inspect_text_encoder(str(folder)))


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bert")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_text(pointer)
        with pytest.raises(EncoderError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
            inspect_text_encoder(str(folder))
        (folder / name).write_bytes(content)


def test_models_that_fail_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "bert")
    encoder = TextEncoder(inspect_text_encoder(str(folder)))
    monkeypatch.setattr(encoder, "max_tokens", 80)
    with pytest.raises(EncoderError, match=r"cannot embed a caption .*\(\w+Error: .*\); use another") as raised:
        encoder.encode([LONG])
    assert "\n" not in str(raised.value)
    wide = TextSpec("x", folder, "f", WIDTH + 1)
    with pytest.raises(EncoderError, match="cannot embed a caption"):
        TextEncoder(wide).encode(["rain"])
    (folder / "config.json").write_text('{"model_type": "bert", "a": ' + "[" * 10_000 + "]" * 10_000 + "}")
    with pytest.raises(EncoderError, match="nested too deeply"):
        inspect_text_encoder(str(folder))
