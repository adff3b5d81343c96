"""Frozen configurations of a trial and of a study, validated on entry and written back as YAML.

`TrialConfig` is what the search varies; `RunSettings` is what all trials of a study share, so that their numbers can
be compared and their mini-batches shared. A front point's YAML is both a result and an input of a retrain.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuner.errors import ConfigError
from tuner.near import shown

Precision = Literal["bf16", "fp32"]
EncoderPath = Literal["audio_tower", "full_forward"]
Placed = Literal["tower", "language_model", "both"]
OffPath = Literal["refuse", "warn"]
# Of a wrong value in an error, and of errors in a sentence.
MAX_SHOWN, MAX_ERRORS = 100, 6
MAX_REASON = 300
# Nothing that is configured comes near; Python cannot even write the longest numbers that a file can hold.
MAX_WHOLE = 2**63 - 1
# Of brackets in YAML: PyYAML takes a time that grows with the square of the depth.
MAX_DEPTH = 100


class Frozen(BaseModel):
    """Base of all configurations: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: object, origin: str) -> Self:
        """Validate plain values; `origin` names the file or flag in the error.

        Raises:
            ConfigError: with every offending field in one sentence.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{origin}: {describe_validation(error)}") from None


def describe_validation(error: ValidationError) -> str:
    """Turn pydantic's report into one line: `lora.rank: Input should be greater than 0 (got 0); ...`."""
    parts, errors = [], error.errors()
    for item in errors[:MAX_ERRORS]:
        field = ".".join(str(part)[:MAX_SHOWN] for part in item["loc"]) or "value"
        if item["type"] == "extra_forbidden":
            parts.append(f"{field}: no such field")
        elif item["type"] == "missing":
            # Without the value: it may be a whole file.
            parts.append(f"{field}: missing")
        else:
            parts.append(f"{field}: {item['msg']} (got {shown(item['input'], MAX_SHOWN)})")
    if len(errors) > MAX_ERRORS:
        parts.append(f"and {len(errors) - MAX_ERRORS} more")
    return "; ".join(parts)


class LoraSpec(Frozen):
    """Low-rank adaptation of the encoder (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / rank) B A x."""

    rank: int = Field(ge=1, description="rank r of A (r x in) and B (out x r)")
    alpha_ratio: float = Field(
        default=2.0, gt=0, description="alpha divided by rank, so the scaling does not move with rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of A")
    targets: tuple[str, ...] = Field(
        min_length=1, description="linear layers of a block, by the family's names or aliases"
    )
    first_layer: int = Field(
        default=0, description="first adapted block of each part; negative counts from its top (-1 = last block)"
    )
    placement: Placed = Field(
        default="tower",
        description="part of the model that is adapted; with the language model the embedding is its output, not the "
        "tower's",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732)")

    @property
    def alpha(self) -> float:
        """The value of PEFT's `lora_alpha`."""
        return self.alpha_ratio * self.rank


class HeadSpec(Frozen):
    """Projection from the pooled encoder state to the text embedding space, trained in fp32."""

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = Field(default=512, ge=1, description="width of the hidden layer of the mlp head")


class OptimSpec(Frozen):
    """AdamW with linear warm-up and cosine decay to zero; one learning rate for LoRA, one for head and logit scale."""

    # A head from scratch needs far larger steps than adapters of a pretrained encoder: at 1e-3 the projection alone
    # looks weak, and LoRA's gain is overstated (docs/log.md).
    lora_lr: float = Field(default=2e-3, gt=0)
    lora_plus_ratio: float = Field(
        default=1.0, gt=0, description="learning rate of B divided by that of A (LoRA+, arXiv:2402.12354)"
    )
    head_lr: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="share of all steps spent warming up")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="clipping by the global norm of one adapter's gradients"
    )


class LossSpec(Frozen):
    """Contrastive loss against frozen text embeddings."""

    kind: Literal["infonce", "siglip"] = "infonce"
    temperature: float = Field(
        default=0.07, ge=0.01, le=1, description="initial or fixed; logit_scale is 1 / temperature"
    )
    learn_temperature: bool = True


class TrialConfig(Frozen):
    """One point of a search space: everything in which the trials of a study differ."""

    lora: LoraSpec | None = None
    head: HeadSpec = HeadSpec()
    optim: OptimSpec = OptimSpec()
    loss: LossSpec = LossSpec()
    pooling: Literal["mean"] = "mean"
    seed: int = Field(default=0, ge=0, description="initialisation and dropout stream of this adapter")


class EncoderRef(Frozen):
    """Which pretrained audio encoder, how much of its model runs, and how clips enter it."""

    source: str = Field(description="hub id, Hugging Face folder or faster-whisper folder")
    pad_to_30s: bool = Field(
        default=False, description="use the original fixed 30 s window instead of the clip's own length"
    )
    path: EncoderPath = Field(
        default="audio_tower", description="only the audio tower, or also the language model after it"
    )


class RunSettings(Frozen):
    """What all trials of a study share."""

    store: str = Field(description="prepared store (folder)")
    encoder: EncoderRef
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=64, ge=2, description="clips per optimiser step, over all workers of a lane")
    tokens_per_forward: int = Field(
        default=8192, ge=1, description="encoder tokens per forward pass: bounds padding and memory"
    )
    data_seed: int = Field(
        default=0, ge=0, description="order of clips and choice of captions, the same for all trials"
    )
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    off_path: OffPath = Field(
        default="refuse", description="what to do with a trial if the embedding does not depend on a LoRA module"
    )


def read_yaml(path: Path) -> Any:
    """Read one YAML document with the safe loader.

    Raises:
        ConfigError: the file is missing, is not YAML (names the line), or holds several documents.
    """
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        raise ConfigError(f"{path}: has {len(documents)} YAML documents; keep one per file")
    return documents[0] if documents else None


def read_yaml_documents(path: Path) -> list[Any]:
    """Read all YAML documents of a file with the safe loader.

    Raises:
        ConfigError: the file is missing or is not YAML; names the line.
    """
    try:
        return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader))  # noqa: TID251, a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from None
    except RecursionError:
        raise ConfigError(f"{path}: is not valid YAML (lists or mappings are nested too deeply); correct it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        cut = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."
        raise ConfigError(f"{path}: is not valid YAML ({cut}); correct it") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, but a key written twice is an error; PyYAML would silently use the last one.

    Every value that cannot be read is a YAML error with its line: PyYAML raises whatever Python's own types raise.
    """

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            reason = "lists or mappings are nested too deeply"
            raise yaml.scanner.ScannerError(None, None, reason, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            reason = f"{shown(node.value)} is not of the type {kind[:MAX_SHOWN]}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None
        if isinstance(value, int) and abs(value) > MAX_WHOLE:
            reason = "a whole number that does not fit into 64 bits"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                reason = "a list or a mapping cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, reason, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key)} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
