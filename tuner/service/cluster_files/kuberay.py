"""What can be wrong with RayCluster and RayJob objects for the KubeRay operator.

No package has KubeRay's schema, so the fields below are those of its API reference (ray.io/v1, operator 1.6), written
down here; pod templates are Kubernetes' own and are checked as far as Ray reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tuner.service.cluster_files.mistakes import (
    Mistake,
    image_mistake,
    locked_ray,
    placeholder_mistakes,
    schema_mistakes,
)

Values = Mapping[str, Any]

KINDS = ("RayCluster", "RayJob")
SPOT_KEYS = ("cloud.google.com/gke-spot", "karpenter.sh/capacity-type", "eks.amazonaws.com/capacityType")
OPEN_SERVICES = ("LoadBalancer", "NodePort")
CLUSTER_LABEL = "ray.io/cluster"

TEXT, WHOLE, SWITCH, ANY_OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
# `additionalProperties: {}` would not do: these map names to texts, and an unquoted number is the usual mistake.
TEXTS = {"type": "object", "additionalProperties": TEXT}
COUNT = {"type": "integer", "minimum": 0}


def _object(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": fields}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


CONTAINER = {"type": "object", "required": ["name", "image"], "properties": {"name": TEXT, "image": TEXT}}
POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {"containers": {"type": "array", "minItems": 1, "items": CONTAINER}},
        }
    },
}
HEAD_GROUP = _object(
    ("template",),
    template=POD,
    rayStartParams=TEXTS,
    serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=SWITCH,
    headService=ANY_OBJECT,
    labels=TEXTS,
    resources=ANY_OBJECT,
)
WORKER_GROUP = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    idleTimeoutSeconds=COUNT,
    suspend=SWITCH,
    rayStartParams=TEXTS,
    scaleStrategy=ANY_OBJECT,
    template=POD,
    labels=TEXTS,
    resources=ANY_OBJECT,
)
AUTOSCALER = _object(
    version=_one_of("v1", "v2"),
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    image=TEXT,
    imagePullPolicy=_one_of("Always", "Never", "IfNotPresent"),
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
    resources=ANY_OBJECT,
    securityContext=ANY_OBJECT,
)
CLUSTER_SPEC = _object(
    ("headGroupSpec", "rayVersion"),
    rayVersion=TEXT,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=AUTOSCALER,
    authOptions=_object(mode=_one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=SWITCH),
    gcsFaultToleranceOptions=ANY_OBJECT,
    headServiceAnnotations=TEXTS,
    upgradeStrategy=ANY_OBJECT,
    managedBy=TEXT,
    suspend=SWITCH,
)
JOB_SPEC = _object(
    ("entrypoint",),
    entrypoint=TEXT,
    clusterSelector=TEXTS,
    rayClusterSpec=CLUSTER_SPEC,
    metadata=TEXTS,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterPodTemplate=POD,
    submitterConfig=_object(backoffLimit=COUNT),
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    entrypointResources=TEXT,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=WHOLE,
    preRunningDeadlineSeconds=WHOLE,
    backoffLimit=COUNT,
    deletionStrategy=ANY_OBJECT,
    managedBy=TEXT,
    suspend=SWITCH,
)
METADATA = {"type": "object", "required": ["name"], "properties": {"name": TEXT, "labels": TEXTS}}
SCHEMAS = {
    kind: _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=_one_of("ray.io/v1"),
        kind=_one_of(kind),
        metadata=METADATA,
        spec=spec,
    )
    for kind, spec in (("RayCluster", CLUSTER_SPEC), ("RayJob", JOB_SPEC))
}


def kuberay_mistakes(documents: list[Values]) -> list[Mistake]:
    """Everything wrong with the Ray objects among Kubernetes documents; of others, only what was left to fill in."""
    mistakes: list[Mistake] = []
    clusters = {document["metadata"]["name"] for document in documents if _named_cluster(document)}
    for document in documents:
        kind = document.get("kind")
        found = schema_mistakes(document, SCHEMAS[kind]) if kind in SCHEMAS else []
        unsound = any("no such key" not in mistake.sentence for mistake in found)
        found += placeholder_mistakes(document)
        if not unsound and kind == "RayCluster":
            found += _cluster_mistakes("spec", document["spec"])
        elif not unsound and kind == "RayJob":
            found += _job_mistakes(document["spec"], clusters)
        mistakes += [Mistake(f"{kind}.{where}" if where else str(kind), sentence) for where, sentence in found]
    return mistakes


def _named_cluster(document: Values) -> bool:
    return document.get("kind") == "RayCluster" and "name" in (document.get("metadata") or {})


def _cluster_mistakes(where: str, spec: Values) -> Iterator[Mistake]:
    head, ray = spec["headGroupSpec"], locked_ray()
    if spec["rayVersion"] != ray:
        yield Mistake(f"{where}.rayVersion", f"{spec['rayVersion']} is not the {ray} of the lock; write {ray!r}")
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield Mistake(f"{where}.authOptions", "token authentication is missing; write authOptions: {mode: token}")
    if spec.get("enableInTreeAutoscaling") is not True:
        yield Mistake(f"{where}.enableInTreeAutoscaling", "workers would never come or go; write true")
    yield from _head_mistakes(f"{where}.headGroupSpec", head)
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        place = f"{where}.workerGroupSpecs.{index}"
        for key in ("minReplicas", "replicas"):
            if group.get(key, 0) > 0:
                yield Mistake(
                    f"{place}.{key}", f"{group[key]} workers of {group['groupName']} are paid for idle; write 0"
                )
        yield from _image_mistakes(place, group["template"])


def _head_mistakes(where: str, head: Values) -> Iterator[Mistake]:
    pod = head["template"]["spec"]
    if head.get("serviceType") in OPEN_SERVICES:
        yield Mistake(
            f"{where}.serviceType",
            f"{head['serviceType']} opens the dashboard to the world; write ClusterIP and use `kubectl port-forward`",
        )
    if head.get("enableIngress") is True:
        yield Mistake(f"{where}.enableIngress", "an ingress opens the dashboard to the world; drop it")
    if any(_gpus(container) for container in pod["containers"]):
        yield Mistake(
            f"{where}.template", "the head has a GPU that would idle between searches; give GPUs to workers alone"
        )
    tolerated = {item.get("key") for item in pod.get("tolerations") or []}
    if any(key in (pod.get("nodeSelector") or {}) or key in tolerated for key in SPOT_KEYS):
        yield Mistake(
            f"{where}.template",
            "the head may land on a spot node; it holds the study and the drivers, keep it off them",
        )
    yield from _image_mistakes(where, head["template"])


def _gpus(container: Values) -> bool:
    resources = container.get("resources") or {}
    return any("nvidia.com/gpu" in (resources.get(key) or {}) for key in ("limits", "requests"))


def _image_mistakes(where: str, template: Values) -> Iterator[Mistake]:
    # The first container is Ray's; others are sidecars with versions of their own.
    if mistake := image_mistake(
        f"{where}.template.spec.containers.0.image", template["spec"]["containers"][0]["image"]
    ):
        yield mistake


def _job_mistakes(spec: Values, clusters: set[str]) -> Iterator[Mistake]:
    selected = (spec.get("clusterSelector") or {}).get(CLUSTER_LABEL)
    if "rayClusterSpec" in spec:
        yield from _cluster_mistakes("spec.rayClusterSpec", spec["rayClusterSpec"])
    elif not selected:
        yield Mistake(
            "spec.clusterSelector", f"names no cluster; write {CLUSTER_LABEL}: NAME, or give a rayClusterSpec"
        )
    elif clusters and selected not in clusters:
        yield Mistake(
            "spec.clusterSelector", f"there is no RayCluster {selected} in this file, only {', '.join(clusters)}"
        )
    if selected and spec.get("backoffLimit"):
        yield Mistake("spec.backoffLimit", "the operator refuses it together with clusterSelector; drop it")
