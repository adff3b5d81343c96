"""LoRA on the tower, the language model or both: where it goes, one pack for all, files, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import MELS, TEXT_DIM, Tiny, write_encoder
from safetensors.torch import load_file, save_file
from test_qwen2_audio import weight_map
from trained_adapter import Trained, train_and_export
from transformers import Qwen2AudioForConditionalGeneration

from tuner.config import EncoderRef, LoraSpec, Placed, TrialConfig
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.whisper.features import silence_level
from tuner.errors import AdapterError, EncoderError, PlacementError
from tuner.lora.placement import resolve_placement, trainable_parameters
from tuner.train.embed import Clips, embed_files
from tuner.train.evaluate import attach_exported, load
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import LivePrefix, open_prefix
from tuner.train.single import read_trial, train_single

PLACEMENTS: tuple[Placed, ...] = ("tower", "language_model", "both")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
TOWER_WIDTH, WIDTH = 32, 40
CLIPS = np.arange(60)  # all of the tiny store


def lora(placement: Placed, targets: tuple[str, ...] = ALL, **fields: Any) -> LoraSpec:
    return LoraSpec(rank=2, targets=targets, placement=placement, **fields)


CONFIGS = {
    "t0000": TrialConfig(seed=1),
    "t0001": TrialConfig(lora=lora("tower", dropout=0.1), seed=2),
    "t0002": TrialConfig(lora=lora("language_model", dropout=0.1), seed=2),
    "t0003": TrialConfig(lora=lora("both", first_layer=1), seed=3),
}


@pytest.fixture(scope="module")
def full(tiny_qwen: Tiny) -> Tiny:
    """The same encoder and store, run through the language model."""
    return Tiny(tiny_qwen.encoder.model_copy(update={"path": "full_forward"}), tiny_qwen.store_folder)


@pytest.fixture(scope="module")
def spec(full: Tiny) -> EncoderSpec:
    return inspect_encoder(full.encoder)


def make_pack(data: Tiny, cache: Path | None = None, **settings: Any) -> Pack:
    encoder = load_encoder(inspect_encoder(data.encoder), torch.float32)
    return Pack(PackContext(encoder, data.store(), data.settings(**settings), prefix_root=cache))


def train(pack: Pack, trials: list[str]) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {trial: [] for trial in trials}
    for _ in range(pack.settings.epochs):
        for trial, row in pack.train_epoch(trials).items():
            assert isinstance(row, dict)
            losses[trial].append(row["loss"])
    return losses


# Placement


def test_each_part_takes_the_targets_it_has(spec: EncoderSpec) -> None:
    tower = resolve_placement(spec, lora("tower", first_layer=-1))
    assert tower.layers == (2,) and tower.modules[0] == "layers.2.self_attn.q_proj"
    assert tower.targets == ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    model = resolve_placement(spec, lora("language_model", first_layer=-1))
    assert model.layers == (4,) and model.modules[0] == "language_model.layers.1.self_attn.q_proj"
    assert model.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    both = resolve_placement(spec, lora("both", first_layer=-1))
    assert both.layers == (2, 4) and both.lora_parameters == tower.lora_parameters + model.lora_parameters
    assert both.modules == (*(f"audio_tower.{module}" for module in tower.modules), *model.modules)


def test_a_target_of_one_part_is_fine_under_both(spec: EncoderSpec) -> None:
    placement = resolve_placement(spec, lora("both", ("gate_proj",)))
    assert placement.modules == tuple(f"language_model.layers.{layer}.mlp.gate_proj" for layer in (0, 1))
    assert placement.layers == (3, 4)
    with pytest.raises(PlacementError, match=r"\(qwen2_audio\) have no 'gate_proj'; they have q_proj, .*, fc2"):
        resolve_placement(spec, lora("tower", ("gate_proj",)))
    with pytest.raises(PlacementError, match=r"blocks of the language model of .* have no 'conv1'; they have q_proj"):
        resolve_placement(spec, lora("language_model", ("conv1",)))
    with pytest.raises(PlacementError, match=r"blocks of .* have no 'gate'; .* gate_proj, .*did you mean gate_proj\?"):
        resolve_placement(spec, lora("both", ("gate",)))


def test_a_first_layer_must_be_in_every_part(spec: EncoderSpec) -> None:
    assert resolve_placement(spec, lora("tower", first_layer=2)).layers == (2,)
    for placement in ("language_model", "both"):
        with pytest.raises(PlacementError, match=r"first_layer: 2 is outside the 2 blocks of the language model of"):
            resolve_placement(spec, lora(placement, first_layer=2))


def test_the_head_is_as_wide_as_the_place_where_the_embedding_leaves(spec: EncoderSpec) -> None:
    widths = {"t0000": TOWER_WIDTH, "t0001": TOWER_WIDTH, "t0002": WIDTH, "t0003": WIDTH}
    for trial, config in CONFIGS.items():
        count = resolve_placement(spec, config.lora).lora_parameters if config.lora else 0
        assert trainable_parameters(spec, config, TEXT_DIM) == count + (widths[trial] + 1) * TEXT_DIM + 1


@pytest.mark.parametrize("placement", ["language_model", "both"])
def test_a_language_model_that_does_not_run_is_refused(tiny_qwen: Tiny, tmp_path: Path, placement: Placed) -> None:
    with pytest.raises(
        PlacementError, match=rf"{placement} adapts .* the path audio_tower never runs; give path full_forward"
    ):
        resolve_placement(inspect_encoder(tiny_qwen.encoder), lora(placement))
    whisper = inspect_encoder(EncoderRef(source=str(write_encoder(tmp_path / "whisper"))))
    with pytest.raises(PlacementError, match=rf"no language model to adapt; give tower .* {placement}"):
        resolve_placement(whisper, lora(placement))


# One pack


def test_members_of_every_placement_train_as_they_would_alone(full: Tiny, tiny_qwen: Tiny) -> None:
    """Bit for bit: in a pack of all, alone, and, where the tower suffices, without a language model."""
    pack = make_pack(full)
    for trial, config in CONFIGS.items():
        assert pack.attach(trial, config).trainable_parameters == trainable_parameters(
            pack.encoder.spec, config, TEXT_DIM
        )
    together = train(pack, list(CONFIGS))
    for trial, config in CONFIGS.items():
        tower_suffices = config.lora is None or config.lora.placement == "tower"
        for data in (full, tiny_qwen) if tower_suffices else (full,):
            alone = make_pack(data)
            alone.attach(trial, config)
            assert train(alone, [trial])[trial] == together[trial]
            assert torch.equal(alone.embed(trial, CLIPS), pack.embed(trial, CLIPS))
    for trial in CONFIGS:
        pack.detach(trial)
    assert not any(hasattr(module, "lora_A") for module in pack.encoder.modules())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_reaches_every_adapted_layer(full: Tiny, placement: Placed) -> None:
    """Two steps: A has no gradient before B has moved."""
    pack = make_pack(full, epochs=1, batch_size=18)
    member = pack.attach("t0000", TrialConfig(lora=lora(placement)))
    start = [parameter.detach().clone() for parameter in member.lora_parameters]
    frozen = {name: tensor.clone() for name, tensor in pack.encoder.model.state_dict().items() if "lora" not in name}
    train(pack, ["t0000"])
    moved = [not torch.equal(old, new) for old, new in zip(start, member.lora_parameters, strict=True)]
    assert all(moved) and len(moved) == 2 * len(resolve_placement(pack.encoder.spec, lora(placement)).modules)
    after = pack.encoder.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_lowers_the_loss(full: Tiny, placement: Placed) -> None:
    pack = make_pack(full, epochs=6)
    pack.attach("t0000", TrialConfig(lora=lora(placement)))
    losses = train(pack, ["t0000"])["t0000"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("depth", [0, 2, 3, 4])
def test_the_cached_prefix_equals_the_live_one(full: Tiny, tmp_path: Path, depth: int) -> None:
    """In the tower and in the language model; tolerance 1e-5 in fp32: other groups, so other matrix shapes."""
    pack, clips = make_pack(full), np.array([5, 17, 2, 44])
    cached = open_prefix(pack.encoder, pack.store, depth, tmp_path, tokens_per_forward=50)
    live, read = LivePrefix(pack.encoder, pack.store, depth).hidden(clips), cached.hidden(clips)
    assert read.packing.lengths == live.packing.lengths and read.states_ND.shape == live.states_ND.shape
    assert read.packing.groups[0].causal == (depth >= 3)
    torch.testing.assert_close(read.states_ND, live.states_ND, rtol=0, atol=1e-5)


def test_caches_of_a_prefix_belong_to_the_path(full: Tiny, tiny_qwen: Tiny, tmp_path: Path) -> None:
    """The tower's states are shared by studies of either path; those in the language model are its own."""
    for data, trials in ((full, ["t0001", "t0002", "t0003"]), (tiny_qwen, ["t0001"])):
        pack = make_pack(data, tmp_path, epochs=1)
        for trial in trials:
            pack.attach(trial, CONFIGS[trial])
        train(pack, trials)
    tower, whole = (inspect_encoder(data.encoder).fingerprint[:16] for data in (tiny_qwen, full))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        [f"tiny-store-{tower}-0-float32", f"tiny-store-{tower}-1-float32", f"tiny-store-{whole}-3-float32"]
    )


