"""Reads `model.bin` of faster-whisper folders (CTranslate2 binary format 6) without CTranslate2. No torch here.

Little-endian: u32 format version, string specification name, u32 revision, u32 count, then per variable a string name,
u8 rank, u32 x rank shape, u8 type, u32 byte count, bytes; last u32 count of aliases, each two strings. A string is a
u16 length with its closing NUL, then the bytes.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.encoders.checkpoint import refuse_pointers
from tuner.errors import EncoderError

FILE_NAME = "model.bin"
FORMAT_VERSION = 6
# Type codes of the format; bfloat16 (5) has no numpy type, and faster-whisper folders do not use it.
DTYPES: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
_LAYER = re.compile(r"encoder/layer_\d+/")
HEAD_SIZE = 64  # of every Whisper; only used if a file does not give its number of heads


@dataclass(frozen=True)
class Variable:
    """Where one tensor lies in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


@dataclass(frozen=True)
class Header:
    """Table of contents of a model.bin."""

    path: Path
    name: str
    variables: Mapping[str, Variable]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a variable.

        Raises:
            EncoderError: the file does not have it.
        """
        if name not in self.variables:
            raise EncoderError(f"{self.path}: variable {name} is missing; convert the model again")
        return self.variables[name].shape


class _Cursor:
    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.offset = 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.buffer, self.offset)
        self.offset += struct.calcsize(code)
        return int(value)

    def string(self) -> str:
        length = self.number("H")
        text = self.buffer[self.offset : self.offset + length]
        self.offset += length
        return text.rstrip(b"\0").decode("utf-8")

    def variable(self) -> tuple[str, Variable]:
        name = self.string()
        shape = tuple(self.number("I") for _ in range(self.number("B")))
        code = self.number("B")
        size = self.number("I")
        variable = Variable(shape, DTYPES.get(code, np.dtype("V1")), self.offset)
        self.offset += size
        count = int(np.prod(shape, dtype=np.int64))
        if self.offset > len(self.buffer) or (code in DTYPES and size != count * variable.dtype.itemsize):
            raise ValueError(f"the size of variable {name} is wrong")
        return name, variable


def read_header(path: Path) -> Header:
    """Table of contents of a model.bin; tensors stay on disk.

    Raises:
        EncoderError: it is not this format, another version of it, or incomplete.
    """
    refuse_pointers([path])
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            cursor = _Cursor(buffer)
            version = cursor.number("I")
            if version != FORMAT_VERSION:
                raise EncoderError(
                    f"{path}: is not a CTranslate2 model of format {FORMAT_VERSION} (found {version}); "
                    "convert the original model with a current ct2-transformers-converter"
                )
            name = cursor.string()
            cursor.number("I")
            return Header(path, name, dict(cursor.variable() for _ in range(cursor.number("I"))))
    except (struct.error, ValueError) as error:
        raise EncoderError(f"{path}: is damaged or incomplete ({error}); download the model again") from None
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read ({error.strerror})") from None


def whisper_config(header: Header) -> dict[str, Any]:
    """Configuration of the encoder, in the names of transformers' WhisperConfig, from the shapes in the file.

    Raises:
        EncoderError: the weights are quantised (int8, int16), or their shapes are not those of a Whisper encoder.
    """
    weights = {name: v for name, v in header.variables.items() if name.startswith("encoder/") and v.shape}
    quantised = sorted(name for name, v in weights.items() if v.dtype.kind != "f")
    if quantised:
        kind = weights[quantised[0]].dtype
        raise EncoderError(
            f"{header.path}: {quantised[0]} is stored as {'bfloat16' if kind.kind == 'V' else kind.name}; "
            "LoRA needs unquantised weights: convert the model with --quantization float16 or float32"
        )
    convolution = header.shape("encoder/conv1/weight")
    fc1 = header.shape("encoder/layer_0/ffn/linear_0/weight")
    positions = header.shape("encoder/position_encodings/encodings")
    if (len(convolution), len(fc1), len(positions)) != (3, 2, 2):
        raise EncoderError(f"{header.path}: its shapes are not those of a Whisper encoder; convert the model again")
    return {
        "model_type": "whisper",
        "d_model": convolution[0],
        "num_mel_bins": convolution[1],
        "encoder_layers": len({match[0] for name in weights if (match := _LAYER.match(name))}),
        "encoder_attention_heads": _heads(header) or max(1, convolution[0] // HEAD_SIZE),
        "encoder_ffn_dim": fc1[0],
        "max_source_positions": positions[0],
    }


def read_whisper_encoder(path: Path) -> dict[str, NDArray[np.floating[Any]]]:
    """Tensors of the encoder under transformers' names, in the stored precision (fp16 or fp32).

    Raises:
        EncoderError: as `read_header` and `whisper_config`, or a layer lacks a tensor.
    """
    header = read_header(path)
    layers = whisper_config(header)["encoder_layers"]
    buffer = np.memmap(path, mode="r", dtype=np.uint8)

    def read(name: str) -> NDArray[np.floating[Any]]:
        shape = header.shape(name)
        variable = header.variables[name]
        flat: NDArray[Any] = np.frombuffer(buffer, variable.dtype, int(np.prod(shape, dtype=np.int64)), variable.offset)
        # Variables come after names of any length, so they are not aligned; torch needs them aligned and writable.
        return flat.reshape(shape).copy()

    tensors = {ours: read(theirs) for ours, theirs in _names(layers).items()}
    for index in range(layers):
        attention = f"encoder/layer_{index}/self_attention/linear_0"
        weights, biases = np.split(read(f"{attention}/weight"), 3), np.split(read(f"{attention}/bias"), 3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            tensors[f"layers.{index}.self_attn.{part}_proj.weight"] = weight
            # Whisper's key projection has no bias; the converter fills in zeros to stack the three.
            if part != "k":
                tensors[f"layers.{index}.self_attn.{part}_proj.bias"] = bias
            elif bias.any():
                raise EncoderError(
                    f"{path}: {attention} has a key bias, but no Whisper model does; convert the model again"
                )
    return tensors


def _names(layers: int) -> dict[str, str]:
    """Names of the tensors that are taken over unchanged: ours -> theirs."""
    linears = {"conv1": "conv1", "conv2": "conv2"}
    norms = {"layer_norm": "layer_norm"}
    for index in range(layers):
        ours, theirs = f"layers.{index}", f"layer_{index}"
        linears[f"{ours}.self_attn.out_proj"] = f"{theirs}/self_attention/linear_1"
        linears[f"{ours}.fc1"] = f"{theirs}/ffn/linear_0"
        linears[f"{ours}.fc2"] = f"{theirs}/ffn/linear_1"
        norms[f"{ours}.self_attn_layer_norm"] = f"{theirs}/self_attention/layer_norm"
        norms[f"{ours}.final_layer_norm"] = f"{theirs}/ffn/layer_norm"
    names = {"embed_positions.weight": "encoder/position_encodings/encodings"}
    for ours, theirs in linears.items():
        names |= {f"{ours}.{kind}": f"encoder/{theirs}/{kind}" for kind in ("weight", "bias")}
    for ours, theirs in norms.items():
        names |= {f"{ours}.weight": f"encoder/{theirs}/gamma", f"{ours}.bias": f"encoder/{theirs}/beta"}
    return names


def _heads(header: Header) -> int | None:
    variable = header.variables.get("encoder/num_heads")
    if variable is None:
        return None
    return int(np.fromfile(header.path, variable.dtype, count=1, offset=variable.offset)[0])
