"""What can be wrong with a file of Ray's cluster launcher (`ray up FILE`): AWS, Google Cloud, machines by ssh."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.service.cluster_files.mistakes import (
    LOOPBACK,
    Mistake,
    image_mistake,
    locked_ray,
    placeholder_mistakes,
    schema_mistakes,
)

Values = Mapping[str, Any]

# Families whose machines have GPUs even if the file gives no resources.
GPU_MACHINES = re.compile(r"^(p\d|g\d|a\d+-|a\d[a-z]*\.|gr\d)")
WORLD = ("0.0.0.0/0", "::/0")
SSH_PORT = 22
RAY_REQUIREMENT = re.compile(r"^ray(\[[\w,-]*\])?(?P<pin>[=<>~!@].*)?$")
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def launcher_mistakes(values: Values) -> list[Mistake]:
    """Everything wrong with a launcher file: what Ray's own schema refuses, then what would be costly or unsafe."""
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    local = _is_local(values)
    if local:
        # Ray makes node types of the listed machines itself and moves this key into them before it asks its schema.
        schema["properties"]["min_workers"] = {"type": "integer", "minimum": 0}
    mistakes = schema_mistakes(values, schema)
    if any("no such key" not in mistake.sentence for mistake in mistakes):
        return mistakes
    mistakes += placeholder_mistakes(values)
    mistakes += _local_mistakes(values) if local else _node_type_mistakes(values)
    filled = {**_defaults(values), **values}
    for check in (_pin_mistakes, _dashboard_mistakes, _token_mistakes):
        mistakes += check(filled)
    return mistakes


def _is_local(values: Values) -> bool:
    provider = values.get("provider")
    return isinstance(provider, Mapping) and provider.get("type") == "local"


def _defaults(values: Values) -> dict[str, Any]:
    """Ray's defaults for keys that the file omits."""
    from ray.autoscaler._private.providers import _get_default_config

    try:
        defaults: dict[str, Any] = _get_default_config(values["provider"])  # type: ignore[no-untyped-call]
    except (ImportError, NotImplementedError):
        # A provider of the user's own has none.
        return {}
    return defaults


def _local_mistakes(values: Values) -> Iterator[Mistake]:
    provider = values["provider"]
    for key in ("head_ip", "worker_ips"):
        if key not in provider and "coordinator_address" not in provider:
            yield Mistake(f"provider.{key}", "is missing; name the machines (worker_ips may be an empty list)")
    for key in ("available_node_types", "head_node_type"):
        if key in values:
            yield Mistake(key, "is not for a local provider; list the machines under provider instead")


def _node_type_mistakes(values: Values) -> Iterator[Mistake]:
    types = values.get("available_node_types")
    head = values.get("head_node_type")
    if not types or head not in types:
        names = ", ".join(types or {}) or "none"
        yield Mistake("head_node_type", f"must name one of available_node_types ({names})")
        return
    for name, node_type in types.items():
        where = f"available_node_types.{name}"
        if name == head:
            if _is_spot(node_type["node_config"]):
                yield Mistake(where, "the head is a spot machine; it holds the study and the drivers, take on-demand")
            if _has_gpu(node_type):
                yield Mistake(where, "the head has a GPU that would idle between searches; give GPUs to workers alone")
        elif node_type.get("min_workers", 0) > 0:
            yield Mistake(f"{where}.min_workers", f"{node_type['min_workers']} machines are paid for idle; write 0")


def _is_spot(config: Values) -> bool:
    market = config.get("InstanceMarketOptions") or {}
    scheduling = config.get("scheduling") or {}
    # Ray's own examples for Google Cloud write a list of one mapping.
    parts = scheduling if isinstance(scheduling, list) else [scheduling]
    return market.get("MarketType") == "spot" or any(
        part.get("preemptible") is True or part.get("provisioningModel") == "SPOT" for part in parts
    )


def _has_gpu(node_type: Values) -> bool:
    config = node_type["node_config"]
    machine = str(config.get("InstanceType") or config.get("machineType") or "")
    accelerated = bool(config.get("guestAccelerators") or GPU_MACHINES.match(machine))
    return accelerated or node_type["resources"].get("GPU", 0) > 0


