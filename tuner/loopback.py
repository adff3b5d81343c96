"""Ray for this machine alone: embedded in this process, with all its servers on loopback.

Ray runs what it is sent, so whoever reaches one of its ports runs programs as its user.
"""

from __future__ import annotations

import ipaddress
import os
from typing import Any

import psutil


def start_ray(**options: Any) -> Any:
    """Start Ray inside this process and return its context; `options` are those of `ray.init`.

    Never joins a cluster, whatever RAY_ADDRESS says or runs on this machine.
    """
    import ray
    from ray._private import ray_constants

    # Ray's servers listen on all interfaces, unless the node's address is 127.0.0.1. `_node_ip_address` cannot say so:
    # Ray replaces loopback there by the machine's own address, except on systems where it makes no clusters.
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    # Processes of the dashboard connect to the cluster as we do, and would look for it at the machine's address too.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        return ray.init("local", **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own, which no other can reach."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IP address, such as `lo`; None where none has it."""
    for name, owned in psutil.net_if_addrs().items():
        if any(item.address == address for item in owned):
            return name
    return None
