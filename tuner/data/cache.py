"""Where downloads and prepared stores live when the user names no folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The user's cache folder of this program: `$TUNER_CACHE`, else `$XDG_CACHE_HOME/tuner`, else `~/.cache/tuner`.

    The folder is not created here; whoever writes into it does.
    """
    if own := os.environ.get("TUNER_CACHE"):
        return Path(own).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "tuner"
    return Path.home() / ".cache" / "tuner"


def prefix_root() -> Path:
    """Where this machine keeps the frozen states that its trials share (`tuner.train.prefix`)."""
    return cache_root() / "prefix"
