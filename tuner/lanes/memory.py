"""Environment that keeps a training process small; it must be set before torch starts. No Ray, no torch.

Training on a CPU meets ever new matrix shapes, and torch keeps what it made for each: oneDNN 1,024 primitives, and
torch's layer above it (ideep) 1,024 more with their buffers, 10 MB a step that never come back. Kept small, the heap of
a worker stays at what one step needs, at no measurable cost (docs/log.md). One malloc arena instead of one for each
thread saves a little more. Each step needs the same memory again, so malloc gives none back in between: asking the
kernel for it again cost 3 % of the time.
"""

from __future__ import annotations

import os

LEAN_MEMORY = {
    "LRU_CACHE_CAPACITY": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "MALLOC_ARENA_MAX": "1",
    # glibc's largest threshold for mapping a block alone; setting either of the two stops it from adapting the other.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(1024**3),
}


def set_lean_memory() -> None:
    """Set what the user has not set, for this process (if torch has not started) and its children."""
    for name, value in LEAN_MEMORY.items():
        os.environ.setdefault(name, value)
