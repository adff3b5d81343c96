"""The contract of every family of encoders: names, lengths, batches, counts, training, files.

Each family is a small random model as Hugging Face saves it, found by its own name in the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import small_whisper
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.config import EncoderPath, EncoderRef, LoraSpec, OptimSpec, Placed, TrialConfig
from tuner.encoders import packed
from tuner.encoders.base import AudioEncoder
from tuner.encoders.registry import families, inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import EncoderError
from tuner.lora import adapter as adapters
from tuner.lora.placement import resolve_placement
from tuner.search.request import path_note
from tuner.train.embed import Clips
from tuner.train.member import Member
from tuner.train.model import encoder_precision, pool_clips
from tuner.train.prefix import LivePrefix, row_lengths

RATE = 16_000
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
ALL_QUERIES = ("q_proj", "query")
WAVEFORM_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense")
WHISPER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
QWEN_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLAP_TARGETS = ("query", "key", "value", "out_proj", "fc1", "fc2")
GLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
# Seconds of the clips: short and long, in no order, two of nearly the same length (they attend in one group).
SECONDS = (0.83, 0.05, 2.0, 1.97, 0.311)

Reference = Callable[[Any, EncoderSpec, NDArray[np.float32]], Tensor]


@dataclass(frozen=True)
class Case:
    """A family: how to make a small model of it, and what it must look like from outside."""

    model: Callable[[], Any]
    targets: tuple[str, ...]
    reference: Reference  # transformers' own output TD for a clip, real tokens alone
    pad_to_30s: bool = False
    preprocessor: dict[str, Any] | None = None
    tower: str = ""  # where the tower is inside the model
    feature_channels: int = 128
    placement: Placed = "tower"
    part: str = ""  # of the tower, where it is adapted
    leaves: tuple[str, ...] = ()  # what the modules of the targets are called, where not as the targets
    extra_frames: int = 0  # of the longest clip, beyond its length by the frame rate


def sizes(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **more}


def whisper(mels: int, **more: Any) -> Any:
    return transformers.WhisperForConditionalGeneration(
        small_whisper(num_mel_bins=mels, encoder_attention_heads=4, **more)
    )


def qwen2_audio() -> Any:
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4}
    text = {"model_type": "qwen2", "vocab_size": 200, "num_key_value_heads": 2, "pad_token_id": 0, **sizes()}
    text |= {"hidden_size": 40}
    return transformers.Qwen2AudioForConditionalGeneration(
        transformers.Qwen2AudioConfig(
            audio_config=audio | {"encoder_ffn_dim": 48}, text_config=text, audio_token_index=150
        )
    )


def voxtral(**more: Any) -> Any:
    text = {"model_type": "llama", "vocab_size": 200, "num_key_value_heads": 2, "pad_token_id": 0, **sizes()}
    return transformers.VoxtralForConditionalGeneration(
        transformers.VoxtralConfig(
            audio_config={"model_type": "voxtral_encoder", **sizes(**more)}, text_config=text, audio_token_id=150
        )
    )


def glmasr() -> Any:
    text = {"model_type": "llama", "vocab_size": 200, "num_key_value_heads": 2, "pad_token_id": 0, **sizes()}
    return transformers.GlmAsrForConditionalGeneration(
        transformers.GlmAsrConfig(
            audio_config={"model_type": "glmasr_encoder", **sizes()}, text_config=text, audio_token_id=150
        )
    )


def omni_thinker() -> Any:
    """Windows of 20 tokens, so that the clips have full and broken ones."""
    audio = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "n_window": 20}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    text = {"vocab_size": 200, "num_key_value_heads": 2, "pad_token_id": 0, **sizes()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(
        transformers.Qwen2_5OmniThinkerConfig(
            audio_config=audio | {"output_dim": 32},
            vision_config=vision,
            text_config=text | {"rope_parameters": rope},
        )
    )


class WholeOmni(nn.Module):
    """A Qwen2.5-Omni on disk: its thinker below `thinker.`, and something of its talker."""

    def __init__(self) -> None:
        super().__init__()
        self.thinker = omni_thinker()
        self.talker = nn.Linear(3, 3)

    def save_pretrained(self, folder: Path) -> None:
        self.thinker.save_pretrained(folder)
        thinker = load_file(folder / "model.safetensors")
        tensors = {f"thinker.{name}": tensor for name, tensor in thinker.items()} | self.talker.state_dict(
            prefix="talker."
        )
        save_file(tensors, folder / "model.safetensors")
        config = {"model_type": "qwen2_5_omni", "thinker_config": json.loads((folder / "config.json").read_text())}
        (folder / "config.json").write_text(json.dumps(config))


def waveform(kind: str, large: bool, head: str = "Model") -> Callable[[], Any]:
    """A base model (group norm, norm after attention) or one built like the large ones (layer norm, norm before)."""

    def build() -> Any:
        config = getattr(transformers, f"{kind}Config")(
            **sizes(),
            conv_dim=[16] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            do_stable_layer_norm=large,
            feat_extract_norm="layer" if large else "group",
            conv_bias=large,
            hidden_dropout=0.4,
            vocab_size=32,
            **({"num_buckets": 32, "max_bucket_distance": 60} if kind == "WavLM" else {}),
        )
        return getattr(transformers, f"{kind}{head}")(config)

    return build


CLAP_FRONT_END = {
    "feature_extractor_type": "ClapFeatureExtractor",
    "feature_size": 16,
    "max_length_s": 2,
    "sampling_rate": 48_000,
    "truncation": "rand_trunc",
    "padding": "repeatpad",
}


def clap(**more: Any) -> Any:
    """Pictures of 64 by 64 instead of 256 by 256, of 2 s; the first stage shifts its windows in its second block."""
    audio = {"spec_size": 64, "num_mel_bins": 16, "window_size": 4, "patch_embeds_hidden_size": 16, **more}
    audio |= {"depths": [2, 1, 2], "num_attention_heads": [2, 2, 4], "hidden_size": 64, "mlp_ratio": 1.5}
    model = transformers.ClapModel(
        transformers.ClapConfig(
            audio_config=audio | {"attention_probs_dropout_prob": 0.3, "drop_path_rate": 0.3},
            text_config={**sizes(), "vocab_size": 64},
            projection_dim=24,
        )
    )
    # As trained: the mean and variance of levels in dB.
    norm: Any = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.uniform_(-40, -20)
    norm.running_var.uniform_(100, 400)
    return model


def clap_audio(kind: str) -> Any:
    """The audio half of the same on disk, with or without its projection."""
    whole = clap()
    model = getattr(transformers, kind)(whole.config.audio_config)
    own = model.audio_model if kind.endswith("WithProjection") else model
    own.audio_encoder.batch_norm.load_state_dict(whole.audio_model.audio_encoder.batch_norm.state_dict())
    return model


def clap_features(spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """What transformers makes of the folder's own front end, [1, 1, F, C]."""
    extractor: Any = transformers.ClapFeatureExtractor.from_pretrained(spec.folder)
    features: Tensor = extractor(clip, sampling_rate=48_000, return_tensors="pt")["input_features"]
    return features


