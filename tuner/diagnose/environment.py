"""Step 1: the machine and the installed libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

import psutil
import torch

from tuner.data.cache import cache_root
from tuner.diagnose.findings import Step, gib
from tuner.train.precision import measured_precision

LIBRARIES = ("torch", "torchaudio", "transformers", "peft", "ray", "optuna")
PYTHONS = ((3, 11), (3, 13))  # from, and before
MIN_MEMORY = 2 * 2**30
MIN_DISK = 2 * 2**30
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY = 256 * 2**20  # Ray's object store here is 200 MiB


def check_environment() -> Step:
    """Python, libraries, processor or GPU, memory, and disk space for the cache."""
    step = Step("environment")
    _python(step)
    _libraries(step)
    _device(step)
    _memory(step)
    _disk(step)
    return step


def _python(step: Step) -> None:
    version = platform.python_version()
    step.values["python"] = version
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        step.ok(f"Python {version} on {platform.system()} {platform.machine()}")
    else:
        step.error(f"tuner does not support Python {version}", "use Python 3.11 or 3.12")


def _libraries(step: Step) -> None:
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    step.values["libraries"] = versions
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        step.error(f"not installed: {', '.join(missing)}", "run `make install`")
    step.ok(", ".join(f"{name} {version}" for name, version in versions.items() if version))


def _device(step: Step) -> None:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(len(names))]
        step.values |= {"device": "cuda", "gpus": names, "gpu_memory_bytes": sizes}
        step.ok(f"{len(names)} GPU: {names[0]}, {gib(sizes[0])} each; bf16 {torch.cuda.is_bf16_supported()}")
        return
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    capability, precision = torch.backends.cpu.get_cpu_capability(), measured_precision(torch.device("cpu"))
    step.values |= {"device": "cpu", "cores": cores, "threads": threads, "instructions": capability}
    step.values["precision"] = precision
    step.ok(f"no GPU; CPU cores: {cores}, torch threads: {threads}, {capability}; faster in {precision} (timed)")


def _memory(step: Step) -> None:
    memory = psutil.virtual_memory()
    step.values |= {"memory_bytes": memory.total, "memory_available_bytes": memory.available}
    text = f"{gib(memory.available)} of {gib(memory.total)} memory available"
    if memory.available < MIN_MEMORY:
        step.warn(text, "a search of the demo needs 2 GiB; close other programs, or search with --lanes 1 --pack 1")
    else:
        step.ok(text)
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        step.values["shared_memory_free_bytes"] = free
        if free < MIN_SHARED_MEMORY:
            step.warn(
                f"{gib(free)} free in {SHARED_MEMORY}, where Ray keeps its objects",
                "start the container with more shared memory (--shm-size=512m)",
            )


def _disk(step: Step) -> None:
    """Check the cache folder, which may not exist yet."""
    root = cache_root().absolute()
    existing = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    step.values |= {"cache": str(root), "cache_free_bytes": free}
    if not os.access(existing, os.W_OK):
        step.error(
            f"{existing}: the cache cannot be written there", "set TUNER_CACHE to a folder that you can write to"
        )
    elif free < MIN_DISK:
        step.warn(
            f"{gib(free)} free at {root}", "stores and frozen states are kept there; free disk space or set TUNER_CACHE"
        )
    else:
        step.ok(f"{gib(free)} free for caches at {root}")
