"""Step 3: the encoder on disk: which tensors are read, in what format, and how much memory that saves."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors import SafetensorError, safe_open

from tuner.config import Precision
from tuner.diagnose.findings import Step, duration, gib
from tuner.diagnose.subject import Subject
from tuner.encoders import ctranslate2
from tuner.encoders.base import AudioEncoder
from tuner.encoders.checkpoint import INDEX, SINGLE, names_below, read_json
from tuner.encoders.registry import load_encoder, tensor_prefixes
from tuner.encoders.spec import EncoderSpec
from tuner.errors import EncoderError
from tuner.train.precision import dtype_of

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
LOW = {"F8_E4M3", "F8_E5M2", "I8", "U8", "int8", "int16"}
# Exactness is best measured in fp32, if the model takes at most this share of the free memory.
FP32_SHARE = 0.5


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint."""

    dtype: str
    parameters: int
    size: int  # bytes


@dataclass
class Contents:
    """What a checkpoint holds: the tensors of the files on disk, and the names of all tensors."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    total_bytes: int = 0  # of all tensors, also those of files that are not on disk

    def read(self, spec: EncoderSpec) -> list[str]:
        """Names of the tensors that belong to the encoder."""
        if spec.checkpoint == "ctranslate2":
            return [name for name in self.names if name.startswith("encoder/")]
        parts = [names_below(self.names, prefixes) for prefixes in tensor_prefixes(spec)]
        return list(dict.fromkeys(name for part in parts for name in part))


def check_checkpoint(subject: Subject, precision: Literal["auto", "bf16", "fp32"], device: str) -> Step:
    """Check the files, then load the encoder for the later steps."""
    step, spec = Step("checkpoint"), subject.spec
    if spec is None:
        step.error(subject.spec_error or "the encoder cannot be used")
        return step
    step.values |= {"family": spec.family, "source": spec.source, "folder": str(spec.folder), "path": spec.path}
    try:
        contents = read_contents(spec)
        dtype = dtype_of(precision) if precision != "auto" else _affordable(contents, spec)
        started = time.perf_counter()
        subject.encoder = load_encoder(spec, dtype, device)
    except EncoderError as error:
        step.error(str(error))
        return step
    step.values["load_seconds"] = time.perf_counter() - started
    _describe(step, spec, contents, subject.encoder)
    return step


def read_contents(spec: EncoderSpec) -> Contents:
    """Names, formats and sizes from the headers of the checkpoint's files.

    Raises:
        EncoderError: a file is damaged.
    """
    if spec.checkpoint == "ctranslate2":
        contents = Contents()
        for name, variable in ctranslate2.read_header(spec.folder / ctranslate2.FILE_NAME).variables.items():
            if not variable.shape:  # a setting of the model, not a weight
                continue
            count = math.prod(variable.shape)
            contents.tensors[name] = Stored(variable.dtype.name, count, count * variable.dtype.itemsize)
    else:
        contents = Contents({name: stored for path in _weight_files(spec.folder) for name, stored in _header(path)})
    contents.names = list(contents.tensors)
    contents.total_bytes = sum(tensor.size for tensor in contents.tensors.values())
    if (spec.folder / INDEX).is_file():
        index = read_json(spec.folder / INDEX)
        contents.names = list(index["weight_map"])
        contents.total_bytes = int(index.get("metadata", {}).get("total_size", contents.total_bytes))
    return contents


def _header(path: Path) -> list[tuple[str, Stored]]:
    found = []
    try:
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118, the reader is no mapping
                part = reader.get_slice(name)
                count, dtype = math.prod(part.get_shape()), str(part.get_dtype())
                found.append((name, Stored(dtype, count, count * BYTES.get(dtype, 1))))
    except SafetensorError as error:
        raise EncoderError(f"{path}: is a damaged safetensors file ({error}); download the model again") from None
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files on disk: for a hub id only the encoder's shards are downloaded."""
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    shards = sorted({str(name) for name in read_json(folder / INDEX)["weight_map"].values()})
    return [folder / shard for shard in shards if (folder / shard).is_file()]


def _affordable(contents: Contents, spec: EncoderSpec) -> torch.dtype:
    wanted = 4 * sum(contents.tensors[name].parameters for name in contents.read(spec) if name in contents.tensors)
    precision: Precision = "fp32" if wanted <= FP32_SHARE * psutil.virtual_memory().available else "bf16"
    return dtype_of(precision)


def _describe(step: Step, spec: EncoderSpec, contents: Contents, encoder: AudioEncoder) -> None:
    read = contents.read(spec)
    stored = [contents.tensors[name] for name in read if name in contents.tensors]
    formats = Counter(tensor.dtype for tensor in stored)
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    memory = sum(parameter.numel() * parameter.itemsize for parameter in encoder.model.parameters())
    size = sum(tensor.size for tensor in stored)
    dtype = str(encoder.dtype).removeprefix("torch.")
    # As if the rest were loaded in the same format.
    everything = memory * contents.total_bytes / size if size else memory
    step.values |= {"tensors_read": len(read), "tensors": len(contents.names), "formats": dict(formats)}
    step.values |= {"bytes_read": size, "bytes": contents.total_bytes, "loaded_as": dtype, "parameters": parameters}
    step.values |= {"memory_bytes": memory, "memory_of_everything_bytes": round(everything)}
    step.ok(
        f"{spec.family}: {len(read)} of {len(contents.names)} tensors are read ({', '.join(formats)}), "
        f"{gib(size)} of {gib(contents.total_bytes)} on disk, in {duration(step.values['load_seconds'])}"
    )
    saved = f"the whole model would take {gib(everything)}" if len(read) < len(contents.names) else "that is all"
    step.ok(f"{parameters / 1e6:,.2f}M parameters take {gib(memory)} of memory as {dtype}; {saved}")
    low = sorted(set(formats) & LOW)
    if low:
        step.warn(
            f"weights are stored as {', '.join(low)}",
            "use the original weights, which are more exact: LoRA learns on top of them",
        )
