"""The shipped cluster files against the schemas of those who read them, and `tuner cluster check` against mistakes."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tuner import cli
from tuner.errors import ConfigError
from tuner.service.cluster_files.check import check_cluster_file
from tuner.service.cluster_files.mistakes import Mistake, locked_ray

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = ("cluster.yaml", "cluster/gcp.yaml", "cluster/local.yaml")
KUBERAY = "cluster/kuberay.yaml"
Values = dict[str, Any]
Spoil = Callable[[Values], object]


def read(name: str) -> list[Values]:
    return list(yaml.safe_load_all((REPOSITORY / name).read_text()))


def filled(name: str) -> list[Values]:
    """A shipped file after its user has replaced what there is to replace."""
    text = (REPOSITORY / name).read_text()
    body = "\n".join(line.partition(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert "REPLACE" in body, f"{name} has nothing left to its user: then this test is not about it"
    documents: list[Values] = list(yaml.safe_load_all(body.replace("REPLACE", "mine")))
    return documents


def check(folder: Path, documents: list[Values]) -> list[Mistake]:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return check_cluster_file(path)


def checked(folder: Path, name: str, spoil: Spoil) -> list[str]:
    """Mistakes of a shipped file, filled in, after `spoil` has changed its documents of Ray's."""
    documents = copy.deepcopy(filled(name))
    for document in documents:
        if document.get("kind") not in ("PersistentVolumeClaim", "RayJob"):
            spoil(document)
    return [str(mistake) for mistake in check(folder, documents)]


