"""Clips of different lengths as one row of tokens, without padding. A torch module.

In a transformer block everything except attention works on single tokens, so the blocks run on the tokens of all
clips laid end to end, [N, D]. Only attention works by clip: it groups neighbouring clips of similar length, pads each
clip to the longest of its group, and drops the padding again. On a CPU the demo's batches of 128 clips would otherwise
be one third padding.

Shapes: B clips, N rows (tokens of all clips), G clips of a group, T tokens of the longest of a group, H heads, d head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

IMPLEMENTATION = "tuner_packed"
# A group may hold clips this much shorter than its longest: more groups cost more calls, fewer cost more padding.
SHORTEST_IN_GROUP = 0.7
# Up to this width plain products are faster than torch's fused attention on a CPU in bf16 (`benchmarks/attention.py`).
PLAIN_WIDTH = 512


@dataclass(frozen=True)
class Group:
    """Neighbouring clips that attend in one call; the tensors are None if all clips have the same length."""

    start: int  # first token in the pack
    stop: int
    clips: int
    width: int
    padded_GT: Tensor | None  # for each place of the padded group, flat, its token counted from `start`
    real_N: Tensor | None  # for each token of the group, its place in the padded group
    bias_G1T: Tensor | None  # 0 on real tokens, the lowest number on padding; None if no real token attends to padding
    causal: bool = False


ScoreBias = Callable[[Group], Tensor]


class Packing:
    """Which tokens of a pack belong to which clip.

    Args:
        lengths: tokens of each clip, in the order of the pack; falling lengths give the fewest groups.
        dtype, device: of the hidden states.
        window: if given, a clip attends in separate windows of this many tokens, the last one shorter.
        causal: whether a token attends only to itself and the tokens of its clip before it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
        causal: bool = False,
    ) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        spans = self.lengths if window is None else tuple(_windows(self.lengths, window))
        groups = _groups(spans, dtype, device)
        # Padding comes after a clip, so causal attention never reaches it.
        self.groups = tuple(replace(group, bias_G1T=None, causal=True) for group in groups) if causal else groups

    @property
    def tokens(self) -> int:
        """The tokens of all clips."""
        return sum(self.lengths)

    def places(self) -> Tensor:
        """The place of each row in its clip, from 0, int64."""
        return self.join([torch.arange(length, device=self.device) for length in self.lengths])

    def join(self, clips: Sequence[Tensor]) -> Tensor:
        """Rows ND of the pack from the tokens of each clip, TD."""
        return torch.cat(list(clips))

    def join_batch(self, hidden_BTD: Tensor) -> Tensor:
        """Rows ND of the pack from a padded batch."""
        return self.join([hidden_TD[:length] for hidden_TD, length in zip(hidden_BTD, self.lengths, strict=True)])

    def share(self, states_HNd: Tensor) -> list[Tensor]:
        """Rows of each group. One split, because the gradient of each slice would be a whole pack of zeros."""
        sizes = [group.stop - group.start for group in self.groups]
        return list(torch.split(states_HNd, sizes, dim=1))

    def split(self, hidden_ND: Tensor) -> list[Tensor]:
        """Tokens TD of each clip from the rows of the pack."""
        return list(torch.split(hidden_ND, list(self.lengths)))


class Rotation:
    """Rotary positions (RoFormer, arXiv:2104.09864) that start again with every clip of a packing.

    Args:
        model: its `rotary_emb` gives cosines and sines for places.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._last: tuple[Packing, tuple[Tensor, Tensor]] | None = None

    def of(self, packing: Packing, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, N, d] for all rows in the number format of the states, kept for the next block."""
        if self._last is None or self._last[0] is not packing:
            self._last = packing, self._model.rotary_emb(hidden_ND, packing.places()[None])
        return self._last[1]


def unpack(packed_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """A padded batch BTD, zero after each clip, from tokens end to end."""
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(packed_ND, list(lengths))), batch_first=True)


def _windows(lengths: Sequence[int], window: int) -> Iterator[int]:
    for length in lengths:
        yield from (min(window, length - start) for start in range(0, length, window))


def _groups(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Group, ...]:
    groups, first, start = list[Group](), 0, 0
    for clip in range(1, len(lengths) + 1):
        part = lengths[first : clip + 1]
        if clip < len(lengths) and min(part) >= SHORTEST_IN_GROUP * max(part):
            continue
        groups.append(_group(lengths[first:clip], start, dtype, device))
        start, first = groups[-1].stop, clip
    return tuple(groups)


def _group(lengths: tuple[int, ...], start: int, dtype: torch.dtype, device: torch.device) -> Group:
    clips, width, stop = len(lengths), max(lengths), start + sum(lengths)
    if min(lengths) == width:
        return Group(start, stop, clips, width, None, None, None)
    length_G = torch.tensor(lengths)
    real_GT = torch.arange(width) < length_G[:, None]
    offset_G = length_G.cumsum(0) - length_G
    # Padding repeats a clip's last token; the bias gives it zero weight, and its output is dropped.
    padded_GT = offset_G[:, None] + torch.minimum(torch.arange(width), length_G[:, None] - 1)
    bias_GT = torch.zeros(clips, width, dtype=dtype).masked_fill_(~real_GT, torch.finfo(dtype).min)
    return Group(
        start,
        stop,
        clips,
        width,
        padded_GT.flatten().to(device, non_blocking=True),
        real_GT.flatten().nonzero().squeeze(1).to(device, non_blocking=True),
        bias_GT[:, None, :].to(device, non_blocking=True),
    )


