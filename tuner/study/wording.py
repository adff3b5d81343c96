"""Trials, counts and times in words, the same in every view and report."""

from __future__ import annotations

from tuner.config import TrialConfig
from tuner.study.events import BASELINE, RECOMMENDED

ORIGINS = {BASELINE: "projection only", RECOMMENDED: "recommended"}


def counted(number: int, noun: str) -> str:
    """`1 point`, `3 points`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def decimals(value: float | None) -> str:
    """Three decimals; `nan` for a value that is not finite."""
    return "nan" if value is None else f"{value:.3f}"


def describe_points(count: int) -> str:
    """`front 1 point`, `front 3 points`."""
    return f"front {counted(count, 'point')}"


def describe_time(seconds: float | None) -> str:
    """`about 4 min left`, rounded as coarsely as the estimate deserves."""
    if seconds is None:
        return "time left unknown"
    if seconds < 90:
        return f"about {max(0, round(seconds / 10) * 10)} s left"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"


def describe_config(config: TrialConfig) -> str:
    """A configuration in a few words: `r=16 alpha=32 dropout=0.1 q_proj,v_proj from block 0 lr=1.0e-03`."""
    lora = config.lora
    if lora is None:
        return "projection only"
    return (
        f"r={lora.rank} alpha={lora.alpha:g} dropout={lora.dropout:g} "
        f"{placed(','.join(lora.targets), lora.placement)} from block {lora.first_layer} lr={config.optim.lora_lr:.1e}"
    )


def placed(targets: str, placement: str | None) -> str:
    """Target modules, and the part of the model that has them unless it is the tower."""
    parts = {"language_model": " in the language model", "both": " in tower and language model"}
    return targets + parts.get(placement or "tower", "")