def _pin_mistakes(values: Values) -> Iterator[Mistake]:
    """Ray must be the lock's everywhere, by container image or by what the setup installs."""
    images = list(_images(values))
    for where, image in images:
        if mistake := image_mistake(where, image):
            yield mistake
    pinned = bool(images)
    for where, command in _commands(values, COMMANDS):
        pinned |= "requirements.lock" in command or re.search(r"\bmake\b.*\binstall\b", command) is not None
        for requirement in _ray_requirements(command):
            pinned = True
            if requirement != locked_ray():
                said = f"installs Ray {requirement}" if requirement else "installs the newest Ray"
                yield Mistake(where, f"{said}, but the lock has {locked_ray()}; install requirements.lock")
    if not pinned:
        yield Mistake("setup_commands", "nothing here pins Ray; install the lock with `make -C ~/tuner install`")


def _images(values: Values) -> Iterator[tuple[str, str]]:
    holders = {"docker": values.get("docker") or {}}
    for name, node_type in (values.get("available_node_types") or {}).items():
        holders[f"available_node_types.{name}.docker"] = node_type.get("docker") or {}
    for where, docker in holders.items():
        for key in ("image", "head_image", "worker_image"):
            if docker.get(key):
                yield f"{where}.{key}", docker[key]


def _ray_requirements(command: str) -> Iterator[str]:
    """Versions of Ray that a shell command installs with pip; empty for one that is not exact."""
    if "install" not in command:
        return
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    for word in words:
        if match := RAY_REQUIREMENT.match(word.rstrip(";")):
            pin = match["pin"] or ""
            yield pin.removeprefix("==") if pin.startswith("==") and "*" not in pin else ""


def _commands(values: Values, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key in keys:
        for index, command in enumerate(values.get(key) or []):
            yield f"{key}.{index}", command


def _dashboard_mistakes(values: Values) -> Iterator[Mistake]:
    """Whoever reaches the dashboard's port can run programs; it is for the head's loopback and a tunnel."""
    for where, command in _commands(values, STARTS[:1]):
        for host in re.findall(r"--dashboard-host[= ]+(\S+)", command):
            if host not in LOOPBACK:
                yield Mistake(
                    where, f"the dashboard answers on {host}; write --dashboard-host=127.0.0.1 and use `ray dashboard`"
                )
    group = values["provider"].get("security_group") or {}
    for index, rule in enumerate(group.get("IpPermissions") or []):
        ranges = [
            item.get("CidrIp") or item.get("CidrIpv6")
            for item in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
        ]
        ports = (rule.get("FromPort", -1), rule.get("ToPort", -1))
        if any(net in WORLD for net in ranges) and ports != (SSH_PORT, SSH_PORT):
            yield Mistake(
                f"provider.security_group.IpPermissions.{index}",
                f"opens ports {ports[0]} to {ports[1]} to the world; open {SSH_PORT} alone and tunnel the rest",
            )


def _token_mistakes(values: Values) -> Iterator[Mistake]:
    """Without a token, everyone on the nodes' network can run programs there."""
    setup = " ".join(command for _, command in _commands(values, COMMANDS))
    by_shell = re.search(r"export [^;&|]*RAY_AUTH_MODE=token", setup) is not None
    for where, command in _commands(values, STARTS):
        if "ray start" not in command:
            continue
        if "RAY_AUTH_MODE=" in command and "RAY_AUTH_MODE=token" not in command:
            yield Mistake(where, "token authentication is switched off; write RAY_AUTH_MODE=token before `ray start`")
        elif "RAY_AUTH_MODE=token" not in command and not by_shell:
            yield Mistake(where, "token authentication is missing; write RAY_AUTH_MODE=token before `ray start`")
    for where, command in _commands(values, (*COMMANDS, *STARTS)):
        if re.search(r"RAY_AUTH_TOKEN=[^\s$]", command):
            yield Mistake(where, "holds the token itself; mount it with file_mounts: {~/.ray/auth_token: ...}")
    if not any(str(path).endswith(".ray/auth_token") for path in values.get("file_mounts") or {}):
        yield Mistake(
            "file_mounts",
            "no token reaches the nodes; mount ~/.ray/auth_token, made by `ray get-auth-token --generate`",
        )
