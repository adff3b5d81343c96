"""`tuner cluster check`: which kind of cluster file this is, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

from tuner.config import read_yaml_documents
from tuner.errors import ConfigError
from tuner.service.cluster_files.kuberay import KINDS, kuberay_mistakes
from tuner.service.cluster_files.launcher import launcher_mistakes
from tuner.service.cluster_files.mistakes import Mistake


def check_cluster_file(path: Path) -> list[Mistake]:
    """Everything wrong with a file for Ray's cluster launcher or for the KubeRay operator, in the file's order.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is neither of the two kinds.
    """
    documents = [document for document in read_yaml_documents(path) if document is not None]
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ConfigError(f"{path}: is not a cluster file; start from cluster.yaml or one of cluster/")
    if any(document.get("kind") in KINDS for document in documents):
        return kuberay_mistakes(documents)
    if len(documents) > 1 or not documents[0].keys() & {"cluster_name", "provider"}:
        raise ConfigError(f"{path}: is neither a file for `ray up` nor a RayCluster or RayJob; start from cluster.yaml")
    return launcher_mistakes(documents[0])
