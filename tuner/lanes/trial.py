"""The Tune trial: a light actor that submits one configuration to the coordinator and passes on its epochs.

It imports no torch (about 200 MB instead of 650), so a hundred of them fit on a head node. With `reuse_actors` Tune
hands the same actor to the next trial through `reset_config`; nothing is leased before the first `step`, because Tune
calls `setup` for actors it then gives to another trial.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from tuner.lanes.capacity import HEAD_NODE
from tuner.lanes.messages import Update

WAIT_SECONDS = 10.0


class TrialClient(tune.Trainable):
    """Config keys: `trial` (id), `config` (`TrialConfig` dump), `coordinator` (actor name), `epochs`."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """No CPU, and on the head. Said here because `tune.with_resources` would hide the class's name from Ray's
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

        A failure is a result, not an exception: Tune would start an exception's trial again, to fail again.
        """
        trial = self._trial
        while True:
            if self._lease is None:
                self._lease = self._ask("submit", trial, self.config["config"])
            update: Update = self._ask("next", trial, self._lease, self._cursor, WAIT_SECONDS)
            if update.kind == "epoch":
                assert update.row is not None
                self._cursor += 1
                final = update.row["epoch"] >= self.config["epochs"]
                return {**update.row, "trial": trial, "final": final, "done": final}
            if update.kind in ("failed", "fatal"):
                return {"trial": trial, update.kind: update.reason, "final": False, "done": True}
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

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Weights live in the lane's checkpoints; a paused trial needs only to know how far it has read."""
        return {"cursor": self._cursor}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Read on from where the paused trial stopped."""
        self._cursor = (checkpoint or {}).get("cursor", 0)

    def _release(self) -> None:
        if self._lease is not None:
            # Not `self.config`: Tune replaces it before it calls `reset_config`.
            self._ask("cancel", self._trial, self._lease)
            self._lease = None

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._coordinator, method).remote(*arguments))