# What reads the files


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_launcher_files(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """As they are, and filled in: with the very calls of `ray up`."""
    for documents in (read(name), filled(name)):
        (values,) = documents
        validate_config(prepare_config(values))
        with pytest.raises(Exception, match="Additional properties"):
            validate_config(prepare_config({**values, "cluster_nmae": "x"}))


def test_kubernetes_accepts_pods_and_claims() -> None:
    """Against Kubernetes' own schemas, strictly: an unknown field is an error."""
    documents = {document["kind"]: document for document in read(KUBERAY)}
    kubernetes_validate.validate(documents["PersistentVolumeClaim"], "1.33", strict=True)
    spec = documents["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
        broken = copy.deepcopy(pod)
        broken["spec"]["containers"][0]["volumeMonts"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, "1.33", strict=True)


@pytest.mark.parametrize("name", [*LAUNCHER, KUBERAY])
def test_the_shipped_files_miss_nothing_but_what_their_user_knows(name: str, tmp_path: Path) -> None:
    asked = [str(mistake) for mistake in check_cluster_file(REPOSITORY / name)]
    assert asked
    assert all("still says REPLACE" in sentence for sentence in asked), asked
    assert check(tmp_path, filled(name)) == []


@pytest.mark.parametrize("name", [*LAUNCHER[:2], KUBERAY])
def test_the_promises_of_the_shape_hold(name: str) -> None:
    """Told from the files, not by the checker: head without GPU or spot, GPU workers from zero, at most one of each."""
    if name == KUBERAY:
        spec = next(d["spec"] for d in read(name) if d["kind"] == "RayCluster")
        assert "nvidia.com/gpu" not in yaml.safe_dump(spec["headGroupSpec"])
        assert [(g["minReplicas"], g["replicas"]) for g in spec["workerGroupSpecs"]] == [(0, 0)]
        assert "nvidia.com/gpu: '1'" in yaml.safe_dump(spec["workerGroupSpecs"])
        assert spec["authOptions"] == {"mode": "token"}
        return
    (values,) = read(name)
    types = values["available_node_types"]
    head = yaml.safe_dump(types.pop(values["head_node_type"])).lower()
    assert "spot" not in head
    assert "gpu: 0" in head
    assert {key: node["min_workers"] for key, node in types.items()} == dict.fromkeys(types, 0)
    assert all(node["resources"]["GPU"] == 1 for node in types.values())
    spot = [key for key, node in types.items() if "spot" in yaml.safe_dump(node["node_config"]).lower()]
    assert spot == ["gpu_spot"]
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]


def test_everything_that_is_pinned_is_pinned_to_the_lock() -> None:
    """The Ray of this environment is the lock's, and image, tag and base image say the same."""
    lock = (REPOSITORY / "requirements.lock").read_text()
    (version,) = re.findall(r"^ray==(\S+)", lock, flags=re.MULTILINE)
    assert locked_ray() == version
    assert f"FROM rayproject/ray:{version}-py311" in (REPOSITORY / "cluster/Dockerfile").read_text()
    assert set(re.findall(r"ray(\d+\.\d+\.\d+)", (REPOSITORY / KUBERAY).read_text())) == {version}


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_mounted_files_are_there_and_suffice_for_make_install(name: str) -> None:
    (values,) = read(name)
    mounted = {remote: local for remote, local in values["file_mounts"].items() if remote.startswith("~/tuner/")}
    assert all((REPOSITORY / local).exists() for local in mounted.values())
    assert {remote.removeprefix("~/tuner/") for remote in mounted} == set(mounted.values())
    (rule,) = re.findall(r"^\$\(INSTALLED\):(.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    project = (REPOSITORY / "pyproject.toml").read_text()
    needed = {*rule.split(), *re.findall(r'readme = "(.*)"', project), "Makefile", "tuner", "search_spaces"}
    assert needed == set(mounted.values())


# Mistakes in files for `ray up`


def head_of(values: Values) -> Values:
    head: Values = values["available_node_types"][values["head_node_type"]]
    return head


def spoil_commands(key: str, old: str, new: str) -> Spoil:
    def spoil(values: Values) -> None:
        assert any(old in command for command in values[key])
        values[key] = [command.replace(old, new) for command in values[key]]

    return spoil


def open_port(values: Values) -> None:
    rule = {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    ssh = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    values["provider"]["security_group"] = {"GroupName": "mine", "IpPermissions": [ssh, rule]}


START = "head_start_ray_commands"
AWS_MISTAKES: dict[str, tuple[Spoil, str]] = {
    "unknown key": (lambda v: v.update(idle_timeout_minuts=5), "idle_timeout_minuts: no such key; did you mean idle"),
    "unknown key of a node type": (
        lambda v: v["available_node_types"]["gpu_spot"].update(min_wokers=0),
        "available_node_types.gpu_spot.min_wokers: no such key; did you mean min_workers?",
    ),
    "unknown key of the docker part": (lambda v: v.update(docker={"imag": "x"}), "docker.imag: no such key; did you"),
    "wrong type": (lambda v: v.update(max_workers="eight"), "max_workers: 'eight' is not of type 'integer'"),
    "no name": (lambda v: v.pop("cluster_name"), "cluster_name: is missing"),
    "no head": (lambda v: v.update(head_node_type="haed"), "head_node_type: must name one of available_node_types"),
    "spot head": (
        lambda v: head_of(v)["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
        "available_node_types.head: the head is a spot machine",
    ),
    "declared GPU on the head": (
        lambda v: head_of(v)["resources"].update(GPU=1),
        "available_node_types.head: the head has a GPU",
    ),
    "GPU machine as head": (
        lambda v: head_of(v)["node_config"].update(InstanceType="g6.xlarge"),
        "available_node_types.head: the head has a GPU",
    ),
    "workers that stay": (
        lambda v: v["available_node_types"]["gpu_spot"].update(min_workers=2),
        "available_node_types.gpu_spot.min_workers: 2 machines are paid for idle; write 0",
    ),
    "unpinned image": (
        lambda v: v.update(docker={"image": "rayproject/ray:latest-gpu", "container_name": "ray"}),
        "docker.image: rayproject/ray:latest-gpu does not pin Ray; use a tag that holds",
    ),
    "image without a tag": (
        lambda v: v.update(docker={"image": "rayproject/ray", "container_name": "ray"}),
        "docker.image: rayproject/ray does not pin Ray",
    ),
    "image of another Ray": (
        lambda v: v.update(docker={"image": "rayproject/ray:2.9.0-py311", "container_name": "ray"}),
        f"docker.image: the tag of rayproject/ray:2.9.0-py311 is not that of Ray {locked_ray()}",
    ),
    "unpinned Ray": (
        spoil_commands("setup_commands", "make -C ~/tuner install", "pip install -U 'ray[default,tune]'"),
        "setup_commands.1: installs the newest Ray",
    ),
    "loosely pinned Ray": (
        spoil_commands("setup_commands", "make -C ~/tuner install", "pip install ray[default]==2.60.*"),
        "setup_commands.1: installs the newest Ray",
    ),
    "another Ray": (
        spoil_commands("setup_commands", "make -C ~/tuner install", "pip install ray==2.9.0; true"),
        f"setup_commands.1: installs Ray 2.9.0, but the lock has {locked_ray()}",
    ),
    "no Ray": (
        spoil_commands("setup_commands", "make -C ~/tuner install", "true"),
        "setup_commands: nothing here pins Ray",
    ),
    "open dashboard": (
        spoil_commands(START, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        f"{START}.1: the dashboard answers on 0.0.0.0",
    ),
    "Ray's own start commands": (lambda v: v.pop(START), f"{START}.1: the dashboard answers on 0.0.0.0"),
    "open port": (open_port, "provider.security_group.IpPermissions.1: opens ports 8265 to 8265 to the world"),
    "no token mode on the head": (
        spoil_commands(START, "RAY_AUTH_MODE=token ", ""),
        f"{START}.1: token authentication is missing",
    ),
    "token mode off": (
        spoil_commands("worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "worker_start_ray_commands.1: token authentication is switched off",
    ),
    "no token": (lambda v: v["file_mounts"].pop("~/.ray/auth_token"), "file_mounts: no token reaches the nodes"),
    "token in the file": (
        spoil_commands(START, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=c0ffee"),
        f"{START}.1: holds the token itself",
    ),
}


def drop_shell_token(values: Values) -> None:
    """The export in ~/.bashrc would make up for what a start command lacks."""
    values["setup_commands"] = [command.replace("RAY_AUTH_MODE=token", "") for command in values["setup_commands"]]


@pytest.mark.parametrize("name", AWS_MISTAKES)
def test_each_mistake_of_a_launcher_file_is_explained_once(name: str, tmp_path: Path) -> None:
    spoil, said = AWS_MISTAKES[name]

    def spoil_all(values: Values) -> None:
        spoil(values)
        if "token mode" in name:
            drop_shell_token(values)

    mistakes = checked(tmp_path, "cluster.yaml", spoil_all)
    explained = [mistake for mistake in mistakes if mistake.startswith(said)]
    assert len(explained) == 1, mistakes
    assert mistakes == explained


@pytest.mark.parametrize(
    "scheduling", [{"provisioningModel": "SPOT"}, {"preemptible": True}, [{"preemptible": True}]], ids=str
)
def test_a_spot_head_is_seen_on_google_cloud(scheduling: object, tmp_path: Path) -> None:
    mistakes = checked(tmp_path, "cluster/gcp.yaml", lambda v: head_of(v)["node_config"].update(scheduling=scheduling))
    assert mistakes == [m for m in mistakes if "the head is a spot machine" in m] != []


@pytest.mark.parametrize(
    "config", [{"machineType": "g2-standard-4"}, {"machineType": "a3-highgpu-1g"}, {"guestAccelerators": [{}]}], ids=str
)
def test_a_head_with_a_gpu_is_seen_on_google_cloud(config: Values, tmp_path: Path) -> None:
    mistakes = checked(tmp_path, "cluster/gcp.yaml", lambda v: head_of(v)["node_config"].update(config))
    assert [m.partition(": ")[2][:20] for m in mistakes] == ["the head has a GPU t"]


def test_own_machines_have_no_node_types(tmp_path: Path) -> None:
    def spoil(values: Values) -> None:
        del values["provider"]["head_ip"]
        values |= {"head_node_type": "head", "min_workers": 1}

    mistakes = checked(tmp_path, "cluster/local.yaml", spoil)
    assert [m.partition(":")[0] for m in mistakes] == ["provider.head_ip", "head_node_type"]


# Mistakes in files for KubeRay


def head_container(values: Values) -> Values:
    container: Values = values["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return container


def head_pod(values: Values) -> Values:
    pod: Values = values["spec"]["headGroupSpec"]["template"]["spec"]
    return pod


KUBERAY_MISTAKES: dict[str, tuple[Spoil, str]] = {
    "unknown key": (
        lambda v: v["spec"].update(rayVersoin="2"),
        "spec.rayVersoin: no such key; did you mean rayVersion?",
    ),
    "unknown key of a group": (
        lambda v: v["spec"]["workerGroupSpecs"][0].update(minReplica=0),
        "spec.workerGroupSpecs.0.minReplica: no such key; did you mean minReplicas?",
    ),
    "old API": (lambda v: v.update(apiVersion="ray.io/v1alpha1"), "apiVersion: 'ray.io/v1alpha1' is not one of"),
    "number for text": (
        lambda v: v["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "spec.headGroupSpec.rayStartParams.num-cpus: 0 is not of type 'string'",
    ),
    "another Ray": (lambda v: v["spec"].update(rayVersion="2.9.0"), "spec.rayVersion: 2.9.0 is not the"),
    "another image": (
        lambda v: head_container(v).update(image="mine/tuner:0.1.0"),
        "spec.headGroupSpec.template.spec.containers.0.image: the tag of mine/tuner:0.1.0 is not that of Ray",
    ),
    "no token": (lambda v: v["spec"].pop("authOptions"), "spec.authOptions: token authentication is missing"),
    "no autoscaler": (
        lambda v: v["spec"].update(enableInTreeAutoscaling=False),
        "spec.enableInTreeAutoscaling: workers would never come or go",
    ),
    "workers that stay": (
        lambda v: v["spec"]["workerGroupSpecs"][0].update(minReplicas=1),
        "spec.workerGroupSpecs.0.minReplicas: 1 workers of gpu are paid for idle; write 0",
    ),
    "load balancer": (
        lambda v: v["spec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
        "spec.headGroupSpec.serviceType: LoadBalancer opens the dashboard to the world",
    ),
    "ingress": (
        lambda v: v["spec"]["headGroupSpec"].update(enableIngress=True),
        "spec.headGroupSpec.enableIngress: an ingress opens the dashboard to the world",
    ),
    "GPU on the head": (
        lambda v: head_container(v)["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
        "spec.headGroupSpec.template: the head has a GPU",
    ),
    "spot head": (
        lambda v: head_pod(v).update(nodeSelector={"cloud.google.com/gke-spot": "true"}),
        "spec.headGroupSpec.template: the head may land on a spot node",
    ),
    "head that tolerates spot": (
        lambda v: head_pod(v).update(tolerations=[{"key": "karpenter.sh/capacity-type", "operator": "Exists"}]),
        "spec.headGroupSpec.template: the head may land on a spot node",
    ),
}


@pytest.mark.parametrize("name", KUBERAY_MISTAKES)
def test_each_mistake_of_a_kuberay_file_is_explained_alone(name: str, tmp_path: Path) -> None:
    spoil, said = KUBERAY_MISTAKES[name]
    mistakes = checked(tmp_path, KUBERAY, spoil)
    assert len(mistakes) == 1, mistakes
    assert mistakes[0].startswith(f"RayCluster.{said}"), mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clusterSelector": {"ray.io/cluster": "tunr"}}, "spec.clusterSelector: there is no RayCluster tunr"),
        ({"clusterSelector": {}}, "spec.clusterSelector: names no cluster"),
        ({"backoffLimit": 2}, "spec.backoffLimit: the operator refuses it"),
        ({"entripoint": "x"}, "spec.entripoint: no such key; did you mean entrypoint?"),
        ({"metadata": {"trials": 3}}, "spec.metadata.trials: 3 is not of type 'string'"),
    ],
)
def test_mistakes_of_a_job(changes: Values, said: str, tmp_path: Path) -> None:
    documents = filled(KUBERAY)
    next(document for document in documents if document["kind"] == "RayJob")["spec"].update(changes)
    mistakes = [str(mistake) for mistake in check(tmp_path, documents)]
    assert len(mistakes) == 1, mistakes
    assert mistakes[0].startswith(f"RayJob.{said}"), mistakes


# The command


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", "cluster", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_lists_mistakes_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", REPOSITORY / "cluster.yaml"], monkeypatch) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{REPOSITORY / 'cluster.yaml'}: ") for line in lines)
    assert (
        printed.err
        == f"tuner: {REPOSITORY / 'cluster.yaml'}: 3 mistakes, listed above; fix the file and check it again\n"
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump_all(filled("cluster.yaml")))
    assert run(["check", tmp_path / "mine.yaml"], monkeypatch) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine.yaml'}: no mistakes found, for Ray {locked_ray()}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a cluster file"),
        ("- a\n- b\n", "is not a cluster file"),
        ("a: 1\n", "is neither a file for `ray up` nor a RayCluster or RayJob"),
        ("cluster_name: x\ncluster_name: y\n", "'cluster_name' is written twice"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_cluster_file_is_refused_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        check_cluster_file(tmp_path / "x.yaml")
    assert str(raised.value).startswith(str(tmp_path / "x.yaml"))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read"):
        check_cluster_file(tmp_path / "no.yaml")