def before_pooling(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """The original CLAP: its last tokens behind the final norm."""
    captured: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, arguments, output: captured.append(output))
    model(clap_features(spec, clip))
    hook.remove()
    return captured[0][0]


def whole_waveform(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    features, _ = load_feature_extractor(spec).extract(clip)
    states_1TD: Tensor = model(torch.from_numpy(features)).last_hidden_state
    return states_1TD[0]


def window(spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """The clip in the encoder's whole window of silence, [1, C, F]."""
    extractor: Any = load_feature_extractor(spec)
    features: Tensor = extractor.extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    return features[:, :, : spec.max_frames]


def in_whole_window(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """The original Whisper and Voxtral: padding attends."""
    states_1TD: Tensor = model(window(spec, clip)).last_hidden_state
    return states_1TD[0, : spec.token_length(-(-clip.size // 160))]


def truncated(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """Whisper and Voxtral with the window cut to the clip behind the convolutions."""
    tokens = spec.token_length(-(-clip.size // 160))
    hidden = nn.functional.gelu(model.conv2(nn.functional.gelu(model.conv1(window(spec, clip)))))
    hidden = hidden.transpose(1, 2)[:, :tokens] + model.embed_positions.weight[:tokens]
    for layer in model.layers:
        hidden = layer(hidden, None)
    states_1TD: Tensor = model.layer_norm(hidden)
    return states_1TD[0]


def rotated(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """GLM-ASR with the window cut to the clip behind the convolutions."""
    tokens = spec.token_length(-(-clip.size // 160))
    hidden = nn.functional.gelu(model.conv2(nn.functional.gelu(model.conv1(window(spec, clip)))))
    hidden = hidden.transpose(1, 2)[:, :tokens]
    rotation = model.rotary_emb(hidden, position_ids=torch.arange(tokens)[None])
    for layer in model.layers:
        hidden = layer(hidden, position_embeddings=rotation)
    states_1TD: Tensor = model.norm(hidden)
    return states_1TD[0]


def in_windows(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """The original Qwen2.5-Omni without its projection into the language model."""
    frames = -(-clip.size // 160)
    captured: list[Tensor] = []
    hook = model.ln_post.register_forward_hook(lambda module, arguments, output: captured.append(output))
    model(window(spec, clip)[0, :, :frames], feature_lens=torch.tensor([frames]))
    hook.remove()
    return captured[0]


def masked(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """The original Qwen2-Audio: the whole window with its padding masked, in pairs of tokens."""
    frames = -(-clip.size // 160)
    mask = torch.zeros(1, 1, 1, model.config.max_source_positions)
    mask[..., (frames - 1) // 2 + 1 :] = torch.finfo(torch.float32).min
    states_1TD: Tensor = model(window(spec, clip), attention_mask=mask).last_hidden_state
    return states_1TD[0, : ((frames - 1) // 2 - 1) // 2 + 1]


def full_forward(model: Any, spec: EncoderSpec, clip: NDArray[np.float32]) -> Tensor:
    """The original Qwen2-Audio through its language model, which reads the clip's tokens alone."""
    tokens_TD = model.multi_modal_projector(masked(model.audio_tower, spec, clip))
    states_1TD: Tensor = model.language_model(inputs_embeds=tokens_TD[None]).last_hidden_state
    return states_1TD[0]


NORMALISED = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True, "sampling_rate": RATE}
RAW = NORMALISED | {"do_normalize": False}
# A window of 2.4 s instead of 30 s, which would take its time: nothing else depends on its length.
SHORT_WINDOW = {"max_source_positions": 120}
# Which part of Qwen2-Audio is adapted, the targets there, and where it is in the whole model.
QWEN_PARTS: tuple[tuple[Placed, tuple[str, ...], str], ...] = (
    ("language_model", QWEN_TARGETS, "language_model."),
    ("both", (*WHISPER_TARGETS, *(name for name in QWEN_TARGETS if name not in WHISPER_TARGETS)), ""),
)
CASES = {
    "whisper": Case(lambda: whisper(80), WHISPER_TARGETS, truncated, tower="model.encoder", feature_channels=80),
    "whisper of 128 mels, padded": Case(
        lambda: whisper(128, **SHORT_WINDOW), WHISPER_TARGETS, in_whole_window, pad_to_30s=True, tower="model.encoder"
    ),
    "qwen2_audio": Case(qwen2_audio, WHISPER_TARGETS, masked, tower="model.audio_tower"),
    "qwen2_audio_encoder": Case(lambda: qwen2_audio().model.audio_tower, WHISPER_TARGETS, masked),
    **{
        f"qwen2_audio, {placement}": Case(
            qwen2_audio,
            targets,
            full_forward,
            tower="model",
            placement=placement,
            part=part,
        )
        for placement, targets, part in QWEN_PARTS
    },
    "voxtral": Case(voxtral, WHISPER_TARGETS, truncated, tower="model.audio_tower"),
    "voxtral_encoder": Case(lambda: voxtral().model.audio_tower, WHISPER_TARGETS, truncated),
    "voxtral, padded": Case(
        lambda: voxtral(**SHORT_WINDOW), WHISPER_TARGETS, in_whole_window, pad_to_30s=True, tower="model.audio_tower"
    ),
    **{
        name: Case(
            model,
            CLAP_TARGETS,
            before_pooling,
            preprocessor=CLAP_FRONT_END,
            tower=tower,
            feature_channels=16,
            leaves=("query", "key", "value", "dense"),
            extra_frames=1,
        )
        for name, model, tower in (
            ("clap", clap, "audio_model.audio_encoder"),
            ("clap_audio_model", lambda: clap_audio("ClapAudioModel"), "audio_encoder"),
            (
                "clap_audio_model with projection",
                lambda: clap_audio("ClapAudioModelWithProjection"),
                "audio_model.audio_encoder",
            ),
        )
    },
    "glmasr": Case(glmasr, GLM_TARGETS, rotated, tower="model.audio_tower"),
    "glmasr_encoder": Case(lambda: glmasr().model.audio_tower, GLM_TARGETS, rotated),
    "qwen2_5_omni": Case(WholeOmni, WHISPER_TARGETS, in_windows, tower="thinker.model.audio_tower"),
    "qwen2_5_omni_thinker": Case(omni_thinker, WHISPER_TARGETS, in_windows, tower="model.audio_tower"),
    "qwen2_5_omni_audio_encoder": Case(lambda: omni_thinker().model.audio_tower, WHISPER_TARGETS, in_windows),
    **{
        f"{kind.lower()} {'large' if large else 'base'}": Case(
            waveform(kind, large),
            WAVEFORM_TARGETS,
            whole_waveform,
            preprocessor=NORMALISED if large else RAW,
            feature_channels=1,
        )
        for kind in ("Wav2Vec2", "Hubert", "WavLM")
        for large in (False, True)
    },
    "wav2vec2 with a head": Case(
        waveform("Wav2Vec2", False, "ForCTC"),
        WAVEFORM_TARGETS,
        whole_waveform,
        preprocessor=NORMALISED,
        tower="wav2vec2",
        feature_channels=1,
    ),
}


@dataclass(frozen=True)
class Made:
    """A case on disk, and the tower of transformers that was saved."""

    case: Case
    folder: Path
    tower: Any

    @property
    def spec(self) -> EncoderSpec:
        path: EncoderPath = "audio_tower" if self.case.placement == "tower" else "full_forward"
        return inspect_encoder(EncoderRef(source=str(self.folder), pad_to_30s=self.case.pad_to_30s, path=path))

    def lora(self, rank: int = 2, targets: tuple[str, ...] = ALL, first_layer: int = 0) -> LoraSpec:
        return LoraSpec(rank=rank, targets=targets, first_layer=first_layer, placement=self.case.placement)

    def encoder(self, dtype: torch.dtype = torch.float32) -> AudioEncoder:
        return load_encoder(self.spec, dtype)


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    model = case.model().eval()
    with torch.no_grad():
        # transformers starts so near to zero that attention would hardly matter.
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    if case.preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(case.preprocessor))
    return Made(case, folder, model.get_submodule(case.tower))


def sounds(seconds: tuple[float, ...] = SECONDS) -> list[NDArray[np.float32]]:
    """Tones of different pitch in noise."""
    random = np.random.default_rng(0)
    clips = []
    for index, length in enumerate(seconds):
        time = np.arange(int(length * RATE)) / RATE
        tone = np.sin(2 * np.pi * 200 * 1.7**index * time) * (0.3 + 0.1 * index)
        clips.append((tone + 0.05 * random.standard_normal(time.size)).astype(np.float32))
    return clips


def extracted(spec: EncoderSpec, clips: list[NDArray[np.float32]]) -> Clips:
    extractor = load_feature_extractor(spec)
    pairs = [extractor.extract(clip) for clip in clips]
    return Clips([features for features, _ in pairs], np.asarray([frames for _, frames in pairs], dtype=np.int32))


def outputs(encoder: AudioEncoder, clips: list[NDArray[np.float32]]) -> list[Tensor]:
    """Output states TD of each clip from one batch."""
    inputs = extracted(encoder.spec, clips)
    frames_B = torch.from_numpy(inputs.frames.astype(np.int64))
    with torch.no_grad(), encoder_precision(encoder):
        hidden_BTD, mask_BT = encoder(encoder.pad_features(inputs.maps), frames_B)
    assert mask_BT.sum(dim=1).tolist() == [encoder.spec.token_length(int(frames)) for frames in inputs.frames]
    return [states_TD[mask_T] for states_TD, mask_T in zip(hidden_BTD, mask_BT, strict=True)]


def attach_trained(encoder: AudioEncoder, lora: LoraSpec) -> None:
    """An adapter with a random B, as if it had been trained."""
    torch.manual_seed(1)
    adapters.attach(encoder, lora, "default")
    with torch.no_grad():
        for parameter in adapters.parameters(encoder, "default")[1::2]:
            parameter.normal_(std=0.2)


def test_every_family_has_a_case() -> None:
    assert {name.split()[0].rstrip(",") for name in CASES} == set(families())


def test_features_are_stored_as_channels_by_frames(made: Made) -> None:
    spec = made.spec
    assert spec.feature_channels == made.case.feature_channels
    frames = spec.max_frames - made.case.extra_frames
    assert frames / spec.max_seconds == pytest.approx(RATE if spec.feature_channels == 1 else 100)
    inputs = extracted(spec, sounds())
    for features, frames in zip(inputs.maps, inputs.frames, strict=True):
        assert features.dtype == np.float32 and features.flags.c_contiguous
        assert features.shape[0] == spec.feature_channels and frames <= features.shape[1] <= spec.max_frames


def test_names_of_the_shipped_spaces_resolve(made: Made) -> None:
    """By layer, path and count, against the modules that are really there."""
    spec, lora = made.spec, made.lora(3)
    placement = resolve_placement(spec, lora)
    assert placement.targets == made.case.targets
    assert placement == resolve_placement(spec, made.lora(3, made.case.targets))
    assert placement == resolve_placement(spec, made.lora(3, ("all-linear",)))
    # An adapter's configuration from one family is a space's input for another: both names of the output projection.
    assert resolve_placement(spec, made.lora(3, ("o_proj",))) == resolve_placement(spec, made.lora(3, ("out_proj",)))
    for stage in spec.stages:
        aliased = {name for names in stage.aliases.values() for name in names}
        assert aliased <= set(stage.targets) and not set(stage.aliases) & set(stage.targets)
    linears = {
        path: module
        for path, module in made.tower.named_modules()
        if isinstance(module, nn.Linear)
        and path.startswith(made.case.part)
        and path.rpartition(".")[2] in (made.case.leaves or made.case.targets)
    }
    assert set(placement.modules) == set(linears) and len(placement.modules) == len(linears)
    assert placement.lora_parameters == sum(3 * (each.in_features + each.out_features) for each in linears.values())
    encoder = made.encoder()
    adapters.attach(encoder, lora, "default")
    trainable = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    assert trainable == placement.lora_parameters


def test_the_facts_state_which_linears_read_the_input_of_their_block(made: Made) -> None:
    """Traced: those that get the very tensor that the queries get, before all others; estimates of cost follow it."""
    encoder, spec = made.encoder(), made.spec
    met: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, path=path: met.append((path, arguments[0])))
        for path, module in encoder.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    outputs(encoder, sounds()[:2])
    for hook in hooks:
        hook.remove()
    for depth, block in enumerate(spec.block_names):
        targets = spec.stages[spec.stage_at(depth)].targets
        names = {f"{block}.{linear.suffix}": name for name, linear in targets.items()}
        traced = [(names[path], entering) for path, entering in met if path in names]
        assert sorted(name for name, _ in traced) == sorted(targets), "a forward pass calls each of them once"
        readers = [name for name, entering in traced if entering is traced[0][1]]
        stated = [name for name, linear in targets.items() if linear.reads_block_input]
        assert set(readers) == set(stated) == {name for name, _ in traced[: len(stated)]} and stated[0] in ALL_QUERIES
        assert [name for name, _ in traced if name not in readers] == [name for name in targets if name not in readers]


def test_the_path_says_where_the_tower_is(made: Made) -> None:
    """In the whole model as transformers has it; a model of the waveform is all encoder, with no tower to point at."""
    spec, case = made.spec, made.case
    if case.feature_channels == 1:
        assert (spec.path, spec.tower_path) == ("full_forward", None)
        assert "since it has no separate tower (path full_forward)" in str(path_note(spec))
        asked = EncoderRef(source=str(made.folder), path="full_forward")
        assert inspect_encoder(asked) == spec
        return
    assert path_note(spec) is None
    if case.placement == "tower":
        assert (spec.path, spec.tower_path, spec.tower_alone) == ("audio_tower", case.tower, None)
    else:
        assert (spec.path, spec.tower_path) == ("full_forward", f"{case.tower}.audio_tower")
    assert made.encoder().tower_alone.spec == (spec.tower_alone or spec)


def test_a_clip_in_a_batch_equals_the_clip_alone(made: Made) -> None:
    """Tolerance 1e-5 of the largest state, in fp32: other matrix shapes round differently."""
    encoder = made.encoder()
    for batched_TD, clip in zip(outputs(encoder, sounds()), sounds(), strict=True):
        (alone_TD,) = outputs(encoder, [clip])
        assert batched_TD.shape == alone_TD.shape and len(alone_TD) > 0
        assert (batched_TD - alone_TD).abs().max() <= 1e-5 * alone_TD.abs().max()


def test_equals_transformers_clip_by_clip(made: Made) -> None:
    """Tolerance 1e-5 of the largest state, in fp32, from a batch of different lengths."""
    for ours_TD, clip in zip(outputs(made.encoder(), sounds()), sounds(), strict=True):
        with torch.no_grad():
            theirs_TD = made.case.reference(made.tower, made.spec, clip)
        assert ours_TD.shape == theirs_TD.shape
        assert (ours_TD - theirs_TD).abs().max() <= 1e-5 * theirs_TD.abs().max()


def test_an_adapter_equals_the_merged_weights(made: Made) -> None:
    """A LoRA on every target, against a base whose weights are W + (alpha / r) B A; tolerance 1e-4 in fp32."""
    adapted, merged = made.encoder(), made.encoder()
    attach_trained(adapted, made.lora())
    with torch.no_grad():
        for path, layer in adapted.model.named_modules():
            if hasattr(layer, "lora_A"):
                linear: Any = merged.model.get_submodule(path)
                linear.weight += layer.get_delta_weight("default")
    plain = outputs(made.encoder(), sounds())
    for ours_TD, theirs_TD, plain_TD in zip(outputs(adapted, sounds()), outputs(merged, sounds()), plain, strict=True):
        assert (ours_TD - theirs_TD).abs().max() <= 1e-4 * theirs_TD.abs().max()
        assert (ours_TD - plain_TD).abs().max() > 1e-2 * plain_TD.abs().max()


@pytest.mark.parametrize("plain_width", [packed.PLAIN_WIDTH, 0])
def test_bf16_is_near_fp32(made: Made, plain_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter, in the mixed precision of training, by plain and by fused attention; 10 % of the mean square."""
    monkeypatch.setattr(packed, "PLAIN_WIDTH", plain_width)
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        encoder = made.encoder(dtype)
        attach_trained(encoder, made.lora())
        states.append(torch.cat(outputs(encoder, sounds())).float())
    whole, half = states
    assert (half - whole).square().mean().sqrt() <= 0.1 * whole.square().mean().sqrt()


def test_training_lowers_the_loss_and_moves_every_tensor(made: Made) -> None:
    """The loop of the pack: three steps, since A has no gradient before B has moved."""
    encoder = made.encoder()
    encoder.train()
    frozen = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    config = TrialConfig(lora=made.lora(), optim=OptimSpec(lora_lr=3e-3, head_lr=1e-3, warmup_fraction=0.0))
    member = Member("t0000", config, encoder, text_dim=8, total_steps=100)
    start = [parameter.detach().clone() for parameter in member.lora_parameters]
    inputs = extracted(encoder.spec, sounds())
    clips, lengths = np.arange(len(SECONDS)), row_lengths(encoder, inputs, member.depth)
    text_BD = nn.functional.normalize(torch.randn(len(clips), 8, generator=torch.Generator().manual_seed(2)), dim=1)
    losses = []
    for _ in range(4):
        member.activate(training=True)
        pooled_BH = pool_clips(encoder, LivePrefix(encoder, inputs, member.depth), clips, lengths, budget=120)
        loss = member.loss(member.head(pooled_BH), text_BD, torch.eye(len(clips), dtype=torch.bool))
        losses.append(float(loss.detach()))
        loss.backward()
        member.step()
    assert losses[0] > losses[1] > losses[3]
    moved = [not torch.equal(old, new) for old, new in zip(start, member.lora_parameters, strict=True)]
    assert all(moved), f"{moved.count(False)} of {len(moved)} LoRA tensors never moved"
    member.detach()
    after = encoder.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())


def test_an_adapter_survives_export(made: Made, tmp_path: Path) -> None:
    encoder, lora = made.encoder(), made.lora(first_layer=1)
    before = outputs(encoder, sounds())
    attach_trained(encoder, lora)
    expected = outputs(encoder, sounds())
    assert not torch.equal(expected[0], before[0])
    adapters.save_adapter(encoder, "default", tmp_path, lora)
    fresh = made.encoder()
    adapters.load_adapter(fresh, tmp_path)
    assert all(map(torch.equal, outputs(fresh, sounds()), expected))


# What only the waveform encoders have


@pytest.fixture
def wav2vec2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    waveform("Wav2Vec2", False)().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(NORMALISED))
    return tmp_path / "model"


def test_padding_leaks_into_a_base_model_of_transformers(wav2vec2: Path) -> None:
    """Why the stem runs clip by clip: in a padded batch the group norm counts the padding, mask or not."""
    model = transformers.Wav2Vec2Model.from_pretrained(wav2vec2).eval()  # type: ignore[no-untyped-call]
    (clip,) = sounds((0.83,))
    batch = torch.zeros(1, 2 * RATE)
    batch[0, : clip.size] = torch.from_numpy(clip)
    mask = (torch.arange(2 * RATE) < clip.size)[None].long()
    with torch.no_grad():
        alone_TD = model(torch.from_numpy(clip)[None]).last_hidden_state[0]
        batched_TD = model(batch, attention_mask=mask).last_hidden_state[0, : len(alone_TD)]
    assert (alone_TD - batched_TD).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks by the old name
def test_lora_on_transformers_own_wavlm_does_nothing() -> None:
    """Why WavLM's attention is replaced: it reads the weights of its projections and never calls them."""
    torch.manual_seed(0)
    model = waveform("WavLM", False)().eval()
    samples = torch.from_numpy(sounds((0.5,))[0])[None]
    with torch.no_grad():
        before = model(samples).last_hidden_state
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        assert torch.equal(adapted(samples).last_hidden_state, before)
        assert not torch.allclose(adapted.merge_and_unload()(samples).last_hidden_state, before)


def test_the_preprocessor_says_whether_to_normalise(wav2vec2: Path) -> None:
    (clip,) = sounds((0.5,))
    path = wav2vec2 / "preprocessor_config.json"
    spec = inspect_encoder(EncoderRef(source=str(wav2vec2)))
    features, frames = load_feature_extractor(spec).extract(clip)
    assert frames == clip.size and abs(features.mean()) < 1e-6 and features.std() == pytest.approx(1, abs=1e-3)
    path.write_text(json.dumps(RAW))
    raw = inspect_encoder(EncoderRef(source=str(wav2vec2)))
    assert raw.fingerprint != spec.fingerprint
    assert np.array_equal(load_feature_extractor(raw).extract(clip)[0][0], clip)
    path.write_text(json.dumps(RAW | {"sampling_rate": 8000}))
    with pytest.raises(EncoderError, match="sampling_rate is 8000, but this encoder reads 16000"):
        inspect_encoder(EncoderRef(source=str(wav2vec2)))
    path.unlink()
    with pytest.raises(EncoderError, match=r"preprocessor_config.json: is missing"):
        inspect_encoder(EncoderRef(source=str(wav2vec2)))


OLD_NAMES, NEW_NAMES = ("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{part}" for part in "01")


@pytest.mark.parametrize("names", [OLD_NAMES, NEW_NAMES])
def test_both_names_of_the_weight_norm(wav2vec2: Path, names: tuple[str, str]) -> None:
    """Checkpoints have torch's old or its new ones."""
    expected = outputs(load_encoder(inspect_encoder(EncoderRef(source=str(wav2vec2))), torch.float32), sounds())
    tensors = load_file(wav2vec2 / "model.safetensors")
    conv = "encoder.pos_conv_embed.conv"
    for old, new, name in zip(OLD_NAMES, NEW_NAMES, names, strict=True):
        (found,) = {f"{conv}.{old}", f"{conv}.{new}"} & set(tensors)
        tensors[f"{conv}.{name}"] = tensors.pop(found)
    save_file(tensors, wav2vec2 / "model.safetensors")
    encoder = load_encoder(inspect_encoder(EncoderRef(source=str(wav2vec2))), torch.float32)
    assert all(map(torch.equal, outputs(encoder, sounds()), expected))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"add_adapter": True}, "add_adapter in config.json asks for convolutions after the blocks"),
        ({"conv_stride": [5, 2]}, "conv_kernel and conv_stride in config.json must be lists of the same length"),
        ({"hidden_size": None}, "hidden_size in config.json is None"),
    ],
)
def test_a_configuration_that_cannot_be_used(wav2vec2: Path, change: dict[str, Any], match: str) -> None:
    path = wav2vec2 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EncoderError, match=match):
        inspect_encoder(EncoderRef(source=str(wav2vec2)))


def test_a_waveform_has_no_window_to_pad_to(wav2vec2: Path) -> None:
    with pytest.raises(EncoderError, match="has no 30 s window"):
        inspect_encoder(EncoderRef(source=str(wav2vec2), pad_to_30s=True))
