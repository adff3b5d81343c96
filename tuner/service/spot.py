"""Heeding the notice of a spot machine: asks the cloud's metadata service, and drains this machine's Ray node in time.

A drained node takes no new work; lanes on it save what they have, hand their trials back and start again elsewhere.
Without a notice, or on a cloud that gives none, a node that goes away costs what its lanes have not yet saved.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tuner.errors import ClusterError, ConfigError, Field, StudyError
from tuner.ray_cluster import joined_ray

CloudName = Literal["aws", "gcp"]
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
# AWS asks to look every five seconds; Google Cloud's half minute is worth a closer look.
POLL_SECONDS = {"aws": 5.0, "gcp": 2.0}
# The service is next door: what takes longer has failed, and is asked again at the next look.
ANSWER_SECONDS = 2.0
TOKEN_SECONDS = 21600
GCP_NOTICE_SECONDS = 30


@dataclass(frozen=True)
class Notice:
    """The machine will be taken away in so many seconds."""

    seconds: int


def read_notice(cloud: CloudName, metadata: str) -> Notice | None:
    """Ask the metadata service whether this machine is being taken back.

    Args:
        metadata: address of the service, without a path.

    Raises:
        OSError: the service does not answer, or answers with an error.
    """
    return _aws_notice(metadata) if cloud == "aws" else _gcp_notice(metadata)


def _aws_notice(metadata: str) -> Notice | None:
    """EC2's instance metadata service, version 2: a session token first, then the action, 404 while there is none."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = _ask("PUT", f"{metadata}/latest/api/token", lifetime)
    try:
        answer = _ask("GET", f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return None
        raise
    action = json.loads(answer)
    # "hibernate" and "stop" take the machine away as "terminate" does.
    left = datetime.fromisoformat(action["time"]) - datetime.now(UTC)
    return Notice(max(0, int(left.total_seconds())))


def _gcp_notice(metadata: str) -> Notice | None:
    answer = _ask("GET", f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return Notice(GCP_NOTICE_SECONDS) if answer.strip() == "TRUE" else None


def _ask(method: str, url: str, headers: dict[str, str]) -> str:
    # Not through a proxy of the environment: the service is on the machine's own link.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method=method, headers=headers), timeout=ANSWER_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def drain_node(address: str, node: str | None, notice: Notice) -> None:
    """Report to the cluster that a node goes away; Ray removes it at the notice's end.

    Args:
        address: `host:port` of the head, or `auto`.
        node: its id; None for this machine's.

    Raises:
        StudyError: the cluster refuses.
        ClusterError: it does not answer.
    """
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", address]
    command += ["--node-id", node or own_node(address), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "notice of the cloud", "--deadline-remaining-seconds", str(notice.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise StudyError(
            Field("address"), f" {address}: the node cannot be drained ({said[-1] if said else 'no reason given'})"
        )


def own_node(address: str) -> str:
    """The id of this machine's node.

    Raises:
        ClusterError: no node of the cluster runs here.
    """
    import ray

    with joined_ray(address, log_to_driver=False, logging_level=logging.ERROR):
        node: str = ray.get_runtime_context().get_node_id()
        return node


def watch(cloud: CloudName, metadata: str, drain: Callable[[Notice], None], say: Callable[[str], None]) -> None:
    """Look every few seconds until there is a notice, and drain the node once.

    A service that does not answer is asked again: said once, since a machine without one is a mistake of whoever
    started this.
    """
    silent = False
    while True:
        try:
            notice = read_notice(cloud, metadata)
        except (OSError, ValueError, KeyError) as error:
            if not silent:
                say(f"{metadata}: no answer that means anything ({error}); asking on")
            silent, notice = True, None
        if notice is not None:
            say(f"this machine is taken away in {notice.seconds} s; draining its node")
            try:
                drain(notice)
                return
            except (StudyError, ClusterError) as error:
                say(str(error))
        time.sleep(POLL_SECONDS[cloud])


def cloud_named(name: str) -> CloudName:
    """The cloud of this name.

    Raises:
        ConfigError: there is none.
    """
    clouds: tuple[CloudName, ...] = ("aws", "gcp")
    for known in clouds:
        if name == known:
            return known
    raise ConfigError(Field("cloud"), f" {name}: give aws or gcp; on others, drain the node by `ray drain-node`")
