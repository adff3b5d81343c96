"""The Tune trial: a light actor that submits one configuration to the coordinator and passes on its epochs.

It imports no torch (about 200 MB instead of 650), so a hundred of them fit on a head node. With `reuse_actors` Tune
hands the same actor to the next trial through `reset_config`; nothing is leased before the first `step`, because Tune
calls `setup` for actors it then gives to another trial.

What becomes of a trial at a rung is Tune's scheduler's to say, and the coordinator hears it by the next call from here:
`step` asks for the next epoch, so the trial goes on; `reset_config` and `cleanup` give a stopped trial's lease back;
`save_checkpoint`, which Tune calls for nothing but a pause, gives back that of a paused one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tuner.config import TrialConfig
from tuner.lanes.capacity import HEAD_NODE
from tuner.lanes.messages import Update

WAIT_SECONDS = 10.0
CURSOR_FILE = "cursor.json"


class TrialClient(tune.Trainable):
    """Config keys: `trial` (id), `config` (`TrialConfig` dump), `coordinator` (actor name), `epochs`."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """No CPU, and on the head. Given here because `tune.with_resources` would hide the class's name from Ray's
        dashboard behind one of its own."""
        return tune.PlacementGroupFactory([{"CPU": 0, **HEAD_NODE}])

    def setup(self, config: dict[str, Any]) -> None:
        """Forget any lease; the first `step` asks for one."""
        self._trial = str(config["trial"])
        self._lease: int | None = None
        self._cursor = 0
        self._coordinator = ray.get_actor(config["coordinator"])

    def __repr__(self) -> str:
        """How Ray's dashboard shows the actor; not by its trial, which changes while the actor stays."""
        return str(self.config["coordinator"]).replace("tuner-coordinator:", "tuner-trial-client:")

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch and return its row, or `failed` with the reason when the lane gave the trial up.

        A failure is a result, not an exception: Tune would start an exception's trial again, to fail again. Of an epoch
        with later ones behind it, `decided` is true: the trial went on after it, before its study was resumed.
        """
        update = self._next_epoch()
        if update.row is None:
            self._release()
            return {"trial": self._trial, update.kind: update.reason, "final": False, "done": True}
        self._cursor += 1
        final = self._cursor >= self.config["epochs"]
        if final:
            # At once: until Tune gives this actor to another trial, the place in the lane would be nobody's.
            self._release()
        return {**update.row, "trial": self._trial, "decided": update.later > 0, "final": final, "done": final}

    def _next_epoch(self) -> Update:
        """Wait for the next epoch, or for the end of the trial."""
        while True:
            if self._lease is None:
                self._lease = self._ask("submit", self._trial, TrialConfig.model_validate(self.config["config"]))
            update: Update = self._ask("next", self._trial, self._lease, self._cursor, WAIT_SECONDS)
            if update.kind in ("epoch", "failed", "fatal"):
                return update
            if update.kind == "unknown":
                self._lease = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self._release()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Give the adapter's place in its lane free."""
        self._release()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The trial is paused: its place in the lane goes to another one.

        Weights live in the lane's checkpoints; this only remembers how far the trial has read.
        """
        Path(checkpoint_dir, CURSOR_FILE).write_text(json.dumps(self._cursor), encoding="utf-8")
        self._release()

    def load_checkpoint(self, checkpoint: dict[str, Any] | str | None) -> None:
        """Read on from where the paused trial stopped."""
        self._cursor = int(json.loads(Path(str(checkpoint), CURSOR_FILE).read_text(encoding="utf-8")))

    def _release(self) -> None:
        if self._lease is not None:
            # Not `self.config`: Tune replaces it before it calls `reset_config`.
            self._ask("cancel", self._trial, self._lease)
            self._lease = None

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._coordinator, method).remote(*arguments))
