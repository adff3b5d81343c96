"""Where a lane keeps checkpoints and adapters: in the study's own folder, or on its node and in a storage.

With a storage (`--storage`) nodes share no file system. A lane then writes into a scratch folder of its node, and a
file counts once the storage has it: whichever node takes a trial up goes on from the storage's copy.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from tuner.data.cache import cache_root
from tuner.storage import Storage
from tuner.study.folder import StudyFolder, adapter_name, checkpoint_config_name, checkpoint_name


class LaneFiles:
    """Checkpoints and adapters of one study, as one worker of a lane sees them.

    Args:
        run_dir: the study's folder, which this node sees unless there is a storage.
        storage: of the study.
        lane: whose worker this is.

    Attributes:
        folder: `checkpoints/<trial>.pt` and `adapters/<trial>/` lie below it.
    """

    def __init__(self, run_dir: Path, storage: Storage | None, lane: str) -> None:
        self.storage = storage
        self.folder = run_dir if storage is None else _new_scratch(lane)
        self._described: set[str] = set()

    def checkpoint(self, trial: str) -> Path:
        """Where the checkpoint of a trial is written and, after `fetch`, read."""
        return StudyFolder(self.folder).checkpoint(trial)

    def fetch(self, trial: str) -> None:
        """Have the checkpoint here that the trial is to go on from, if there is one.

        Raises:
            StorageError: the storage is away, or this node's disk is full.
        """
        if self.storage is not None and self.storage.exists(checkpoint_name(trial)):
            self.storage.download(checkpoint_name(trial), self.checkpoint(trial))

    def keep(self, trial: str, config: dict[str, Any]) -> None:
        """Make the checkpoint just written count.

        Before a trial's first one goes the configuration that it is of: a new head, whose copy of the study's database
        may be some seconds older, knows from it what had begun.

        Args:
            config: plain values of the `TrialConfig`.

        Raises:
            StorageError: the storage is away or full.
        """
        if self.storage is None:
            return
        if trial not in self._described:
            self.storage.write(checkpoint_config_name(trial), json.dumps(config).encode())
            self._described.add(trial)
        self.storage.upload(self.checkpoint(trial), checkpoint_name(trial))
        # Never read here again: whoever takes the trial up asks the storage.
        self.checkpoint(trial).unlink()

    def keep_adapter(self, trial: str) -> None:
        """Make an exported adapter count; raises as `keep`."""
        if self.storage is not None:
            self.storage.upload_folder(StudyFolder(self.folder).adapter(trial), adapter_name(trial), last="card.json")

    def close(self) -> None:
        """Leave nothing on the node."""
        if self.storage is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _new_scratch(lane: str) -> Path:
    """An empty folder of this process on this node's disk; what killed workers of the lane have left is removed."""
    root = cache_root() / "lanes"
    for left in root.glob(f"{lane}.*"):
        pid = left.name.rpartition(".")[2]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid)) and int(pid) != os.getpid()):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / f"{lane}.{os.getpid()}"
    folder.mkdir(parents=True)
    return folder
