"""What a LoRA costs to train: operations and memory, known before any weight is loaded. No torch here.

Counted are the products that the mathematics needs on real tokens, 2 m k n for m x k by k x n (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1, without the weight gradients that frozen layers do not have). For one block with linear
layers of I inputs and O outputs each, one token of a clip of T tokens, adapters of rank r on some of them:

    forward   linears 2 I O     adapters 2 r (I + O)     attention 4 T A, A being the width of its queries
    backward  linears 2 I O     adapters twice that      attention twice that
              (to inputs)       (to inputs and weights)  (to scores and values, queries and keys)

In the first adapted block nothing below the first adapted layer is trained, so no gradient flows back past it: none of
its input, none through the layers before it, and none through attention if that comes before it too. Blocks further
down run once, into the prefix cache.

Omitted, together below 1 % at sizes where an estimate matters: norms, softmax, activation functions, dropout, the loss
and the optimiser; and CLAP's stem and the merging of its tokens, 4 % of its frozen pass. Attention is counted over the
window that a stage names (CLAP), else over the whole clip, an upper bound for other families with windows or causal
masks. So are stem convolutions, counted at the encoder's full width, for wav2vec 2.0 and related families.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tuner.config import LoraSpec, TrialConfig
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage
from tuner.lora.placement import encoding_spec, head_parameters, lora_parameters, resolve_placement

# fp32 weight, gradient and AdamW's two moments of each trained number.
BYTES_TRAINED = 16
# Activations that one block keeps for backward, in numbers for each token and unit of width: 34 bytes of 16 bits in
# Korthikanti et al. 2022 (arXiv:2205.05198), equation 1, without the score matrix that fused attention never stores.
ACTIVATIONS_KEPT = 17


@dataclass(frozen=True)
class Lengths:
    """Clips of equal length are counted once: real frames of a clip, and how many clips have them."""

    frames: Mapping[int, int]

    @classmethod
    def of(cls, frames: Iterable[int]) -> Lengths:
        """From the real frames of each clip."""
        return cls(Counter(frames))

    @property
    def clips(self) -> int:
        """Number of clips."""
        return sum(self.frames.values())

    def tokens(self, spec: EncoderSpec, depth: int) -> tuple[int, int]:
        """Tokens that enter block `depth`, and pairs of those that attend to one another."""
        window = spec.stages[spec.stage_at(depth)].attention_window
        total = pairs = 0
        for frames, count in self.frames.items():
            length = spec.sequence_length(frames, depth)
            total += count * length
            pairs += count * length * min(length, window or length)
        return total, pairs


@dataclass(frozen=True)
class _Rank:
    """Which layers of a block have adapters, and their rank."""

    names: frozenset[str]
    rank: int


def training_flops(spec: EncoderSpec, config: TrialConfig, lengths: Lengths, text_dim: int) -> int:
    """Operations of one epoch of training on these clips, forward and backward, behind the cached prefix.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    run = encoding_spec(spec, config.lora)
    behind = _behind_prefix(run, config.lora)
    blocks = sum(
        _trained_flops(run, depth, rank, lengths, entered=place > 0) for place, (depth, rank) in enumerate(behind)
    )
    return blocks + 3 * _head_flops(run, config, lengths, text_dim)


def validation_flops(spec: EncoderSpec, config: TrialConfig, lengths: Lengths, text_dim: int) -> int:
    """Operations of measuring one trial on these clips, behind the cached prefix.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    run = encoding_spec(spec, config.lora)
    blocks = sum(_forward_flops(run, depth, rank, lengths) for depth, rank in _behind_prefix(run, config.lora))
    return blocks + _head_flops(run, config, lengths, text_dim)


def frozen_flops(spec: EncoderSpec, lora: LoraSpec | None, lengths: Lengths) -> int:
    """Operations that trials with the same first adapted block share: stem and blocks below it, or without LoRA all.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    run = encoding_spec(spec, lora)
    first = run.num_layers if lora is None else _adapted(run, lora)[1]
    return stem_flops(run, lengths) + sum(_forward_flops(run, depth, None, lengths) for depth in range(first))


def stem_flops(spec: EncoderSpec, lengths: Lengths) -> int:
    """Operations of the convolutions from features to the first block."""
    total = 0
    for frames, count in lengths.frames.items():
        channels = spec.feature_channels
        for window, length in zip(spec.stem_windows, spec.stem_lengths(frames), strict=True):
            total += count * length * 2 * window.kernel * channels * spec.width(0)
            channels = spec.width(0)
    return total