def packed_attention(
    module: Any,
    query_1HNd: Tensor,
    key_1HNd: Tensor,
    value_1HNd: Tensor,
    attention_mask: Packing | None,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    score_bias: ScoreBias | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers: each clip of the packing attends only to itself.

    Without a packing (someone calls the model directly) it is transformers' own. The packing comes as the attention
    mask, or as `packing` through layers that take no mask. `score_bias` gives what a family adds to the scores HGTT of
    a group. Keys and values may have fewer heads than queries: neighbouring queries then share one.

    Returns:
        Output [1, N, H, d], as transformers expects it, and no weights.
    """
    packing = packing or attention_mask
    if packing is None:
        whole: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query_1HNd, key_1HNd, value_1HNd, None, scaling=scaling, dropout=dropout, **more
        )
        return whole
    assert dropout == 0.0, "the frozen encoder has no dropout of its own"
    sharing = query_1HNd.shape[1] // key_1HNd.shape[1]
    key_1HNd, value_1HNd = repeat_kv(key_1HNd, sharing), repeat_kv(value_1HNd, sharing)
    parts = []
    shares = (packing.share(states_1HNd[0]) for states_1HNd in (query_1HNd, key_1HNd, value_1HNd))
    for group, *own in zip(packing.groups, *shares, strict=True):
        query, key, value = (padded(states_HNd, group) for states_HNd in own)
        bias = _bias(group, score_bias, len(query))
        parts.append(_unpadded(_attend(query, key, value, group, scaling, bias), group))
    return torch.cat(parts, dim=1).transpose(0, 1)[None], None


def empty_model(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A model of transformers on the meta device whose layers take a `Packing` as their attention mask."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    config._attn_implementation = IMPLEMENTATION
    with torch.device("meta"):
        return model_class(config)


def _bias(group: Group, score_bias: ScoreBias | None, heads: int) -> Tensor | None:
    """What is added to the scores HGTT of a group, in a shape that broadcasts to theirs."""
    padding_HG1T = None if group.bias_G1T is None else group.bias_G1T[None].expand(heads, -1, -1, -1)
    if score_bias is None:
        return padding_HG1T
    own_HGTT = score_bias(group)
    return own_HGTT if padding_HG1T is None else own_HGTT + padding_HG1T


def _attend(
    query_HGTd: Tensor, key_HGTd: Tensor, value_HGTd: Tensor, group: Group, scaling: float, bias: Tensor | None
) -> Tensor:
    plain = query_HGTd.device.type == "cpu" and query_HGTd.dtype == torch.bfloat16 and group.width <= PLAIN_WIDTH
    assert not group.causal or bias is None, "no family has a bias in causal attention"
    if not plain:
        return F.scaled_dot_product_attention(
            query_HGTd, key_HGTd, value_HGTd, attn_mask=bias, scale=scaling, is_causal=group.causal
        )
    score_HGTT = query_HGTd @ key_HGTd.transpose(2, 3)
    if scaling != 1.0:
        score_HGTT.mul_(scaling)
    if group.causal:
        later_TT = torch.ones(group.width, group.width, dtype=torch.bool, device=score_HGTT.device).triu(1)
        score_HGTT = score_HGTT.masked_fill(later_TT, -torch.inf)
    if bias is not None:
        score_HGTT.add_(bias)
    return score_HGTT.softmax(dim=3) @ value_HGTd


def padded(states_HNd: Tensor, group: Group) -> Tensor:
    """States HGTd of a group's own rows HNd; padding repeats a clip's last token."""
    heads, _, width = states_HNd.shape
    if group.padded_GT is not None:
        states_HNd = _Pad.apply(states_HNd, group.padded_GT, group.real_N)  # type: ignore[no-untyped-call]
    return states_HNd.reshape(heads, group.clips, group.width, width)


def _unpadded(states_HGTd: Tensor, group: Group) -> Tensor:
    flat_HNd = states_HGTd.flatten(1, 2)
    if group.real_N is None:
        return flat_HNd
    kept: Tensor = _Unpad.apply(flat_HNd, group.real_N)  # type: ignore[no-untyped-call]
    return kept


class _Pad(torch.autograd.Function):
    """Tokens to places of a padded group. Padding has no gradient, so backward is a plain selection again.

    (The gradient of `index_select` itself would add up rows one by one, which is slow on a CPU.)
    """

    @staticmethod
    def forward(ctx: Any, states_HNd: Tensor, padded_GT: Tensor, real_N: Tensor) -> Tensor:
        ctx.save_for_backward(real_N)
        return states_HNd.index_select(1, padded_GT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (real_N,) = ctx.saved_tensors
        return gradient.index_select(1, real_N), None, None


class _Unpad(torch.autograd.Function):
    """Places of a padded group to tokens; backward leaves zeros on the padding."""

    @staticmethod
    def forward(ctx: Any, states_HNd: Tensor, real_N: Tensor) -> Tensor:
        ctx.save_for_backward(real_N)
        ctx.shape = states_HNd.shape
        return states_HNd.index_select(1, real_N)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (real_N,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(1, real_N, gradient), None
