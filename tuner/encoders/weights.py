"""Tensors from safetensors files into a model, only those of the encoder. A torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tuner.encoders.checkpoint import first_prefix, weight_files
from tuner.errors import EncoderError


def read_tensors(folder: Path, prefixes: Sequence[str], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Tensors below the first of `prefixes` that occurs, named without it, floating ones as `dtype`.

    Only these tensors are read from disk, so the tower of a large model takes only its own size.

    Raises:
        EncoderError: a file is damaged, or there are no weights.
    """
    files = weight_files(folder, prefixes)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=device) as reader:
                names = list(reader.keys())
                prefix = first_prefix(names, prefixes)
                for name in names:
                    if name.startswith(prefix):
                        tensor = reader.get_tensor(name)
                        tensors[name.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        except SafetensorError as error:
            raise EncoderError(f"{file}: is a damaged safetensors file ({error}); download the model again") from None
    return tensors


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], origin: Path) -> None:
    """Assign the tensors to a model on the meta device and freeze it; names and shapes must match exactly.

    Raises:
        EncoderError: names the first missing, unexpected or misshaped tensors.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    misshaped = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if faults:
        raise EncoderError(f"{origin}: weights do not match config.json: {'; '.join(faults)}; download the model again")
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    model.requires_grad_(False).eval()