def training_bytes(spec: EncoderSpec, config: TrialConfig, tokens_per_forward: int, element: int, pack: int = 1) -> int:
    """Memory of one worker: frozen linear layers, a pack of such adapters, and the activations of one forward pass.

    Args:
        element: bytes of one number of the frozen encoder, 2 for bf16.
    """
    frozen = sum(
        stage.layers * sum(linear.in_features * linear.out_features for linear in stage.targets.values())
        for stage in spec.stages
    )
    run = encoding_spec(spec, config.lora)
    if config.lora is None:
        return frozen * element
    first = _adapted(run, config.lora)[1]
    kept = sum(ACTIVATIONS_KEPT * run.width(depth) for depth in range(first, run.num_layers))
    trained = lora_parameters(spec, config.lora) * BYTES_TRAINED
    return frozen * element + pack * trained + tokens_per_forward * kept * element


def first_adapted(spec: EncoderSpec, lora: LoraSpec) -> int:
    """Depth of the first adapted block: what lies below is cached, one file for each such depth."""
    return _adapted(encoding_spec(spec, lora), lora)[1]


def _adapted(run: EncoderSpec, lora: LoraSpec) -> tuple[dict[int, _Rank], int]:
    """The adapted layers of each block by depth, and the first such depth."""
    placement = resolve_placement(run, lora)
    adapted = {}
    for depth in placement.layers:
        stage = run.stages[run.stage_at(depth)]
        adapted[depth] = _Rank(frozenset(placement.targets) & stage.targets.keys(), lora.rank)
    return adapted, placement.layers[0]


def _behind_prefix(run: EncoderSpec, lora: LoraSpec | None) -> list[tuple[int, _Rank | None]]:
    """Depth of each block that a trial runs itself, and its adapters, if any.

    Without LoRA there is none: pooled states of the frozen encoder are computed once, see `frozen_flops`.
    """
    if lora is None:
        return []
    adapted, first = _adapted(run, lora)
    return [(depth, adapted.get(depth)) for depth in range(first, run.num_layers)]


def _head_flops(run: EncoderSpec, config: TrialConfig, lengths: Lengths, text_dim: int) -> int:
    """Forward through the projection; backward takes twice that."""
    return 2 * head_parameters(run.hidden_size, config.head, text_dim) * lengths.clips


def _forward_flops(run: EncoderSpec, depth: int, adapted: _Rank | None, lengths: Lengths) -> int:
    """Forward only, through one block."""
    stage = run.stages[run.stage_at(depth)]
    tokens, pairs = lengths.tokens(run, depth)
    return tokens * _forward(stage, adapted) + pairs * _attention(stage)


def _trained_flops(run: EncoderSpec, depth: int, adapted: _Rank | None, lengths: Lengths, entered: bool) -> int:
    """Forward and backward through one block.

    Args:
        entered: see `_backward`.
    """
    stage = run.stages[run.stage_at(depth)]
    tokens, pairs = lengths.tokens(run, depth)
    backward, through_attention = _backward(stage, adapted, entered)
    forward = _forward_flops(run, depth, adapted, lengths)
    return forward + tokens * backward + (2 * pairs * _attention(stage) if through_attention else 0)


def _attention(stage: Stage) -> int:
    """Scores and weighted values, for each pair of tokens of a clip."""
    queries = next(iter(stage.targets.values()))
    return 4 * queries.out_features


def _forward(stage: Stage, adapted: _Rank | None) -> int:
    """Linear layers and adapters, for each token."""
    frozen = sum(_product(linear) for linear in stage.targets.values())
    return frozen + sum(_down(stage, name, adapted) + _up(stage, name, adapted) for name in stage.targets)


def _backward(stage: Stage, adapted: _Rank | None, entered: bool) -> tuple[int, bool]:
    """Backward operations of linear layers and adapters for each token, and whether gradient passes attention.

    Args:
        entered: whether something below needs the gradient of the block's input.
    """
    total, reached = 0, entered
    for group in _along_the_path(stage):
        trained = adapted is not None and bool(adapted.names & set(group))
        for name in group:
            down, up = _down(stage, name, adapted), _up(stage, name, adapted)
            if reached:
                total += _product(stage.targets[name]) + 2 * (down + up)
            elif trained:
                # No gradient of this layer's input: neither through the frozen weight nor through A.
                total += down + 2 * up
        reached = reached or trained
    first = next(_along_the_path(stage))
    through_attention = entered or (adapted is not None and bool(adapted.names & set(first)))
    return total, through_attention


def _along_the_path(stage: Stage) -> Iterator[tuple[str, ...]]:
    """Names of the linear layers in the order in which a token meets them; those that read the same input together."""
    yield tuple(name for name, linear in stage.targets.items() if linear.reads_block_input)
    for name, linear in stage.targets.items():
        if not linear.reads_block_input:
            yield (name,)


def _product(linear: LinearTarget) -> int:
    return 2 * linear.in_features * linear.out_features


def _down(stage: Stage, name: str, adapted: _Rank | None) -> int:
    return 2 * adapted.rank * stage.targets[name].in_features if adapted and name in adapted.names else 0


def _up(stage: Stage, name: str, adapted: _Rank | None) -> int:
    return 2 * adapted.rank * stage.targets[name].out_features if adapted and name in adapted.names else 0
