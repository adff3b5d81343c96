"""How much of the machine's bf16 matrix peak one LoRA epoch uses.

Counted are the operations of `tuner.lora.cost`: those that the mathematics needs on real tokens, not what padding or
recomputation adds. Stem and blocks below the first adapted one come from the prefix cache.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch

from benchmarks import run
from benchmarks.levers import RECOMMENDED
from benchmarks.table import show
from tuner.commands.actions.stores import find_store
from tuner.commands.options import DataChoice
from tuner.config import RunSettings, TrialConfig
from tuner.data.cache import prefix_root
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import TrialFailed
from tuner.lanes.memory import LEAN_MEMORY, set_lean_memory
from tuner.lora.cost import Lengths, training_flops
from tuner.train.pack import Pack, PackContext

TARGET = 0.5
# rows, in, out: square ones, and a few thousand tokens through the linears of the demo's encoder
SHAPES = (
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (4096, 384, 384),
    (4096, 384, 1536),
    (4096, 1536, 384),
)
MATMUL_SECONDS = 1.0


def matmul_rate(rows: int, inner: int, columns: int, seconds: float = MATMUL_SECONDS) -> float:
    """Best rate of a bf16 product in operations a second, over as many repeats as fit into `seconds`."""
    left = torch.randn(rows, inner, dtype=torch.bfloat16)
    right = torch.randn(inner, columns, dtype=torch.bfloat16)
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    torch.mm(left, right, out=out)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * columns / best


def measured_peak() -> float:
    """Best bf16 rate of this machine over several shapes; prints them."""
    rates = {shape: matmul_rate(*shape) for shape in SHAPES}
    rows = [(" x ".join(map(str, shape)), f"{rate / 1e9:.0f}") for shape, rate in rates.items()]
    show("bf16 matrix products", ("rows x in x out", "GFLOP/s"), rows)
    return max(rates.values())


def train(data: str, batch_size: int, epochs: int, tokens_per_forward: int) -> tuple[Pack, list[float]]:
    """Train on `--data` and return the seconds of each epoch after the first, which compiles kernels."""
    store = Store.open(find_store(DataChoice(data)))
    settings = RunSettings(
        store=str(store.folder),
        encoder=store.encoder,
        epochs=epochs + 1,
        batch_size=batch_size,
        tokens_per_forward=tokens_per_forward,
    )
    encoder = load_encoder(inspect_encoder(store.encoder), torch.bfloat16)
    pack = Pack(PackContext(encoder, store, settings, prefix_root=prefix_root()))
    pack.attach("t", TrialConfig(lora=RECOMMENDED))
    pack.prefix(0)
    seconds = []
    for _ in range(epochs + 1):
        row = pack.train_epoch(["t"])["t"]
        if isinstance(row, TrialFailed):
            raise row
        seconds.append(row["train_seconds"])
    return pack, seconds[1:]


def main(
    data: str = "demo", batch_size: int = 128, epochs: int = 3, tokens_per_forward: int = 8192, threads: int = 0
) -> None:
    """One epoch of LoRA r=16 on attention, dropout 0.1, over the training split of the demo or a prepared store."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    peak = measured_peak()
    pack, seconds = train(data, batch_size, epochs, tokens_per_forward)
    lengths, store = pack.length_N[pack.train_clips].tolist(), pack.store
    clips = Lengths.of(store.frames[pack.train_clips].tolist())
    work = training_flops(pack.encoder.spec, TrialConfig(lora=RECOMMENDED), clips, store.text_dim)
    took = statistics.median(seconds)
    rate = work / took
    rows = (
        ("training clips", f"{len(lengths)}"),
        ("tokens", f"{sum(lengths)}"),
        ("work of one epoch, TFLOP", f"{work / 1e12:.3f}"),
        (f"seconds of one epoch, median of {len(seconds)}", f"{took:.2f}"),
        ("achieved, GFLOP/s", f"{rate / 1e9:.0f}"),
        ("bf16 matrix peak, GFLOP/s", f"{peak / 1e9:.0f}"),
        (f"share of the peak (target {TARGET:.0%})", f"{rate / peak:.1%}"),
    )
    show(f"one LoRA epoch, r=16 on attention, dropout 0.1, batches of {batch_size}", ("quantity", "value"), rows)


if __name__ == "__main__":
    # As a lane has it; malloc reads its part when a process starts.
    if not LEAN_MEMORY.keys() <= os.environ.keys():
        set_lean_memory()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.epoch", *sys.argv[1:]])
    run(main)