# Files


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request: pytest.FixtureRequest, full: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_and_export(full, CONFIGS[request.param], tmp_path_factory.mktemp("exported"))


def ends_at_the_tower(trained: Trained) -> bool:
    return trained.card.config.lora is None or trained.card.config.lora.placement == "tower"


def test_an_export_is_loaded_on_its_own_path(trained: Trained, full: Tiny, tiny_qwen: Tiny) -> None:
    """What ends at the tower belongs to the tower, whatever it was trained beside.

    Tolerance 1e-5 in fp32: a pack cuts its forward passes by the tokens that enter the first adapted block.
    """
    loaded = load(trained.folder)
    path = "audio_tower" if ends_at_the_tower(trained) else "full_forward"
    assert (loaded.card.encoder.path, loaded.encoder.spec.path) == (path, path)
    assert (
        loaded.card.encoder_fingerprint
        == inspect_encoder((tiny_qwen if path == "audio_tower" else full).encoder).fingerprint
    )
    torch.testing.assert_close(loaded.embed(full.store(), CLIPS), trained.embeddings, rtol=0, atol=1e-5)
    assert loaded.evaluate(full.store(), "validation").metrics() == trained.metrics


def test_an_export_is_attached_beside_a_language_model(trained: Trained, full: Tiny) -> None:
    """As a search confirms its points, on the one encoder that it has loaded: bit for bit what the files give alone."""
    encoder = load_encoder(inspect_encoder(full.encoder), torch.float32)
    attached = attach_exported(trained.folder, trained.card, encoder)
    assert attached.encoder is (encoder.tower_alone if ends_at_the_tower(trained) else encoder)
    assert torch.equal(attached.embed(full.store(), CLIPS), load(trained.folder).embed(full.store(), CLIPS))
    attached.release()
    assert not any(hasattr(module, "lora_A") for module in encoder.modules())


