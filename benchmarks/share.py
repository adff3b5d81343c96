"""A small share of the demo for comparisons that must end: a manifest of a few hundred recordings with splits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.commands.actions.stores import find_store
from tuner.commands.options import DataChoice
from tuner.data.cache import cache_root
from tuner.data.store import Store
from tuner.demo import fetch_demo


@dataclass(frozen=True)
class Share:
    """Recordings and encoders, as `tuner prepare` and the peer take them."""

    manifest: Path
    audio_encoder: Path
    text_encoder: Path


def make_share(folder: Path, clips: Mapping[str, int], seed: int = 0) -> Share:
    """Draw so many clips of each split of the demo; the demo's splits keep every recording in one of them."""
    demo = fetch_demo(cache_root() / "demo")
    store = Store.open(find_store(DataChoice()))
    rows = {row["clip_id"]: row for row in map(json.loads, demo.manifest.read_text(encoding="utf-8").splitlines())}
    random = np.random.default_rng(seed)
    manifest = folder / "share.jsonl"
    with manifest.open("w", encoding="utf-8") as file:
        for split, count in clips.items():
            for clip in np.sort(random.choice(store.split(split), size=count, replace=False)):
                row = rows[store.clip_ids[clip]]
                audio = str(demo.manifest.parent / row["audio"])
                file.write(json.dumps({**row, "audio": audio, "split": split}, ensure_ascii=False) + "\n")
    return Share(manifest, demo.audio_encoder, demo.text_encoder)