def test_what_ends_at_the_tower_needs_no_language_model(trained: Trained, full: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full.encoder.source, tmp_path / "tower-shards"))
    names = weight_map(folder)
    for shard in set(names.values()) - {shard for name, shard in names.items() if name.startswith("audio_tower.")}:
        (folder / shard).unlink()
    elsewhere = trained.card.encoder.model_copy(update={"source": str(folder)})
    if ends_at_the_tower(trained):
        embeddings = [load(trained.folder, encoder).embed(full.store(), CLIPS) for encoder in (elsewhere, None)]
        assert torch.equal(*embeddings)
    else:
        with pytest.raises(EncoderError, match="which is missing"):
            load(trained.folder, elsewhere)


def test_the_trial_file_trains_the_same_again(
    trained: Trained, full: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache of the frozen prefix, which rounds differently: tolerance 1e-3 after six steps in fp32."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    trial, settings = read_trial(trained.folder / "trial.yaml")
    assert trial == trained.card.config and settings.encoder == trained.card.encoder
    train_single(trial, settings, tmp_path / "again", lambda done, total: None, lambda text: None)
    again = load(tmp_path / "again").embed(full.store(), CLIPS)
    torch.testing.assert_close(again, trained.embeddings, rtol=0, atol=1e-3)


def test_new_recordings_are_embedded(trained: Trained, tmp_path: Path) -> None:
    """From a file on disk the same as from its features; tolerance 1e-4 for the 16 bits of the file."""
    loaded = load(trained.folder)
    waveform = (np.random.default_rng(0).standard_normal(16_000) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", waveform, 16_000)
    embed_files(loaded, [tmp_path / "noise.wav"], tmp_path / "out.parquet", lambda done, total: None)
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    features, frames = load_feature_extractor(loaded.encoder.spec).extract(waveform)
    expected = loaded.embed(Clips([features], np.array([frames], dtype=np.int32)), np.array([0]))[0]
    torch.testing.assert_close(torch.tensor(row["embedding"]), expected, rtol=0, atol=1e-4)


def test_an_adapter_of_another_path_is_refused(trained: Trained, tiny_qwen: Tiny) -> None:
    other = "full_forward" if ends_at_the_tower(trained) else "audio_tower"
    with pytest.raises(AdapterError, match="made for another encoder"):
        load(trained.folder, tiny_qwen.encoder.model_copy(update={"path": other}))


def test_adapters_without_the_tensors_of_one_part_are_refused(full: Tiny, tmp_path: Path) -> None:
    folder = train_and_export(full, CONFIGS["t0003"], tmp_path).folder
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "language_model" not in name}, path)
    with pytest.raises(AdapterError, match=r"language_model.layers.1.*lora_A.weight is missing and 13 more"):
        load(folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks by the old name
@pytest.mark.parametrize("trial", ["t0002", "t0003"])
def test_transformers_own_model_runs_the_files(full: Tiny, tmp_path: Path, trial: str) -> None:
    """Plain PEFT on a plain Qwen2AudioModel, padded and masked, clip by clip: tolerance 1e-5 in fp32."""
    exported = train_and_export(full, CONFIGS[trial], tmp_path)
    whole = Qwen2AudioForConditionalGeneration.from_pretrained(full.encoder.source, dtype=torch.float32)
    whole.eval()  # type: ignore[no-untyped-call]
    model: Any = peft.PeftModel.from_pretrained(whole.model, exported.folder).base_model.model
    loaded, store = load(exported.folder), full.store()
    for clip in (3, 17, 40):
        frames = int(store.frames[clip])
        window_1CF = torch.full((1, MELS, 200), float(silence_level(store.features(clip))))
        window_1CF[0, :, : store.features(clip).shape[1]] = torch.from_numpy(np.array(store.features(clip)))
        mask = torch.zeros(1, 1, 1, 100)
        mask[..., (frames - 1) // 2 + 1 :] = torch.finfo(torch.float32).min
        with torch.no_grad():
            heard_1TD = model.audio_tower(window_1CF, attention_mask=mask).last_hidden_state
            tokens_1TD = model.multi_modal_projector(heard_1TD[:, : inspect_encoder(full.encoder).token_length(frames)])
            pooled_1D = model.language_model(inputs_embeds=tokens_1TD).last_hidden_state.mean(dim=1)
            theirs_1D = loaded.head(pooled_1D)
        torch.testing.assert_close(theirs_1D, loaded.embed(store, np.array([clip])), rtol=0, atol=1e-5)
